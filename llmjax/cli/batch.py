"""``llmjax batch`` and ``llmjax score``: files of rows in, files of rows out."""

import argparse
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax.cli import loading
from llmjax.cli.flags import (
    Verbs,
    add_verb,
    answer,
    cache_flags,
    engine_flags,
    load_flags,
    memory_flag,
    sampling_flags,
    sampling_given,
)
from llmjax.cli.loading import tell_defaults
from llmjax.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmjax.batch import job
    from llmjax.batch.rows import Shard, Work
    from llmjax.llm import LLM
    from llmjax.model import Model
    from llmjax.runtime.asking import Params


def add(verbs: Verbs) -> None:
    """Registers the verbs."""
    text = "Run a JSONL of prompts into a JSONL of answers; run again, it goes on."
    batch = add_verb(verbs, "batch", _batch, text, engine_flags(), sampling_flags())
    batch.add_argument("--n", type=int, metavar="N", help="samples of each prompt (default 1)")
    batch.add_argument("--logprobs", type=int, metavar="K", help="report the K most likely tokens")
    batch.add_argument("--prompt-logprobs", type=int, metavar="K", help="the same for the prompt's tokens")
    _job_flags(batch)
    batch.add_argument(
        "--lora-modules",
        action=_Named,
        nargs="+",
        metavar="NAME=PATH",
        help="LoRA adapters that rows may ask for by name (lora)",
    )
    batch.add_argument(
        "--dry-run", action="store_true", help="check and count the rows, estimate the time, write nothing"
    )

    text = "Log-probabilities, NLL and perplexity of given texts; run again, it goes on."
    score = add_verb(verbs, "score", _score, text, load_flags(), cache_flags())
    memory_flag(score)
    _job_flags(score)


def _job_flags(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--input",
        required=True,
        help="JSONL file, *.gz or not, - for stdin, or a table: *.parquet, *.csv; or its URL (s3://...)",
    )
    verb.add_argument(
        "--output", required=True, help="JSONL file, *.gz or not, - for stdout, or a table, made at the end; or its URL"
    )
    verb.add_argument(
        "--column",
        action=_Named,
        nargs="+",
        metavar="KEY=COLUMN",
        help="of a table: the column that holds a key of the rows, such as prompt=question",
    )
    verb.add_argument("--ordered", action="store_true", help="leave the answers in the order of the rows")
    verb.add_argument("--shard", metavar="I/N", help="do part I of N of the rows, chosen by their ids")
    cluster = verb.add_argument_group("a Ray cluster")
    text = "answer the rows there: auto (this machine's), HOST:PORT, or local for one of this job's own"
    cluster.add_argument("--ray", metavar="ADDRESS", help=text)
    cluster.add_argument("--actors", type=int, metavar="N", help="workers (default: one for each GPU, or each machine)")
    cluster.add_argument("--actor-cpus", type=float, metavar="C", help="CPUs that Ray counts for each (default 1)")
    cluster.add_argument("--actor-gpus", type=float, metavar="G", help="GPUs for each (default 1 where there are any)")
    verb.add_argument("--force", action="store_true", help="start over, whatever the output holds")
    verb.add_argument("--retry-errors", action="store_true", help="run rows again that failed when they ran")
    verb.add_argument(
        "--progress-seconds", type=float, default=10.0, metavar="S", help="between lines of progress; 0 for none"
    )


class _Named(argparse.Action):
    """Collects ``NAME=VALUE``, over all times the flag is given; a name may come but once."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        found = dict(getattr(namespace, self.dest) or {})
        for text in values:
            name, equals, value = text.partition("=")
            if not (name and equals and value):
                raise argparse.ArgumentError(self, f"expected {self.metavar}, found {text!r}")
            if name in found:
                raise argparse.ArgumentError(self, f"{name!r} is there twice: each is to have a name of its own")
            found[name] = value
        setattr(namespace, self.dest, found)


def _batch(args: argparse.Namespace) -> int:
    from llmjax.batch import dryrun
    from llmjax.batch.rows import Generating

    given, load = sampling_given(args), functools.partial(_generating, args)
    if args.dry_run:
        if {args.ray, args.actors, args.actor_cpus, args.actor_gpus} != {None}:
            raise RequestError("--dry-run: rows are checked here; leave --ray, --actors and the like out")
        shard = _shard(args)
        report = dryrun.run(load, args.input, args.output, given, shard, args.date, args.column or {})
        return answer(args, 1 if report.bad else 0, report.describe())
    about = _about(args) | {"truncate_prompt": args.truncate_prompt}
    return _ended(args, _run(args, load, given, about, Generating), "answered")


def _score(args: argparse.Namespace) -> int:
    from llmjax.batch import scoring

    summary = _run(args, functools.partial(_scoring, args), None, _about(args), scoring.Scoring)
    if summary.results:
        print(scoring.describe(summary.results), file=sys.stderr)
    return _ended(args, summary, "scored")


def _run(
    args: argparse.Namespace, load: "Callable[[], LLM]", given: "Params", about: dict[str, Any], work: "type[Work]"
) -> "job.Summary":
    """Here, or on a cluster."""
    from llmjax.batch import job

    files = load, args.input, args.output, given, _options(args), about, work
    wanted = {"actors": args.actors, "cpus": args.actor_cpus, "gpus": args.actor_gpus}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if args.ray is not None:
        from llmjax.batch import ray

        return ray.run(*files, ray.Cluster(args.ray, **wanted))
    if wanted:
        raise RequestError("--actors, --actor-cpus, --actor-gpus: go with --ray")
    return job.run(*files)


def _generating(args: argparse.Namespace) -> "LLM":
    """What a job's rows are answered with, in this process or a worker's."""
    loading.keep_compiled(args)
    llm = _stated(loading.load_llm(args, _job_slots)[0])
    tell_defaults(llm, sampling_given(args))
    return llm


def _scoring(args: argparse.Namespace) -> "LLM":
    """The same for texts to be scored."""
    loading.keep_compiled(args)
    return _stated(loading.load_llm(args)[0])


def _options(args: argparse.Namespace) -> "job.Options":
    from llmjax.batch import job

    date = getattr(args, "date", None)
    columns = args.column or {}
    return job.Options(args.ordered, _shard(args), args.retry_errors, args.force, args.progress_seconds, date, columns)


def _shard(args: argparse.Namespace) -> "Shard":
    from llmjax.batch.rows import WHOLE, Shard

    return WHOLE if args.shard is None else Shard.parse(args.shard)


def _about(args: argparse.Namespace) -> dict[str, Any]:
    from llmjax.outside.urls import shown_url

    return {"model": args.model, "input": shown_url(args.input), "ordered": args.ordered}


def _ended(args: argparse.Namespace, summary: "job.Summary", what: str) -> int:
    """Tells how a job ended; returns the exit code."""
    rows = _rows_file(args)
    if summary.problem:
        print(f"llmjax: {summary.problem}; {_how_to_go_on(args)}", file=sys.stderr)
    print(summary.describe(what), file=sys.stderr)
    if summary.failures:
        output = "the output" if args.output == "-" else rows
        print(
            "\n  ".join(["llmjax: the first rows that failed:", *summary.failures])
            + f"\n  all of them are in {output}, with their error (jq -c 'select(.error)')",
            file=sys.stderr,
        )
    if summary.removed:
        print(
            f"llmjax: answers to rows that have changed or gone were removed; they are in {rows}.previous",
            file=sys.stderr,
        )
    if summary.status == "interrupted":
        print(f"llmjax: interrupted; {_how_to_go_on(args)}", file=sys.stderr)
        return 130
    return 1 if summary.problem or summary.totals.failed else 0


def _rows_file(args: argparse.Namespace) -> str:
    """Where the rows are, whatever is made of them at the end."""
    from llmjax.batch.results import rows_path
    from llmjax.outside.urls import local

    return rows_path(local(args.output))


def _how_to_go_on(args: argparse.Namespace) -> str:
    output = _rows_file(args)
    if not Path(output).is_file() and not output.endswith(".gz"):
        return "to go on later, a job needs a file for its output"
    same = "the same command" + (", without --force," if args.force else "")
    return f"{same} goes on from the rows that are done"


def _job_slots(model: "Model") -> int:
    from llmjax.runtime.cache import job_slots

    return job_slots(model.config, model.numerics)


def _stated(llm: "LLM") -> "LLM":
    """The same, its memory told before anything runs."""
    print(f"llmjax: memory: {llm.engine.store.memory.describe()}", file=sys.stderr)
    return llm
