"""Rows through an LLM, in the job's own process or in a worker's: what is done already, what cannot run, what fails."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from llmjax.batch.index import Index, Written
from llmjax.batch.progress import Count, Gauge
from llmjax.batch.reading import AnyLines
from llmjax.batch.rows import InputRow, Shard, Work, read_rows, row_error
from llmjax.errors import CheckpointError, RequestError
from llmjax.runtime.params import SamplingParams
from llmjax.runtime.row import Request, Requests

# The rows of an input, given whether the one that asks would wait for the next; None where there is none at the moment.
Rows = Callable[[Callable[[], bool]], Iterator[InputRow | None]]


class Sink(Protocol):
    """Where rows that are done with go."""

    def known(self, key: bytes) -> Written | None:
        """What an earlier run wrote for a row."""

    def keep(self, key: bytes, line: int) -> None:
        """That answers this line."""

    def append(self, row: Written, text: bytes, line: int) -> None:
        """A new row of the output does."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What a job asks of those who answer its rows.

    Attributes:
      lines: of the input.
      index: remembers the ids.
      sink: where rows go.
      count: of rows, kept up to date.
      shard: which rows.
      date: what chat templates take for the present.
      retry_errors: run rows again that failed when they ran.
      stopped: whether to leave the rest.
    """

    lines: AnyLines
    index: Index
    sink: Sink
    count: Count
    shard: Shard
    date: str
    retry_errors: bool
    stopped: Callable[[], bool]


class Runner(Protocol):
    """Who answers the rows of a job.

    Attributes:
      work: what is done with the rows.
      engine: its counts, and what stops it.
    """

    work: type[Work]

    @property
    def engine(self) -> Gauge: ...

    def identity(self, shard: Shard, date: str) -> dict[str, Any]:
        """See ``Work``."""

    def answer(self, task: Task) -> None:
        """Does all rows, or those until it is to stop."""


class Here:
    """This process.

    Args:
      work: with its LLM.
    """

    def __init__(self, work: Work):
        self.work, self.engine, self.identity = type(work), work.llm.engine, work.identity
        self._work = work

    def answer(self, task: Task) -> None:
        """See ``Runner``."""

        def rows(wait: Callable[[], bool]) -> Iterator[InputRow | None]:
            return read_rows(task.lines.arriving(wait), self._work, task.index, task.shard, task.date)

        for _ in Answering(self._work, task.sink, task.count, task.retry_errors, task.stopped).run(rows):
            pass


class Answering:
    """One way of rows through an engine.

    Args:
      work: what is done with them, and with which LLM.
      sink: where they go.
      count: kept up to date.
      retry_errors: run rows again that failed when they ran.
      stopped: whether to leave the rest.
    """

    def __init__(self, work: Work, sink: Sink, count: Count, retry_errors: bool, stopped: Callable[[], bool]):
        self._work, self._llm, self._sink, self._count = work, work.llm, sink, count
        self._retry_errors, self._stopped = retry_errors, stopped
        self._waiting: dict[str, InputRow] = {}  # rows that the engine has
        self._ended: Exception | None = None  # why the input was not read to its end
        self._sound = False  # the engine has answered something, so a row without numbers is to blame itself

    def run(self, rows: Rows) -> Iterator[None]:
        """Does them; yields whenever one is done.

        Raises:
          RequestError: the input cannot be read on; the rows before are done.
        """
        requests = self._requests(rows)
        while True:
            try:
                yield from self._run(requests)
                break
            except _RunEnded as ended:
                yield from self._one_by_one(ended.error)
        if self._ended is not None:
            raise self._ended
        assert not self._waiting or self._stopped(), "the engine ended without these rows"

    def _run(self, requests: Requests) -> Iterator[None]:
        with contextlib.closing(self._work.outputs(requests)) as outputs:
            while (output := _next(outputs)) is not None:
                row = self._waiting[output.request_id]
                if isinstance(output.error, CheckpointError) and not self._sound:
                    raise _RunEnded(output.error)
                del self._waiting[output.request_id]
                self._sound |= output.error is None
                if output.error is not None:
                    self._append(row._replace(error=output.error).failure(), row.line)
                else:
                    self._count.answered += 1
                    self._count.answer_tokens += sum(len(c.token_ids) for c in output.outputs)
                    try:
                        answer = row.answer(output, self._llm)
                    except BaseException as error:
                        answer = row._replace(error=row_error(error)).failure()
                    self._append(answer, row.line)
                yield

    def _one_by_one(self, error: BaseException) -> Iterator[None]:
        """After a row made the engine fail (numbers that overflow, say): runs those that were under way alone, to tell
        which.

        Raises:
          BaseException: ``error``, where the engine answers nothing any more, so that it is not the row.
        """
        failed = []
        rows = list(self._waiting.values())
        for row in rows:
            try:
                yield from self._run(r for r in [row.request] if r is not None and not self._stopped())
            except _RunEnded as again:
                failed.append(row._replace(error=row_error(again.error)))
        if self._stopped():
            return
        if not rows or (len(failed) == len(rows) and not self._is_sound()):
            raise error
        self._sound = True
        for row in failed:
            del self._waiting[str(row.row_id)]
            self._append(row.failure(), row.line)
            yield

    def _is_sound(self) -> bool:
        """Whether the engine answers the shortest of prompts."""
        tokenizer = self._llm.model.tokenizer
        prompt = [(tokenizer and tokenizer.bos_id) or 0]
        try:
            probe = self._llm.request(prompt, SamplingParams(max_tokens=1), request_id="probe")
            return all(output.error is None for output in self._llm.outputs([probe]))
        except Exception:
            return False

    def _requests(self, rows: Rows) -> Iterator[Request | None]:
        """The rows that are to be run; on the way, those that need not or cannot be are done with.

        What goes wrong in between is no fault of the engine that asks for them: ``_ended`` keeps it.
        """
        try:
            yield from self._rows_to_run(rows)
        except RequestError as error:  # of an input that cannot be read on, the rows under way are answered
            self._ended = error
        except Exception as error:
            self._ended = error
            self._llm.engine.stop()

    def _rows_to_run(self, rows: Rows) -> Iterator[Request | None]:
        for row in rows(lambda: not self._waiting and not self._stopped()):
            if self._stopped():
                return
            if row is None:
                yield None
            elif is_done(row, self._sink, self._retry_errors):
                self._sink.keep(row.key, row.line)
                self._count.keep()
            elif row.request is None:
                if self._work.in_order and self._waiting:
                    yield None  # those before it are done with first
                self._append(row.failure(), row.line)
            else:
                self._waiting[row.request.request_id] = row
                self._count.under_way = len(self._waiting)
                self._count.begin(row.request)
                yield row.request

    def _append(self, answer: tuple[Written, bytes], line: int) -> None:
        self._sink.append(*answer, line)
        self._count.done += 1
        self._count.under_way = len(self._waiting)


def is_done(row: InputRow, sink: Sink, retry_errors: bool) -> bool:
    """Whether an earlier run's row answers this one."""
    known = sink.known(row.key)
    if known is None or known.content != row.content:
        return False
    return not (known.failed and row.request is not None and retry_errors)


class _RunEnded(Exception):
    """The engine failed: ``error`` says how."""

    def __init__(self, error: BaseException):
        self.error = error


def _next(outputs: Iterator[Any]) -> Any:
    """The next answer of the engine, None after the last.

    Raises:
      _RunEnded: it failed.
    """
    try:
        return next(outputs, None)
    except BaseException as error:
        row_error(error)
        raise _RunEnded(error) from error
