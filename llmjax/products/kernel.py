"""Products of many rows with packed weights as one kernel for an NVIDIA card, what ``defined`` writes plainly.

There XLA unpacks a weight into memory before its matrix units may have it, and writes the products of each piece of x
before it adds them up.  Here a weight is read as it is stored and unpacked in registers, some columns a turn: integers,
exact in 16 bits, whose products with the pieces of a float32 x are summed in float32.  Each turn's sum begins at zero
and is added to the others once, with its scale where groups have their own: matrix units cut off what they add to a
long sum.  Where tiles are too few to fill a card, the columns are dealt out in parts, whose sums are added in their
order.  All follows from shapes, and a row's bits do not depend on its neighbours.

So do rows of which each tile has chosen one weight of a stack, a mixture's experts, floats of 16 bits, too: all in one
kernel, where XLA would need a turn of a loop for each tile, whose weight the host waits for.  Tiles with one weight
stand side by side, so that they read it from a card's cache but for the first.

A float32 x is two pieces of float16, each row scaled by a power of two so that they have its range: all but 1.2e-7 of a
value, or 1e-12 of the row's largest, which is less than float32 products lose in their sums, and two thirds of the work
that three pieces of bfloat16 are.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from llmjax.products.sums import total
from llmjax.products.tiles import rows_dot
from llmjax.quant.bits import rounded_off
from llmjax.quant.qtensor import QTensor, columns, integers

# Of one program, at most: output channels and rows, whose sums an SM's registers hold twice.
_CHANNELS, _ROWS = 128, 128
# Fewest rows, channels or columns that a tensor core has.
_FEWEST = 16
# Bytes of shared memory, as the least of the cards has that Triton serves (A10, L4, RTX): two turns fit into it.
_MEMORY = 99 << 10
# Programs that fill a card, and turns that are worth one.
_ENOUGH, _TURNS = 128, 8
# Values of a row that are split at once.
_BLOCK = 2048


class Choice(NamedTuple):
    """Which weight of a stack each tile meets, and which rows of x it has.

    Attributes:
      numbers: int32 ``[tiles]``; that of no weight for a tile nobody asks for.
      rows: int32 ``[tiles, tile]``, a power of two from 16 to 128; None where x has the tiles' rows, one after the
        other.
      tile: of rows.
    """

    numbers: jax.Array
    rows: jax.Array | None
    tile: int


def can_serve(weight: jax.Array | QTensor) -> bool:
    """Whether the kernel knows such a weight or stack: floats of 16 bits, or packed; its arrays are powers of two, and
    a turn is of one group.  A place in it is a number of 32 bits."""
    if isinstance(weight, QTensor):
        known = weight.bits != 5
    else:
        known = weight.dtype in (jnp.bfloat16, jnp.float16)
    fits = math.prod(_stored(weight).shape) < 1 << 31
    return known and fits and weight.shape[-2] >= _FEWEST and _turn(weight, _ROWS, 2) >= _FEWEST


def _stored(weight: Any) -> Any:
    return weight.values if isinstance(weight, QTensor) else weight


def _columns(x: jax.Array, weight: Any) -> list[jax.Array]:
    return columns(x, weight) if isinstance(weight, QTensor) else [x]


def _groups(weight: Any) -> int:
    return weight.scales.shape[-1] if isinstance(weight, QTensor) else 1


def _turn(weight: Any, rows: int, pieces: int) -> int:
    """Stored columns of a turn, a power of two that divides a group's, where a tile has so many rows and x pieces."""
    values = _stored(weight)
    group, parts = values.shape[-1] // _groups(weight), len(_columns(values, weight))
    width = min(group & -group, (128 if rows < _ROWS else 64) // parts)
    while 2 * width * (2 * pieces * parts * rows + values.dtype.itemsize * _CHANNELS) > _MEMORY:
        width //= 2
    return width


def packed_product(
    x: jax.Array, weight: jax.Array | QTensor, choice: Choice | None = None, *, interpret: bool = False
) -> jax.Array:
    """``x [rows, in] . weight [out, in] -> float32 [rows, out]``; with a choice that of the tiles' rows, ``[tiles *
    tile, out]``, where a tile that nobody asks for has any values.

    Args:
      x: bfloat16, or float32; the dtype of a weight of floats.
      weight: one that ``can_serve``; with a choice a stack of them, ``[E, out, in]``.
      choice: of a stack.
      interpret: run it on any device, slowly.
    """
    rows, (out, stored), groups = len(x), _stored(weight).shape[-2:], _groups(weight)
    tile = min(_ROWS, max(_FEWEST, pl.next_power_of_2(rows))) if choice is None else choice.tile
    in_pieces = isinstance(weight, QTensor) and x.dtype != jnp.bfloat16
    channels = min(_CHANNELS, 1 << (out.bit_length() - 1))
    tiles = (pl.cdiv(rows, tile) if choice is None else len(choice.numbers), pl.cdiv(out, channels))
    width = _turn(weight, tile, 2 if in_pieces else 1)
    turns, parts = stored // width, 1
    while tiles[0] * tiles[1] * parts < _ENOUGH and turns % (2 * parts) == 0 and turns >= 2 * parts * _TURNS:
        parts *= 2
    if choice is None:
        x = jnp.pad(x, ((0, tiles[0] * tile - rows), (0, 0)))
    scale = sums = None
    if in_pieces:
        pieces, scale = in_float16(x, len(_columns(x, weight)), interpret=interpret)
    else:
        pieces = jnp.stack(_columns(x, weight))[None]
    if isinstance(weight, QTensor) and weight.offsets is not None:
        summed = pieces.astype(jnp.float32).reshape(*pieces.shape[:3], groups, -1)
        sums = total(total(piece) for piece in summed).sum(-1)
    chosen = None if choice is None else (choice.numbers, choice.rows)
    args = (pieces, weight, sums, scale, chosen)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    y = pl.pallas_call(
        functools.partial(_multiply, width, tile, channels),
        grid=(*tiles, parts),
        in_specs=jax.tree.map(lambda _: anywhere, args),
        out_specs=anywhere,
        out_shape=jax.ShapeDtypeStruct((parts, tiles[0] * tile, out), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=8 if tile * channels > 64 * 64 else 4, num_stages=3),
        interpret=interpret,
        name="packed_product" if choice is None else "experts_product",
    )(*args)
    y = total(y[part] for part in range(parts))
    return y[:rows] if choice is None else y


def in_float16(x: jax.Array, count: int, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """``x [rows, in] = scale * (small + large)``: pieces in float16 ``[2, count, rows, in / count]``, the small one
    first, in ``count`` sets of columns as ``columns`` has them, and scale, powers of two, float32 ``[rows]``."""
    rows, width = x.shape
    pieces, scale = pl.pallas_call(
        _split,
        grid=(rows,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((2, count, rows, width // count), jnp.float16),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="in_float16",
    )(x.reshape(rows, -1, count))
    return pieces, scale


def _split(x: Any, pieces: Any, scales: Any) -> None:
    """One row, see ``in_float16``."""
    row, (_, count, _, width) = pl.program_id(0), pieces.shape
    block = min(_BLOCK, pl.next_power_of_2(width))
    turns = pl.cdiv(width, block)

    def load(i: jax.Array, part: int) -> tuple[Any, jax.Array, jax.Array]:
        at, there = pl.ds(i * block, block), i * block + jnp.arange(block, dtype=jnp.int32) < width
        return at, there, plt.load(x.at[row, at, np.int32(part)], mask=there, other=0.0)

    def largest(i: jax.Array, top: jax.Array) -> jax.Array:
        return functools.reduce(jnp.maximum, [jnp.abs(load(i, part)[2]) for part in range(count)], top)

    top = jnp.max(lax.fori_loop(0, turns, largest, jnp.zeros(block, jnp.float32)))
    # 2^e of the largest value, no less than 2^-100: that value is to lie between 2^14 and 2^15.
    exponent = jnp.maximum(lax.bitcast_convert_type(top, jnp.int32) >> 23, 27)
    scales[row] = _power_of_two(exponent - 14)
    factor = _power_of_two(268 - exponent)

    def split(i: jax.Array, carry: int) -> int:
        for part in range(count):
            at, there, values = load(i, part)
            values = values * factor
            large = rounded_off(values, 13)  # as float16 has it
            for piece, value in enumerate((values - large, large)):
                plt.store(pieces.at[np.int32(piece), np.int32(part), row, at], value.astype(jnp.float16), mask=there)
        return carry

    lax.fori_loop(0, turns, split, 0)


def _float16(q: QTensor) -> list[jax.Array]:
    """``integers`` in float16.  A card converts one where it adds four: here an integer is the last bits of 1024 and
    more, of which 1024 is taken away with what means zero, exactly."""
    if q.bits == 8:
        numbers, zero = [lax.bitcast_convert_type(q.values, jnp.uint8).astype(jnp.uint16) ^ np.uint16(0x6480)], 128
    else:
        nibbles, zero = (q.values & np.uint8(15), q.values >> np.uint8(4)), q.zero
        numbers = [n.astype(jnp.uint16) | np.uint16(0x6400) for n in nibbles]
    return [lax.bitcast_convert_type(n, jnp.float16) - np.float16(1024 + zero) for n in numbers]


def _power_of_two(biased: jax.Array) -> jax.Array:
    """float32 of an exponent as it is stored."""
    return lax.bitcast_convert_type(biased << 23, jnp.float32)


def _multiply(
    width: int,
    tile: int,
    channels: int,
    x: Any,
    weight: Any,
    sums: Any,
    scale: Any,
    chosen: tuple[Any, Any] | None,
    result: Any,
) -> None:
    """One tile of rows and channels over one part of the columns.

    Args:
      width: stored columns of a turn.
      tile: rows.
      channels: of the output.
      x: pieces, the smallest first, ``[pieces, P, rows, in / P]``, in columns as ``integers`` has the weight's.
      weight: a QTensor, or floats ``[out, in]``; with ``chosen`` of a stack.
      sums: x's ``[rows, G]``, if the weight has offsets.
      scale: x's ``[rows]``, powers of two, if it has one.
      chosen: numbers and rows of a ``Choice``.
      result: ``[parts, rows, out]``.
    """
    (out, stored), groups = _stored(weight).shape[-2:], _groups(weight)
    part, turns = pl.program_id(2), stored // width // result.shape[0]
    mine = pl.ds(pl.multiple_of(pl.program_id(0) * tile, tile), tile)
    rows: Any = mine
    which: tuple[Any, ...] = ()
    first, last = part * turns, (part + 1) * turns
    if chosen is not None:
        number, count = chosen[0][pl.program_id(0)], len(_stored(weight))
        which, last = (jnp.minimum(number, count - 1),), jnp.where(number < count, last, first)
        if chosen[1] is not None:
            rows = chosen[1][pl.program_id(0), pl.ds(0, tile)]
    # The last tile may repeat channels of the one before, to the same bits.
    outs = pl.ds(jnp.minimum(pl.program_id(1) * channels, out - channels), channels)

    def scaled(y: jax.Array, group: Any, first: Any) -> jax.Array:
        """With what the group's values mean, its offset when it comes first."""
        y = y * weight.scales[*which, outs, group].astype(jnp.float32)[:, None]
        if sums is not None:
            offsets = weight.offsets[*which, outs, group].astype(jnp.float32)
            y = y + jnp.where(first, offsets, 0.0)[:, None] * sums[rows, group][None]
        return y

    def unpacked(at: Any) -> list[jax.Array]:
        some = _stored(weight)[*which, outs, at]
        if not isinstance(weight, QTensor):
            return [some]
        q = weight.replace(values=some)
        return _float16(q) if x.dtype == jnp.float16 else [n.astype(x.dtype) for n in integers(q)]

    def turn(i: jax.Array, acc: jax.Array) -> jax.Array:
        start = pl.multiple_of(i * width, width)
        at = pl.ds(start, width)
        parts = unpacked(at)
        y = total(rows_dot(n, x[piece, p, rows, at]) for piece in range(x.shape[0]) for p, n in enumerate(parts))
        if groups > 1:
            group = stored // groups
            y = scaled(y, start // group, start % group == 0)
        return acc + y

    y = lax.fori_loop(first, last, turn, jnp.zeros((channels, tile), jnp.float32))
    if isinstance(weight, QTensor) and groups == 1:
        y = scaled(y, 0, part == 0)
    if scale is not None:
        y = y * scale[rows][None]
    result[part, mine, outs] = y.T
