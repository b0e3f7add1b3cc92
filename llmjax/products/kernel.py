"""Products of many rows with packed weights as one kernel for an NVIDIA card, what ``defined`` writes plainly.

There XLA unpacks a weight into memory before its matrix units may have it, and writes the products of each piece of x
before it adds them up.  Here a weight is read as it is stored and unpacked in registers, some columns a turn: integers,
exact in bfloat16, whose products with the pieces of a float32 x are summed in float32.  Each turn's sum begins at zero
and is added to the others once, with its scale where groups have their own: matrix units cut off what they add to a
long sum.  Where tiles are too few to fill a card, the columns are dealt out in parts, whose sums are added in their
order.  All follows from shapes, and a row's bits do not depend on its neighbours.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from llmjax.products.sums import total
from llmjax.products.tiles import rows_dot
from llmjax.quant.qtensor import QTensor, columns, integers

# Of one program, at most: output channels and rows, whose sums an SM's registers hold twice.
_CHANNELS, _ROWS = 128, 128
# Fewest rows, channels or columns that a tensor core has.
_FEWEST = 16
# Bytes of shared memory, as the least of the cards has that Triton serves (A10, L4, RTX): two turns fit into it.
_MEMORY = 99 << 10
# Programs that fill a card, and turns that are worth one.
_ENOUGH, _TURNS = 128, 8


def can_serve(q: QTensor) -> bool:
    """Whether the kernel knows such a weight: its arrays are powers of two, and a turn is of one group."""
    return q.bits != 5 and q.shape[0] >= _FEWEST and _turn(q, _ROWS, 3) >= _FEWEST


def _turn(q: QTensor, rows: int, pieces: int) -> int:
    """Stored columns of a turn, a power of two that divides a group's, where a tile has so many rows and x pieces."""
    group, parts = q.values.shape[1] // q.scales.shape[1], len(columns(q.values, q))
    width = min(group & -group, (128 if rows < _ROWS else 64) // parts)
    while 2 * width * (2 * pieces * parts * rows + _CHANNELS) > _MEMORY:
        width //= 2
    return width


def packed_product(x: list[jax.Array], q: QTensor, *, interpret: bool = False) -> jax.Array:
    """``x [rows, in] . weight [out, in] -> float32 [rows, out]``.

    Args:
      x: bfloat16 pieces that add up to it, the largest first.
      q: a weight that ``can_serve``.
      interpret: run it on any device, slowly.
    """
    rows, (out, stored), groups = len(x[0]), q.values.shape, q.scales.shape[1]
    tile = min(_ROWS, max(_FEWEST, pl.next_power_of_2(rows)))
    channels = min(_CHANNELS, 1 << (out.bit_length() - 1))
    tiles, width = (pl.cdiv(rows, tile), pl.cdiv(out, channels)), _turn(q, tile, len(x))
    turns, parts = stored // width, 1
    while tiles[0] * tiles[1] * parts < _ENOUGH and turns % (2 * parts) == 0 and turns >= 2 * parts * _TURNS:
        parts *= 2
    pad = ((0, tiles[0] * tile - rows), (0, 0))
    args = [jnp.stack([jnp.stack(columns(jnp.pad(piece, pad), q)) for piece in x[::-1]]), q.values, q.scales]
    if q.offsets is not None:
        sums = total(piece.astype(jnp.float32) for piece in x[::-1]).reshape(rows, groups, -1).sum(-1)
        args += [q.offsets, jnp.pad(sums, pad)]
    y = pl.pallas_call(
        functools.partial(_multiply, q.replace(values=None), width, tile, channels),
        grid=(*tiles, parts),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(args),
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct((parts, tiles[0] * tile, out), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=8 if tile * channels > 64 * 64 else 4, num_stages=3),
        interpret=interpret,
        name="packed_product",
    )(*args)
    return total(y[part, :rows] for part in range(parts))


def _multiply(q: QTensor, width: int, tile: int, channels: int, x: Any, values: Any, scales: Any, *rest: Any) -> None:
    """One tile of rows and channels over one part of the columns.

    Args:
      q: the weight's kind.
      width: stored columns of a turn.
      tile: rows.
      channels: of the output.
      x: pieces, the smallest first, ``[pieces, P, rows, in / P]``, in columns as ``integers`` has the weight's.
      values: ``[out, in / P]``.
      scales: ``[out, G]``.
      rest: offsets ``[out, G]`` and x's sums ``[rows, G]``, if it has any; the result ``[parts, rows, out]``.
    """
    *offset, result = rest
    (out, stored), groups = values.shape, scales.shape[1]
    part, turns = pl.program_id(2), stored // width // result.shape[0]
    rows = pl.ds(pl.multiple_of(pl.program_id(0) * tile, tile), tile)
    # The last tile may repeat channels of the one before, to the same bits.
    outs = pl.ds(jnp.minimum(pl.program_id(1) * channels, out - channels), channels)

    def scaled(y: jax.Array, group: Any, first: Any) -> jax.Array:
        """With what the group's values mean, its offset when it comes first."""
        y = y * scales[outs, group].astype(jnp.float32)[:, None]
        if offset:
            offsets, sums = offset[0][outs, group].astype(jnp.float32), offset[1][rows, group]
            y = y + jnp.where(first, offsets, 0.0)[:, None] * sums[None]
        return y

    def turn(i: jax.Array, acc: jax.Array) -> jax.Array:
        start = pl.multiple_of((part * turns + i) * width, width)
        at = pl.ds(start, width)
        parts = [n.astype(jnp.bfloat16) for n in integers(q.replace(values=values[outs, at]))]
        y = total(rows_dot(n, x[piece, p, rows, at]) for piece in range(x.shape[0]) for p, n in enumerate(parts))
        if groups > 1:
            group = stored // groups
            y = scaled(y, start // group, start % group == 0)
        return acc + y

    y = lax.fori_loop(0, turns, turn, jnp.zeros((channels, tile), jnp.float32))
    result[part, rows, outs] = (y if groups > 1 else scaled(y, 0, part == 0)).T
