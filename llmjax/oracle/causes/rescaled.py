"""Scales moved from a step into what reads it (AWQ, SmoothQuant, folded norms): no mistake, but other tensors."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.oracle.causes.base import PROJECTIONS, Cause, Scene, leaf, modules, scales_of, weight_of
from llmjax.oracle.stages import Edit, Params
from llmjax.oracle.steps import sources

# The share of an error that scales of channels must take away to be worth a trial, and tokens that can tell it.
_SHARE, _TOKENS = 0.3, 4


def rescaled(scene: Scene) -> Iterator[Cause]:
    """Each channel of a norm, of ``mlp.up`` or ``attn.v`` has a scale that the products behind it take back."""
    step, weight = scene.step, weight_of(scene, scene.step)
    if step in PROJECTIONS and step not in ("mlp.up", "attn.v"):
        return
    if weight is None or weight.ndim > 2 or scene.ours.shape != (len(scene.ours), len(weight)):
        return
    ours, theirs = (x.astype(np.float64) for x in (scene.ours, scene.theirs))
    scales = scales_of(ours, theirs)
    left, apart = (float(np.linalg.norm(theirs - x)) for x in (ours * scales, ours))
    readers = _readers(scene, step)
    if len(ours) < _TOKENS or left > (1 - _SHARE) * apart or not readers or not (np.abs(scales) > 1e-6).all():
        return
    detail = (
        f"{step}'s channels are scaled, and scaled back in {', '.join(readers)}: together the same (AWQ, SmoothQuant, "
        f"a folded norm); a dump without {step} is measured past it"
    )
    factor = jnp.asarray(scales, jnp.float32)
    for offset in (0, 1) if weight.ndim == 1 else (0,):  # a norm may mean 1 + w

        def edit(params: Params, offset: int = offset) -> Params:
            params = leaf(step, "weight", lambda w: _rows(w + offset, factor) - offset)(params)
            params = leaf(step, "bias", lambda b: b * factor)(params)
            for reader in readers:
                params = leaf(reader, "weight", lambda w: w / factor)(params)
            return params

        yield Cause("weight", detail, (step,), Edit(params=edit))


def _rows(weight: jax.Array, factor: jax.Array) -> jax.Array:
    return weight * (factor if weight.ndim == 1 else factor[:, None])


def _readers(scene: Scene, step: str) -> list[str]:
    """The products that read a step's channels."""
    width, prefix = len(scene.ours[0]), f"layers.{scene.stage}." if scene.stage < scene.stages.layers else ""
    found = []
    for name in modules(scene, norms=False) if scene.stage >= 0 else ():
        weight = weight_of(scene, name)
        if weight is None or weight.shape[-1] != width:
            continue
        read = sources(prefix + name, scene.stages.shapes, scene.stages.layers)
        if prefix + step in read or (step, name) == ("attn.v", "attn.o"):
            found.append(name)
    return found
