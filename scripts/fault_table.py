"""Deliberate faults, in transformers' modules and in ours, and what `llmjax compare` says of each.

    python scripts/fault_table.py [--only TEXT]

Prints a table: the verdict, the first faulty module, its cause and how much it explains; then what share is right.
Needs the parity extra.
"""

import argparse
import copy
import dataclasses
import functools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "dumps")]

import transformers_dump  # noqa: E402
from transformers_faults import THEIRS, int8  # noqa: E402

import llmjax  # noqa: E402
from llmjax.models.attention import Scores  # noqa: E402
from llmjax.models.rope import Rope  # noqa: E402
from tests.parity import golden, reference  # noqa: E402

CASES = Path(__file__).parents[1] / "tests" / "data" / "cases"
IDS = np.random.RandomState(5).randint(0, 150, 40).tolist()
_WORK = tempfile.TemporaryDirectory()


@functools.cache
def folder(name: str) -> Path:
    if (CASES / name).exists():
        return CASES / name
    return golden.write(name, Path(_WORK.name) / name)


@functools.cache
def ours(name: str) -> llmjax.Model:
    return llmjax.load(folder(name))


@functools.cache
def _theirs(name: str) -> Any:
    return reference.load(folder(name), json.loads((folder(name) / "config.json").read_text())["model_type"])


# Faults of ours: (variant, function that gives a broken model, module, words).

Broken = Callable[[llmjax.Model], llmjax.Model]


def config(**changes: Any) -> Broken:
    def fault(m: llmjax.Model) -> llmjax.Model:
        found = {k: v(getattr(m.config, k)) if callable(v) else v for k, v in changes.items()}
        return dataclasses.replace(m, config=dataclasses.replace(m.config, **found))

    return fault


def rope(**changes: Any) -> Broken:
    return config(rope=lambda r: dataclasses.replace(r, **changes))


def leaf(path: str, change: Callable[[Any], Any]) -> Broken:
    def fault(m: llmjax.Model) -> llmjax.Model:
        tree = jax.tree.map(lambda x: x, m.params)
        node = tree
        *parents, last = path.split("/")
        for key in parents:
            node = node[key]
        node[last] = jnp.asarray(change(node[last]))
        return dataclasses.replace(m, params=tree)

    return fault


OURS: dict[str, tuple[str, Broken, str, str]] = {
    "own: rope dims": ("phi", rope(dims=20), "layers.0.attn", "rope_dims"),
    "own: rope dims of the default": ("stablelm", rope(dims=12), "layers.0.attn", "rope_dims"),
    "own: local base for global layers": ("gemma3", config(global_rope=lambda r: dataclasses.replace(r, theta=1e4)), "layers.2.attn", "rope_theta"),
    "own: windows of the other layers": ("qwen3_bias_layer_types", config(windows=(None, 4, 4, None)), "layers.0.attn", "window"),
    "own: qk norm off": ("qwen3", config(qk_norm=False), "layers.0.attn", "qk_norm"),
    "own: parallel residual": ("stablelm", config(use_parallel_residual=True), "layers.0.mlp", "residual"),
    "own: sequential residual": ("falcon_40b", lambda m: config(parallel_attn=False)(m), "layers.0", "residual"),
    "own: embedding in int4": ("llama", leaf("embed/weight", lambda w: np.asarray(int8(torch.tensor(np.asarray(w)), 4))), "embed", "quantization"),
    "own: one channel of q zero": ("llama", leaf("layers_1/attn/q/weight", lambda w: w.at[5].set(0)), "layers.1.attn.q", "weight"),
    "own: one norm's weight 1": ("mistral", leaf("layers_2/attn_norm/weight", jnp.ones_like), "layers.2.attn_norm", "weight"),
    "own: q and k norm epsilon": ("gemma3", config(rms_norm_eps=1e-3), "layers.0.attn_norm", "norm_eps"),
}  # fmt: skip

PATCHES: dict[str, tuple[str, Any, str, Callable[..., Any], str, str]] = {
    "own: next token seen": ("llama", Scores, "__call__", lambda right: lambda self, p, q, k, c: right(self, p, q + 1, k, c), "layers.0.attn", "mask"),
    "own: positions one too high in keys and queries": ("llama", Rope, "__call__", lambda right: lambda self, x, c: right(self, x, c.replace(positions=c.positions + 1)), "layers.0.attn", "rope_positions"),
    "own: scores scaled twice": ("gemma2", Scores, "__call__", lambda right: lambda self, p, q, k, c: right(self, p * 0.25, q, k, c), "layers.0.attn", "attention_scale"),
}  # fmt: skip


def says(report: Any) -> tuple[str, str, str, float]:
    if not report.faults:
        return report.verdict, "-", "-", 0.0
    first = report.faults[0]
    cause = first["causes"][0]
    return report.verdict, first["module"], f"{cause['cause']}: {cause['detail']}", cause["explains"]


def right_module(found: str, expected: str) -> bool:
    return found == expected or found.startswith(f"{expected}.") or expected.startswith(f"{found}.")


def theirs_dump(name: str, fault: Callable[[Any], None], out: Path) -> Path:
    model = copy.deepcopy(_theirs(name))
    with reference.float32_alibi():
        try:
            fault(model)
            transformers_dump.write(out, model, IDS)
        finally:
            if hasattr(model, "_restore"):
                setattr(*model._restore)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose names match this regular expression")
    parser.add_argument("--cache", help="keep compiled programs in this folder")
    args = parser.parse_args()
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    rows = []
    work = Path(_WORK.name)
    table = {**{k: ("theirs", *v) for k, v in THEIRS.items()}, **{k: ("ours", *v) for k, v in OURS.items()}}
    table |= {k: ("patch", *v) for k, v in PATCHES.items()}
    for number, (fault, entry) in enumerate(table.items()):
        if not re.search(args.only, fault):
            continue
        began = time.monotonic()
        kind, name, *rest = entry
        *how, module, word = rest
        if kind == "theirs":
            candidate: Any = theirs_dump(name, how[0], work / str(number))
        elif kind == "ours":
            candidate = llmjax.trace(how[0](ours(name)), IDS)
        else:
            owner, method, make = how
            right = getattr(owner, method)
            try:
                setattr(owner, method, make(right))
                jax.clear_caches()
                candidate = llmjax.trace(dataclasses.replace(ours(name)), IDS)
            finally:
                setattr(owner, method, right)
                jax.clear_caches()
        verdict, found, cause, explains = says(llmjax.compare(ours(name), candidate))
        told = cause.split(":")[0]
        row = {
            "fault": fault,
            "verdict": verdict == "different",
            "module": right_module(found, module),
            "cause": told in word.split("|") or told == "unknown",
            "wrong": told not in word.split("|") and explains > 0.9,
            "found": f"{found}  {cause} ({explains:.2f})",
            "seconds": round(time.monotonic() - began, 1),
        }
        rows.append(row)
        marks = "".join("ok  " if row[k] else "NO  " for k in ("verdict", "module", "cause"))
        print(f"{fault:48} {marks}{'WRONG ' if row['wrong'] else ''}{row['found']}  [{row['seconds']} s]", flush=True)
    for key in ("verdict", "module", "cause"):
        print(f"{key}: {sum(r[key] for r in rows)} of {len(rows)}")
    print(f"wrong causes above 0.9: {sum(r['wrong'] for r in rows)}")


if __name__ == "__main__":
    main()
