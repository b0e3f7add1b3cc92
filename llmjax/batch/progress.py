"""Progress of a job on stderr: one line rewritten on a terminal, plain lines now and then elsewhere."""

import sys
import time
from typing import IO

from llmjax.runtime.engine import Progress

# A log file wants few lines, a person wants motion.
PLAIN_SECONDS = 10.0
TERMINAL_SECONDS = 0.2


class Reporter:
    """Prints rows done, tokens a second and the time left."""

    def __init__(self, stream: IO[str] | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._began = self._last = time.monotonic()

    def update(self, rows: int, total: int | None, progress: Progress) -> None:
        """Prints if it is time to.

        Args:
          rows: done, failed ones included.
          total: of the job, None where unknown.
          progress: the engine's counts.
        """
        now = time.monotonic()
        if now - self._last < (TERMINAL_SECONDS if self._terminal else PLAIN_SECONDS):
            return
        self._last = now
        seconds = now - self._began
        of = f"/{total}" if total else ""
        line = (
            f"{rows}{of} rows · prefill {progress.prefill_tokens / seconds:,.0f} tok/s"
            f" · decode {progress.decode_tokens / seconds:,.0f} tok/s"
        )
        if total and rows:
            line += f" · {_clock(seconds / rows * (total - rows))} left"
        self._stream.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the line a terminal shows."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
