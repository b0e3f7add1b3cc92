"""Attention over the cache's pages as one kernel for a GPU, what ``attention.cached_attention`` folds block by block.

There a loop whose number of turns follows the tokens in use costs two waits of the host for each layer, and each turn
writes what it cut out of the cache, scores and sums to memory.  Here the loop is within the kernel, and what it holds
stays in registers (Dao et al. 2022, arXiv:2205.14135).  Steps, whose queries are too few to fill a card, give each page
of a row to a program of its own; their results are folded in the order of pages, so that a row's bits depend neither on
its neighbours nor on the cache's length.

Float32, where a profile does not ask for products of that (``Numerics.digits``), is the sum of three bfloat16 numbers,
as in ``products.defined``: tensor cores multiply six pairs of those several times as fast as a card does one of
float32, and the other three are too small to matter.

Triton's arrays are powers of two: a head is cut into such, from which any width is made up.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from llmjax.numerics import Numerics
from llmjax.products.defined import pieces
from llmjax.quant.bits import from_storage, rounded_off

# Queries of one program, by the bytes of a number, and keys in one of its turns: what an SM's registers hold of heads
# of that width; of wider ones half as many queries.  Tensor cores have no fewer than 16.
_QUERIES = {2: 64, 4: 16}
_IN_THIRDS = 32
_WIDTH = 256
_KEYS = 32
_FEWEST = 16
_WIDEST = 512
_thirds = functools.partial(pieces, count=3, nearest=functools.partial(rounded_off, bits=16))
# Dimensions of a head whose thirds shared memory holds at once.
_SPLIT = 64
# Bytes of a key that shared memory holds for two turns, on a card of 99 KB.
_TWICE = 1024
# Bytes of queries that four warps hold: of 16 float32 heads of 512 their registers spill.
_FEW_BYTES = 16 << 10
# Pages whose results are read at once: one after the other, each would wait for memory.
_PARTS = 16

# ``(products, queries, keys, slopes) -> (scores, mask)``, see ``attention.Scores``.
Rule = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]


def can_serve(cache_k: jax.Array) -> bool:
    """Whether the kernel knows such pages: no register file holds wider heads."""
    _, _, page, width = cache_k.shape
    return page % _KEYS == 0 and width <= _WIDEST


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
    batch, count, heads, width = q.shape
    num_kv, page, pages = *cache_k.shape[1:3], table.shape[1]
    rows = heads // num_kv * count
    thirds = q.dtype == jnp.float32 and numerics.digits is not None
    most = (_IN_THIRDS if thirds else _QUERIES[q.dtype.itemsize]) // (1 if width <= _WIDTH else 2)
    tile = max(_FEWEST, min(most, pl.next_power_of_2(rows)))
    stages = 2 if width * q.dtype.itemsize <= (_TWICE // 2 if thirds else _TWICE) else 1
    warps = 8 if tile * width * q.dtype.itemsize > _FEW_BYTES else 4
    parts = pages if count == 1 else 1
    call = functools.partial(pl.pallas_call, interpret=interpret)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    # What the parts of a row's one query give lies as several queries' results do.
    shape = (batch, max(count, parts), heads)
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    args = [table, positions, q, cache_k, cache_v] + ([] if slopes is None else [slopes])
    acc, *sums = call(
        functools.partial(_fold, rule, numerics, window, tile, thirds, slopes is not None),
        grid=(batch, num_kv, parts, pl.cdiv(rows, tile)),
        in_specs=[anywhere] * len(args),
        out_specs=[anywhere] * (1 if parts == 1 else 3),
        out_shape=[float32((*shape, width)), *([] if parts == 1 else [float32(shape)] * 2)],
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        name="attention_in_thirds" if thirds else "attention",
    )(*args)
    if parts == 1:
        return acc
    return call(
        functools.partial(_join, page),
        grid=(batch, heads),
        in_specs=[anywhere] * 4,
        out_specs=anywhere,
        out_shape=float32(q.shape),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="attention_join",
    )(positions, acc, *sums)


class _Piece(NamedTuple):
    """Neighbouring dimensions of a head, a power of two; of the last the head may have but some."""

    start: int
    size: int
    whole: bool

    @property
    def lanes(self) -> jax.Array:
        """int32 ``[size]``: which they are."""
        return self.start + jnp.arange(self.size, dtype=jnp.int32)


def _pieces(width: int, most: int) -> list[_Piece]:
    """Of a head, the largest first, of so many dimensions at most."""
    found, start = [], 0
    while (left := width - start) > 0:
        size = min(most, max(_FEWEST, 1 << (left.bit_length() - 1)))
        found.append(_Piece(start, size, size <= left))
        start += size
    return found


def _dot(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """``a [M, in] . b [out, in] -> float32 [M, out]``, each one array or three, without TF32; small products first."""
    each = [(i, n - i) for n in reversed(range(len(a))) for i in range(n + 1)]
    contracted = (((1,), (1,)), ((), ()))
    return functools.reduce(
        jnp.add, [lax.dot_general(a[i], b[j], contracted, lax.Precision.HIGHEST, jnp.float32) for i, j in each]
    )


def _fold(
    rule: Rule,
    numerics: Numerics,
    window: int | None,
    tile: int,
    thirds: bool,
    sloped: bool,
    table: Any,
    positions: Any,
    q: Any,
    cache_k: Any,
    cache_v: Any,
    *rest: Any,
) -> None:
    """One tile of queries over one row's keys, all of them or those of one page."""
    batch, head, part = (pl.program_id(i) for i in range(3))
    (_, count, heads, width), (_, num_kv, page, _) = q.shape, cache_k.shape
    groups = heads // num_kv
    # All that a key's head meets, a token's queries side by side; those behind the last are none.
    row = pl.program_id(3) * tile + jnp.arange(tile, dtype=jnp.int32)
    real, token, query = row < groups * count, lax.div(row, groups), head * groups + lax.rem(row, groups)
    at = positions[batch, jnp.minimum(token, count - 1)]
    slopes, results = (rest[0][query][:, None], rest[1:]) if sloped else (None, rest)
    pieces = _pieces(width, _SPLIT if thirds else _WIDEST)
    split = _thirds if thirds else lambda x: [x]
    queries = [
        split(
            plt.load(
                q.at[batch, token[:, None], query[:, None], piece.lanes[None]],
                mask=real[:, None] & (piece.lanes < width)[None],
                other=0,
            )
        )
        for piece in pieces
    ]
    first, last = jnp.int32(0), jnp.max(at) // _KEYS + 1
    if window is not None:
        first = jnp.maximum(jnp.min(at) - (window - 1), 0) // _KEYS
    if len(results) > 1:
        turns = page // _KEYS
        first, last = jnp.maximum(first, part * turns), jnp.minimum(last, (part + 1) * turns)

    def cut(cache: Any, piece: _Piece, axis: int, *index: Any) -> jax.Array:
        """Of a head's keys or values the dimensions of a piece, along ``axis``; zero for those that it has not."""
        mask = None if piece.whole else jnp.expand_dims(piece.lanes < width, 1 - axis)
        values = plt.load(cache.at[index], mask=mask, other=None if piece.whole else 0)
        return from_storage(values, numerics.products)

    def turn(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        top, total, acc = carry
        start = i * _KEYS
        number, each = table[batch, start // page], jnp.arange(_KEYS, dtype=jnp.int32)
        place = pl.multiple_of(start % page, _KEYS) + each
        products = jnp.zeros((tile, _KEYS), jnp.float32)
        for x, piece in zip(queries, pieces, strict=True):
            keys = cut(cache_k, piece, 1, number, head, place[:, None], piece.lanes[None])
            products = products + _dot(x, split(keys))
        scores, mask = rule(products[None, None, None], at[None], (start + each)[None], slopes)
        s, mask = scores[0, 0, 0], jnp.broadcast_to(mask[0, 0, 0], (tile, _KEYS))
        new_top = jnp.maximum(top, jnp.max(jnp.where(mask, s, -1e30), -1))
        p = jnp.where(mask, jnp.exp(s - new_top[:, None]), 0.0)
        shrink, weights = jnp.exp(top - new_top), split(p.astype(numerics.products))
        added = []
        for x, piece in zip(acc, pieces, strict=True):
            values = cut(cache_v, piece, 0, number, head, piece.lanes[:, None], place[None])
            added.append(x * shrink[:, None] + _dot(weights, split(values)))
        return new_top, total * shrink + jnp.sum(p, -1), tuple(added)

    zero = jnp.zeros(tile, jnp.float32)
    start = (zero - 1e30, zero, tuple(jnp.zeros((tile, piece.size), jnp.float32) for piece in pieces))
    top, total, acc = lax.fori_loop(first, last, turn, start)
    place = token + part
    for x, piece in zip(acc, pieces, strict=True):
        plt.store(
            results[0].at[batch, place[:, None], query[:, None], piece.lanes[None]],
            x / total[:, None] if len(results) == 1 else x,
            mask=real[:, None] & (piece.lanes < width)[None],
        )
    for result, x in zip(results[1:], (top, total), strict=False):
        plt.store(result.at[batch, place, query], x, mask=real)


def _join(page: int, positions: Any, accs: Any, tops: Any, totals: Any, out: Any) -> None:
    """What a row's pages gave one query, in their order, some at a time."""
    batch, head = pl.program_id(0), pl.program_id(1)
    (_, parts, _), width = tops.shape, out.shape[3]
    pieces, used = _pieces(width, _WIDEST), positions[batch, 0] // page + 1

    def turn(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        top, total, acc = carry
        part = i * _PARTS + jnp.arange(_PARTS, dtype=jnp.int32)
        mask = part < jnp.minimum(used, parts)
        its_top = plt.load(tops.at[batch, part, head], mask=mask, other=-1e30)
        its_total = plt.load(totals.at[batch, part, head], mask=mask, other=0)
        new_top = jnp.maximum(top, jnp.max(its_top))
        mine, its = jnp.exp(top - new_top), jnp.exp(its_top - new_top)
        added = []
        for x, piece in zip(acc, pieces, strict=True):
            real = mask[:, None] & (piece.lanes < width)[None]
            its_acc = plt.load(accs.at[batch, part[:, None], head, piece.lanes[None]], mask=real, other=0)
            added.append(x * mine + jnp.sum(its_acc * its[:, None], 0))
        return new_top, total * mine + jnp.sum(its_total * its), tuple(added)

    zero = jnp.float32(0)
    start = (zero - 1e30, zero, tuple(jnp.zeros(piece.size, jnp.float32) for piece in pieces))
    _, total, acc = lax.fori_loop(0, pl.cdiv(used, _PARTS), turn, start)
    for x, piece in zip(acc, pieces, strict=True):
        plt.store(out.at[batch, 0, head, piece.lanes], x / total, mask=piece.lanes < width)
