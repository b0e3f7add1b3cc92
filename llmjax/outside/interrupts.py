"""Ctrl-C in a job or a training run: the first asks it to stop, the second stops it."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# The terminal is closed, or the connection to it lost; there is none on Windows.
HANGUP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *HANGUP)


class Interrupts:
    """While entered, SIGINT, SIGTERM and SIGHUP (but under ``nohup``) call ``stop`` first and raise KeyboardInterrupt
    from then on.

    Python's handlers wait until the program under way returns, be that minutes; a thread that the system tells of the
    signal says at once that it was heard.

    Attributes:
      asked: whether a signal came.
    """

    def __init__(self, stop: Callable[[], None] = lambda: None):
        self.asked = False
        self._stop = stop
        self._before: dict[int, Any] = {}
        self._heard = self._handled = 0

    def _listen(self, read: int) -> None:
        with open(read, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] in _SIGNALS:
                    self._heard += 1
                    self._ask()
                    if self._heard == 1:
                        _say("stopping after the step under way; what is done stays; once more stops at once")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._handled += 1
        if max(self._handled, self._heard) > 1:  # two that come close together are handled once
            raise KeyboardInterrupt
        self._ask()

    def _ask(self) -> None:
        self.asked = True
        self._stop()

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            for number in _SIGNALS:
                if number in HANGUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._handle)
            self._thread = threading.Thread(target=self._listen, args=(read,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._write)
            self._thread.join()


def _say(text: str) -> None:
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    with contextlib.suppress(OSError):
        print(f"{clear}llmjax: {text}", file=sys.stderr, flush=True)
