"""Progress of a job on stderr: one line rewritten on a terminal, plain lines now and then elsewhere."""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from llmjax.runtime.progress import Progress
from llmjax.runtime.row import Request

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
      begun: given to the engine.
      prompt_tokens: of those, a prompt's once for each of its samples.
      most_tokens: they may be answered with.
      answered: of those, that have been.
      answer_tokens: of the answered ones.
    """

    total: int | None = None
    done: int = 0
    kept: int = 0
    under_way: int = 0
    begun: int = 0
    prompt_tokens: int = 0
    most_tokens: int = 0
    answered: int = 0
    answer_tokens: int = 0

    def keep(self) -> None:
        """Counts a row that an earlier run had done."""
        self.kept += 1
        self.done += 1

    def begin(self, request: Request) -> None:
        """Counts a row that goes into the engine."""
        self.begun += 1
        self.prompt_tokens += len(request.ids) * request.params.n
        self.most_tokens += (request.params.max_tokens or 0) * request.params.n

    def seconds_left(self, run: dict[str, Any]) -> float:
        """An estimate from the tokens of the rows so far, and of the time that prompts and answers took.

        Args:
          run: see ``Meter.read``.
        """
        to_come = (self.total or 0) - self.done - self.under_way
        prompts = self.prompt_tokens * (1 + to_come / max(self.begun, 1))
        prompts_left = max(prompts - run["prefill_tokens"] - run["reused_tokens"], 0)
        most = self.most_tokens / max(self.begun, 1)
        # Short answers are there first: what the others have so far counts, too, as long as they are without an end.
        mean = min(run["decode_tokens"] / self.answered, most) if self.answered else most
        begun = max(run["decode_tokens"] - self.answer_tokens, 0) / max(self.under_way, 1)
        answers_left = to_come * mean + self.under_way * min(mean, max(most - begun, 0))
        return sum(
            left * run[f"{what}_seconds"] / max(done, 1)
            for what, left, done in (
                ("prefill", prompts_left, run["prefill_tokens"] + run["reused_tokens"]),
                ("decode", answers_left, run["decode_tokens"]),
            )
        )


class Gauge(Protocol):
    """What there is to know of an engine, or of many.

    Attributes:
      progress: running counts.
      compile_seconds: that compiling took.
    """

    progress: Progress
    compile_seconds: float

    @property
    def slots(self) -> int:
        """Rows that are decoded together."""

    def stop(self) -> None:
        """After the step under way."""


class Meter:
    """What an engine has done since this was made."""

    def __init__(self, engine: Gauge):
        self._engine = engine
        self._began, self._compiled = time.monotonic(), engine.compile_seconds
        self._counted = dataclasses.asdict(engine.progress)

    def read(self) -> dict[str, Any]:
        """Seconds, those spent compiling, the engine's counts, and the fraction of slots that were busy."""
        steps, tokens = (self._since(name) for name in ("decode_steps", "decode_tokens"))
        return {
            "seconds": round(time.monotonic() - self._began, 3),
            "compile_seconds": round(self._engine.compile_seconds - self._compiled, 3),
            **{name: int(self._since(name)) for name in ("prefill_tokens", "reused_tokens", "decode_tokens")},
            **{name: round(self._since(name), 3) for name in ("prefill_seconds", "decode_seconds")},
            "busy": round(tokens / max(steps * self._engine.slots, 1), 4),
        }

    def _since(self, name: str) -> float:
        return getattr(self._engine.progress, name) - self._counted[name]


class Reporter:
    """Prints rows done, tokens a second, slots in use and the time left, from a thread: a long row must not keep the
    others' progress from being told, nor their rows from the disk.

    Args:
      engine: its counts are reported from here on.
      count: of rows.
      also: called as often; what it raises is kept for the end.
      seconds: between plain lines; 0 for none.
    """

    def __init__(
        self,
        engine: Gauge,
        count: Count,
        also: Callable[[], None],
        *,
        seconds: float = PLAIN_SECONDS,
    ):
        self._slots, self._meter, self._count, self._also = engine.slots, Meter(engine), count, also
        self._terminal = sys.stderr.isatty()
        self._seconds = min(seconds, TERMINAL_SECONDS) if self._terminal else seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._end.wait(TERMINAL_SECONDS):
            with contextlib.suppress(OSError):  # the next write meets the same, and tells
                self._also()
            if self._seconds and time.monotonic() - last >= self._seconds:
                last = time.monotonic()
                with contextlib.suppress(OSError):  # no one reads it any more
                    sys.stderr.write(f"\r\x1b[K{self.line()}" if self._terminal else f"{self.line()}\n")
                    sys.stderr.flush()

    def line(self) -> str:
        """What there is to tell now."""
        count, run = self._count, self._meter.read()
        text = f"{count.done:,}{f'/{count.total:,}' if count.total is not None else ''} rows"
        for told in rates(run):
            text += f" · {told}"
        text += f" · {min(count.under_way, self._slots)}/{self._slots} slots"
        if count.total is not None and run["prefill_tokens"]:
            left, decodes = count.seconds_left(run), bool(run["decode_tokens"])
            if decodes or round(left):  # when the prompts are done, no answer has told yet how long they take
                text += f" · {'' if decodes else 'over '}{clock(left)} left"
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
            with contextlib.suppress(OSError):  # it may be closed by now, and the job's end is to be a good one
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()


def rate(run: dict[str, Any], what: str) -> float:
    """Tokens a second of ``prefill`` or ``decode``, while the engine was at it.

    Args:
      run: see ``Meter.read``.
      what: of the two.
    """
    return run[f"{what}_tokens"] / max(run[f"{what}_seconds"], 1e-3)


def rates(run: dict[str, Any]) -> list[str]:
    """Both in words, where there were tokens of the kind."""
    return [f"{what} {rate(run, what):,.0f} tok/s" for what in ("prefill", "decode") if run[f"{what}_tokens"]]


def clock(seconds: float) -> str:
    """As a person reads it: ``1:05``, ``2:00:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
