"""Ctrl-C in the command line: heard wherever it comes, one line, exit code 130."""

import gc
import os
import signal
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


@pytest.mark.parametrize("interrupt", [in_a_destructor, in_a_module])
def test_none_is_lost(monkeypatch, capsys, interrupt):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    monkeypatch.setattr(checkpoints, "_inspect", lambda args: interrupt())
    try:
        assert main(["inspect", "x"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "llmjax: interrupted\n"


def test_a_module_that_is_missing_is_no_interrupt(monkeypatch):
    def missing(args):
        raise ImportError("x")

    monkeypatch.setattr(checkpoints, "_inspect", missing)
    with pytest.raises(ImportError, match="^x$"):
        main(["inspect", "x"])
