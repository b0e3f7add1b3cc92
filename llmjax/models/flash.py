"""Attention over the cache's pages as one kernel for a GPU, what ``attention.cached_attention`` folds block by block.

There a loop whose number of turns follows the tokens in use costs two waits of the host for each layer, and each turn
writes what it cut out of the cache, scores and sums to memory.  Here the loop is within the kernel, and what it holds
stays in registers (Dao et al. 2022, arXiv:2205.14135).  Steps, whose queries are too few to fill a card, give each page
of a row to a program of its own; their results are folded in the order of pages, so that a row's bits depend neither on
its neighbours nor on the cache's length.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from llmjax.numerics import Numerics
from llmjax.quant.bits import from_storage

# Queries of one program, by the bytes of a number, and keys in one of its turns: what an SM's registers hold of the
# widest heads.  Tensor cores have no fewer than 16.
_QUERIES = {2: 64, 4: 16}
_KEYS = 32
_FEWEST = 16

# ``(products, queries, keys) -> (scores, mask)``, see ``attention.Scores``.
Rule = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def can_serve(cache_k: jax.Array) -> bool:
    """Whether the kernel knows such pages: its arrays are powers of two, and no register file holds wide heads."""
    _, _, page, width = cache_k.shape
    return page % _KEYS == 0 and _FEWEST <= width <= 256 and width & (width - 1) == 0


def flash_attention(
    rule: Rule,
    numerics: Numerics,
    window: int | None,
    q: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    table: jax.Array,
    positions: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attention of queries ``[B, K, G, T, H]``, in the products' dtype, over a cache: float32, as they lie.

    Args:
      rule: makes scores of products.
      numerics: the profile.
      window: of the rule; None for all of the past.
      q: queries.
      cache_k: ``[P, K, page, H]``, as ``bits.storage`` of the products' dtype.
      cache_v: ``[P, K, H, page]``.
      table: int32 ``[B, N]``.
      positions: int32 ``[B, T]``.
      interpret: run it on any device, slowly.
    """
    batch, num_kv, groups, count, width = q.shape
    page, pages = cache_k.shape[2], table.shape[1]
    rows = groups * count
    tile = min(_QUERIES[q.dtype.itemsize], max(_FEWEST, pl.next_power_of_2(rows)))
    tiles = pl.cdiv(rows, tile)
    parts = pages if count == 1 else 1
    pad = tiles * tile - rows
    queries = jnp.pad(q.reshape(batch, num_kv, rows, width), ((0, 0), (0, 0), (0, pad), (0, 0)))
    # A query that is none sees what the first does, or would count for the tile's range.
    at = jnp.pad(jnp.tile(positions, (1, groups)), ((0, 0), (0, pad)), mode="edge")
    call = functools.partial(pl.pallas_call, interpret=interpret)
    shape = (batch, num_kv, parts, tiles * tile)
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    top, total, acc = call(
        functools.partial(_fold, rule, numerics, window, parts, page),
        grid=(batch, num_kv, parts, tiles),
        in_specs=[
            pl.BlockSpec((None, pages), lambda b, k, p, t: (b, 0)),
            pl.BlockSpec((None, tile), lambda b, k, p, t: (b, t)),
            pl.BlockSpec((None, None, tile, width), lambda b, k, p, t: (b, k, t, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, tile), lambda b, k, p, t: (b, k, p, t)),
            pl.BlockSpec((None, None, None, tile), lambda b, k, p, t: (b, k, p, t)),
            pl.BlockSpec((None, None, None, tile, width), lambda b, k, p, t: (b, k, p, t, 0)),
        ],
        out_shape=[float32(shape), float32(shape), float32((*shape, width))],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        name="attention",
    )(table, at, queries, cache_k, cache_v)
    if parts == 1:
        out = acc[:, :, 0] / total[:, :, 0, :, None]
    else:
        out = call(
            functools.partial(_join, page),
            grid=(batch, num_kv, tiles),
            in_specs=[
                pl.BlockSpec((None, tile), lambda b, k, t: (b, t)),
                pl.BlockSpec((None, None, parts, tile), lambda b, k, t: (b, k, 0, t)),
                pl.BlockSpec((None, None, parts, tile), lambda b, k, t: (b, k, 0, t)),
                pl.BlockSpec((None, None, parts, tile, width), lambda b, k, t: (b, k, 0, t, 0)),
            ],
            out_specs=pl.BlockSpec((None, None, tile, width), lambda b, k, t: (b, k, t, 0)),
            out_shape=float32((batch, num_kv, tiles * tile, width)),
            compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
            name="attention_join",
        )(at, top, total, acc)
    return out[:, :, :rows].reshape(q.shape)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a [M, in] . b [out, in] -> float32 [M, out]``, without TF32."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), lax.Precision.HIGHEST, jnp.float32)


def _fold(
    rule: Rule,
    numerics: Numerics,
    window: int | None,
    parts: int,
    page: int,
    table: Any,
    positions: Any,
    q: Any,
    cache_k: Any,
    cache_v: Any,
    top_ref: Any,
    total_ref: Any,
    acc_ref: Any,
) -> None:
    """One tile of queries over one row's keys, all of them or those of one page."""
    head, part = pl.program_id(1), pl.program_id(2)
    rows, width = q.shape
    queries, at = q[...], positions[...]
    first, last = jnp.int32(0), jnp.max(at) // _KEYS + 1
    if window is not None:
        first = jnp.maximum(jnp.min(at) - (window - 1), 0) // _KEYS
    if parts > 1:
        each = page // _KEYS
        first, last = jnp.maximum(first, part * each), jnp.minimum(last, (part + 1) * each)

    def turn(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, acc = carry
        start = i * _KEYS
        number, place = table[start // page], pl.ds(pl.multiple_of(start % page, _KEYS), _KEYS)
        keys = from_storage(cache_k[number, head, place, :], numerics.products)
        values = from_storage(cache_v[number, head, :, place], numerics.products)
        products = _dot(queries, keys)[None, None, None]
        scores, mask = rule(products, at[None], (start + jnp.arange(_KEYS, dtype=jnp.int32))[None])
        s, mask = scores[0, 0, 0], jnp.broadcast_to(mask[0, 0, 0], (rows, _KEYS))
        new_top = jnp.maximum(top, jnp.max(jnp.where(mask, s, -1e30), -1))
        p = jnp.where(mask, jnp.exp(s - new_top[:, None]), 0.0)
        shrink = jnp.exp(top - new_top)
        acc = acc * shrink[:, None] + _dot(p.astype(numerics.products), values)
        return new_top, total * shrink + jnp.sum(p, -1), acc

    zero = jnp.zeros(rows, jnp.float32)
    top, total, acc = lax.fori_loop(first, last, turn, (zero - 1e30, zero, jnp.zeros((rows, width), jnp.float32)))
    top_ref[...], total_ref[...], acc_ref[...] = top, total, acc


def _join(page: int, positions: Any, tops: Any, totals: Any, accs: Any, out_ref: Any) -> None:
    """What a row's pages gave, in their order."""
    rows, width = out_ref.shape

    def turn(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, acc = carry
        new_top = jnp.maximum(top, tops[i])
        mine, its = jnp.exp(top - new_top), jnp.exp(tops[i] - new_top)
        return new_top, total * mine + totals[i] * its, acc * mine[:, None] + accs[i] * its[:, None]

    zero = jnp.zeros(rows, jnp.float32)
    start = (zero - 1e30, zero, jnp.zeros((rows, width), jnp.float32))
    _, total, acc = lax.fori_loop(0, jnp.max(positions[...]) // page + 1, turn, start)
    out_ref[...] = acc / total[:, None]
