"""``llmjax trace``, ``llmjax vectors`` and ``llmjax compare``."""

import argparse
import dataclasses
import sys
from functools import partial

from llmjax.cli import loading
from llmjax.cli.flags import Verbs, add_verb, answer, cache_flags, id_list, load_flags, prompt_text
from llmjax.errors import RequestError, amount
from llmjax.outside.paths import checked_path
from llmjax.outside.whole import expect_file, expect_room, write_text


def add(verbs: Verbs) -> None:
    """Registers the verbs."""
    text = "Write a model's named activations for one prompt."
    trace = add_verb(verbs, "trace", _trace, text, load_flags(None), cache_flags())
    what = trace.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="the text, or - for stdin")
    what.add_argument("--ids", type=id_list, metavar="ID,ID", help="token ids, taken as they are")
    trace.add_argument("--output", required=True, metavar="DIR", help="a new directory")
    trace.add_argument("--taps", action="append", metavar="GLOB", help="names to keep, * by default; may be repeated")
    text = "Write texts on which mistakes of a runtime show, and what the model computes of each."
    vectors = add_verb(verbs, "vectors", _vectors, text, load_flags(None), cache_flags())
    vectors.add_argument("--output", required=True, metavar="DIR", help="a new directory, of a folder for each text")
    vectors.add_argument("--taps", action="append", metavar="GLOB", help="names to keep; may be repeated (logits)")
    vectors.add_argument("--longest", type=int, default=512, metavar="N", help="tokens of a text at most (512)")
    _add_compare(verbs)


def _add_compare(verbs: Verbs) -> None:
    text = "Say whether another runtime computes the same, where it begins to differ, and why."
    flags = load_flags("reference", required=False)
    compare = add_verb(verbs, "compare", _compare, text, flags, cache_flags())
    compare.set_defaults(verdict=True)
    compare.add_argument(
        "dumps",
        nargs="*",
        metavar="DUMP",
        help="REF CAND, or CAND alone with --model: directories of dumps; CAND also a file of llama.cpp's: "
        "llamacpp-X.bin of llama-debug --save-logits (or its directory), or of llama-perplexity --kl-divergence-base",
    )
    compare.add_argument(
        "--candidate-model", metavar="N", help="a second checkpoint instead of a dump of the candidate"
    )
    what = compare.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="for two checkpoints: the text, or - for stdin (default: a sentence)")
    what.add_argument("--ids", type=id_list, metavar="ID,ID", help="for two checkpoints: token ids")
    compare.add_argument("--names", metavar="FILE", help="a TOML file from the candidate's names to llmjax's")
    compare.add_argument(
        "--class",
        dest="arithmetic",
        metavar="CLASS[,CLASS]",
        help="what alone, or together, may explain differences: float32, gelu16, cache_float16, cache16, tf32, "
        "float16, bfloat16, static_int16, static_int8, cache_int8, cache_float8, cache_int4, block_int8, int8, "
        "dynamic_int8, float8, int4, int3, int2 (default: what the dump declares, else the narrowest that holds)",
    )
    compare.add_argument("--texts", type=int, metavar="N", help="of a file of several texts, the first N alone")
    compare.add_argument(
        "--search",
        type=float,
        metavar="SECONDS",
        help="for how long to look for the causes of a difference, 0 for until all are tried (default: five minutes)",
    )
    compare.add_argument("--json", action="store_true", help="machine-readable, to stdout")
    compare.add_argument("--html", metavar="FILE", help="write a page that needs nothing else")
    compare.add_argument("--junit", metavar="FILE", help="write a test report")


def _trace(args: argparse.Namespace) -> int:
    from llmjax.oracle.trace import trace
    from llmjax.runtime.asking import warn_of_two_starts

    expect_room(checked_path("output", args.output, RequestError), RequestError)
    model = loading.load_model(args)
    ids = args.ids
    if ids is None:
        if model.tokenizer is None:
            raise RequestError(f"{args.model}: no tokenizer files, so give --ids instead of --prompt")
        ids = model.tokenizer.encode(prompt_text(args.prompt))
        warn_of_two_starts(ids, model.tokenizer)
    result = trace(model, ids, args.taps or ["*"])
    result.save(args.output)
    print(
        f"{amount(len(result.activations), 'activation')} of {amount(len(ids), 'token')} in {args.output}",
        file=sys.stderr,
    )
    return 0


def _vectors(args: argparse.Namespace) -> int:
    from llmjax.oracle.vectors import write

    expect_room(checked_path("output", args.output, RequestError), RequestError)
    tell = partial(print, file=sys.stderr, flush=True)
    index = write(loading.load_model(args), args.output, args.taps or "logits", longest=args.longest, progress=tell)
    for left in index["left_out"]:
        tell(
            f"left out: {left['name']} of {left['tokens']:,} tokens: {left['shows']}; --longest {left['tokens']} has it"
        )
    tell(f"{amount(len(index['vectors']), 'text')} in {args.output}")
    return 0


def _about_model(args: argparse.Namespace) -> list[str]:
    """The flags that were given of those which say how a model is loaded."""
    [flags] = [group for group in load_flags()._action_groups if group.title == "model"]
    given = {*vars(args).get("_given", ()), *(name for name, value in vars(args).items() if value is True)}
    return [flag.option_strings[0] for flag in flags._group_actions if flag.dest in given]


def _compare(args: argparse.Namespace) -> int:
    from llmjax.checkpoint.loading import load
    from llmjax.oracle.compare import SEARCH, compare

    dumps = list(args.dumps)
    wanted = (args.model is None) + (args.candidate_model is None)
    if len(dumps) != wanted and not (args.model is not None and len(dumps) == 2 and args.candidate_model is None):
        raise RequestError(
            "compare: expected REF CAND, or --model M and CAND, or --model M --candidate-model N; "
            f"found {amount(len(dumps), 'dump')}"
        )
    for page in (args.html, args.junit):
        if page is not None and (path := checked_path("output", page, RequestError)).is_dir():
            expect_file(path, RequestError)
    if args.html is not None and args.html == args.junit:
        raise RequestError(f"--html, --junit: expected two files, found {args.html} for both")
    if args.model is None and (alone := _about_model(args)):
        raise RequestError(f"{', '.join(alone)}: about the model that --model names; give that, too")
    model = None if args.model is None else loading.load_model(args)
    candidate = dumps.pop() if args.candidate_model is None else load(args.candidate_model)
    ids = args.ids
    if args.prompt is not None:
        if model is None or model.tokenizer is None:
            raise RequestError("--prompt: goes with --model and its tokenizer; give --ids")
        ids = model.tokenizer.encode(prompt_text(args.prompt))
    report = compare(
        dumps[0] if dumps else None,
        candidate,
        model=model,
        names=args.names,
        arithmetic=args.arithmetic,
        token_ids=ids,
        texts=args.texts,
        search=SEARCH if args.search is None else args.search,
        progress=partial(print, file=sys.stderr, flush=True),
    )
    report = dataclasses.replace(report, subject={**report.subject, "command": args.command})
    if args.html is not None:
        report.to_html(args.html)
    if args.junit is not None:
        write_text(args.junit, report.to_junit(), RequestError)
    code = answer(args, report.exit_code, report.to_json() if args.json else report.to_text())
    if report.verdict == "not_comparable":
        print(f"llmjax: not comparable: {report.reason}", file=sys.stderr)
    return code
