"""Mistakes in products, the embedding, the head and the order of layers."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llmjax.models.context import tap
from llmjax.oracle.causes.base import (
    PROJECTIONS,
    SCHEMES,
    Cause,
    Scene,
    always,
    borrowed,
    factors,
    field,
    leaf,
    modules,
    other_layers,
    put,
    scale_of,
    scales_of,
    unbiased,
    weight_of,
)
from llmjax.oracle.floors import Change, requantized, rounded
from llmjax.oracle.stages import Edit, Params
from llmjax.quant.qtensor import QTensor


def _one_scale(most: float, narrow: Change) -> Change:
    """To a grid whose one scale, of the whole weight, makes its largest value ``most``."""

    def change(weight: jax.Array) -> jax.Array:
        scale = jnp.maximum(jnp.max(jnp.abs(weight)), 1e-30) / most
        return narrow(weight / scale) * scale

    return change


# What a weight may have been rounded to.
_ROUNDINGS: dict[str, Change] = {
    **{scheme: requantized(scheme) for scheme in SCHEMES},
    **{dtype: rounded(dtype) for dtype in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")},
    "int8 with one scale": _one_scale(127, jnp.round),
    "int4 with one scale": _one_scale(7, jnp.round),
    "float8_e4m3fn with one scale": _one_scale(448, rounded("float8_e4m3fn")),
}
# Pairs of rows that are held against each other at most.
_PAIRS = 1 << 25

# Products.


def projection(scene: Scene, step: str) -> Iterator[Cause]:
    """Of one product with a weight."""
    weight = weight_of(scene, step)
    if weight is None or isinstance(weight, QTensor) or (step == "head" and scene.stage < scene.stages.layers):
        return

    def cause(word: str, detail: str, change: Any, name: str = "weight") -> Cause:
        return Cause(word, detail, (step,), Edit(params=leaf(step, name, change)))

    yield cause("bias", "the bias is not added", jnp.zeros_like, "bias")
    yield cause("bias", "the bias is added twice", lambda b: 2 * b, "bias")
    if weight.shape[0] == weight.shape[1]:
        yield cause("weight_transposed", "the weight is transposed", lambda w: w.T)
    for other in (p for p in modules(scene, norms=False) if p not in (step, "head") and step != "head"):
        theirs = weight_of(scene, other)
        if theirs is not None and theirs.shape == weight.shape:
            found = {name: weight_of(scene, other, name) for name in ("weight", "bias")}
            yield Cause("weight_swapped", f"the weight is that of {other}", (step,), Edit(params=put(step, found)))
    for j in other_layers(scene):
        if (layers := borrowed(scene, step, j, "weight", "bias")) is not None:
            yield Cause("weight_swapped", f"the weight is layer {j}'s", (step,), Edit(params=layers))
    for what, change in _ROUNDINGS.items():
        yield cause("quantization", f"the weight is rounded to {what}", change)
    if scene.step == step:
        scale = scale_of(scene, step)
        if scale is not None:
            yield cause("weight", f"the weight is scaled by {scale:.4g}", lambda w: w * scale)
        yield from _channels(scene, step)
        yield from _rows(scene, step)
        yield from shifted(scene, step)
    yield from _adapter(scene, step)


def together(scene: Scene) -> Iterator[Cause]:
    """Of several products at once, where none of them was dumped: two in each other's place, all without biases."""
    if not 0 <= scene.stage < scene.stages.layers or scene.step in PROJECTIONS:
        return
    leaves = {p: {name: weight_of(scene, p, name) for name in ("weight", "bias")} for p in PROJECTIONS if p != "head"}
    for a, b in (("mlp.gate", "mlp.up"), ("attn.k", "attn.v"), ("attn.q", "attn.k")):
        x, y = leaves[a]["weight"], leaves[b]["weight"]
        if x is not None and y is not None and x.shape == y.shape:
            edit = Edit(params=lambda p, a=a, b=b: put(a, leaves[b])(put(b, leaves[a])(p)))  # type: ignore[misc]
            yield Cause("weight_swapped", f"the weights of {a} and {b} are swapped", (a, b), edit)
    biased = tuple(p for p in leaves if leaves[p]["bias"] is not None)
    for some in (tuple(p for p in biased if p in ("attn.q", "attn.k", "attn.v")), biased):
        if len(some) > 1:
            edit = Edit(params=partial(_without_biases, some))
            yield Cause("bias", f"the biases of {', '.join(some)} are not added", some, edit)


def _without_biases(steps: tuple[str, ...], params: Params) -> Params:
    for step in steps:
        params = leaf(step, "bias", jnp.zeros_like)(params)
    return params


def _adapter(scene: Scene, step: str) -> Iterator[Cause]:
    """Of an adapter's scale, beside the weight or merged into it."""
    apart, layer = weight_of(scene, step, "lora"), scene.stage < scene.stages.layers
    lora = scene.stages.merged.get(f"layers.{scene.stage}.{step}.weight" if layer else f"{step}.weight")
    lora = lora if apart is None else apart
    if lora is None:
        return

    def scaled(factor: float) -> Edit:
        rest = lora.replace(scale=lora.scale * (factor if apart is not None else factor - 1), norm=None)
        rest = rest if factor else rest.replace(magnitude=None)

        def change(w: jax.Array) -> Any:
            return rest if apart is not None else w + rest.scale * (rest.b @ rest.a)

        return Edit(params=leaf(step, "weight" if apart is None else "lora", change))

    rank, scale = lora.a.shape[0], float(lora.scale)
    factors = [0.0, rank, 1 / rank, 2.0, 0.5, rank**0.5, rank**-0.5, 1 / (scale or 1.0)]
    if scene.step == step and (without := scene.under(scaled(0.0))) is not None:
        ours, theirs = (x.astype(np.float64) - without for x in (scene.ours, scene.theirs))
        factors.append(float((ours * theirs).sum() / max((ours**2).sum(), 1e-300)))
    for factor in factors:
        detail = f"the adapter's scale is {scale * factor:.4g}" if factor else "the adapter is not applied"
        yield Cause("lora_scale", detail, (step,), scaled(factor))
    if lora.magnitude is not None:
        plain = Edit(params=leaf(step, "lora", lambda w: lora.replace(magnitude=None)))
        yield Cause("lora_scale", "the adapter's magnitudes are not applied", (step,), plain)


def _channels(scene: Scene, step: str) -> Iterator[Cause]:
    """A few rows of the weight scaled, each by its own factor."""
    ours, theirs = unbiased(scene, step)
    if len(ours) < 4:
        return
    scales = scales_of(ours, theirs)
    off = np.abs(scales - 1) > 1e-3
    if off.any():
        factor = jnp.asarray(np.where(off, scales, 1), jnp.float32)
        detail = f"{off.sum()} of {len(off)} output channels are scaled"
        edit = Edit(params=leaf(step, "weight", lambda w: w * factor[:, None]))
        yield Cause("weight", detail, (step,), edit)


def _rows(scene: Scene, step: str) -> Iterator[Cause]:
    """Rows of the weight in another order, or a few that are other ones altogether."""
    shape = scene.ours.shape
    ours, theirs = (x.reshape(len(x), -1).astype(np.float64) for x in (scene.ours, scene.theirs))
    if len(ours) < 4:
        return
    size, apart = np.linalg.norm(ours, axis=0), np.linalg.norm(theirs - ours, axis=0)
    off = np.flatnonzero(apart > 1e-3 * np.maximum(size, 1e-3 * size.max()))
    if not len(off) or len(off) * len(size) > _PAIRS:
        return
    # |x - y|^2 of each of theirs that is off to each of ours.
    distances = (theirs[:, off] ** 2).sum(0)[:, None] + (size**2)[None] - 2 * theirs[:, off].T @ ours
    order = np.arange(len(size))
    order[off] = distances.argmin(1)
    moved = order != np.arange(len(size))
    if moved.any() and len(set(order)) == len(order):
        first = ", ".join(f"{i}: {order[i]}" for i in np.flatnonzero(moved)[:4])
        found = {name: weight_of(scene, step, name) for name in ("weight", "bias")}
        found = {name: None if value is None else value[order] for name, value in found.items()}
        detail = (
            f"{moved.sum()} of {len(order)} rows are in another order ({first}{', ...' if moved.sum() > 4 else ''})"
        )
        yield Cause("weight_swapped", detail, (step,), Edit(params=put(step, found)))
    along = theirs[:, off] - ours[:, off] * scales_of(ours, theirs)[off]
    if len(off) <= len(size) / 8 and (np.linalg.norm(along, axis=0) > 0.1 * apart[off]).any():
        some = ", ".join(map(str, off[:8])) + (", ..." if len(off) > 8 else "")
        wrong = np.isin(np.arange(len(size)), off).reshape(1, *shape[1:])
        post = partial(_instead, wrong, scene.theirs)
        yield Cause("weight", f"{len(off)} of {len(size)} rows are other ones ({some})", (step,), post=post)


def _instead(wrong: np.ndarray, theirs: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.where(wrong, theirs, x)


def shifted(scene: Scene, step: str) -> Iterator[Cause]:
    """Another bias: what is the same for all tokens."""
    apart = scene.theirs.astype(np.float64) - scene.ours
    shift = apart.mean(0)
    if len(apart) >= 4 and np.linalg.norm(apart - shift) < 0.1 * np.linalg.norm(apart):
        ours = "another" if weight_of(scene, step, "bias") is not None else "one that ours lacks"
        yield Cause("bias", f"the bias is {ours}", (step,), post=partial(_plus, shift.astype(np.float32)))


def _plus(shift: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x + shift


# The ends, and whole layers.


def embedding(scene: Scene) -> Iterator[Cause]:
    """Of the embedding."""
    if scene.stage >= 0:
        return
    steps, config = ("embed",), scene.stages.model.config
    root = float(config.hidden_size) ** 0.5
    scales = {float(jnp.bfloat16(root)): "rounded to bfloat16", float(jnp.float16(root)): "rounded to float16",
              root: f"sqrt({config.hidden_size})", float(config.hidden_size): "applied twice", 1 / root: "a division",
              1.0: "missing"}  # fmt: skip
    for scale, text in scales.items():
        yield Cause("embedding_scale", f"the scale is {text} ({scale:g})", steps, Edit({"embed": field(scale=scale)}))
    for what, change in _ROUNDINGS.items():
        edit = Edit(params=leaf("embed", "weight", change))
        yield Cause("quantization", f"the table is rounded to {what}", steps, edit)
    if scene.step != "embed":
        for factor in factors(scene, "embedding_scale", _table_times):
            yield Cause("embedding_scale", f"the embedding is {factor:.5g} times as large", steps, _table_times(factor))
        yield from _other_starts(scene)
        return
    wrong = np.flatnonzero(
        np.linalg.norm(scene.theirs - scene.ours, axis=-1) > 1e-2 * np.linalg.norm(scene.ours, axis=-1)
    )
    if 0 < len(wrong):
        table = np.asarray(scene.stages.params(-1)["embed"]["weight"])
        rows = scene.theirs[wrong] / np.maximum(np.linalg.norm(scene.theirs[wrong], axis=-1, keepdims=True), 1e-30)
        norms = np.maximum(np.linalg.norm(table, axis=-1), 1e-30)
        likely = (rows @ table.T / norms).argmax(-1)
        fed = scene.stages.ids.copy()
        fed[wrong] = likely
        if not np.array_equal(fed, scene.stages.ids):
            pairs = ", ".join(f"{int(t)}: {int(fed[t])} for {int(scene.stages.ids[t])}" for t in wrong[:4])
            yield Cause("token_ids", f"other ids were fed (position {pairs})", steps, _fed(fed))
    scale = scale_of(scene, "nothing")
    if scale is not None:
        edit = Edit(params=leaf("embed", "weight", lambda w: w * scale))
        yield Cause("weight", f"the table is scaled by {scale:.4g}", steps, edit)


def _table_times(factor: float) -> Edit:
    return Edit(params=leaf("embed", "weight", lambda w: w * factor))


def _other_starts(scene: Scene) -> Iterator[Cause]:
    """Another token in the place of the first: BOS where the text has none, another one, or none where it has one."""
    ids, tokenizer, rows = scene.stages.ids, scene.stages.model.tokenizer, scene.stages.model.config.vocab_size
    bos = None if tokenizer is None else tokenizer.bos_id
    known = {0, 1, 2, *(() if bos is None else (bos,)), *(tokenizer.eos_ids if tokenizer else ())}
    for first in sorted(id for id in known if id < rows and id != ids[0]):
        what = f"{first}{' (BOS)' if first == bos else ''} for {ids[0]}"
        fed = np.concatenate([[first], ids[1:]])
        yield Cause("token_ids", f"another first token was fed: {what}", ("embed",), _fed(fed))


def _fed(ids: np.ndarray) -> Edit:
    return Edit({"embed": lambda module, run, _: run(module, jnp.asarray(ids)[None])})


def head(scene: Scene) -> Iterator[Cause]:
    """Of the head and its soft-cap."""
    if scene.stage < scene.stages.layers:
        return
    params = scene.stages.params(scene.stage)
    if "weight" in params.get("head", {}):
        table = params["embed"]["weight"]
        yield Cause(
            "head", "the head is the embedding's table", ("head",), Edit(params=leaf("head", "weight", always(table)))
        )
    for cap in (None, 30.0, 50.0, 20.0):
        if hasattr(scene.stages.model.config, "final_logit_softcapping"):
            edit = Edit(config=lambda c, cap=cap: dataclasses.replace(c, final_logit_softcapping=cap))  # type: ignore[misc]
            yield Cause("final_softcap", f"the soft-cap on logits is {cap or 'missing'}", ("logits",), edit)
        elif cap:
            what = f"logits have a soft-cap of {cap:g}"
            yield Cause("final_softcap", what, ("logits", "head"), post=partial(_capped, cap))


def _capped(cap: float, x: np.ndarray) -> np.ndarray:
    return cap * np.tanh(x / cap)


def layers(scene: Scene) -> Iterator[Cause]:
    """Of a layer's place."""
    if not 0 <= scene.stage < scene.stages.layers:
        return
    every = tuple({tap.split(".", 2)[2] for tap in scene.stages.shapes if tap.startswith(f"layers.{scene.stage}.")})
    for j in other_layers(scene):
        edit = Edit(params=lambda _, j=j: scene.stages.params(j))  # type: ignore[misc]
        yield Cause("layer_order", f"the layer is layer {j}", every, edit)
    skipped = Edit({"": lambda module, run, x: run(_Skip(), x)})
    yield Cause("layer_order", "the layer is left out", every, skipped)


class _Skip(nn.Module):
    @nn.compact
    def __call__(self, x: Any, ctx: Any, *own: Any) -> Any:
        if isinstance(x, tuple):  # what later layers share goes along
            return tap(self, "resid", x[0]), *x[1:]
        return tap(self, "resid", x)
