"""Ctrl-C in the command line: heard wherever it comes, one line, exit code 130."""

import gc
import logging
import os
import signal
import sys
import time

import pytest

from llmjax.cli import checkpoints
from llmjax.cli.main import main


def wait() -> None:
    for _ in range(500):
        time.sleep(0.01)


def in_a_destructor() -> None:
    """Where Python drops what is raised."""

    def interrupt(phase, info):
        gc.callbacks.remove(interrupt)
        os.kill(os.getpid(), signal.SIGINT)

    gc.callbacks.append(interrupt)
    gc.collect()
    wait()


def in_a_module() -> None:
    """As an extension that is being loaded says it."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        wait()
    except KeyboardInterrupt:
        raise ImportError("encountered an error while initializing the extension") from None


def by_the_system() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    wait()


@pytest.mark.parametrize("interrupt", [in_a_destructor, in_a_module, by_the_system])
def test_none_is_lost(monkeypatch, capsys, interrupt):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    monkeypatch.setattr(checkpoints, "_inspect", lambda args: interrupt())
    try:
        assert main(["inspect", "x"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "llmjax: interrupted\n"


@pytest.mark.parametrize("end", [in_a_destructor, lambda: 130])  # the latter as a job ends
def test_when_the_process_ends_one_more_is_not_heard(monkeypatch, end):
    """It would show where Python was in its own end."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(checkpoints, "_inspect", lambda args: end())
    monkeypatch.setattr(sys, "argv", ["llmjax", "inspect", "x"])
    try:
        assert main() == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_the_writers_say_has_our_name(monkeypatch, capsys):
    monkeypatch.setattr(
        checkpoints, "_inspect", lambda args: logging.getLogger("converters.x").warning("a\x1b[2J") or 0
    )
    assert main(["inspect", "x"]) == 0
    assert capsys.readouterr().err == "llmjax: a\\x1b[2J\n"


def test_a_module_that_is_missing_is_no_interrupt(monkeypatch):
    def missing(args):
        raise ImportError("x")

    monkeypatch.setattr(checkpoints, "_inspect", missing)
    with pytest.raises(ImportError, match="^x$"):
        main(["inspect", "x"])
