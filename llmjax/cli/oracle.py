"""``llmjax trace``."""

import argparse
import sys

from llmjax.cli import loading
from llmjax.cli.flags import Verbs, add_verb, cache_flags, id_list, load_flags, prompt_text
from llmjax.errors import RequestError


def add(verbs: Verbs) -> None:
    """Registers the verb."""
    text = "Write a model's named activations for one prompt."
    trace = add_verb(verbs, "trace", _trace, text, load_flags(None), cache_flags())
    what = trace.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="the text, or - for stdin")
    what.add_argument("--ids", type=id_list, metavar="ID,ID", help="token ids, taken as they are")
    trace.add_argument("--output", required=True, metavar="DIR", help="a new directory")
    trace.add_argument("--taps", action="append", metavar="GLOB", help="names to keep, * by default; may be repeated")


def _trace(args: argparse.Namespace) -> int:
    from llmjax.oracle.trace import trace

    model = loading.load_model(args)
    ids = args.ids
    if ids is None:
        if model.tokenizer is None:
            raise RequestError(f"{args.model}: no tokenizer files, so give --ids instead of --prompt")
        ids = model.tokenizer.encode(prompt_text(args.prompt))
    result = trace(model, ids, args.taps or ["*"])
    result.save(args.output)
    print(f"{len(result.activations)} activations of {len(ids)} tokens in {args.output}", file=sys.stderr)
    return 0
