"""Products in 16 bits as one kernel for an NVIDIA card, what ``defined`` writes plainly.

There XLA unpacks a weight into memory before its matrix units may have it, and writes the products of each piece of x
before it adds them up; its sums of a few rows take more arithmetic than a card has while memory brings four bits, or
eight.  Here a weight is read as it is stored and unpacked in registers, some columns a turn: integers, exact in 16
bits, whose products with the pieces of a float32 x are summed in float32.  Each turn's sum begins at zero and is added
to the others once, with its scale where groups have their own: matrix units cut off what they add to a long sum.  Where
tiles are too few to fill a card, the columns are dealt out in parts, whose sums are added in their order.  All follows
from shapes, and a row's bits do not depend on its neighbours.

Weights that meet the same x are one kernel, floats of 16 bits, too, while rows are few.  So are rows of which each tile
has chosen one weight of a stack, a mixture's experts, where XLA would need a turn of a loop for each tile, whose weight
the host waits for.  Tiles with one weight stand side by side, so that they read it from a card's cache but for the
first.

A float32 x is three pieces of bfloat16, to the last bit, while a tile has room for them as rows of their own; matrix
units have no fewer than 16.  Rows that few meet several groups of a turn at once, too, each in rows of its own.  More
rows are two pieces of float16, each row scaled by a power of two so that they have its range: all but 1.2e-7 of a
value, or 1e-12 of the row's largest, which is less than float32 products lose in their sums, and two thirds of the work
that three pieces are.
"""

import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from llmjax.products import digits
from llmjax.products.sums import total
from llmjax.products.tiles import rows_dot
from llmjax.products.unpacking import in_16_bits
from llmjax.quant.bits import halves, into_half, rounded_off
from llmjax.quant.qtensor import QTensor, columns

# Fewest rows that a tensor core has, and most of a tile, whose sums an SM's registers hold twice.
_FEWEST, _ROWS = 16, 128
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
    so is what a turn has of a group.  A place in it is a number of 32 bits."""
    if isinstance(weight, QTensor):
        known = weight.bits != 5
    else:
        known = weight.dtype in (jnp.bfloat16, jnp.float16)
    fits, group = math.prod(_stored(weight).shape) < 1 << 31, _stored(weight).shape[-1] // _groups(weight)
    return known and fits and weight.shape[-2] >= _FEWEST and group % _FEWEST == 0


def are_alike(weights: Sequence[Any]) -> bool:
    """Whether ``packed_products`` takes them together: they differ in their channels alone."""

    def kind(weight: Any) -> Any:
        leaves, tree = jax.tree.flatten(weight)
        return tree, [(x.dtype, x.shape[:-2], x.shape[-1]) for x in leaves]

    return all(kind(weight) == kind(weights[0]) for weight in weights)


def _stored(weight: Any) -> Any:
    return weight.values if isinstance(weight, QTensor) else weight


def _columns(x: jax.Array, weight: Any) -> list[jax.Array]:
    return columns(x, weight) if isinstance(weight, QTensor) else [x]


def _groups(weight: Any) -> int:
    return weight.scales.shape[-1] if isinstance(weight, QTensor) else 1


class Tiling(NamedTuple):
    """What one program does, and how.

    Attributes:
      rows: of a tile, a power of two.
      sets: of those rows, each for a group of its own of a turn's.
      channels: of the output, a power of two.
      width: stored columns of a turn: of a group, a power of two, or of ``sets`` whole groups.
      parts: that the columns are dealt out in.
      warps: of a program.
      stages: turns whose loads are under way at once.
    """

    rows: int
    sets: int
    channels: int
    width: int
    parts: int
    warps: int
    stages: int


def _tiling(rows: int, tile: int, tiles: int, pieces: int, weights: Sequence[Any]) -> Tiling:
    """Of ``tiles`` of ``tile`` rows, of which so many are real, with x in so many pieces.  The numbers were the fastest
    on an H200 for Gemma 2B: one row has its weights of 16 and 8 bits at 0.9 to 1 times the speed of copies, those of
    four bits at 0.6."""
    like, outs = weights[0], [_stored(weight).shape[-2] for weight in weights]
    stored, groups, few = _stored(like).shape[-1], _groups(like), tile == _FEWEST
    group, bits = stored // groups, like.bits if isinstance(like, QTensor) else 16
    channels = min(64 if few else 128, 1 << (min(outs).bit_length() - 1))
    most = (256 if bits == 8 else 128) if few else (128 if bits == 8 else 64) // pieces
    width, sets = min(most, group & -group), 1
    if width == group:
        while 2 * sets * rows <= tile and 2 * sets * group <= most and groups % (2 * sets) == 0:
            sets *= 2
    width *= sets
    programs, turns = tiles * sum(pl.cdiv(out, channels) for out in outs), stored // width
    enough, least = (160, 2) if few else (128, 4)  # programs that fill a card, and turns that are worth one
    possible = [n for n in range(1, max(1, turns // least) + 1) if turns % n == 0]
    parts = next((n for n in possible if n * programs >= enough), possible[-1])
    warps, stages = (8, 3) if tile == _ROWS else (4, 4 if pieces > 1 else 3)
    return Tiling(tile, sets, channels, width, parts, warps, stages)


def packed_product(
    x: jax.Array, weight: jax.Array | QTensor, choice: Choice | None = None, *, interpret: bool = False
) -> jax.Array:
    """``x [rows, in] . weight [out, in] -> float32 [rows, out]``; with a choice that of the tiles' rows, ``[tiles *
    tile, out]``, where a tile that nobody asks for has any values.

    Args:
      x: bfloat16, or float32, which is rounded to the dtype of a weight of floats.
      weight: one that ``can_serve``; with a choice a stack of them, ``[E, out, in]``.
      choice: of a stack.
      interpret: run it on any device, slowly.
    """
    return packed_products(x, [weight], choice, interpret=interpret)[0]


def packed_products(
    x: jax.Array, weights: Sequence[Any], choice: Choice | None = None, *, interpret: bool = False
) -> list[jax.Array]:
    """``packed_product`` with each of some weights that ``are_alike``, in one kernel."""
    like, rows, scale = weights[0], len(x), None
    in_pieces = isinstance(like, QTensor) and x.dtype != jnp.bfloat16
    if in_pieces and choice is None and 3 * rows <= _FEWEST:
        # Rows of one tile, for which the weight is unpacked once; the small pieces first.
        x = jnp.concatenate(digits.pieces(x, 3, nearest=partial(rounded_off, bits=16))[::-1])
    given = len(x)
    tile = min(_ROWS, max(_FEWEST, pl.next_power_of_2(given))) if choice is None else choice.tile
    tiles = pl.cdiv(given, tile) if choice is None else len(choice.numbers)
    if tiles > 1 and choice is None:
        x = jnp.pad(x, ((0, tiles * tile - given), (0, 0)))
    if x.dtype == jnp.float32 and isinstance(like, QTensor):
        parts, scale = in_float16(x, len(_columns(x, like)), interpret=interpret)
    else:
        parts = jnp.stack(_columns(x, like))[None]
    sums = None
    if isinstance(like, QTensor) and like.offsets is not None:
        summed = parts.astype(jnp.float32).reshape(*parts.shape[:3], _groups(like), -1)
        sums = total(total(piece) for piece in summed).sum(-1)
    how = _tiling(given if choice is None else tile, tile, tiles, len(parts), weights)
    chosen = None if choice is None else (choice.numbers, choice.rows)
    args = (parts, list(weights), sums, scale, chosen)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    written = rows if choice is None else tiles * tile
    outs = [_stored(weight).shape[-2] for weight in weights]
    found = pl.pallas_call(
        partial(_multiply, how, given if choice is None else written, interpret),
        grid=(tiles, sum(pl.cdiv(out, how.channels) for out in outs), how.parts),
        in_specs=jax.tree.map(lambda _: anywhere, args),
        out_specs=[anywhere] * len(weights),
        out_shape=[jax.ShapeDtypeStruct((how.parts, written, out), jnp.float32) for out in outs],
        compiler_params=plt.CompilerParams(num_warps=how.warps, num_stages=how.stages),
        interpret=interpret,
        name="packed_product" if choice is None else "experts_product",
    )(*args)
    return [total(y) for y in found]


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
        return reduce(jnp.maximum, [jnp.abs(load(i, part)[2]) for part in range(count)], top)

    top = jnp.max(lax.fori_loop(0, turns, largest, jnp.zeros(block, jnp.float32)))
    factor, scales[row] = into_half(top)

    def split(i: jax.Array, carry: int) -> int:
        for part in range(count):
            at, there, values = load(i, part)
            for piece, value in enumerate(reversed(halves(values * factor))):
                plt.store(pieces.at[np.int32(piece), np.int32(part), row, at], value, mask=there)
        return carry

    lax.fori_loop(0, turns, split, 0)


def _multiply(
    how: Tiling,
    given: int,
    interpret: bool,
    x: Any,
    weights: Any,
    sums: Any,
    scale: Any,
    chosen: tuple[Any, Any] | None,
    *results: Any,
) -> None:
    """One tile of rows and channels of one weight over one part of the columns.

    Args:
      how: what a program does.
      given: rows of x that are real, pieces included.
      interpret: see ``packed_product``.
      x: pieces, the smallest first, ``[pieces, P, rows, in / P]``, in columns as ``integers`` has the weight's.
      weights: QTensors, or floats ``[out, in]``; with ``chosen`` of a stack.
      sums: x's ``[rows, G]``, if the weights have offsets.
      scale: x's ``[rows]``, powers of two, if it has one.
      chosen: numbers and rows of a ``Choice``.
      results: ``[parts, rows, out]`` of each weight.
    """
    place, number, part = (pl.program_id(axis) for axis in range(3))
    first = 0
    for weight, result in zip(weights, results, strict=True):
        count = pl.cdiv(result.shape[2], how.channels)
        mine = partial(
            _of_one, how, given, interpret, (place, number - first, part), x, weight, sums, scale, chosen, result
        )
        if len(weights) == 1:
            mine()
        else:
            pl.when((number >= first) & (number < first + count))(mine)
        first += count


def _of_one(
    how: Tiling,
    given: int,
    interpret: bool,
    program: tuple[jax.Array, jax.Array, jax.Array],
    x: Any,
    weight: Any,
    sums: Any,
    scale: Any,
    chosen: tuple[Any, Any] | None,
    result: Any,
) -> None:
    """``_multiply`` with a tile of one weight's channels."""
    (out, stored), groups, width = _stored(weight).shape[-2:], _groups(weight), how.width
    dtype = x.dtype if isinstance(weight, QTensor) else weight.dtype
    place, number, part = program
    turns, group = stored // width // how.parts, stored // groups
    first, last = part * turns, (part + 1) * turns
    row = jnp.arange(how.rows, dtype=jnp.int32)
    to = place * how.rows + row
    real = (to < how.sets * given)[:, None]
    # Of each row its row of x and, of a turn's sets, which it meets.
    mine, its_set = jnp.minimum(to, given - 1), None
    bulk: Any = pl.ds(pl.multiple_of(place * how.rows, how.rows), how.rows)
    which: tuple[Any, ...] = ()
    if how.sets > 1:
        mine, its_set = lax.rem(row, jnp.int32(given)), jnp.minimum(lax.div(row, jnp.int32(given)), how.sets - 1)
    if chosen is not None:
        expert, experts = chosen[0][place], len(_stored(weight))
        which, last = (jnp.minimum(expert, experts - 1),), jnp.where(expert < experts, last, first)
        if chosen[1] is not None:
            mine = bulk = chosen[1][place, pl.ds(0, how.rows)]
    # The last tile may repeat channels of the one before, to the same bits.
    begin = jnp.minimum(number * how.channels, out - how.channels)
    outs, each = pl.ds(begin, how.channels), begin + jnp.arange(how.channels, dtype=jnp.int32)

    def of_x(piece: int, columns: int, start: Any) -> jax.Array:
        """Of a turn's columns; rows that are none are zero, and so is what is not of the group that a row meets."""
        if x.shape[2] % how.rows == 0 or chosen is not None:
            return x[piece, columns, bulk, pl.ds(start, width)].astype(dtype)
        column = jnp.arange(width, dtype=jnp.int32)
        mask = jnp.broadcast_to(real, (how.rows, width))
        if its_set is not None:
            mask = mask & (lax.div(column, jnp.int32(group))[None] == its_set[:, None])
        at = x.at[np.int32(piece), np.int32(columns), mine[:, None], (start + column)[None]]
        return plt.load(at, mask=mask, other=0).astype(dtype)

    def of_groups(values: Any, number: Any) -> jax.Array:
        """float32 ``[rows or 1, channels]``, those of the groups from ``number`` on that rows meet."""
        if its_set is None:
            return values[*which, outs, number].astype(jnp.float32)[None]
        return plt.load(values.at[each[None], (number + its_set)[:, None]]).astype(jnp.float32)

    def scaled(y: jax.Array, number: Any, first: Any) -> jax.Array:
        """With what the group's values mean, its offset when it comes first."""
        y = y * of_groups(weight.scales, number)
        if sums is None:
            return y
        its_sums = plt.load(sums.at[mine, number + (jnp.zeros_like(row) if its_set is None else its_set)])
        return y + jnp.where(first, of_groups(weight.offsets, number), 0.0) * its_sums[:, None]

    def unpacked(at: Any) -> list[jax.Array]:
        some = _stored(weight)[*which, outs, at]
        if not isinstance(weight, QTensor):
            return [some]
        return in_16_bits(weight.replace(values=some), x.dtype, interpret=interpret)

    def turn(i: jax.Array, acc: jax.Array) -> jax.Array:
        start = pl.multiple_of(i * width, width)
        parts = unpacked(pl.ds(start, width))
        y = total(rows_dot(of_x(piece, p, start), n) for piece in range(x.shape[0]) for p, n in enumerate(parts))
        return acc + (scaled(y, start // group, start % group == 0) if groups > 1 else y)

    y = lax.fori_loop(first, last, turn, jnp.zeros((how.rows, how.channels), jnp.float32))
    if isinstance(weight, QTensor) and groups == 1:
        y = scaled(y, np.int32(0), part == 0)
    if scale is not None:
        y = y * plt.load(scale.at[mine])[:, None]
    if result.shape[1] == how.sets * given:
        plt.store(result.at[part, to[:, None], each[None]], y, mask=jnp.broadcast_to(real, y.shape))
        return
    its_row = lax.rem(row, jnp.int32(result.shape[1]))[:, None]
    for i in range(result.shape[1]):
        plt.store(result.at[part, np.int32(i), each], jnp.sum(jnp.where(real & (its_row == i), y, 0.0), 0))
