"""The catalogue of known mistakes, to be tried one after the other in our own code (``oracle.patching``).

Each is an ``Edit`` of one stage and the steps it acts on.  What does not apply to a model changes nothing there, and so
explains nothing.  To add one, write it beside its kin.
"""

from collections.abc import Collection, Iterator
from functools import partial

import jax.numpy as jnp
import numpy as np

from llmjax.oracle.causes import blocks, norms, rotation, routers, weights
from llmjax.oracle.causes.base import PROJECTIONS, Cause, Scene, modules
from llmjax.oracle.causes.rescaled import rescaled
from llmjax.oracle.floors import CLASSES
from llmjax.oracle.metrics import log_softmax

# Mistakes that a runtime makes in all layers alike, where they are made in the code and not in a tensor.
EVERYWHERE = (
    "norm_eps", "norm_offset", "norm_kind", "activation", "rope_theta", "rope_dims", "rope_pairing", "rope_positions",
    "rope_scaling", "attention_scale", "attention_softcap", "final_softcap", "window", "mask", "head_mapping",
    "qk_norm", "alibi", "residual", "embedding_scale", "cache_precision", "router",
)  # fmt: skip


# What all products of a program are made of.
_PRODUCTS = (*PROJECTIONS, "attn.probs", "attn.out", "experts")


def everywhere(cause: Cause) -> bool:
    """Whether a mistake is one that a runtime makes in all layers."""
    return cause.cause in EVERYWHERE or cause.steps == _PRODUCTS


def catalogue(scene: Scene, steps: Collection[str]) -> Iterator[Cause]:
    """The causes for a scene that act on one of these steps, the most specific first."""
    return (cause for cause in _all(scene, steps) if not set(steps).isdisjoint(cause.steps))


def _all(scene: Scene, steps: Collection[str]) -> Iterator[Cause]:
    for what, post in (("log-probabilities", log_softmax), ("probabilities", _softmax)):
        yield Cause("head", f"they are {what}, no logits", ("logits", "head"), post=post)
    yield from blocks.beside(scene)
    yield from blocks.residual(scene)  # before weights: a branch left out is told so, not as a weight of zeros
    steps_of_norms = [norm for norm in modules(scene, norms=True) if norm in steps]
    for norm in steps_of_norms:
        yield from norms.norm(scene, norm)
    if len(steps_of_norms) > 1:
        yield from norms.norms(scene, steps_of_norms)
    yield from rescaled(scene)  # after norms: of two that explain as much, that less was changed is likelier
    for projection in modules(scene, norms=False):
        if projection in steps:
            yield from weights.projection(scene, projection)
    yield from weights.together(scene)
    yield from routers.router(scene)
    yield from routers.experts(scene)
    yield from blocks.activation(scene)
    yield from rotation.rotation(scene)
    yield from blocks.scores(scene)
    yield from blocks.heads(scene)
    yield from weights.embedding(scene)
    yield from weights.head(scene)
    yield from weights.layers(scene)
    yield from _products()
    for dtype in ("bfloat16", "float16"):
        post = partial(_rounded, dtype=dtype)
        yield Cause("precision", f"the result is rounded to {dtype}", (scene.step,), post=post)
    yield from _saturated(scene)


def _products() -> Iterator[Cause]:
    """In fewer bits than float32, which they are in by a flag of the program's, or without one: what is computed in
    float32 says so of itself all the same."""
    nearest, cut = CLASSES["tf32"]()
    ways = {"tf32": nearest, "tf32, cut off": cut} | {d: CLASSES[d]()[1] for d in ("bfloat16", "float16")}
    for dtype, edit in ways.items():
        yield Cause("precision", f"products take their inputs in {dtype}", _PRODUCTS, edit)


def _softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(x))


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32))


def _saturated(scene: Scene) -> Iterator[Cause]:
    """What goes beyond a range, of whole numbers or of float8, is at its ends."""
    low, high = float(scene.theirs.min()), float(scene.theirs.max())
    if scene.ours.min() < low or scene.ours.max() > high:
        detail = f"the result saturates at {low:.4g} and {high:.4g}: a scale is too small, or a calibration's range"
        yield Cause("precision", detail, (scene.step,), post=partial(np.clip, a_min=low, a_max=high))
