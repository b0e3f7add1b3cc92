"""The ``llmjax`` command, also as ``python -m llmjax``: what hears a Ctrl-C stands before anything else is imported."""

import contextlib
import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Runs the command line and returns its exit code."""
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a process in the background may hear none
    try:
        if own:
            signal.signal(signal.SIGINT, _leave)
        from llmjax.cli.main import main as run

        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run()
    except KeyboardInterrupt:
        code = _told()
    if code == 130:
        # XLA may still be compiling what nobody waits for any more, and crashes when Python's end takes its client.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # its reader left, or it is closed
                stream.flush()
        os._exit(code)
    return code


def _leave(number: int, frame: FrameType | None) -> None:
    """Nothing has begun, and a module that is half imported need not be told."""
    os._exit(_told())


def _told() -> int:
    os.write(2, b"llmjax: interrupted\n")
    return 130


if __name__ == "__main__":
    sys.exit(main())
