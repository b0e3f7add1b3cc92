"""Runs a JSONL of prompts through an ``LLM``: what is done stays done, whatever ends it."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from llmjax.batch import manifest as manifests
from llmjax.batch.files import claimed, open_lines
from llmjax.batch.identity import identity
from llmjax.batch.index import Index, Totals, Written
from llmjax.batch.interrupts import Interrupts
from llmjax.batch.journal import SYNC_SECONDS, Journal
from llmjax.batch.manifest import Manifest
from llmjax.batch.progress import PLAIN_SECONDS, Count, Meter, Reporter
from llmjax.batch.rows import WHOLE, InputRow, Shard, count_rows, describe, read_rows
from llmjax.errors import CheckpointError, RequestError, ResumeError
from llmjax.llm import LLM
from llmjax.runtime.params import SamplingParams
from llmjax.runtime.row import Request

# Positions of the cache a job begins with: most rows fit, and a longer one makes it grow.
RESERVE = 1024


@dataclasses.dataclass(frozen=True)
class Options:
    """How a job goes about it.

    Attributes:
      ordered: leave the output in the order of the input; otherwise rows stay in the order they were finished in.
      shard: which rows to do.
      retry_errors: run rows again that failed when they ran.
      force: start over, whatever the output holds.
      progress_seconds: between lines of progress where stderr is no terminal; 0 for none.
    """

    ordered: bool = False
    shard: Shard = WHOLE
    retry_errors: bool = False
    force: bool = False
    progress_seconds: float = PLAIN_SECONDS

    def __post_init__(self) -> None:
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
      run: seconds and counts of this run, as the manifest has them.
    """

    status: str = "running"
    totals: Totals = Totals(0, 0, 0, 0)
    kept: int = 0
    problem: str = ""
    removed: bool = False
    run: dict[str, Any] = dataclasses.field(default_factory=dict)

    def describe(self) -> str:
        """One line."""
        run, (rows, failed, prompt, completion) = self.run, self.totals
        generate = max(run["seconds"] - run["compile_seconds"], 1e-9)
        kept = f" ({self.kept} of them earlier)" if self.kept else ""
        rates = [f"{run[f'{what}_tokens'] / generate:.0f} tok/s" for what in ("prefill", "decode")]
        return (
            f"{rows - failed} rows answered, {failed} failed{kept}; {prompt} prompt and {completion} answer tokens; "
            f"prefill {rates[0]}, decode {rates[1]} in {run['busy']:.0%} of the slots; "
            f"load {run['load_seconds']:.1f} s, compile {run['compile_seconds']:.1f} s, generate {generate:.1f} s"
        )


def run(
    load: Callable[[], LLM],
    source: str,
    output: str,
    params: SamplingParams,
    options: Options = Options(),
    about: dict[str, Any] | None = None,
) -> Summary:
    """Runs every row that the output does not answer yet; a row that fails is reported in its own output row.

    Args:
      load: makes the LLM; called when the files are known to be in order.
      source: path of the input, ``-`` for stdin.
      output: path of the output, ``-`` for stdout; what is no regular file cannot be resumed.
      params: defaults for rows.
      options: see there.
      about: noted in the manifest.

    Raises:
      RequestError: the input cannot be read or the output not be written to.
      ResumeError: the output belongs to another job, or one is at work on it.
      LlmjaxError: from ``load``.
    """
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(open_lines(source))
        path, stream = stack.enter_context(claimed(output, source))
        began = time.monotonic()
        llm = load()
        job = _Job(llm, path, stream, params, options, time.monotonic() - began)
        with contextlib.closing(job.index):
            return job.run(lines, source, output, about or {})


class _Job:
    def __init__(
        self,
        llm: LLM,
        path: Path,
        stream: IO[bytes] | None,
        params: SamplingParams,
        options: Options,
        load_seconds: float,
    ):
        self.llm, self.path, self.stream, self.params, self.options = llm, path, stream, params, options
        self.index = Index()
        self.count = Count()
        self.summary = Summary()
        self.load_seconds = load_seconds
        self.answered = False  # whether any row was, ever
        self.waiting: dict[str, InputRow] = {}  # rows that the engine has

    def run(self, lines: Iterable[str], source: str, output: str, about: dict[str, Any]) -> Summary:
        job = identity(self.llm, self.params, self.options.shard)
        fresh = self.options.force or self.stream is not None
        manifest = Manifest(job) if fresh else manifests.going_on(self.path, job)
        manifest.status, manifest.about = "running", about
        began, meter = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), Meter(self.llm.engine)
        try:
            # Before the manifest: rows that are thrown away must never be found beside the one of this job.
            journal = Journal(self.path, self.index, describe, fresh=fresh)
            with contextlib.closing(journal):
                self._write(manifest)
                self.count.total = count_rows(source, self.options.shard)
                self._answer(lines, journal)
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            self.summary.status = "interrupted"
            raise
        except OSError as error:
            self.summary.status = "failed"
            self.summary.problem = f"{output}: writing the output failed: {error.strerror}; the rows before are whole"
        except BaseException:
            self.summary.status = "failed"
            raise
        finally:
            self.summary.totals = self.index.totals(everything=self.summary.status != "complete")
            self.summary.run = {
                "began": began,
                "rows": self.count.done - self.count.kept,
                "load_seconds": round(self.load_seconds, 3),
                **meter.read(),
            }
            self.summary.kept = self.count.kept
            manifest.status, manifest.counts = self.summary.status, self.summary.totals._asdict()
            manifest.runs.append(self.summary.run)
            with contextlib.suppress(OSError):  # of a full disk more has been said
                self._write(manifest)
        return self.summary

    def _write(self, manifest: Manifest) -> None:
        if self.stream is None:
            manifest.write(self.path)

    def _answer(self, lines: Iterable[str], journal: Journal) -> None:
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
                except CheckpointError as error:
                    self._one_by_one(journal, error)
        if not interrupts.asked:
            self.summary.removed = self._finish(journal)
        if self.stream is not None and self.options.ordered:
            for text in journal.rows(ordered=True):
                self.stream.write(text)
            self.stream.flush()
        self.summary.status = "interrupted" if interrupts.asked else "complete"

    def _run(self, requests: Iterable[Request], journal: Journal) -> None:
        for output in self.llm.outputs(requests, reserve=RESERVE):
            row = self.waiting.pop(output.request_id)
            self._append(journal, *row.answer(output, self.llm), row.line)
            self.answered = True

    def _one_by_one(self, journal: Journal, error: CheckpointError) -> None:
        """After a row made the model fail (numbers that overflow): runs those that were under way alone, to tell which.

        Raises:
          CheckpointError: no row of this job could be answered, so it is not the row.
        """
        failed = []
        for row in list(self.waiting.values()):
            assert row.request is not None
            try:
                self._run([row.request], journal)
            except CheckpointError as again:
                failed.append(row._replace(error=again))
        if not self.answered:
            raise error
        for row in failed:
            del self.waiting[row.row_id or ""]
            self._append(journal, *row.failure(), row.line)

    def _requests(self, lines: Iterable[str], journal: Journal, interrupts: Interrupts) -> Iterator[Request]:
        """The rows that are to be run; on the way, those that need not or cannot be are done with."""
        for row in read_rows(lines, self.llm, self.params, self.index, self.options.shard):
            if interrupts.asked:
                return
            if self._is_done(row):
                self.index.keep(row.key, row.line)
                self.count.kept += 1
                self.count.done += 1
            elif row.request is None:
                self._append(journal, *row.failure(), row.line)
            else:
                self.waiting[row.request.request_id] = row
                self.count.under_way = len(self.waiting)
                yield row.request

    def _is_done(self, row: InputRow) -> bool:
        known = self.index.get(row.key)
        if known is None or known.content != row.content:
            return False
        self.answered |= not known.failed
        return not (known.failed and row.request is not None and self.options.retry_errors)

    def _append(self, journal: Journal, row: Written, text: bytes, line: int) -> None:
        journal.append(row, text, line)
        self.count.done += 1
        self.count.under_way = len(self.waiting)
        if self.stream is not None and not self.options.ordered:
            self.stream.write(text)
            self.stream.flush()

    def _finish(self, journal: Journal) -> bool:
        assert not self.waiting, "the engine ended without these rows"
        if journal.lines and not self.index.totals(everything=False).rows:
            raise ResumeError(
                f"{self.path}: none of its {journal.lines} rows is in the input, which has no others; is it the right "
                "input? The rows are left as they are"
            )
        return self.stream is None and journal.finish(ordered=self.options.ordered)
