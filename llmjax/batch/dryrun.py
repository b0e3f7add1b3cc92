"""``llmjax batch --dry-run``: what a job would do, and about how long that takes."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from llmjax.batch import manifest as manifests
from llmjax.batch.index import Index
from llmjax.batch.progress import clock
from llmjax.batch.reading import open_lines
from llmjax.batch.results import rows_path
from llmjax.batch.rows import WHOLE, Generating, Shard, read_rows
from llmjax.errors import LlmjaxError, NoRoomError, RequestError, TooLongError, amount
from llmjax.llm import LLM
from llmjax.outside.paths import checked_path
from llmjax.outside.urls import local
from llmjax.runtime.asking import Params
from llmjax.runtime.params import SamplingParams
from llmjax.runtime.schedule import no_room
from llmjax.text.dates import Date

# Bad rows that are named; the others are counted.
_NAMED = 20
_CALIBRATION_TOKENS = 32


@dataclasses.dataclass
class Forecast:
    """What a job would meet.

    Attributes:
      rows: that can run.
      bad: that cannot.
      too_long: of those, prompts longer than the context.
      errors: of bad rows, the first ones.
      no_room: of those, prompts that do not fit the memory.
      truncated: prompts that are cut short.
      prompt_tokens: of all rows.
      longest: prompt, in tokens.
      answer_tokens: at most, if every row goes on to its ``max_tokens``.
      outgrow: rows that then would not fit the memory.
      memory: how it is spent.
      estimate: the time, and how that is known.
    """

    rows: int = 0
    bad: int = 0
    too_long: int = 0
    no_room: int = 0
    truncated: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    longest: int = 0
    answer_tokens: int = 0
    outgrow: int = 0
    memory: str = ""
    estimate: str = ""

    def describe(self) -> str:
        """For a terminal."""
        lines = [
            f"rows           {self.rows + self.bad:,}: {self.rows:,} can run, {self.bad:,} cannot "
            f"({self.too_long:,} of them too long for the context, {self.no_room:,} for the memory)",
            f"prompt tokens  {self.prompt_tokens:,}, the longest prompt {self.longest:,}; {self.truncated:,} cut short",
            f"answer tokens  at most {self.answer_tokens:,}; {amount(self.outgrow, 'row')} may outgrow the memory",
            f"memory         {self.memory}",
            f"time           {self.estimate}",
            *self.errors,
        ]
        if self.bad > len(self.errors):
            lines.append(f"... and {amount(self.bad - len(self.errors), 'more row')} that cannot run")
        return "\n".join(lines)


def run(
    load: Callable[[], LLM],
    source: str,
    output: str,
    params: Params = None,
    shard: Shard = WHOLE,
    date: Date | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> Forecast:
    """Reads and checks every row as a job would, and writes nothing.

    Args:
      load: makes the LLM.
      source: path of the input, ``-`` for stdin.
      output: path of the output; a manifest beside it tells how fast the job was so far.
      params: what rows do not set, see ``LLM.sampling_params``.
      shard: which rows.
      date: see ``job.Options``.
      columns: see ``job.Options``.

    Raises:
      LlmjaxError: the input cannot be read, or from ``load``.
    """
    report = Forecast()
    source, output = local(source), local(output)
    begun = None if output == "-" else _begun(checked_path("output", rows_path(output), RequestError))
    date = manifests.job_date(date, begun)
    with open_lines(source, columns, Generating.keys) as lines, contextlib.closing(Index()) as index:
        llm = load()
        work = Generating(llm, params)
        store = llm.engine.store
        report.memory = store.memory.describe()
        for row in read_rows(lines, work, index, shard, date):
            assert row is not None  # of a file that is read to its end
            error = row.error
            if row.request is not None and not store.fits(len(row.request.ids) + 1):
                error = no_room(store, len(row.request.ids) + 1)
            if row.request is None or error is not None:
                report.bad += 1
                report.too_long += isinstance(error, TooLongError)
                report.no_room += isinstance(error, NoRoomError)
                if len(report.errors) < _NAMED:
                    report.errors.append(f"line {row.line}: {error}")
                continue
            size, answer = len(row.request.ids), row.request.params.max_tokens or 0
            report.rows += 1
            report.prompt_tokens += size
            report.longest = max(report.longest, size)
            report.truncated += row.request.truncated > 0
            report.answer_tokens += answer * row.request.params.n
            report.outgrow += not store.fits(size + answer)
    if report.rows:
        if begun and any(manifests.differences(begun.job, work.identity(shard, date))):
            begun = None
        report.estimate = (begun and _from_manifest(begun, output, report)) or _from_calibration(llm, report)
    else:
        report.estimate = "none, no row can run"
    return report


def _begun(output: Path) -> manifests.Manifest | None:
    """What there is of a manifest beside an output."""
    if output.is_dir():
        raise RequestError(f"{output}: cannot write the output: it is a directory; name a file in it")
    try:
        return manifests.read(output)
    except LlmjaxError:
        return None


def _from_manifest(manifest: manifests.Manifest, output: str, report: Forecast) -> str:
    """From what this job has done already; empty where it has done nothing."""
    done = sum(run["rows"] for run in manifest.runs)
    if not done:
        return ""
    seconds = sum(run["seconds"] - run["compile_seconds"] for run in manifest.runs)
    left = max(report.rows + report.bad - manifest.counts.get("rows", 0), 0)
    return (
        f"about {clock(seconds / done * left)} for the {amount(left, 'row')} not done yet, from the {done:,} that took "
        f"{clock(seconds)} (manifest of {output})"
    )


def _from_calibration(llm: LLM, report: Forecast) -> str:
    """From random prompts of the rows' mean length, run in all slots at once."""
    length = min(max(report.prompt_tokens // report.rows, 1), llm.model.context_length - _CALIBRATION_TOKENS - 1)
    random, tokenizer = np.random.default_rng(0), llm.model.tokenizer
    # Without it a warning would tell of prompts that nobody gave.
    bos = [] if tokenizer is None or tokenizer.bos_id is None else [tokenizer.bos_id]
    compiled = llm.engine.compile_seconds

    def seconds(tokens: int) -> float:
        drawn = random.integers(0, llm.model.config.vocab_size, (llm.engine.slots, length)).tolist()
        prompts = [[*bos, *ids][:length] for ids in drawn]
        began = time.monotonic()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
        return time.monotonic() - began

    seconds(1)
    compiled = llm.engine.compile_seconds - compiled
    prefill = seconds(1)
    decode = max(seconds(1 + _CALIBRATION_TOKENS) - prefill, 1e-9)
    prefill_rate = length * llm.engine.slots / prefill
    decode_rate = _CALIBRATION_TOKENS * llm.engine.slots / decode
    least = compiled + report.prompt_tokens / prefill_rate
    most = least + report.answer_tokens / decode_rate
    return (
        f"{clock(least)} for the prompts, {clock(most)} if every answer is as long as it may be; from a calibration: "
        f"prefill {prefill_rate:,.0f} tok/s, decode {decode_rate:,.0f} tok/s in {amount(llm.engine.slots, 'slot')}, "
        f"compile {compiled:.1f} s"
    )
