"""``llmjax lora train``."""

import argparse
import contextlib
import json
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax.cli import loading
from llmjax.cli.flags import Verbs, add_verb, cache_flags, load_flags
from llmjax.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from llmjax.training.loop import Report


def _names(text: str) -> str | tuple[str, ...]:
    """A keyword or a regular expression as it is; names with commas between them as a list."""
    plain = all(char.isalnum() or char in "_.," for char in text)
    return tuple(text.split(",")) if plain and text not in ("all-linear", "mediapipe") else text


def _pattern(kind: type) -> Any:
    def parse(text: str) -> tuple[str, Any]:
        key, _, value = text.rpartition("=")
        try:
            if not key:
                raise ValueError
            return key, kind(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected PATTERN=NUMBER, found {text!r}") from None

    return parse


def _pair(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two numbers with a comma between, found {text!r}") from None


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"expected on or off, found {text!r}")
    return text == "on"


def _limit(text: str) -> float | str:
    try:
        return text if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or none, found {text!r}") from None


# By ``TrainConfig``'s name: how a flag's text is read, what it is called, and what it says.
_FLAGS: dict[str, tuple[Any, str, str]] = {
    "targets": (_names, "NAMES", "mediapipe (q, k, v and o), all-linear, names with commas between, or one regular "
                "expression of whole names (default mediapipe)"),
    "exclude": (_names, "NAMES", "modules to leave out, as --targets"),
    "rank": (int, "R", "of the factors (default 8)"),
    "alpha": (float, "A", "scale = A / R (default 16)"),
    "dropout": (float, "P", "share of a factor's inputs that are dropped (default 0)"),
    "beta": (float, "B", "of --dpo: how dear it is to go away from the base (default 0.1)"),
    "optimizer": (str, "NAME", "adamw, lion, sgd, rmsprop or adafactor (default adamw)"),
    "learning_rate": (float, "RATE", "the highest (default 2e-4)"),
    "betas": (_pair, "B,B", "of adamw and lion; the second is rmsprop's decay (default 0.9,0.999)"),
    "eps": (float, "E", "of adamw and rmsprop (default 1e-8)"),
    "momentum": (float, "M", "of sgd (default 0)"),
    "weight_decay": (float, "W", "default 0"),
    "schedule": (str, "NAME", "constant, linear or cosine, after the warm-up (default cosine)"),
    "warmup": (int, "N", "steps on which the rate rises from 0 (default 0)"),
    "clip": (_limit, "NORM", "largest norm of the gradient; none for no limit (default 1)"),
    "batch_size": (int, "N", "rows computed together (default 4)"),
    "accumulation": (int, "N", "batches to a step (default 1)"),
    "epochs": (int, "N", "times every row is seen (default 1)"),
    "steps": (int, "N", "optimizer steps (default: follows from --epochs)"),
    "shuffle": (_switch, "on|off", "a new order of the rows for each epoch (default on)"),
    "max_length": (int, "N", "rows of more tokens are left out (default: the model's context)"),
    "seed": (int, "S", "of the factors, the order of the rows and dropout (default 0)"),
    "compute": (str, "DTYPE", "float32 or bfloat16 for all but factors and loss (default: as --numerics says)"),
    "recompute": (str, "WHAT", "what of layers is computed again on the way back: all, cheap, nothing (default cheap)"),
    "eval_every": (int, "N", "steps between evaluations (default: the end alone)"),
    "patience": (int, "N", "stop after N evaluations without a better loss (default: never)"),
    "checkpoint_every": (int, "N", "steps between states to go on from (default 50)"),
}  # fmt: skip


def add(verbs: Verbs) -> None:
    """Registers the verb."""
    train = add_verb(
        verbs,
        "train",
        _train,
        "Train an adapter; the same command goes on after a kill, to the same bits.",
        load_flags("reference"),
        cache_flags(),
    )
    group = train.add_argument_group("training")
    group.add_argument(
        "--data",
        required=True,
        metavar="JSONL",
        help="rows: prompt and completion, messages, text, ids; with --dpo prompt, chosen and rejected",
    )
    held_out = "rows that are not learned from; the adapter with the least loss of them is kept"
    group.add_argument("--eval", metavar="JSONL", help=held_out)
    group.add_argument("--output", required=True, metavar="DIR", help="the adapter (PEFT), metrics, curves, the state")
    group.add_argument("--start", metavar="PATH", help="an adapter to train on; it says rank, scale and modules")
    group.add_argument("--date", metavar="DATE", help="the date chat templates are told (default: now)")
    for name, (kind, metavar, text) in _FLAGS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    group.add_argument("--rslora", action="store_true", default=None, help="scale = A / sqrt(R)")
    group.add_argument("--dora", action="store_true", default=None, help="train each row's magnitude, too (DoRA)")
    for name, number in (("rank", int), ("alpha", float)):
        text = f"{name} of the modules a regular expression matches; may be repeated, the first that does wins"
        group.add_argument(f"--{name}-pattern", type=_pattern(number), action="append", metavar="REGEX=N", help=text)
    text = "learn from pairs of completions, one chosen and one rejected (direct preference optimization)"
    group.add_argument("--dpo", action="store_true", default=None, help=text)


def _train(args: argparse.Namespace) -> int:
    from llmjax.training.checkpoints import expect_output
    from llmjax.training.config import TrainConfig
    from llmjax.training.loop import finetune

    given = {field.name: getattr(args, field.name) for field in fields(TrainConfig)}
    for name in ("rank_pattern", "alpha_pattern"):
        pairs = given[name] or ()
        if twice := next((key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i])), None):
            raise ConfigError(f"--{name.replace('_', '-')}: {twice!r} is given twice; give it once")
        given[name] = dict(pairs) or None
    unlimited = {"clip": None} if given["clip"] == "none" else {}
    config = TrainConfig.from_dict({name: v for name, v in given.items() if v is not None} | unlimited)
    if args.lora is not None:
        raise RequestError("--lora: an adapter to train on is given as --start")
    expect_output(args.output)
    result = finetune(
        loading.load_model(args),
        Path(args.data),
        config,
        eval_rows=None if args.eval is None else Path(args.eval),
        output=args.output,
        start=args.start,
        date=args.date,
        report=_Progress(),
        note=lambda text: print(f"llmjax: {text}", file=sys.stderr),
    )
    summary = {"output": args.output, "step": result.step, "finished": result.finished,
               "loss": result.metrics[-1]["loss"], "eval_loss_before": result.first_eval,
               "eval_loss": result.best_eval, "rows": len(result.data[0].examples),
               "bad_rows": sum(len(data.bad) for data in result.data)}  # fmt: skip
    print(json.dumps(summary))
    return 1 if summary["bad_rows"] else 0


class _Progress:
    """One line rewritten on a terminal, plain lines now and then elsewhere."""

    def __init__(self) -> None:
        self._last = (0.0, 0)

    def __call__(self, report: "Report") -> None:
        from llmjax.batch.progress import PLAIN_SECONDS, TERMINAL_SECONDS, clock

        values, now = report.values, time.monotonic()
        terminal, end = sys.stderr.isatty(), report.step == report.steps
        told, tokens = self._last
        if not (end or "eval_loss" in values or now - told >= (TERMINAL_SECONDS if terminal else PLAIN_SECONDS)):
            return
        rate = (values["tokens"] - tokens) / (now - told) if told else values["tokens"] / max(values["seconds"], 1e-3)
        self._last = now, values["tokens"]
        line = f"step {report.step:,}/{report.steps:,} · loss {values['loss']:.4f}"
        line += f" · margin {values['rewards/margins']:.4f}" if "rewards/margins" in values else ""
        line += f" · eval {values['eval_loss']:.4f}" if "eval_loss" in values else ""
        line += f" · {rate:,.0f} tok/s · {clock(report.seconds_left)} left"
        with contextlib.suppress(OSError):  # no one reads it any more
            print(
                f"\r\x1b[K{line}" if terminal else line,
                end="\n" if end or not terminal else "",
                file=sys.stderr,
                flush=True,
            )
