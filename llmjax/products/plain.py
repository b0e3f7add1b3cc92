"""``x . W^T`` as it is defined, in float32: the derivative of a product, whichever program computes it.

A product is linear in x and in W, a packed W in its scales and offsets.  So its derivative is made of products of
tangents, which are written here with what JAX can batch, transpose and differentiate again.  No converted weight is
kept for the way back: it is converted again, a tile at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.products.tiles import many, rows_dot, tile_of_many, tile_rows
from llmjax.quant.bits import cut
from llmjax.quant.qtensor import QTensor, dequantize

# Weights that are converted to less are converted whole: a loop takes as long to compile as ten products.
_SMALL_BYTES = 1 << 18


def plain(x: jax.Array, weight: jax.Array | QTensor) -> jax.Array:
    """``x [rows, in] . weight [out, in] -> float32 [rows, out]``, at the highest precision.

    Linear, for JAX to transpose, in x; in a float32 weight; in a QTensor's scales and offsets.
    """
    x = x.astype(jnp.float32)
    floats: dict[str, Any] = {}
    if isinstance(weight, QTensor):
        floats = {"scales": weight.scales, "offsets": weight.offsets}
    elif weight.dtype == jnp.float32:
        return rows_dot(x, weight)
    out, width = weight.shape
    small = 4 * out * width < _SMALL_BYTES
    tile = out if small else tile_of_many(weight.shape) if many(x) else tile_rows((out, width), 4)

    def multiply(start: Any, floats: dict[str, Any]) -> jax.Array:
        return rows_dot(x, _converted(weight, start, tile, floats))

    floats = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), floats)
    if tile == out:
        return jax.checkpoint(multiply)(0, floats)
    whole = (out - 1) // tile * tile  # the last tile repeats channels of the one before where it must

    def tiles(leaf: jax.Array) -> jax.Array:
        return jnp.concatenate([leaf[:whole], leaf[out - tile :]]).reshape(-1, tile, leaf.shape[1])

    starts = jnp.minimum(jnp.arange(0, out, tile, dtype=jnp.int32), out - tile)
    step = jax.checkpoint(multiply, prevent_cse=False)
    y = lax.map(lambda part: step(*part), (starts, jax.tree.map(tiles, floats)))
    return jnp.concatenate([y[:-1].swapaxes(0, 1).reshape(len(x), whole), y[-1, :, whole - out :]], -1)


def _converted(weight: Any, start: Any, size: int, floats: dict[str, Any]) -> jax.Array:
    """``size`` rows of a weight as float32, a packed one's with these scales and offsets of the same rows."""
    if not isinstance(weight, QTensor):
        return cut(weight, start, size).astype(jnp.float32)
    integers = jax.tree.map(lambda leaf: cut(leaf, start, size), {"values": weight.values, "fifth": weight.fifth})
    return dequantize(weight.replace(**integers, **floats))
