"""Mistakes in mixtures of experts: which experts a token gets, how much of each, and what they are."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.oracle.causes.base import Cause, Scene, factors, field, leaf, nothing, put, weight_of
from llmjax.oracle.stages import Edit, Hook

# What a choice acts on.
_STEPS = ("router.weights", "experts")

Chosen = tuple[jax.Array, jax.Array]


def router(scene: Scene) -> Iterator[Cause]:
    """Of the choice of experts."""
    gate = weight_of(scene, "experts.gate")
    if gate is None:
        return

    def cause(detail: str, hook: Hook) -> Cause:
        return Cause("router", detail, _STEPS, Edit({"*choice": hook}))

    yield cause("the weights of a token's experts do not add up to 1 (norm_topk_prob)", field(normalised=False))
    yield cause(
        "the weights of a token's experts add up to 1 (norm_topk_prob), as of a softmax behind the choice",
        field(normalised=True),
    )
    for by, detail in ((-1, "one expert fewer"), (1, "one expert more")):
        yield cause(f"a token gets {detail}", field(used=lambda k, by=by: min(max(k + by, 1), len(gate))))
    yield cause("a token gets one expert", field(used=1))
    yield cause("the weights are sigmoids, no softmax", _weighing(_sigmoids))
    yield cause("the weights are sigmoids that are made to add up to 1", _weighing(lambda *x: _shares(_sigmoids(*x))))
    yield cause("a token's experts have equal weights", _after(lambda w, c: (jnp.full_like(w, 1 / w.shape[-1]), c)))
    yield cause("a token's experts all have a weight of 1", _after(lambda w, c: (jnp.ones_like(w), c)))
    yield cause("a token's experts are sorted, their weights are not", _after(lambda w, c: (w, jnp.sort(c, -1))))

    def times(factor: float) -> Edit:
        return Edit({"*choice": _after(lambda w, c: (w * factor, c))})

    for factor in factors(scene, "router", times):
        detail = f"the weights of experts are {factor:.5g} times too large (a scaling factor of what is routed)"
        yield Cause("router", detail, _STEPS, times(factor))
    # A router with parameters of its own (Gemma 4).
    for name, what, steps in (
        ("per_expert_scale", "the scale of each expert", _STEPS),
        ("scale", "the scale of what the router reads", ("router.project",)),
    ):
        yield Cause("router", f"{what} is missing", steps, Edit(params=leaf("router", name, jnp.ones_like)))
    root = scene.stages.model.config.hidden_size**0.5
    detail = "what the router reads is not divided by the root of its width"
    yield Cause("router", detail, ("router.project",), Edit(params=leaf("router", "scale", lambda s: s * root)))


def experts(scene: Scene) -> Iterator[Cause]:
    """Of what they compute, and of an MLP beside them."""
    gate, up = (weight_of(scene, f"experts.{name}") for name in ("gate", "up"))
    if gate is None:
        return

    def swapped(params: Any) -> Any:
        return put("experts.gate", {"weight": up})(put("experts.up", {"weight": gate})(params))

    yield Cause("weight_swapped", "the weights of gate and up are swapped in the experts", ("experts",),
                Edit(params=swapped))  # fmt: skip
    for what, norm in (("MLP's output is not added beside the experts'", "post_dense_norm"),
                       ("experts' output is not added beside the MLP's", "post_experts_norm")):  # fmt: skip
        yield Cause("residual", f"the {what}", ("post_mlp_norm",), Edit({norm: nothing}))


def _after(change: Callable[[jax.Array, jax.Array], Chosen]) -> Hook:
    """Other weights, or other experts, than were chosen."""
    return lambda module, run, x: change(*run(module, x))


def _weighing(weigh: Callable[[jax.Array, jax.Array], jax.Array]) -> Hook:
    """Other weights for the same experts, from scores ``[B, T, E]`` and numbers ``[B, T, k]``."""

    def hook(module: Any, run: Any, x: jax.Array) -> Chosen:
        _, chosen = run(module, x)
        return weigh(x.astype(jnp.float32), chosen), chosen

    return hook


def _sigmoids(scores: jax.Array, chosen: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(jnp.take_along_axis(scores, chosen, -1))


def _shares(weights: jax.Array) -> jax.Array:
    return weights / jnp.sum(weights, -1, keepdims=True)
