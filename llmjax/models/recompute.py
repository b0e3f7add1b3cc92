"""Gradients that keep a function's arguments alone and compute what is in it again on the way back (Chen et al. 2016,
arXiv:1604.06174).

``jax.checkpoint`` says the same, but XLA:CPU drops the barriers that it relies on: it then computes everything again
as early as it can, and keeps it (jaxlib 0.10: not a byte is saved).  What is inside a branch it leaves there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal

from llmjax.numerics import on_cpu

_Function = Callable[..., Any]


class _Wanted(struct.PyTreeNode):
    """Of each leaf, whether its derivative is wanted."""

    leaves: tuple[bool, ...] = struct.field(pytree_node=False)


def recomputed(function: _Function) -> _Function:
    """``function``, of any trees of arrays, whose values are computed again once the derivative of its result is known.

    Only what is asked for is differentiated: of frozen weights nothing is computed.
    """
    if not on_cpu():
        return jax.checkpoint(function)

    @jax.custom_vjp
    def run(*args: Any) -> Any:
        return function(*args)

    def forward(*args: Any) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(args, is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal))
        values = [leaf.value for leaf in leaves]
        wanted = _Wanted(tuple(leaf.perturbed for leaf in leaves))
        return function(*jax.tree.unflatten(tree, values)), (jax.tree.unflatten(tree, values), wanted)

    def backward(kept: Any, seed: Any) -> Any:
        args, wanted = kept
        leaves, tree = jax.tree.flatten(args)
        chosen = [leaf for leaf, w in zip(leaves, wanted.leaves, strict=True) if w]

        def again(chosen: list[jax.Array]) -> Any:
            those = iter(chosen)
            mixed = [next(those) if w else leaf for leaf, w in zip(leaves, wanted.leaves, strict=True)]
            return function(*jax.tree.unflatten(tree, mixed))

        def zeros(chosen: list[jax.Array], seed: Any) -> list[jax.Array]:
            return [jnp.zeros_like(leaf) for leaf in chosen]

        def derivatives(chosen: list[jax.Array], seed: Any) -> list[jax.Array]:
            return jax.vjp(again, chosen)[1](seed)[0]

        first = lax.bitcast_convert_type(jax.tree.leaves(seed)[0].reshape(-1)[0].astype(jnp.float32), jnp.uint32)
        never = first == 0x7FC1_2345  # a NaN no arithmetic makes; XLA does not know
        found = iter(lax.cond(never, zeros, derivatives, chosen, seed))
        return jax.tree.unflatten(tree, [next(found) if w else None for w in wanted.leaves])

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run
