"""Gradients that keep a function's arguments alone and compute what is in it again on the way back (Chen et al. 2016,
arXiv:1604.06174).

``jax.checkpoint`` says the same, but XLA:CPU drops the barriers that it relies on: it then computes everything again
as early as it can, and keeps it (jaxlib 0.10: not a byte is saved).  What is inside a branch it leaves there.  On other
devices a barrier does.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from llmjax.device import by_device

_Function = Callable[..., Any]


class _Wanted(struct.PyTreeNode):
    """Of each leaf, whether its derivative is wanted."""

    leaves: tuple[bool, ...] = struct.field(pytree_node=False)


def recomputed(function: _Function) -> _Function:
    """``function``, of any trees of arrays, whose values are computed again once the derivative of its result is known.

    Only what is asked for is differentiated: of frozen weights nothing is computed.
    """

    @jax.custom_vjp
    def run(*args: Any) -> Any:
        return function(*args)

    def forward(*args: Any) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(args, is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal))
        values = [leaf.value for leaf in leaves]
        wanted = _Wanted(tuple(leaf.perturbed and jnp.issubdtype(leaf.value.dtype, jnp.inexact) for leaf in leaves))
        return function(*jax.tree.unflatten(tree, values)), (jax.tree.unflatten(tree, values), wanted)

    def backward(kept: Any, seed: Any) -> Any:
        args, wanted = kept
        seeds, form = jax.tree.flatten(jax.tree.map(_instantiated, seed, is_leaf=_is_zero))
        floats = [s for s in seeds if s.dtype != jax.dtypes.float0]  # of integers there is no derivative
        leaves, tree = jax.tree.flatten(args)

        def derivatives(leaves: list[jax.Array], floats: list[jax.Array]) -> list[jax.Array]:
            def again(chosen: list[jax.Array]) -> Any:
                those = iter(chosen)
                mixed = [next(those) if w else leaf for leaf, w in zip(leaves, wanted.leaves, strict=True)]
                return function(*jax.tree.unflatten(tree, mixed))

            those = iter(floats)
            mixed = [s if s.dtype == jax.dtypes.float0 else next(those) for s in seeds]
            return jax.vjp(again, chosen(leaves))[1](jax.tree.unflatten(form, mixed))[0]

        def chosen(leaves: list[jax.Array]) -> list[jax.Array]:
            return [leaf for leaf, w in zip(leaves, wanted.leaves, strict=True) if w]

        def zeros(leaves: list[jax.Array], floats: list[jax.Array]) -> list[jax.Array]:
            return [jnp.zeros_like(leaf) for leaf in chosen(leaves)]

        def after_a_barrier(leaves: list[jax.Array], floats: list[jax.Array]) -> list[jax.Array]:
            return derivatives(*lax.optimization_barrier((leaves, floats)))

        def in_a_branch(leaves: list[jax.Array], floats: list[jax.Array]) -> list[jax.Array]:
            first = lax.bitcast_convert_type(floats[0].reshape(-1)[0].astype(jnp.float32), jnp.uint32)
            never = first == 0x7FC1_2345  # a NaN no arithmetic makes; XLA does not know
            return lax.cond(never, zeros, derivatives, leaves, floats)

        found = iter(by_device(after_a_barrier, cpu=in_a_branch)(leaves, floats))
        return jax.tree.unflatten(tree, [next(found) if w else None for w in wanted.leaves])

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, SymbolicZero)


def _instantiated(leaf: Any) -> Any:
    """Zeros for a part of the result that nothing follows from."""
    if not _is_zero(leaf):
        return leaf
    return np.zeros(leaf.shape, leaf.dtype) if leaf.dtype == jax.dtypes.float0 else jnp.zeros(leaf.shape, leaf.dtype)
