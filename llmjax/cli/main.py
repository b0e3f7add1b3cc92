"""The ``llmjax`` command: each verb calls one library function.

Data goes to stdout or the named file, progress and logs to stderr.  Exit codes: 0 fine, 1 the work failed (in part), 2
wrong usage or bad input, 130 interrupted; of ``compare`` and ``diff`` 1 different, 2 all that fails.
"""

import argparse
import contextlib
import io
import logging
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType

import llmjax
from llmjax.cli import batch, bench, checkpoints, generate, loading, lora, oracle
from llmjax.cli.flags import Parser
from llmjax.errors import LlmjaxError, OutputError, TrainingError, printable
from llmjax.outside.interrupts import HANGUP


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    _open_closed()
    # What cannot be read or written as it stands must not end in a traceback.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    words = list(sys.argv[1:] if argv is None else argv)
    code = _run(words)
    if code == 130 and argv is None:  # one more Ctrl-C could only stop Python's own end, which would show a traceback
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code


def _run(words: list[str]) -> int:
    failed, code = 1, 0
    args = argparse.Namespace(command=shlex.join(["llmjax", *words]))
    try:
        with warnings.catch_warnings(), _no_interrupt_lost():
            try:
                _parser().parse_args(words, args)
            finally:
                sys.stdout.flush()  # of --help
            warnings.showwarning = lambda message, *_, **__: _tell(f"warning: {message}")
            _tell_log()
            loading.keep_compiled(args)
            if getattr(args, "verdict", False):
                failed = code = 2  # 1 says that something differs, 0 that nothing does
            code = args.run(args)
            sys.stdout.flush()
            return code
    except (OutputError, TrainingError) as error:
        _tell(str(error))
        return failed
    except LlmjaxError as error:
        _tell(str(error))
        return 2
    except RuntimeError as error:
        if guarded := re.search("Disallowed [a-z-]+ transfer", str(error)):
            _tell(f"JAX_TRANSFER_GUARD: {guarded[0]}; a model cannot do without, so unset it")
        elif str(error).startswith("Unable to initialize backend"):  # JAX's line for what JAX_PLATFORMS says
            _tell(str(error))
        else:
            raise
        return 2
    except KeyboardInterrupt:
        print("llmjax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left: not an error, and nothing more can be told
        _drop_stdout()
        return getattr(args, "code", code)
    except OSError as error:  # a full disk behind stdout, say, which has no name
        _tell(f"{error.filename or 'writing to stdout or a file failed'}: {error.strerror or error}")
        _drop_stdout()
        return failed


def _open_closed() -> None:
    """A stream that is closed would leave its number to the next file that is opened, and what is for stderr would be
    printed to stdout; to a closed stdout no data are lost in silence."""
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, flags)
            if name != "stdin":
                setattr(sys, name, open(number, "w", encoding="utf-8"))


@contextlib.contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """A Ctrl-C that Python drops, in the middle of a destructor or of JAX's part in the collection of garbage, is sent
    once more, and so is one that comes while a module is imported: an extension that is half loaded may print where it
    is, or crash.  One that such a module takes for a fault of its own is a Ctrl-C, too, and the system's request to
    end, by which Python would leave behind what is half written."""
    heard: list[int] = []
    later: threading.Timer | None = None

    def send_again(number: int) -> None:
        nonlocal later
        later = threading.Timer(0.05, os.kill, (os.getpid(), number))
        later.start()

    def handle(number: int, frame: FrameType | None) -> None:
        if _importing(frame):
            return send_again(number)
        heard.append(number)
        raise KeyboardInterrupt(number)

    def hook(ignored: "sys.UnraisableHookArgs") -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            return unraisable(ignored)
        send_again(signal.SIGINT)  # when that is over

    unraisable, sys.unraisablehook = sys.unraisablehook, hook
    # Handlers are the main thread's, and a process that runs in the background may hear none.
    main = threading.current_thread() is threading.main_thread()
    own = {signal.SIGINT: signal.default_int_handler} | dict.fromkeys((signal.SIGTERM, *HANGUP), signal.SIG_DFL)
    before = {number: usual for number, usual in own.items() if main and signal.getsignal(number) is usual}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    except ImportError:
        if heard:
            raise KeyboardInterrupt from None
        raise
    finally:
        if later is not None:
            later.cancel()
        sys.unraisablehook = unraisable
        for number, usual in before.items():
            signal.signal(number, usual)


def _importing(frame: FrameType | None) -> bool:
    """Whether a verb is in the middle of an import."""
    while frame is not None and frame.f_code is not _run.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _tell(message: str) -> None:
    """On stderr, as it is at the time; names from files may be in it."""
    print(f"llmjax: {printable(message)}", file=sys.stderr)


def _drop_stdout() -> None:
    """What could not be written must not be tried once more when Python ends."""
    with contextlib.suppress(io.UnsupportedOperation):  # what stands for it is no file of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _ToStderr(logging.Handler):
    """Wherever stderr leads at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        _tell(record.getMessage())


def _tell_log() -> None:
    """The library's log goes to stderr; importing it alone sets nothing up."""
    for name in ("llmjax", "converters"):
        log = logging.getLogger(name)
        log.setLevel(logging.INFO)
        if not log.handlers:
            log.addHandler(_ToStderr())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="llmjax", description="On-device LLM inference in pure JAX.")
    parser.add_argument("--version", action="version", version=f"llmjax {llmjax.__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for group in (generate, batch, oracle, checkpoints, lora, bench):
        group.add(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
