"""``llmjax batch`` and ``llmjax score``: files of rows in, files of rows out."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from llmjax.cli import loading
from llmjax.cli.flags import (
    Verbs,
    add_verb,
    cache_flags,
    engine_flags,
    load_flags,
    memory_flag,
    named_path,
    sampling_flags,
    sampling_params,
)
from llmjax.errors import OutputError, RequestError

if TYPE_CHECKING:
    from llmjax.llm import LLM
    from llmjax.model import Model


def add(verbs: Verbs) -> None:
    """Registers the verbs."""
    text = "Run a JSONL of prompts into a JSONL of answers; run again, it goes on."
    batch = add_verb(verbs, "batch", _batch, text, engine_flags(), sampling_flags())
    batch.add_argument("--n", type=int, metavar="N", help="samples of each prompt (default 1)")
    batch.add_argument("--logprobs", type=int, metavar="K", help="report the K most likely tokens")
    batch.add_argument("--prompt-logprobs", type=int, metavar="K", help="the same for the prompt's tokens")
    batch.add_argument("--input", required=True, help="JSONL file, *.gz or not, or - for stdin")
    batch.add_argument("--output", required=True, help="JSONL file, *.gz or not, or - for stdout")
    batch.add_argument("--ordered", action="store_true", help="leave the answers in the order of the rows")
    batch.add_argument("--shard", metavar="I/N", help="do part I of N of the rows, chosen by their ids")
    batch.add_argument(
        "--lora-modules",
        type=named_path,
        nargs="+",
        metavar="NAME=PATH",
        help="LoRA adapters that rows may ask for by name (lora)",
    )
    batch.add_argument("--force", action="store_true", help="start over, whatever the output holds")
    batch.add_argument("--retry-errors", action="store_true", help="run rows again that failed when they ran")
    batch.add_argument(
        "--dry-run", action="store_true", help="check and count the rows, estimate the time, write nothing"
    )
    batch.add_argument(
        "--progress-seconds", type=float, default=10.0, metavar="S", help="between lines of progress; 0 for none"
    )

    text = "Log-probabilities, NLL and perplexity of given texts."
    score = add_verb(verbs, "score", _score, text, load_flags(), cache_flags())
    memory_flag(score)
    score.add_argument("--input", required=True, help='JSONL of {"text": ...} or {"token_ids": [...]}, or - for stdin')
    score.add_argument("--output", required=True, help="JSONL file, or - for stdout")


def _batch(args: argparse.Namespace) -> int:
    from llmjax.batch import dryrun, job
    from llmjax.batch.rows import WHOLE, Shard

    params = sampling_params(args)
    shard = Shard.parse(args.shard) if args.shard else WHOLE

    def load() -> "LLM":
        return _stated(loading.load_llm(args, _job_slots)[0])

    if args.dry_run:
        report = dryrun.run(load, args.input, args.output, params, shard, args.date)
        print(report.describe())
        return 1 if report.bad else 0
    options = job.Options(args.ordered, shard, args.retry_errors, args.force, args.progress_seconds, args.date)
    about = {"model": args.model, "input": args.input, "ordered": args.ordered, "truncate_prompt": args.truncate_prompt}
    summary = job.run(load, args.input, args.output, params, options, about)
    if summary.problem:
        print(f"llmjax: {summary.problem}; {_how_to_go_on(args)}", file=sys.stderr)
    print(summary.describe(), file=sys.stderr)
    if summary.removed:
        print(
            f"llmjax: answers to rows that have changed or gone were removed; they are in {args.output}.previous",
            file=sys.stderr,
        )
    if summary.status == "interrupted":
        print(f"llmjax: interrupted; {_how_to_go_on(args)}", file=sys.stderr)
        return 130
    return 1 if summary.problem or summary.totals.failed else 0


def _how_to_go_on(args: argparse.Namespace) -> str:
    if not Path(args.output).is_file() and not args.output.endswith(".gz"):
        return "to go on later, a job needs a file for its output"
    same = "the same command" + (", without --force," if args.force else "")
    return f"{same} goes on from the rows that are done"


def _score(args: argparse.Namespace) -> int:
    from llmjax.batch import scoring
    from llmjax.batch.files import open_lines

    with open_lines(args.input) as lines, _open_output(args.output, args.input) as begin:
        llm = _stated(loading.load_llm(args)[0])
        known, output = scoring.identity(llm), Path(args.output)
        rows = begin()
        if output.is_file():
            scoring.write_manifest(output, known)
        summary = scoring.run(llm, lines, rows, known["sha256"])
        if output.is_file():
            scoring.write_manifest(output, known, summary)
    print(summary.describe(), file=sys.stderr)
    return 1 if summary.failed else 0


@contextlib.contextmanager
def _open_output(path: str, source: str) -> Iterator[Callable[[], IO[str]]]:
    """Opens the output at once, so that a wrong path costs nothing, and empties it only when the work begins: a model
    that does not load must not take an earlier result with it.

    Yields:
      a function that empties the file and returns it.

    Raises:
      RequestError: the file cannot be written to.
      OutputError: writing to it failed.
    """
    if path == "-":
        yield lambda: sys.stdout
        return
    if source != "-" and os.path.exists(path) and os.path.samefile(path, source):
        raise RequestError(f"{path}: the output is the input file")
    is_new, began = not os.path.exists(path), False
    try:
        # Lone surrogates in an id are written as the escapes JSON has for them.
        file = open(path, "a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise RequestError(f"{path}: cannot write the output: {error.strerror}") from None

    def begin() -> IO[str]:
        nonlocal began
        began = True
        if os.path.isfile(path):
            file.truncate(0)
        return file

    try:
        with file:
            yield begin
            if os.path.isfile(path):
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"{path}: writing the output failed: {error.strerror}; its last row may be cut") from None
    finally:
        if is_new and not began:
            os.unlink(path)


def _job_slots(model: "Model") -> int:
    from llmjax.runtime.cache import job_slots

    return job_slots(model.config, model.numerics)


def _stated(llm: "LLM") -> "LLM":
    """The same, its memory told before anything runs."""
    print(f"llmjax: memory: {llm.engine.store.memory.describe()}", file=sys.stderr)
    return llm
