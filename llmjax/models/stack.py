"""A model's layers, one after the other: alike layers are traced once, and small packed ones run in a loop.

What starting a program costs grows with its layers: tracing, compiling, and reading a compiled one back (0.7 ms a
kernel, 2,000 kernels in 30 layers).  A loop over stacked weights has those of one layer.  But XLA:CPU copies what a
loop cuts out of a stack before it multiplies with it, unless the weight is converted (``products.tiles``) or the
product is a sum (``products.sums``) anyway.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from llmjax.models.context import Context
from llmjax.numerics import Numerics
from llmjax.products.matmul import summed_rows
from llmjax.products.tiles import converted_whole
from llmjax.quant.arrays import aligned
from llmjax.quant.bits import from_storage, to_storage
from llmjax.quant.qtensor import QTensor

# The entry of the ``params`` and ``cache`` collections that holds stacked layers: a tuple with one tree for each layer
# of the pattern that repeats, leaves ``[n, ...]`` and cache buffers of ``n * R`` rows, n being the repetitions.
STACKED = "layers"

_Block = TypeVar("_Block", bound=type[nn.Module])


def traced_once(block: _Block) -> _Block:
    """Class decorator for ``Block.__call__(x, ctx)``: blocks of equal fields, shapes and numerics share a trace.

    The program is the same, for the compiler inlines the shared function where it is called.  Without effect where a
    block's place matters: while activations are tapped.
    """
    plain: Callable[..., jax.Array] = block.__call__

    @wraps(plain)
    def __call__(self: nn.Module, x: jax.Array, ctx: Context) -> jax.Array:
        alone = self.clone(parent=None, name=None)
        if self.is_initializing():
            y, made = _init(alone, plain, self.make_rng("params"), x, ctx)
            collection = "params"
        elif self.is_mutable_collection("taps"):
            return plain(self, x, ctx)
        else:
            y, made = _apply(alone, plain, self.variables, x, ctx)
            collection = "cache"
        for name, leaves in made.get(collection, {}).items():
            self.put_variable(collection, name, leaves)
        return y

    setattr(block, "__call__", __call__)  # noqa: B010  a method, to the type checker
    return block


@partial(jax.jit, static_argnums=(0, 1))
def _apply(block: nn.Module, method: Callable[..., jax.Array], variables: Any, x: jax.Array, ctx: Context) -> Any:
    return block.apply(variables, x, ctx, method=method, mutable=["cache"])


@partial(jax.jit, static_argnums=(0, 1))
def _init(block: nn.Module, method: Callable[..., jax.Array], key: jax.Array, x: jax.Array, ctx: Context) -> Any:
    return block.init_with_output(key, x, ctx, method=method, mutable=["params"])


def in_turn(model: nn.Module, blocks: Sequence[nn.Module], x: jax.Array, ctx: Context) -> jax.Array:
    """Applies a model's blocks to ``x [B, T, D]``: in a loop where ``stacked`` made their parameters one."""
    if not model.has_variable("params", STACKED):
        for block in blocks:
            x = block(x, ctx)
        return x
    pattern: tuple[Any, ...] = model.get_variable("params", STACKED)
    count = len(blocks) // len(pattern)
    alike = [block.clone(parent=None, name=None) for block in blocks[: len(pattern)]]

    def step(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        x, caches = carry
        new = []
        for block, params, cache in zip(alike, pattern, caches, strict=True):
            rows = jax.tree.leaves(cache)[0].shape[0] // count
            variables = {"params": jax.tree.map(partial(_pick, i), params), "cache": cache}
            x, changed = block.apply(variables, x, ctx.replace(slot=ctx.slot + i * rows), mutable=["cache"])
            new.append(changed["cache"])
        return x, tuple(new)

    x, caches = lax.fori_loop(0, count, step, (x, model.get_variable("cache", STACKED)))
    model.put_variable("cache", STACKED, caches)
    return x


def _pick(i: jax.Array, leaf: jax.Array) -> jax.Array:
    return from_storage(lax.dynamic_index_in_dim(to_storage(leaf), i, keepdims=False), leaf.dtype)


def stacked(params: dict[str, Any], period: int, slots: int, numerics: Numerics) -> dict[str, Any] | None:
    """``params`` with the layers' entries made one, a copy, where a loop over them is no slower; else None.

    Args:
      params: a model's.
      period: layer ``i`` is computed like layer ``i + period``.
      slots: rows of a decode step.
      numerics: the profile.
    """
    layers = [params[f"layers_{i}"] for i in range(sum(name.startswith("layers_") for name in params))]
    if len(layers) % period or not all(_converted(layer, slots, numerics) for layer in layers):
        return None
    groups = [layers[i::period] for i in range(period)]
    if any(_kind(layer) != _kind(group[0]) for group in groups for layer in group):
        return None
    rest = {name: value for name, value in params.items() if not name.startswith("layers_")}
    return {**rest, STACKED: tuple(jax.tree.map(_stack, *group) for group in groups)}


def _stack(*leaves: jax.Array) -> jax.Array:
    stack = aligned((len(leaves), *leaves[0].shape), leaves[0].dtype)  # NumPy: nothing to compile
    return jnp.asarray(np.stack(leaves, out=stack))


def _converted(layer: Any, slots: int, numerics: Numerics) -> bool:
    """Whether each weight of a layer is small, and converted where a decode step multiplies with it."""
    leaves = jax.tree.leaves(layer, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return all(
        converted_whole(leaf.shape, 4) and (leaf.bits <= 5 or slots <= summed_rows(leaf, numerics))
        if isinstance(leaf, QTensor)
        else leaf.ndim < 2
        for leaf in leaves
    )


def _kind(layer: Any) -> Any:
    return jax.tree.structure(layer), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(layer)]
