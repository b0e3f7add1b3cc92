"""Runs a JSONL of prompts through an ``LLM``: what is done stays done, whatever ends it."""

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from llmjax.batch import manifest as manifests
from llmjax.batch import tables
from llmjax.batch.files import claimed, send
from llmjax.batch.index import Index, Totals, Written
from llmjax.batch.interrupts import Interrupts
from llmjax.batch.journal import SYNC_SECONDS, Journal
from llmjax.batch.manifest import Manifest
from llmjax.batch.progress import PLAIN_SECONDS, Count, Meter, Reporter, rates
from llmjax.batch.reading import AnyLines, open_lines
from llmjax.batch.rows import (
    WHOLE,
    Generating,
    InputRow,
    Shard,
    Work,
    count_rows,
    describe,
    named,
    read_rows,
    row_error,
)
from llmjax.errors import RequestError, ResumeError
from llmjax.llm import LLM
from llmjax.runtime.asking import Params
from llmjax.runtime.params import SamplingParams
from llmjax.runtime.row import Request, Requests
from llmjax.text.dates import Date, settled

# Rows that failed are many or few; so many are named.
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Options:
    """How a job goes about it.

    Attributes:
      ordered: leave the output in the order of the input; otherwise rows stay in the order they were finished in.
      shard: which rows to do.
      retry_errors: run rows again that failed when they ran.
      force: start over, whatever the output holds.
      progress_seconds: between lines of progress where stderr is no terminal; 0 for none.
      date: what chat templates take for the present; None for the time the job began, which the manifest keeps.
      columns: of an input that is a table, by key of a row the column it is in, where that has another name.
    """

    ordered: bool = False
    shard: Shard = WHOLE
    retry_errors: bool = False
    force: bool = False
    progress_seconds: float = PLAIN_SECONDS
    date: Date | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        settled(self.date)
        if not self.progress_seconds >= 0:
            raise RequestError(f"progress_seconds: expected a number from 0, found {self.progress_seconds}")


@dataclasses.dataclass
class Summary:
    """What a job did.

    Attributes:
      status: ``complete``, ``interrupted`` or ``failed``.
      totals: of the output.
      kept: rows that an earlier run had done.
      problem: why it failed.
      removed: rows of the output did not belong to the input any more.
      failures: of the rows that failed the first ones, a line each.
      results: of all rows together, as the manifest has them.
      run: seconds and counts of this run, as the manifest has them.
    """

    status: str = "running"
    totals: Totals = Totals(0, 0, 0, 0)
    kept: int = 0
    problem: str = ""
    removed: bool = False
    failures: list[str] = dataclasses.field(default_factory=list)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: dict[str, Any] = dataclasses.field(default_factory=dict)

    def describe(self, what: str = "answered") -> str:
        """One line; ``what`` says what became of the rows that did not fail."""
        run, (rows, failed, prompt, completion) = self.run, self.totals
        generate = max(run["seconds"] - run["compile_seconds"], 0.0)
        kept = f" ({self.kept} of them earlier)" if self.kept else ""
        tokens = f"{prompt} prompt tokens" if not completion else f"{prompt} prompt and {completion} answer tokens"
        speeds = rates(run)
        if run["decode_tokens"]:
            speeds[-1] += f" in {run['busy']:.0%} of the slots"
        parts = [f"{rows - failed} rows {what}, {failed} failed{kept}", tokens, ", ".join(speeds)]
        parts.append(
            f"load {run['load_seconds']:.1f} s, compile {run['compile_seconds']:.1f} s, generate {generate:.1f} s"
        )
        return "; ".join(filter(None, parts))


def run(
    load: Callable[[], LLM],
    source: str,
    output: str,
    params: Params = None,
    options: Options = Options(),
    about: dict[str, Any] | None = None,
    work: type[Work] = Generating,
) -> Summary:
    """Runs every row that the output does not answer yet; a row that fails is reported in its own output row.

    Args:
      load: makes the LLM; called when the files are known to be in order.
      source: path of the input, ``-`` for stdin.
      output: path of the output, ``-`` for stdout; what is no regular file cannot be resumed.  A table
        (``llmjax.batch.tables``) is written when all rows are done, in the order of the input.
      params: what rows do not set, see ``LLM.sampling_params``.
      options: see there.
      about: noted in the manifest.
      work: what is done with the rows.

    Raises:
      RequestError: the input cannot be read or the output not be written to.
      ResumeError: the output belongs to another job, or one is at work on it.
      LlmjaxError: from ``load``.
    """
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(open_lines(source, options.columns, work.keys))
        table = output if tables.is_table(output) else None
        if table is not None:
            tables.check_output(output, source)
            output, options = tables.rows_path(output), dataclasses.replace(options, ordered=True)
        path, stream = stack.enter_context(claimed(output, source))
        began = time.monotonic()
        llm = load()
        job = _Job(work(llm, params), path, stream, options, time.monotonic() - began)
        with contextlib.closing(job.index):
            summary = job.run(lines, output, about or {})
        if summary.status == "complete" and not job.count.done:
            where = "" if options.shard == WHOLE else " of this shard"
            warnings.warn(f"{source}: no rows{where} in it, so there was nothing to do", stacklevel=2)
        elif table is not None and summary.status == "complete":
            tables.write(path, table)
        return summary


class _RunEnded(Exception):
    """The engine failed: ``error`` says how."""

    def __init__(self, error: BaseException):
        self.error = error


class _Job:
    def __init__(
        self,
        work: Work,
        path: Path,
        stream: IO[bytes] | None,
        options: Options,
        load_seconds: float,
    ):
        self.work, self.llm, self.path, self.stream, self.options = work, work.llm, path, stream, options
        self.index = Index()
        self.count = Count()
        self.summary = Summary()
        self.load_seconds = load_seconds
        self.waiting: dict[str, InputRow] = {}  # rows that the engine has
        self.ended: Exception | None = None  # why the input was not read to its end

    def run(self, lines: AnyLines, output: str, about: dict[str, Any]) -> Summary:
        fresh = self.options.force or self.stream is not None
        found = None if fresh else manifests.read(self.path)
        self.date = manifests.job_date(self.options.date, found)
        job = self.work.identity(self.options.shard, self.date)
        manifest = Manifest(job) if fresh else manifests.going_on(self.path, job, found)
        manifest.status, manifest.about = "running", about
        began, meter = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), Meter(self.llm.engine)
        try:
            # Before the manifest: rows that are thrown away must never be found beside the one of this job.
            journal = Journal(self.path, self.index, functools.partial(describe, work=self.work), fresh=fresh)
            with contextlib.closing(journal):
                self._write(manifest)
                self.count.total = count_rows(lines, self.work, self.options.shard)
                self._answer(lines, journal)
                self.summary.failures = [named(row) for row in journal.failed(_NAMED)]
                if self.summary.status == "complete":
                    self.summary.results = self.work.summary(journal.rows(ordered=True))
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            self.summary.status = "interrupted"
            raise
        except OSError as error:
            self._fail(output, error)
        except BaseException:
            self.summary.status = "failed"
            raise
        finally:
            self.summary.totals = self.index.totals(everything=self.summary.status != "complete")
            self.summary.run = {
                "began": began,
                "rows": self.count.done - self.count.kept - self.index.forgotten,
                "load_seconds": round(self.load_seconds, 3),
                **meter.read(),
            }
            self.summary.kept = self.count.kept
            manifest.status, manifest.counts = self.summary.status, self.summary.totals._asdict()
            manifest.summary = self.summary.results
            manifest.runs.append(self.summary.run)
            try:
                self._write(manifest)
            except OSError as error:
                self._fail(output, error)
        return self.summary

    def _fail(self, output: str, error: OSError) -> None:
        self.summary.status = "failed"
        reason = error.strerror or error
        self.summary.problem = self.summary.problem or (
            f"{output}: writing the output failed: {reason}; the rows before are whole"
        )

    def _write(self, manifest: Manifest) -> None:
        if self.stream is None:
            manifest.write(self.path)

    def _answer(self, lines: AnyLines, journal: Journal) -> None:
        with (
            Interrupts(self.llm.engine.stop) as interrupts,
            Reporter(
                self.llm.engine,
                self.count,
                functools.partial(journal.sync, SYNC_SECONDS),
                seconds=self.options.progress_seconds,
            ),
        ):
            requests = self._requests(lines, journal, interrupts)
            while True:
                try:
                    self._run(requests, journal)
                    break
                except _RunEnded as ended:
                    self._one_by_one(journal, ended.error, interrupts)
        if self.ended is not None:
            raise self.ended
        if not interrupts.asked:
            self.summary.removed = self._finish(journal)
        if self.stream is not None and self.options.ordered:
            try:
                for text in journal.rows(ordered=True):
                    send(self.stream, text)
            except OSError:
                self.index.forget(0)  # how many of them arrived is not known
                raise
        self.summary.status = "interrupted" if interrupts.asked else "complete"

    def _run(self, requests: Requests, journal: Journal) -> None:
        with contextlib.closing(self.work.outputs(requests)) as outputs:
            while (output := _next(outputs)) is not None:
                row = self.waiting.pop(output.request_id)
                if output.error is not None:
                    self._append(journal, *row._replace(error=output.error).failure(), row.line)
                    continue
                self.count.answered += 1
                self.count.answer_tokens += sum(len(c.token_ids) for c in output.outputs)
                try:
                    answer = row.answer(output, self.llm)
                except BaseException as error:
                    answer = row._replace(error=row_error(error)).failure()
                self._append(journal, *answer, row.line)

    def _one_by_one(self, journal: Journal, error: BaseException, interrupts: Interrupts) -> None:
        """After a row made the engine fail (numbers that overflow, say): runs those that were under way alone, to tell
        which.

        Raises:
          BaseException: ``error``, where the engine answers nothing any more, so that it is not the row.
        """
        failed = []
        rows = list(self.waiting.values())
        for row in rows:
            try:
                self._run((r for r in [row.request] if r is not None and not interrupts.asked), journal)
            except _RunEnded as again:
                failed.append(row._replace(error=row_error(again.error)))
        if interrupts.asked:
            return
        if not rows or (len(failed) == len(rows) and not self._is_sound()):
            raise error
        for row in failed:
            del self.waiting[str(row.row_id)]
            self._append(journal, *row.failure(), row.line)

    def _is_sound(self) -> bool:
        """Whether the engine answers the shortest of prompts."""
        tokenizer = self.llm.model.tokenizer
        prompt = [(tokenizer and tokenizer.bos_id) or 0]
        try:
            return any(self.llm.outputs([self.llm.request(prompt, SamplingParams(max_tokens=1), request_id="probe")]))
        except Exception:
            return False

    def _requests(self, lines: AnyLines, journal: Journal, interrupts: Interrupts) -> Iterator[Request | None]:
        """The rows that are to be run; on the way, those that need not or cannot be are done with.

        What goes wrong in between is no fault of the engine that asks for them: ``ended`` keeps it.
        """
        try:
            yield from self._rows_to_run(lines, journal, interrupts)
        except RequestError as error:  # of an input that cannot be read on, the rows under way are answered
            self.ended = error
        except Exception as error:
            self.ended = error
            self.llm.engine.stop()

    def _rows_to_run(self, lines: AnyLines, journal: Journal, interrupts: Interrupts) -> Iterator[Request | None]:
        arriving = lines.arriving(lambda: not self.waiting and not interrupts.asked)
        for row in read_rows(arriving, self.work, self.index, self.options.shard, self.date):
            if interrupts.asked:
                return
            if row is None:
                yield None
            elif self._is_done(row):
                self.index.keep(row.key, row.line)
                self.count.kept += 1
                self.count.done += 1
            elif row.request is None:
                if self.work.in_order and self.waiting:
                    yield None  # those before it are done with first
                self._append(journal, *row.failure(), row.line)
            else:
                self.waiting[row.request.request_id] = row
                self.count.under_way = len(self.waiting)
                self.count.begin(row.request)
                yield row.request

    def _is_done(self, row: InputRow) -> bool:
        known = self.index.get(row.key)
        if known is None or known.content != row.content:
            return False
        return not (known.failed and row.request is not None and self.options.retry_errors)

    def _append(self, journal: Journal, row: Written, text: bytes, line: int) -> None:
        if self.stream is not None and not self.options.ordered:
            send(self.stream, text)
        journal.append(row, text, line)
        self.count.done += 1
        self.count.under_way = len(self.waiting)

    def _finish(self, journal: Journal) -> bool:
        assert not self.waiting, "the engine ended without these rows"
        if journal.lines and not self.index.totals(everything=False).rows:
            raise ResumeError(
                f"{self.path}: none of its {journal.lines} rows is in the input, which has no others; is it the right "
                "input? The rows are left as they are"
            )
        return self.stream is None and journal.finish(ordered=self.options.ordered)


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
