"""Gradients that keep a function's arguments alone and compute what is in it again on the way back (Chen et al. 2016,
arXiv:1604.06174).

``jax.checkpoint`` says the same, but XLA:CPU drops the barriers that it relies on: it then computes everything again
as early as it can, and keeps it (jaxlib 0.10: not a byte is saved).
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import struct
from jax.custom_derivatives import CustomVJPPrimal

from llmjax.products.tiles import after


class _Wanted(struct.PyTreeNode):
    """Of each leaf, whether its derivative is wanted."""

    leaves: tuple[bool, ...] = struct.field(pytree_node=False)


def recomputed(function: Callable[[Any, jax.Array, Any], Any]) -> Callable[[Any, jax.Array, Any], Any]:
    """``function(variables, x, rest)``, whose values are computed again once the derivative of its result is known.

    Only what is asked for is differentiated: of frozen weights nothing is computed.
    """

    @jax.custom_vjp
    def run(variables: Any, x: jax.Array, rest: Any) -> Any:
        return function(variables, x, rest)

    def forward(*args: Any) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(args, is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal))
        values = [leaf.value for leaf in leaves]
        return function(*jax.tree.unflatten(tree, values)), (
            jax.tree.unflatten(tree, values),
            _Wanted(tuple(leaf.perturbed for leaf in leaves)),
        )

    def backward(kept: Any, seed: Any) -> Any:
        (variables, x, rest), wanted = kept
        x = after(jax.tree.leaves(seed)[0], x)
        leaves, tree = jax.tree.flatten((variables, x, rest))

        def of_wanted(some: list[Any]) -> Any:
            rest_of_some = iter(some)
            mixed = [next(rest_of_some) if w else leaf for leaf, w in zip(leaves, wanted.leaves, strict=True)]
            return function(*jax.tree.unflatten(tree, mixed))

        _, back = jax.vjp(of_wanted, [leaf for leaf, w in zip(leaves, wanted.leaves, strict=True) if w])
        found = iter(back(seed)[0])
        return jax.tree.unflatten(tree, [next(found) if w else None for w in wanted.leaves])

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run
