"""Products that convert their weight a tile of output channels at a time.

A conversion written plainly makes a whole float weight; and since it waits for nothing, XLA:CPU converts those of all
layers before it multiplies with the first: a second, larger model in memory (jaxlib 0.10).  Inside a loop it cannot.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.quant.bits import cut, from_storage, to_storage
from llmjax.quant.qtensor import QTensor, dequantize

# Of what a tile is converted to: what the caches keep, more or less; halving or doubling it costs up to a fifth.
_TILE_BYTES = 4 << 20
# Weights that are converted to less are converted whole: a loop costs more to compile than their copies to keep.
_SMALL_BYTES = 4 << 20
# The like where rows are many.
_WHOLE_BYTES = 16 << 20
# From here on a product costs more than its weight's conversion, and no prompt's chunk has so many.
_MANY_ROWS = 256


def over_tiles(
    multiply: Callable[[Any], jax.Array],
    weight: Any,
    shape: tuple[int, ...],
    x: jax.Array,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """``[rows, out]``, some output channels at a time where the weight is large, else all at once.

    Args:
      multiply: from some rows of the weight, ``[t, ...]`` a leaf, to ``[t, rows]``.
      weight: a pytree of arrays ``[out, ...]``.
      shape: ``(out, in)`` of what the weight stands for.
      x: ``[rows, ...]``, what ``multiply`` multiplies with; the weight is converted to its dtype.
      dtype: of the result.
    """
    out, width = shape
    size = x.dtype.itemsize
    tile = tile_rows(shape, size)
    if converted_whole(shape, size):
        return multiply(_after(x, weight)).T

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        # The last tile may repeat channels of the one before: cutting the weight to whole tiles would copy it.
        start = jnp.minimum(i * tile, out - tile)
        return lax.dynamic_update_slice(
            y, multiply(jax.tree.map(lambda leaf: cut(leaf, start, tile), weight)), (start, 0)
        )

    # Overwritten, so any value does.  One that waits for x: XLA would make the zeros of all layers before it begins.
    y = jnp.broadcast_to(x.reshape(-1)[0].astype(dtype), (out, x.shape[0]))
    return lax.fori_loop(0, -(-out // tile), step, y).T


def rows_first(x: jax.Array, weight: jax.Array | QTensor) -> jax.Array:
    """``x [rows, in] . weight [out, in] -> [rows, out]`` in float32, for many rows: beside the product a conversion is
    cheap, and a place in memory for what is converted small; to turn x and the result about is not."""
    out, width = weight.shape
    if weight.dtype == x.dtype and not isinstance(weight, QTensor):
        return rows_dot(x, weight)
    tile = tile_of_many(weight.shape)
    if tile == out:
        return rows_dot(x, _floats(_after(x, weight)))

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        start = jnp.minimum(i * tile, out - tile)
        part = jax.tree.map(lambda leaf: cut(leaf, start, tile), weight)
        return lax.dynamic_update_slice(y, rows_dot(x, _floats(part)), (0, start))

    y = jnp.broadcast_to(x[:, :1], (x.shape[0], out))  # any value does, see over_tiles
    return lax.fori_loop(0, -(-out // tile), step, y)


def _floats(weight: Any) -> jax.Array:
    floats: jax.Array = dequantize(weight) if isinstance(weight, QTensor) else weight.astype(jnp.float32)
    return floats


def rows_dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """``x [rows, in] . weight [out, in] -> float32 [rows, out]``, at the highest precision."""
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), lax.Precision.HIGHEST, jnp.float32)


def many(x: jax.Array) -> bool:
    """Whether ``x [rows, in]`` has so many rows that ``rows_first`` pays."""
    return len(x) >= _MANY_ROWS


def tile_of_many(shape: tuple[int, ...]) -> int:
    """Channels of a tile of a weight ``(out, in)`` that is converted to float32 for many rows; all of them, often."""
    out, width = shape
    return min(out, max(16, _WHOLE_BYTES // (4 * width) // 16 * 16))


def tile_rows(shape: tuple[int, ...], size: int) -> int:
    """Channels of a tile of a weight ``(out, in)`` that is converted to elements of ``size`` bytes; two tiles at least:
    a loop of one turn is no loop to XLA."""
    out, width = shape
    return min((out + 1) // 2, max(16, _TILE_BYTES // (size * width) // 16 * 16))


def converted_whole(shape: tuple[int, ...], size: int) -> bool:
    """Whether a weight of ``shape`` is converted to elements of ``size`` bytes at once, not in tiles."""
    return size * shape[0] * shape[1] < _SMALL_BYTES


def _after(x: jax.Array, weight: Any) -> Any:
    """``weight``, but not before ``x`` is known."""
    first = lax.bitcast_convert_type(x.reshape(-1)[0].astype(jnp.float32), jnp.uint32)
    never = first == 0x7FC1_2345  # a NaN no arithmetic makes

    def wait(leaf: jax.Array) -> jax.Array:
        bits = to_storage(leaf)
        return from_storage(bits + never.astype(bits.dtype), leaf.dtype)

    return jax.tree.map(wait, weight)
