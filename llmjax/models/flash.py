"""Attention over the cache's pages as one kernel for a GPU, what ``attention.cached_attention`` folds block by block.

There a loop whose number of turns follows the tokens in use costs two waits of the host for each layer, and each turn
writes what it cut out of the cache, scores and sums to memory.  Here the loop is within the kernel, and what it holds
stays in registers (Dao et al. 2022, arXiv:2205.14135).  A step's queries are too few to fill a card, and a turn is a
wait for memory: each part of a row's keys is one turn, and many programs share them.  What the parts gave is joined in
their order, so that a row's bits depend neither on its neighbours nor on the cache's length.

Float32 is multiplied as it is, but where a profile does not ask for that (``Numerics.digits``) and queries are many:
then tensor cores have it in two pieces of float16, scaled to their range, as in ``products.kernel``, and of their four
products the three that matter.  A prompt's many programs share pieces that a kernel made before.

Triton's arrays are powers of two: a head is cut into such, from which any width is made up.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from llmjax import device
from llmjax.models.flash_common import (
    FEWEST,
    WIDEST,
    WIDTH,
    Call,
    Rule,
    cut,
    dot,
    first_seen,
    operands,
    pieces_of,
    query_pieces,
    weights_of,
)
from llmjax.models.flash_step import PART, step
from llmjax.numerics import Numerics
from llmjax.quant.bits import from_storage

# Dimensions of a head whose pieces are multiplied at once.
_SPLIT = 128


class _Fit(NamedTuple):
    """How a prompt is cut.

    Attributes:
      size: bytes of what is multiplied for a number.
      tile: queries of a program, at most: what an SM's registers hold of ``WIDTH``; of wider heads half as many.
      turns: keys of a turn, stages, and turns whose keys and values lie in shared memory at once; the quickest first.
    """

    size: int
    tile: int
    turns: tuple[tuple[int, int, int], ...]


_FITS = {
    "16 bits": _Fit(2, 64, ((64, 3, 3), (64, 2, 2), (32, 2, 2), (32, 1, 0))),
    "halves": _Fit(4, 64, ((32, 2, 2), (16, 2, 2), (16, 1, 0))),
    "float32": _Fit(4, 16, ((32, 2, 1), (32, 1, 0))),
}


def can_serve(cache_k: jax.Array) -> bool:
    """Whether the kernel knows such pages: no register file holds wider heads."""
    _, _, page, width = cache_k.shape
    return page % PART == 0 and width <= WIDEST


def flash_attention(
    rule: Rule,
    numerics: Numerics,
    window: int | None,
    q: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    table: jax.Array,
    positions: jax.Array,
    slopes: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attention of queries ``[B, T, N, H]``, in the products' dtype, over a cache: float32, as they lie.

    Args:
      rule: makes scores of products.
      numerics: the profile.
      window: of the rule; None for all of the past.
      q: queries.
      cache_k: ``[P, K, page, H]``, as ``bits.storage`` of the products' dtype.
      cache_v: ``[P, K, H, page]``.
      table: int32 ``[B, n]``.
      positions: int32 ``[B, T]``.
      slopes: float32 ``[N]``, of the rule; None if it has none.
      interpret: run it on any device, slowly.
    """
    # Here, where it costs nothing: in a kernel they would be read, turned into floats and written for tensor cores.
    keys, values = (from_storage(cache, q.dtype) for cache in (cache_k, cache_v))
    in_halves = q.dtype == jnp.float32 and numerics.digits is not None
    attend = step if q.shape[1] == 1 else _prompt
    return attend(Call(rule, window, slopes, interpret), in_halves, table, positions, q, keys, values)


def _prompt(
    call: Call,
    in_halves: bool,
    table: jax.Array,
    positions: jax.Array,
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
) -> jax.Array:
    """Many queries a row."""
    batch, count, heads, width = q.shape
    num_kv, page = keys.shape[1:3]
    rows, rest = heads // num_kv * count, [] if call.slopes is None else [call.slopes]
    fit = _FITS["halves" if in_halves else "float32" if q.dtype == jnp.float32 else "16 bits"]
    tile = max(FEWEST, min(fit.tile // (1 if width <= WIDTH else 2), pl.next_power_of_2(rows)))
    room = device.shared_memory() // (fit.size * sum(piece.size for piece in pieces_of(width, WIDEST)))
    if in_halves and room < tile + 4 * FEWEST:
        tile = max(FEWEST, tile // 2)
    turn, stages = next(
        (turn, stages) for turn, stages, held in fit.turns if tile + 2 * held * turn <= room and page % turn == 0
    )
    if in_halves:
        number = batch * table.shape[1]
        half = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float16)
        keys, values, scales = call.run(
            functools.partial(_halve, turn),
            (table.shape[1] * (page // turn), num_kv, batch),
            [table, jnp.max(positions, 1), keys, values],
            [
                half((2, number, *keys.shape[1:])),
                half((2, number, *values.shape[1:])),
                jax.ShapeDtypeStruct((2, number, num_kv, page // turn), jnp.float32),
            ],
            "attention_halves",
            num_warps=8,
            num_stages=1,
        )
        table, rest = jnp.arange(number, dtype=jnp.int32).reshape(table.shape), [scales, *rest]
    else:
        keys, values = keys[None], values[None]
    result: jax.Array = call.run(
        functools.partial(_fold, call.rule, call.window, tile, turn, call.slopes is not None),
        (batch, num_kv, pl.cdiv(rows, tile)),
        [table, positions, q, keys, values, *rest],
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        "attention_in_halves" if in_halves else "attention",
        num_warps=4 if width <= WIDTH else 8,
        num_stages=stages,
    )
    return result


def _halve(size: int, table: Any, last: Any, cache_k: Any, cache_v: Any, keys: Any, values: Any, scales: Any) -> None:
    """One row's keys and values of a turn as two pieces of float16, in pages of its own, zero behind its last token."""
    turn, head, batch = (pl.program_id(i) for i in range(3))
    page, width = cache_k.shape[2:]
    number, begin = lax.div(turn, page // size), lax.rem(turn, page // size) * size
    which, own = table[batch, number], batch * table.shape[1] + number
    each, pieces = jnp.arange(size, dtype=jnp.int32), pieces_of(width, WIDEST)
    place, there = pl.multiple_of(begin, size) + each, turn * size + each <= last[batch]

    @pl.when(turn * size <= last[batch])
    def _() -> None:
        for n, (cache, result) in enumerate(((cache_k, keys), (cache_v, values))):
            # A piece's dimensions and places as an index, and as they lie.
            at = [(place[:, None], p.lanes[None]) if n == 0 else (p.lanes[:, None], place[None]) for p in pieces]
            real = jnp.expand_dims(there, 1 - n)
            found = [
                jnp.where(real, cut(cache, p, width, 1 - n, which, head, *where), 0.0)
                for p, where in zip(pieces, at, strict=True)
            ]
            halved, scale = operands(found, True)
            for xs, p, where in zip(halved, pieces, at, strict=True):
                mask = None if p.whole else jnp.expand_dims(p.lanes < width, n)
                for i, x in enumerate(xs):
                    plt.store(result.at[np.int32(i), own, head, *where], x, mask=mask)
            scales[np.int32(n), own, head, begin // size] = scale


def _fold(
    rule: Rule,
    window: int | None,
    tile: int,
    size: int,
    sloped: bool,
    table: Any,
    positions: Any,
    q: Any,
    cache_k: Any,
    cache_v: Any,
    *rest: Any,
) -> None:
    """One tile of queries over one row's keys, ``size`` a turn.  The longest tiles begin first.

    Args:
      cache_k: ``[1, ...]``, or ``[2, ...]`` of pieces, with scales behind it.
      cache_v: likewise.
    """
    batch, head = pl.program_id(0), pl.program_id(1)
    (_, count, heads, width), (parts, _, num_kv, page, _) = q.shape, cache_k.shape
    groups, in_halves = heads // num_kv, parts == 2
    scales, rest = (rest[0], rest[1:]) if in_halves else (None, rest)
    # All that a key's head meets, a token's queries side by side; those behind the last are none.
    tiles = -(-groups * count // tile)
    row = (tiles - 1 - pl.program_id(2)) * tile + jnp.arange(tile, dtype=jnp.int32)
    real, token, query = row < groups * count, lax.div(row, groups), head * groups + lax.rem(row, groups)
    at = positions[batch, jnp.minimum(token, count - 1)]
    slopes, (result,) = (rest[0][query][:, None], rest[1:]) if sloped else (None, rest)
    pieces = pieces_of(width, _SPLIT if in_halves else WIDEST)
    queries, q_scale = operands(query_pieces(q, batch, token[:, None], query, real, pieces), in_halves, 1)
    each, numbers = jnp.arange(size, dtype=jnp.int32), [np.int32(i) for i in range(parts)]

    def turn(masked: bool, i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        top, total, acc = carry
        number, begin = table[batch, lax.div(i * size, page)], lax.rem(i * size, page)
        place, seen = pl.multiple_of(begin, size) + each, i * size + each
        v_scale = jnp.float32(1)
        products = jnp.zeros((tile, size), jnp.float32)
        for x, piece in zip(queries, pieces, strict=True):
            lanes = (number, head, place[:, None], piece.lanes[None])
            products = products + dot(x, [cut(cache_k, piece, width, 1, n, *lanes) for n in numbers])
        if scales is not None:
            k_scale, v_scale = (scales[n, number, head, lax.div(begin, size)] for n in numbers)
            products = products * (q_scale * k_scale)
        scores, mask = rule(products[None, None, None], at[None], seen[None], slopes)
        s = scores[0, 0, 0]
        if masked:
            mask = jnp.broadcast_to(mask[0, 0, 0], (tile, size))
        new_top = jnp.maximum(top, jnp.max(jnp.where(mask, s, -1e30) if masked else s, -1))
        p = jnp.exp(s - new_top[:, None])
        p = jnp.where(mask, p, 0.0) if masked else p
        shrink, (weights, p_scale) = jnp.exp(top - new_top), weights_of(p, q.dtype, in_halves)
        added = []
        for x, piece in zip(acc, pieces, strict=True):
            lanes = (number, head, piece.lanes[:, None], place[None])
            y = dot(weights, [cut(cache_v, piece, width, 0, n, *lanes) for n in numbers])
            added.append(x * shrink[:, None] + y * (p_scale * v_scale))
        return new_top, total * shrink + jnp.sum(p, -1), tuple(added)

    lowest, highest = jnp.min(at), jnp.max(at)
    first, last = first_seen(lowest, window, size), lax.div(highest, size) + 1
    # Turns of which every query sees all need no mask.
    begin = first if window is None else jnp.clip(pl.cdiv(highest - (window - 1), size), first, last)
    end = jnp.maximum(begin, lax.div(lowest + 1, size))
    zero = jnp.zeros(tile, jnp.float32)
    carry: Any = (zero - 1e30, zero, tuple(jnp.zeros((tile, piece.size), jnp.float32) for piece in pieces))
    if window is not None:
        carry = lax.fori_loop(first, begin, functools.partial(turn, True), carry)
    carry = lax.fori_loop(begin, end, functools.partial(turn, False), carry)
    top, total, acc = lax.fori_loop(end, last, functools.partial(turn, True), carry)
    for x, piece in zip(acc, pieces, strict=True):
        plt.store(
            result.at[batch, token[:, None], query[:, None], piece.lanes[None]],
            x / total[:, None],
            mask=real[:, None] & (piece.lanes < width)[None],
        )
