"""Runs a JSONL of prompts through an ``LLM``: what is done stays done, whatever ends it."""

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from llmjax.batch import manifest as manifests
from llmjax.batch import results
from llmjax.batch.answering import Here, Runner, Task
from llmjax.batch.files import claimed, send
from llmjax.batch.index import Index, Totals, Written
from llmjax.batch.journal import SYNC_SECONDS, Journal
from llmjax.batch.manifest import Manifest
from llmjax.batch.progress import PLAIN_SECONDS, Count, Meter, Reporter, rates
from llmjax.batch.reading import AnyLines, open_lines
from llmjax.batch.rows import WHOLE, Generating, Shard, Work, count_rows, describe, named
from llmjax.batch.tables import is_table
from llmjax.errors import RequestError, ResumeError, amount
from llmjax.llm import LLM
from llmjax.outside.interrupts import Interrupts
from llmjax.outside.urls import local, shown_url
from llmjax.runtime.asking import Params
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
        kept = f" ({self.kept:,} of them earlier)" if self.kept else ""
        answers = f"{prompt:,} prompt and {amount(completion, 'answer token')}"
        tokens = answers if completion else amount(prompt, "prompt token")
        speeds = rates(run)
        if run["decode_tokens"]:
            speeds[-1] += f" in {run['busy']:.0%} of the slots"
        parts = [f"{amount(rows - failed, 'row')} {what}, {failed:,} failed{kept}", tokens, ", ".join(speeds)]
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
      source: path or URL of the input, ``-`` for stdin.
      output: path or URL of the output, ``-`` for stdout; what is no regular file cannot be resumed.  A table
        (``llmjax.batch.tables``) is written when all rows are done, in the order of the input; a URL is, too.
      params: what rows do not set, see ``LLM.sampling_params``.
      options: see there.
      about: noted in the manifest.
      work: what is done with the rows.

    Raises:
      RequestError: the input cannot be read or the output not be written to.
      ResumeError: the output belongs to another job, or one is at work on it.
      LlmjaxError: from ``load``.
    """
    return run_by(lambda stack: Here(work(load(), params)), source, output, options, about, work.keys)


def run_by(
    start: Callable[[contextlib.ExitStack], Runner],
    source: str,
    output: str,
    options: Options,
    about: dict[str, Any] | None,
    keys: tuple[str, ...],
) -> Summary:
    """The same, whoever answers the rows.

    Args:
      start: has them ready, when the files are known to be in order; what is to be done at the end goes on the stack.
      source: see ``run``.
      output: see ``run``.
      options: see ``run``.
      about: see ``run``.
      keys: what a row may hold.

    Raises:
      LlmjaxError: see ``run``.
    """
    source, output = local(source), local(output)
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(open_lines(source, options.columns, keys))
        made = output if results.is_made(output) else None
        if made is not None:
            results.check_output(output, source)
            output = results.rows_path(output)
            options = dataclasses.replace(options, ordered=options.ordered or is_table(made))
        path, stream = stack.enter_context(claimed(output, source))
        began = time.monotonic()
        runner = start(stack)
        job = _Job(runner, path, stream, options, time.monotonic() - began)
        with contextlib.closing(job.index):
            summary = job.run(lines, output, about or {})
        if summary.status == "complete" and not job.count.done:
            where = "" if options.shard == WHOLE else " of this shard"
            warnings.warn(f"{shown_url(source)}: no rows{where} in it, so there was nothing to do", stacklevel=2)
        if made is not None and summary.status == "complete":
            results.write(path, made)
        return summary


class _Job:
    def __init__(
        self,
        runner: Runner,
        path: Path,
        stream: IO[bytes] | None,
        options: Options,
        load_seconds: float,
    ):
        self.runner, self.path, self.stream, self.options = runner, path, stream, options
        self.index = Index()
        self.count = Count()
        self.summary = Summary()
        self.load_seconds = load_seconds

    def run(self, lines: AnyLines, output: str, about: dict[str, Any]) -> Summary:
        fresh = self.options.force or self.stream is not None
        found = None if fresh else manifests.read(self.path)
        self.date = manifests.job_date(self.options.date, found)
        job = self.runner.identity(self.options.shard, self.date)
        manifest = Manifest(job) if fresh else manifests.going_on(self.path, job, found)
        manifest.status, manifest.about = "running", about
        began, meter = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), Meter(self.runner.engine)
        try:
            # Before the manifest: rows that are thrown away must never be found beside the one of this job.
            journal = Journal(self.path, self.index, functools.partial(describe, work=self.runner.work), fresh=fresh)
            self.journal = journal
            with contextlib.closing(journal):
                self._write(manifest)
                self.count.total = count_rows(lines, self.runner.work, self.options.shard)
                self._answer(lines, journal)
                self.summary.failures = [named(row) for row in journal.failed(_NAMED)]
                if self.summary.status == "complete":
                    self.summary.results = self.runner.work.summary(journal.rows(ordered=True))
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
            Interrupts(self.runner.engine.stop) as interrupts,
            Reporter(
                self.runner.engine,
                self.count,
                functools.partial(journal.sync, SYNC_SECONDS),
                seconds=self.options.progress_seconds,
            ),
        ):
            options, asked = self.options, lambda: interrupts.asked
            self.runner.answer(
                Task(lines, self.index, self, self.count, options.shard, self.date, options.retry_errors, asked)
            )
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

    def known(self, key: bytes) -> Written | None:
        """See ``Sink``."""
        return self.index.get(key)

    def keep(self, key: bytes, line: int) -> None:
        """See ``Sink``."""
        self.index.keep(key, line)

    def append(self, row: Written, text: bytes, line: int) -> None:
        """See ``Sink``."""
        if self.stream is not None and not self.options.ordered:
            send(self.stream, text)
        self.journal.append(row, text, line)

    def _finish(self, journal: Journal) -> bool:
        if journal.lines and not self.index.totals(everything=False).rows:
            raise ResumeError(
                f"{self.path}: none of its {journal.lines} rows is in the input, which has no others; is it the right "
                "input? The rows are left as they are"
            )
        return self.stream is None and journal.finish(ordered=self.options.ordered)
