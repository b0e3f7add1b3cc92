"""The workers of a job on a Ray cluster: each holds a model, all answer rows, and any of them may die.

The job's process owns everything that lasts: it reads the input, sees to ids, writes the output and resumes, with the
code of a job on one machine.  Workers get rows as lines and give them back as lines of the output, made by the
same code, too; a row's bits do not hang on its neighbours, so neither do they on which worker had it.  Rows count when
they have come back and are written: those of a worker that died are sent again.
"""

import collections
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

from llmjax import __version__
from llmjax.batch.answering import Task, is_done
from llmjax.batch.cluster import Cluster, last_line, room
from llmjax.batch.identity import without_path
from llmjax.batch.rows import InputRow, Shard, Work, read_rows, row_key
from llmjax.batch.worker import Greeting, Piece, Sent, Worker
from llmjax.checkpoint.identity import differences
from llmjax.errors import OutputError, RequestError
from llmjax.llm import LLM
from llmjax.runtime.asking import Params
from llmjax.runtime.params import SamplingParams
from llmjax.runtime.progress import Progress
from llmjax.runtime.row import Request
from llmjax.text.dates import Date

# Between two looks whether the job was told to stop.
_SECONDS = 0.2
# A task's rows are the most of what a worker has: so many for each of its slots, so many bytes.
_ROWS, _BYTES = 64, 8 << 20
# Deaths with no row done in between that end a job, at least.
_DEATHS = 10
# A row that was alone in a worker when it died, and among those that may have been at fault so often, has failed.
_SUSPECTED = 3


@dataclasses.dataclass
class _Row:
    row: InputRow
    deaths: int = 0  # of workers that may have had it under way


@dataclasses.dataclass
class _Member:
    """A worker, seen from here.

    Attributes:
      actor: Ray's.
      pending: what is awaited of it: its greeting, or the pieces of its task.
      greeting: None until it has come.
      rows: of the task, those that are not back, in order.
      under_way: rows in its engine.
    """

    actor: Any
    pending: Any
    greeting: Greeting | None = None
    rows: dict[int, _Row] = dataclasses.field(default_factory=dict)
    under_way: int = 0


class Fleet:
    """The ``Runner`` of a job whose rows are answered on a cluster, and the ``Gauge`` of all engines together: seconds
    and steps are those of a worker, on the average.

    Args:
      ray: connected.
      cluster: what for.
      load: makes the LLM of a worker, there.
      work: what is done with the rows.
      params: what rows do not set.
    """

    def __init__(self, ray: Any, cluster: Cluster, load: Callable[[], LLM], work: type[Work], params: Params):
        self.work, self.progress, self.compile_seconds = work, Progress(0), 0.0
        self._ray = ray
        count, has = room(ray, cluster)
        # Spread over machines: on a CPU, a worker uses all of one.
        self._actor = ray.remote(Worker).options(
            num_cpus=has["CPU"], num_gpus=has["GPU"], max_restarts=0, scheduling_strategy="SPREAD"
        )
        self._make = load, work, params
        self._retry: collections.deque[_Row] = collections.deque()
        self._gathered: list[_Row] = []  # for the next task
        self._deaths = 0  # since a row was done
        self._ended: RequestError | None = None  # why the input was not read to its end
        self._first: Greeting | None = None
        self._members = [self._hired() for _ in range(count)]
        while self._first is None:
            if not self._listen(10.0):
                _say(f"waiting for the first of {count} workers")

    @property
    def engine(self) -> "Fleet":
        """See ``Runner``."""
        return self

    @property
    def slots(self) -> int:
        """Of all that are there."""
        return sum(member.greeting.slots for member in self._members if member.greeting)

    def stop(self) -> None:
        """See ``Gauge``: ``answer`` looks for itself."""

    def identity(self, shard: Shard, date: str) -> dict[str, Any]:
        """See ``Runner``."""
        while True:
            for member in self._members:
                if member.greeting is not None:
                    try:
                        return self._ray.get(member.actor.identity.remote(shard, date))
                    except self._ray.exceptions.RayError as error:
                        self._lost(member, error)
            self._listen(_SECONDS)

    def answer(self, task: Task) -> None:
        """See ``Runner``."""
        self._task, self._more, self._ended = task, True, None
        later: Any = _Later(self.work)
        arriving = task.lines.arriving(lambda: not self._busy() and not task.stopped())
        self._rows = read_rows(arriving, later, task.index, task.shard, task.date)
        while not task.stopped():
            self._feed()
            if not (self._more or self._busy()):
                break
            self._listen(_SECONDS)
        if self._ended is not None:
            raise self._ended

    def _busy(self) -> bool:
        return bool(self._retry or self._gathered) or any(member.rows for member in self._members)

    def _feed(self) -> None:
        for member in self._members:
            if member.pending is None and not self._task.stopped() and (rows := self._next_rows(member)):
                member.rows, self._gathered = {row.row.line: row for row in rows}, []
                sent = [self._sent(row.row) for row in rows]
                answer = member.actor.answer.options(num_returns="streaming")
                member.pending = answer.remote(sent, self._task.date, self._task.retry_errors)
        self._task.count.under_way = sum(member.under_way for member in self._members)

    def _sent(self, row: InputRow) -> Sent:
        known = (self._task.sink.known(row_key(name)) for name in (str(row.row_id), row.line))
        return Sent(row.line, row.text, tuple(written for written in known if written is not None))

    def _next_rows(self, member: _Member) -> list[_Row]:
        """What a worker is to do next: rows of the dead first."""
        assert member.greeting is not None
        slots, rows, nbytes = member.greeting.slots, self._gathered, 0
        if self._retry:
            deaths = self._retry[0].deaths
            size = max(1, 2 * slots // 4**deaths) if deaths else _ROWS * slots
            while self._retry and len(rows) < size and self._retry[0].deaths == deaths:
                rows.append(self._retry.popleft())
            return rows
        # Towards the end fewer at a time, so that all come to it together.
        total, done = self._task.count.total, self._task.count.done + sum(len(m.rows) for m in self._members)
        share = _ROWS * slots if total is None else (total - done) // (2 * len(self._members))
        for row in self._new_rows():
            rows.append(_Row(row))
            nbytes += len(row.text)
            if len(rows) >= min(max(share, slots), _ROWS * slots) or nbytes >= _BYTES:
                break
        return rows

    def _new_rows(self) -> Iterator[InputRow]:
        """The next rows of the input that need a model, up to the end, or to where there is none at the moment."""
        task = self._task
        try:
            while self._more and not task.stopped():
                row = next(self._rows)
                if row is None:
                    return
                if row.request is not None:
                    yield row
                elif is_done(row, task.sink, task.retry_errors):
                    task.sink.keep(row.key, row.line)
                    task.count.keep()
                else:
                    self._append(row)
        except StopIteration:
            self._more = False
        except RequestError as error:  # of an input that cannot be read on, the rows under way are answered
            self._more, self._ended = False, error

    def _append(self, row: InputRow) -> None:
        self._task.sink.append(*row.failure(), row.line)
        self._task.count.done += 1

    def _listen(self, seconds: float) -> bool:
        """Takes what a worker says, if one says something in this time."""
        pending = {member.pending: member for member in self._members if member.pending is not None}
        ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=seconds)
        for said in ready:
            member = pending[said]
            try:
                if member.greeting is None:
                    self._greeted(member, self._ray.get(said))
                else:
                    self._take(member, self._ray.get(next(said)))
            except StopIteration:
                member.pending, member.under_way = None, 0
                if member.rows:
                    self._lost(member, OutputError("rows did not come back"))
            except self._ray.exceptions.RayError as error:
                self._lost(member, error)
        return bool(ready)

    def _greeted(self, member: _Member, greeting: Greeting) -> None:
        if greeting.problem:
            raise RequestError(f"the worker on {greeting.node} cannot begin: {greeting.problem}")
        mine, theirs = __version__, greeting.identity["runtime_version"]
        if mine != theirs:
            raise RequestError(
                f"the worker on {greeting.node} has llmjax {theirs}, and this process {mine}; "
                "install the same on every machine"
            )
        if self._first is None:
            self._first = greeting
            _say(f"workers, {len(self._members)} in all, are as the first one, on {greeting.node}:", greeting.told)
        elif changed := list(differences(without_path(self._first.identity), without_path(greeting.identity))):
            first, other = self._first.node, greeting.node
            raise RequestError(
                "\n  ".join([f"workers on {first} (was) and {other} (now) would not give the same bits:", *changed])
            )
        member.greeting, member.pending = greeting, None

    def _take(self, member: _Member, piece: Piece) -> None:
        count, share = self._task.count, 1 / max(1, sum(1 for m in self._members if m.greeting))
        for key, line in piece.kept:
            self._task.sink.keep(key, line)
            del member.rows[line]
        for written, text, line in piece.done:
            self._task.sink.append(written, text, line)
            del member.rows[line]
        for name, more in piece.count.items():
            setattr(count, name, getattr(count, name) + more)
        for name, added in piece.progress.items():
            shared = share if name.endswith(("_seconds", "_steps")) else 1
            setattr(self.progress, name, getattr(self.progress, name) + added * shared)
        self.compile_seconds += piece.compile_seconds * share
        member.under_way = piece.under_way
        if piece.kept or piece.done:
            self._deaths = 0

    def _lost(self, member: _Member, error: Exception) -> None:
        """A worker died, or will answer nothing any more: its rows go to others, and another takes its place."""
        rows, slots = list(member.rows.values()), member.greeting.slots if member.greeting else 0
        self._deaths += 1
        if self._deaths >= max(_DEATHS, 2 * len(self._members)):
            raise OutputError(
                f"workers died {self._deaths} times with no row done in between, the last one so: {last_line(error)}; "
                "what is done stays, and the same command goes on from there"
            )
        where = f" on {member.greeting.node}" if member.greeting else ""
        _say(f"a worker{where} died, {len(rows)} rows go to others: {last_line(error)}")
        if len(rows) == 1 and rows[0].deaths >= _SUSPECTED:
            failure = f"the worker died each of {rows[0].deaths + 1} times: {last_line(error)}"
            self._append(rows.pop().row._replace(error=OutputError(failure)))
        for row in rows[: 2 * slots]:  # an engine takes rows in order
            row.deaths += 1
        self._retry.extendleft(reversed(rows))
        self._ray.kill(member.actor)
        self._members[self._members.index(member)] = self._hired()

    def _hired(self) -> _Member:
        actor = self._actor.remote(*self._make)
        return _Member(actor, actor.greet.remote())


class _Later:
    """``Work`` as far as it can be done without a model: what a row is, and which."""

    def __init__(self, work: type[Work]):
        self.form = work.form

    def request(self, question: Any, row_id: str, date: Date | None) -> Request:
        """Stands for one that a worker will make."""
        return Request(row_id, None, [], SamplingParams(), 0)


def _say(text: str, more: str = "") -> None:
    print(f"llmjax: ray: {text}", *more.splitlines(), sep="\n", file=sys.stderr, flush=True)
