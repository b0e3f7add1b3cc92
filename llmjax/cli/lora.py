"""``llmjax lora``; training has a file of its own."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from llmjax.cli import training
from llmjax.cli.flags import Verbs, add_verb
from llmjax.cli.progress import report_tensors

if TYPE_CHECKING:
    from llmjax.lora.adapter import LoraSource


def add(verbs: Verbs) -> None:
    """Registers the verbs."""
    text = "Train a LoRA adapter, check it, or merge it into a checkpoint."
    lora = verbs.add_parser("lora", help=text, description=text)
    lora_verbs = lora.add_subparsers(required=True, metavar="VERB")
    training.add(lora_verbs)
    for name, run, text in (
        ("check", _lora_check, "Say what an adapter is, whether it fits, and what it changes."),
        ("merge", _lora_merge, "Write the checkpoint with the adapter in its weights, in its own format and dtype."),
    ):
        sub = add_verb(lora_verbs, name, run, text)
        sub.add_argument("--model", required=True, help="the base checkpoint's path")
        sub.add_argument("--lora", required=True, metavar="PATH", help="a PEFT directory, or its weights alone")
        text = "scale = A / rank, for weights without adapter_config.json"
        sub.add_argument("--lora-alpha", "--alpha", dest="alpha", type=float, metavar="A", help=text)
        sub.add_argument("--rank", type=int, help="for the same: what is expected")
        if name == "check":
            sub.add_argument("--prompt", help="text to compare logits on (default: a few token ids)")
            sub.add_argument("--json", action="store_true", help="machine-readable, to stdout")
        else:
            sub.add_argument("--output", required=True, metavar="DIR", help="a new directory, or an empty one")


def _adapter(args: argparse.Namespace) -> "LoraSource":
    from llmjax.lora.adapter import LoraSource

    return LoraSource(args.lora, args.alpha, args.rank)


def _lora_check(args: argparse.Namespace) -> int:
    from llmjax.checkpoint.adapters import check

    report = check(args.model, _adapter(args), prompt=args.prompt)
    print(json.dumps(report.to_dict()) if args.json else report.describe())
    return 0


def _lora_merge(args: argparse.Namespace) -> int:
    from llmjax.checkpoint.adapters import merge

    destination = merge(args.model, _adapter(args), args.output, report=report_tensors)
    print(f"{destination}: written", file=sys.stderr)
    return 0
