"""Mistakes in norms."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llmjax.models.context import tap
from llmjax.models.layers import LayerNorm, RMSNorm, UnitOffsetRMSNorm, WideRMSNorm, parameter, rms_normalised
from llmjax.oracle.causes.base import (
    Cause,
    Scene,
    always,
    borrowed,
    factors,
    field,
    leaf,
    modules,
    other_layers,
    scale_of,
    scales_of,
    unbiased,
    weight_of,
)
from llmjax.oracle.causes.weights import shifted
from llmjax.oracle.floors import rounded
from llmjax.oracle.stages import Edit, Hook, Params


class _Identity(nn.Module):
    flat: bool = False  # the step shows all heads in one

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return tap(self, "", x.reshape(*x.shape[:2], -1) if self.flat else x).reshape(x.shape)


class _NoMean(nn.Module):
    """LayerNorm without taking the mean away."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = rms_normalised(x, self.eps) * parameter(self, "weight", nn.initializers.ones, x.shape[-1:])
        if self.has_variable("params", "bias"):
            y = y + self.get_variable("params", "bias")
        return tap(self, "", y.astype(x.dtype))


def _offset(module: Any, run: Any, x: Any) -> Any:
    kind = {RMSNorm: UnitOffsetRMSNorm, WideRMSNorm: UnitOffsetRMSNorm, UnitOffsetRMSNorm: RMSNorm}.get(type(module))
    return run(kind(module.eps) if kind else module, x)


def _other_kind(module: Any, run: Any, x: Any) -> Any:
    if type(module) is LayerNorm:
        return run(_NoMean(module.eps), x)
    return run(module, x - jnp.mean(x, -1, keepdims=True))


_EPSILONS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-4, 1e-3, 1e-2, 0.0)
# What weights of norms are kept in where those of products are.
_KEPT = ("bfloat16", "float16")


def norms(scene: Scene, steps: Sequence[str]) -> Iterator[Cause]:
    """Of several norms at once, where one code makes them all."""
    mistakes: dict[tuple[str, str], Hook] = {
        ("norm_offset", "1 + w and w are confused in all norms"): _offset,
        ("norm_kind", "root mean square and mean-and-variance norms are confused, all of them"): _other_kind,
        **{("norm_eps", f"epsilon is {eps:g} in all norms"): field(eps=eps) for eps in _EPSILONS},
    }
    for (word, detail), hook in mistakes.items():
        yield Cause(word, detail, tuple(steps), Edit(dict.fromkeys(steps, hook)))
    yield from _of_epsilon(scene, tuple(steps), "in all norms")
    for dtype in _KEPT:
        edit = Edit(params=partial(_kept, steps, dtype))
        yield Cause("precision", f"the weights of all norms are rounded to {dtype}", tuple(steps), edit)


def _of_epsilon(scene: Scene, steps: tuple[str, ...], where: str = "") -> Iterator[Cause]:
    """Another epsilon, where none of these norms was dumped."""
    if scene.step in steps:
        return
    own: set[float] = set()

    def times(factor: float) -> Edit:
        def change(eps: float) -> float:
            own.add(eps)
            return eps * factor

        return Edit(dict.fromkeys(steps, field(eps=change)))

    for factor in factors(scene, f"norm_eps {', '.join(steps)}", times, 3):
        detail = f"epsilon is {', '.join(f'{eps * factor:.3g}' for eps in sorted(own))} {where}".rstrip()
        yield Cause("norm_eps", detail, steps, times(factor))


def _kept(steps: Sequence[str], dtype: str, params: Params) -> Params:
    for step in steps:
        params = leaf(step, "weight", rounded(dtype))(params)
    return params


def norm(scene: Scene, step: str) -> Iterator[Cause]:
    """Of one norm."""
    here = (step,)

    def cause(word: str, detail: str, hook: Hook | None = None, params: Any = None) -> Cause:
        return Cause(word, detail, here, Edit({step: hook} if hook else {}, params or (lambda p: p)))

    missing = "qk_norm" if step.endswith(("q_norm", "k_norm")) else "norm_kind"
    flat = scene.step == step and scene.ours.ndim == 2
    yield cause(missing, "the norm is not applied", lambda module, run, x: run(_Identity(flat), x))
    yield cause("norm_offset", "1 + w and w are confused", _offset)
    yield cause("norm_kind", "root mean square and mean-and-variance norm are confused", _other_kind)
    for eps in _EPSILONS:
        yield cause("norm_eps", f"epsilon is {eps:g}", field(eps=eps))
    yield from _of_epsilon(scene, here)
    yield cause("bias", "the norm's bias is not added", params=leaf(step, "bias", jnp.zeros_like))
    own = weight_of(scene, step)
    if own is None:
        return
    for other in (n for n in modules(scene, norms=True) if n != step):
        weight = weight_of(scene, other)
        if weight is not None and weight.shape == own.shape and scene.stage < scene.stages.layers:
            yield cause("weight_swapped", f"the weight is that of {other}", params=leaf(step, "weight", always(weight)))
    for j in other_layers(scene):
        if (theirs := borrowed(scene, step, j, "weight")) is not None:
            yield cause("weight_swapped", f"the weight is layer {j}'s", params=theirs)
    yield cause("weight", "the norm's weight is left out (1)", params=leaf(step, "weight", jnp.ones_like))
    yield cause("weight", "the norm's weight is left out (0)", params=leaf(step, "weight", jnp.zeros_like))
    for dtype in _KEPT:
        yield cause("precision", f"the norm's weight is rounded to {dtype}", params=partial(_kept, here, dtype))
    if scene.step == step and own.ndim == 1:
        scale = scale_of(scene, step)
        if scale is not None:
            scaled = leaf(step, "weight", lambda w: w * scale)
            yield cause("weight", f"the weight is scaled by {scale:.4g}", params=scaled)
        yield from _channels(scene, step, len(own))
        if (fitted := _epsilon(scene, step, len(own))) is not None:
            yield cause("norm_eps", f"epsilon is {fitted:g}", field(eps=fitted))
        yield from shifted(scene, step)
    yield cause("precision", "the norm is computed in bfloat16", _narrow_norm)


def _channels(scene: Scene, step: str, width: int) -> Iterator[Cause]:
    """Channels of the weight scaled, each by its own factor, and nothing behind it takes that back."""
    ours, theirs = (x.reshape(-1, width) for x in unbiased(scene, step))
    if len(ours) < 4:
        return
    scales = scales_of(ours, theirs)
    off = np.abs(scales - 1) > 1e-3
    factor = jnp.asarray(np.where(off, scales, 1), jnp.float32)
    for offset in (0, 1) if off.any() else ():  # 1 + w

        def change(weight: jax.Array, offset: int = offset) -> jax.Array:
            return (weight + offset) * factor - offset

        detail = f"{off.sum()} of {width} channels are scaled"
        yield Cause("weight", detail, (step,), Edit(params=leaf(step, "weight", change)))


def _epsilon(scene: Scene, step: str, width: int) -> float | None:
    """The epsilon by which the candidate's tokens are as small as they are; None for none, or one that is tried."""
    runs = (scene.under(Edit({step: field(eps=eps)})) for eps in (0.0, 1.0))
    scenes = [dataclasses.replace(scene, ours=run) for run in runs if run is not None]
    if len(scenes) < 2 or not all(np.isfinite(each.ours).all() for each in scenes):
        return None
    (plain, theirs), (one, _) = ([x.reshape(-1, width) for x in unbiased(each, step)] for each in scenes)
    sizes = np.maximum((plain**2).sum(-1), 1e-300)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Of sqrt(m / (m + eps)): what a token's square is, by an epsilon of 1, and then what the candidate's is.
        by_one, by_theirs = (np.square((x * plain).sum(-1) / sizes) for x in (one, theirs))
        found = by_one / (1 - by_one) * (1 / by_theirs - 1)
    found = found[np.isfinite(found)]
    eps = float(f"{np.median(found):.3g}") if len(found) else 0.0
    return eps if eps > 0 and all(abs(eps - known) > 0.01 * known for known in _EPSILONS if known) else None


def _narrow_norm(module: Any, run: Any, x: Any) -> Any:
    """Squares, their mean and the root in bfloat16, the weight after it."""
    narrow = x.astype(jnp.bfloat16)
    mean = jnp.mean(narrow * narrow, -1, keepdims=True).astype(jnp.bfloat16)
    wanted = (narrow * jax.lax.rsqrt(mean + jnp.bfloat16(module.eps))).astype(jnp.float32)
    # The module normalises once more, which but for rounding changes nothing.
    return rounded(jnp.bfloat16)(run(module, wanted))
