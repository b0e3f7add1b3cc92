"""Ctrl-C in the command line: heard wherever it comes, one line, exit code 130."""

import gc
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def in_an_import() -> None:
    """An extension that is half loaded may crash: it is let be."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        kill = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\n"
        Path(folder, "half_loaded.py").write_text(kill)
        try:
            import half_loaded  # noqa: F401
        except KeyboardInterrupt:
            pytest.fail("interrupted while it was loaded")
    wait()


def by_the_system() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    wait()


def by_a_terminal() -> None:
    os.kill(os.getpid(), signal.SIGHUP)
    wait()


@pytest.mark.parametrize("interrupt", [in_a_destructor, in_a_module, in_an_import, by_the_system, by_a_terminal])
@pytest.mark.usefixtures("in_a_terminal")
def test_none_is_lost(monkeypatch, capsys, interrupt):
    monkeypatch.setattr(checkpoints, "_inspect", lambda args: interrupt())
    assert main(["inspect", "x"]) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert capsys.readouterr().err == "llmjax: interrupted\n"


@pytest.mark.parametrize("end", [in_a_destructor, lambda: 130])  # the latter as a job ends
@pytest.mark.usefixtures("in_a_terminal")
def test_when_the_process_ends_one_more_is_not_heard(monkeypatch, end):
    """It would show where Python was in its own end."""
    monkeypatch.setattr(checkpoints, "_inspect", lambda args: end())
    monkeypatch.setattr(sys, "argv", ["llmjax", "inspect", "x"])
    assert main() == 130
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


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


def test_one_that_comes_before_the_command_is_loaded():
    code = (
        "import os, signal, sys\nfrom llmjax.__main__ import main\n"
        "class Interrupts:\n    find_spec = staticmethod(lambda *_: os.kill(os.getpid(), signal.SIGINT))\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Interrupts)\nsys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code, "inspect", "x"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "llmjax: interrupted\n")


def test_one_that_comes_while_a_program_is_compiled():
    """XLA goes on compiling in a thread of its own, while the process ends."""
    code = (
        "import os, signal, sys, threading\nimport jax, jax.numpy as jnp\nfrom llmjax.cli import checkpoints\n"
        "from llmjax.__main__ import main\n"
        "def long(x):\n    for i in range(400):\n        x = jnp.sin(x @ x + i)\n    return x\n"
        "def compile(args):\n    print('begun')\n    lowered = jax.jit(long).lower(jnp.ones((8, 8)))\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n    lowered.compile()\n"
        "checkpoints._inspect = compile\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nsys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code, "inspect", "x"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "begun\n", "llmjax: interrupted\n")
