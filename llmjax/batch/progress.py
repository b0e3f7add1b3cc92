"""Progress of a job on stderr: one line rewritten on a terminal, plain lines now and then elsewhere."""

import dataclasses
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any

from llmjax.runtime.engine import Engine

# A log file wants few lines, a person wants motion.
PLAIN_SECONDS = 10.0
TERMINAL_SECONDS = 0.2


@dataclasses.dataclass
class Count:
    """Rows of a job so far.

    Attributes:
      total: of the input, None where unknown.
      done: answered or failed, kept ones included.
      kept: done by an earlier run.
      under_way: in the engine.
    """

    total: int | None = None
    done: int = 0
    kept: int = 0
    under_way: int = 0


class Meter:
    """What an engine has done since this was made."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._began, self._compiled = time.monotonic(), engine.compile_seconds
        self._counted = dataclasses.asdict(engine.progress)

    def read(self) -> dict[str, Any]:
        """Seconds, those spent compiling, the engine's counts, and the fraction of slots that were busy."""
        steps, tokens = (self._since(name) for name in ("decode_steps", "decode_tokens"))
        return {
            "seconds": round(time.monotonic() - self._began, 3),
            "compile_seconds": round(self._engine.compile_seconds - self._compiled, 3),
            **{name: self._since(name) for name in ("prefill_tokens", "reused_tokens", "decode_tokens")},
            "busy": round(tokens / max(steps * self._engine.slots, 1), 4),
        }

    def _since(self, name: str) -> int:
        return getattr(self._engine.progress, name) - self._counted[name]


class Reporter:
    """Prints rows done, tokens a second, slots in use and the time left, from a thread: a long row must not keep the
    others' progress from being told, nor their rows from the disk.

    Args:
      engine: its counts are reported from here on.
      count: of rows.
      also: called as often; what it raises is kept for the end.
      seconds: between plain lines; 0 for none.
      stream: stderr by default.
    """

    def __init__(
        self,
        engine: Engine,
        count: Count,
        also: Callable[[], None],
        *,
        seconds: float = PLAIN_SECONDS,
        stream: IO[str] | None = None,
    ):
        self._slots, self._meter, self._count, self._also = engine.slots, Meter(engine), count, also
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._seconds = min(seconds, TERMINAL_SECONDS) if self._terminal else seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._end.wait(TERMINAL_SECONDS):
            try:
                self._also()
            except OSError:
                return  # the next write meets the same, and tells
            if self._seconds and time.monotonic() - last >= self._seconds:
                last = time.monotonic()
                self._stream.write(f"\r\x1b[K{self.line()}" if self._terminal else f"{self.line()}\n")
                self._stream.flush()

    def line(self) -> str:
        """What there is to tell now."""
        count, run = self._count, self._meter.read()
        seconds = max(run["seconds"] - run["compile_seconds"], 1e-3)
        text = f"{count.done:,}{f'/{count.total:,}' if count.total is not None else ''} rows"
        text += f" · prefill {run['prefill_tokens'] / seconds:,.0f} tok/s"
        text += f" · decode {run['decode_tokens'] / seconds:,.0f} tok/s"
        text += f" · {min(count.under_way, self._slots)}/{self._slots} slots"
        new = count.done - count.kept
        if count.total is not None and new:
            text += f" · {clock(seconds / new * (count.total - count.done))} left"
        return text

    def __enter__(self) -> "Reporter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def clock(seconds: float) -> str:
    """As a person reads it: ``1:05``, ``2:00:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
