"""What runs in a worker's process: a model, and the rows that a job sends it.

Nothing here knows of Ray, or of files: rows come in as lines, and go out as the lines of the output.
"""

import contextlib
import dataclasses
import io
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llmjax.batch.answering import Answering
from llmjax.batch.index import Written
from llmjax.batch.progress import Count
from llmjax.batch.rows import WHOLE, InputRow, Shard, Work, read_row
from llmjax.errors import LlmjaxError
from llmjax.llm import LLM
from llmjax.runtime.asking import Params

# Between two pieces of a task's rows.
_SECONDS = 0.1


class Sent(NamedTuple):
    """A row on its way to a worker.

    Attributes:
      line: its number.
      text: that line.
      known: what earlier runs wrote that may answer it.
    """

    line: int
    text: str
    known: tuple[Written, ...] = ()


class Greeting(NamedTuple):
    """What a worker says when its model is loaded.

    Attributes:
      node: where it is.
      problem: why there is no model.
      told: what loading it printed.
      identity: everything that fixes its answers.
      slots: of its engine.
    """

    node: str
    problem: str = ""
    told: str = ""
    identity: dict[str, Any] = {}
    slots: int = 0


@dataclasses.dataclass
class Piece:
    """Rows that are done with: what a ``Sink`` is told, to be told again, and how far the engine is.

    Attributes:
      kept: keys and lines.
      done: rows, what is written of them, and lines.
      count: what has been added since the piece before.
      under_way: rows in the engine.
      progress: what has been added since then.
      compile_seconds: likewise.
    """

    kept: list[tuple[bytes, int]]
    done: list[tuple[Written, bytes, int]]
    count: dict[str, int]
    under_way: int
    progress: dict[str, float]
    compile_seconds: float


class Worker:
    """A model, loaded by ``greet``.

    Args:
      load: makes the LLM.
      work: what is done with the rows.
      params: what rows do not set.
    """

    def __init__(self, load: Callable[[], LLM], work: type[Work], params: Params):
        self._load, self._kind, self._params = load, work, params

    def greet(self) -> Greeting:
        """Loads the model, and says what it is, or what is wrong with it, which would be the same if tried again."""
        node, told = socket.gethostname(), io.StringIO()
        try:
            with contextlib.redirect_stderr(told):
                self._work = self._kind(self._load(), self._params)
                self._engine = self._work.llm.engine
                return Greeting(node, "", told.getvalue(), self.identity(WHOLE, ""), self._engine.slots)
        except LlmjaxError as error:
            return Greeting(node, str(error))

    def identity(self, shard: Shard, date: str) -> dict[str, Any]:
        """See ``Work``."""
        return self._work.identity(shard, date)

    def answer(self, rows: list[Sent], date: str, retry_errors: bool) -> Iterator[Piece]:
        """Does rows that are new, each with an id of its own; gives them back as they are done."""
        meter, out = _Meter(self._work), _Collected(rows)

        def asked(wait: Callable[[], bool]) -> Iterator[InputRow | None]:
            return (read_row(row.line, row.text, self._work, _ANY, WHOLE, date) for row in rows)

        last = time.monotonic()
        for _ in Answering(self._work, out, meter.count, retry_errors, lambda: False).run(asked):
            if time.monotonic() - last >= _SECONDS:
                yield meter.piece(out)
                last = time.monotonic()
        yield meter.piece(out)


class _AnyIds:
    """The job has seen to it that ids differ."""

    def is_new(self, row_id: str) -> bool:
        return True


_ANY = _AnyIds()


class _Collected:
    """The ``Sink`` of a task."""

    def __init__(self, rows: list[Sent]):
        self._known = {written.key: written for row in rows for written in row.known}
        self.kept: list[tuple[bytes, int]] = []
        self.done: list[tuple[Written, bytes, int]] = []

    def known(self, key: bytes) -> Written | None:
        return self._known.get(key)

    def keep(self, key: bytes, line: int) -> None:
        self.kept.append((key, line))

    def append(self, row: Written, text: bytes, line: int) -> None:
        self.done.append((row, text, line))


class _Meter:
    """What has been added to the counts of rows and of the engine since they were last told."""

    def __init__(self, work: Work):
        self.count, self._engine = Count(), work.llm.engine
        self._told: dict[str, float] = {}
        self._added("", dataclasses.asdict(self._engine.progress), self._engine.compile_seconds)

    def piece(self, out: _Collected) -> Piece:
        """What is new, which ``out`` then no longer has."""
        kept, done, out.kept, out.done = out.kept, out.done, [], []
        rows = {n: v for n, v in dataclasses.asdict(self.count).items() if n not in ("total", "under_way")}
        count = self._added("rows", rows)
        progress = self._added("", dataclasses.asdict(self._engine.progress), self._engine.compile_seconds)
        compiled = progress.pop("compile_seconds")
        return Piece(kept, done, {n: int(v) for n, v in count.items()}, self.count.under_way, progress, compiled)

    def _added(self, what: str, values: dict[str, float], compiled: float | None = None) -> dict[str, float]:
        if compiled is not None:
            values["compile_seconds"] = compiled
        added = {name: value - self._told.get(f"{what}.{name}", 0) for name, value in values.items()}
        self._told |= {f"{what}.{name}": value for name, value in values.items()}
        return added
