#!/usr/bin/env python3
"""What quantization costs a model: perplexity, KL divergence from the float model, and how often the top token is kept.

    python scripts/quality.py [--model M] [--windows N] [--json FILE] [VARIANT ...]

A variant is what ``llmjax.load`` takes as ``quantize`` (``int8``, ``int4-g32``, ``mixed-8-4-8``, a TOML file),
``stored`` for the checkpoint's own packed weights, or either with ``@PROFILE`` for another numerics profile than
``reference`` (``int8@dynamic_int8``).  Each is compared with the float32 weights of the checkpoint, on the first 64,000
characters of Python's own documentation (``pydoc_data.topics``, part of every CPython); the hash of that text is
printed, since it changes between versions of Python.  Windows of 512 tokens are scored on their own, the first token of
each being given.

Standard errors take tokens as independent.  That of the change in perplexity is of the pairs: both models score the
same tokens, so it is far smaller than the perplexity's own.
"""

import argparse
import dataclasses
import hashlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import llmjax  # noqa: E402
from llmjax.numerics import resolve  # noqa: E402
from llmjax.quant.schemes import parse  # noqa: E402
from llmjax.text.tokenizer import Tokenizer  # noqa: E402

VARIANTS = (
    "stored",
    "int8",
    "int8@dynamic_int8",
    "mixed-8-4-8",
    "int4",
    "int4-mse",
    "int4-g64",
    "int4-g64-mse",
    "int4-g32",
    "int4-g32-mse",
    "mixed-8-4g32-8",
)
CHARACTERS, WINDOW = 64_000, 512
ROWS = 64  # of logits in float64 at a time


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One number for each scored token.

    Attributes:
      reference: the float model's log-probability of the token, nats.
      candidate: the variant's.
      kl: ``KL(float || variant)`` of the distributions it was predicted by, nats.
      same_top: whether both have the same most likely token there.
    """

    reference: np.ndarray
    candidate: np.ndarray
    kl: np.ndarray
    same_top: np.ndarray

    @classmethod
    def join(cls, parts: Iterable["Tokens"]) -> "Tokens":
        """All tokens of several windows."""
        return cls(*(np.concatenate(columns) for columns in zip(*map(dataclasses.astuple, parts), strict=True)))


def compare(reference: np.ndarray, candidate: np.ndarray, ids: Sequence[int]) -> Tokens:
    """Two models' logits of one text, in float64.

    Args:
      reference: float32 ``[T, V]``.
      candidate: float32 ``[T, V]``.
      ids: the ``T`` tokens; all but the first are scored.
    """
    parts = []
    for start in range(0, len(ids) - 1, ROWS):
        rows = slice(start, min(start + ROWS, len(ids) - 1))
        p, q = log_softmax(reference[rows]), log_softmax(candidate[rows])
        at = np.arange(len(p)), np.asarray(ids[rows.start + 1 : rows.stop + 1])
        kl = (np.exp(p) * (p - q)).sum(-1)
        parts.append(Tokens(p[at], q[at], kl, p.argmax(-1) == q.argmax(-1)))
    return Tokens.join(parts)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def mean(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def summary(tokens: Tokens) -> dict[str, float]:
    """The figures of one variant; standard errors to first order."""
    nll, nll_error = mean(-tokens.candidate)
    change, change_error = mean(tokens.reference - tokens.candidate)
    kl, kl_error = mean(tokens.kl)
    return {
        "tokens": len(tokens.kl),
        "perplexity": float(np.exp(nll)),
        "perplexity_standard_error": float(np.exp(nll)) * nll_error,
        "perplexity_ratio": float(np.exp(change)),
        "perplexity_ratio_standard_error": float(np.exp(change)) * change_error,
        "kl_mean": kl,
        "kl_mean_standard_error": kl_error,
        "kl_99": float(np.percentile(tokens.kl, 99)),
        "kl_max": float(tokens.kl.max()),
        "same_top": float(tokens.same_top.mean()),
    }


def text() -> str:
    """English prose with some code, the same on every machine with this version of Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[:CHARACTERS]


def windows(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    """The text in whole windows, each after the tokens that the checkpoint puts before any text (BOS)."""
    before = tokenizer.encode("")
    ids, size = tokenizer.encode(text)[len(before) :], WINDOW - len(before)
    return [before + ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]


def check(variant: str) -> None:
    """Raises ConfigError for a name that ``load`` would refuse for any model: before the others are measured."""
    scheme, _, profile = variant.partition("@")
    resolve(profile or "reference", np.dtype(np.float32))
    if scheme not in ("stored", "float"):
        parse(scheme)


def load(model: str, variant: str) -> llmjax.Model:
    """The model as a variant's name says."""
    scheme, _, profile = variant.partition("@")
    quantize = None if scheme in ("stored", "float") else scheme
    dtype = None if scheme == "stored" else "float32"
    return llmjax.load(model, dtype=dtype, quantize=quantize, numerics=profile or "reference")


def line(variant: str, megabytes: float, figures: dict[str, float]) -> str:
    """A row of the table."""
    f = figures
    return (
        f"| {variant} | {megabytes:.0f} | {f['perplexity']:.3f} ± {f['perplexity_standard_error']:.3f} | "
        f"{100 * (f['perplexity_ratio'] - 1):+.2f} ± {100 * f['perplexity_ratio_standard_error']:.2f} % | "
        f"{f['kl_mean']:.2g} ± {f['kl_mean_standard_error']:.1g} | {f['kl_99']:.2g} | {100 * f['same_top']:.1f} % |"
    )


def measure(args: argparse.Namespace) -> int:
    """Measures and prints, a row as soon as it is known; 1 if a variant does not fit the model, else 0."""
    failed = 0
    model = load(args.model, "float")
    if model.tokenizer is None:
        raise llmjax.TokenizerError(f"{model.path}: brings no tokenizer, so no text can be scored")
    source = text()
    ids = windows(model.tokenizer, source)[: args.windows]
    facts = {
        "model": model.path.name,
        "text": f"pydoc_data.topics of Python {platform.python_version()}, {len(source)} characters",
        "sha256": hashlib.sha256(source.encode()).hexdigest(),
        "windows": len(ids),
        "window": WINDOW,
        "jax": jax.__version__,
        "variants": {},
    }
    print(f"{facts['model']}; {len(ids)} windows of {WINDOW} tokens")
    print(f"text: {facts['text']}, sha256 {facts['sha256'][:16]}\n")
    print("| weights | MB | perplexity | change | KL(float, ·) mean | 99th percentile | same top token |")
    print("|---|---|---|---|---|---|---|", flush=True)
    # In a file without a name, 3 GB for SmolLM2: so each model runs once.
    shape = (len(ids), WINDOW, model.config.vocab_size)
    kept = np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=shape)
    for i, window in enumerate(ids):
        kept[i] = model.logits([window])[0]
    for variant in ("float", *(v for v in args.variants if v != "float")):
        began = time.monotonic()
        if variant != "float":
            try:
                model = load(args.model, variant)
            except llmjax.LlmjaxError as error:  # a group that does not divide; the others are still wanted
                print(f"{variant}: {error}", file=sys.stderr)
                failed = 1
                continue
        candidates = kept if variant == "float" else (model.logits([w])[0] for w in ids)
        figures = summary(Tokens.join(map(compare, kept, candidates, ids)))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
        facts["variants"][variant] = {"bytes": size, **figures}
        print(line(variant, size / 1e6, figures), flush=True)
        print(f"{variant}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        if args.json:
            args.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return failed


def main() -> int:
    """Returns what ``measure`` does; argparse leaves with 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", default=VARIANTS, metavar="VARIANT")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, help="score only the first N windows")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if args.windows is not None and args.windows < 1:
        parser.error(f"--windows: expected at least 1, found {args.windows}")
    try:
        for variant in args.variants:
            check(variant)
        return measure(args)
    except llmjax.LlmjaxError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
