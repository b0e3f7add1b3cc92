"""A step's attention: one query a row, whose keys many programs share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

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

# Keys of a part, where programs are few and where they are many: then what parts leave is to be less; of a key so many
# bytes at most, or registers spill.  A page is made up from the former.
PART, _PART_OF_MANY, _LARGEST = 32, 64, 512
# Programs that share the parts: more than a card holds at once would end as soon as they began.
_ENOUGH = 1024
# Queries, of all rows, that are few: float32 then meets keys in sums, a query a program, which is sooner done.
_FEW = 64
# Bytes of a part's keys that four warps hold.
_BYTES = 32 << 10
# Numbers of the parts' results that are read at once: one after the other, each would wait for memory.
_JOINED = 8192


def step(
    call: Call,
    in_halves: bool,
    table: jax.Array,
    positions: jax.Array,
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
) -> jax.Array:
    """One query a row."""
    batch, _, heads, width = q.shape
    num_kv, page = keys.shape[1:3]
    few, size = batch * heads <= _FEW, width * q.dtype.itemsize
    part = PART if few or size > _LARGEST or page % _PART_OF_MANY else _PART_OF_MANY
    parts, groups = table.shape[1] * (page // part), heads // num_kv
    in_sums = q.dtype == jnp.float32 and (few or not in_halves)
    in_halves = in_halves and not in_sums
    tile = 1 if in_sums else FEWEST
    grid = (batch, num_kv, pl.cdiv(groups, tile))
    shares = min(parts, max(1, _ENOUGH // (grid[0] * grid[1] * grid[2])))
    shape, float32 = (batch, parts, heads), functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    args = [table, positions, q, keys, values, *([] if call.slopes is None else [call.slopes])]
    results = call.run(
        functools.partial(_parts, call.rule, call.window, part, tile, shares, in_halves, call.slopes is not None),
        (*grid, shares),
        args,
        [float32((*shape, width)), float32(shape), float32(shape)],
        "attention_parts_in_halves" if in_halves else "attention_parts",
        num_warps=8 if in_halves or part * size > _BYTES else 4,
        num_stages=1,
    )
    lanes = min(64 if few else WIDTH, pl.next_power_of_2(width))
    return call.run(
        functools.partial(_join, call.window, part, lanes),
        (batch, heads, pl.cdiv(width, lanes)),
        [positions, *results],
        float32(q.shape),
        "attention_join",
        num_warps=4,
        num_stages=1,
    )


def _parts(
    rule: Rule,
    window: int | None,
    size: int,
    tile: int,
    shares: int,
    in_halves: bool,
    sloped: bool,
    table: Any,
    positions: Any,
    q: Any,
    cache_k: Any,
    cache_v: Any,
    *rest: Any,
) -> None:
    """One query of each of some heads over a share of its row's parts, one after the other: of each the sum of values,
    which no total divides as yet, the largest score and the total.  A tile of one head is multiplied in sums."""
    batch, head, number, share = (pl.program_id(i) for i in range(4))
    (_, _, heads, width), (_, num_kv, page, _) = q.shape, cache_k.shape
    groups, in_page, each = heads // num_kv, page // size, jnp.arange(size, dtype=jnp.int32)
    row = number * tile + jnp.arange(tile, dtype=jnp.int32)
    real, query, at = row < groups, head * groups + row, positions[batch, 0]
    slopes, results = (rest[0][jnp.minimum(query, heads - 1)][:, None], rest[1:]) if sloped else (None, rest)
    pieces = pieces_of(width, WIDEST)
    queries, q_scale = operands(query_pieces(q, batch, np.int32(0), query, real, pieces), in_halves, 1)

    def product(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
        return jnp.sum(a[0] * b[0], 1)[None] if tile == 1 else dot(a, b)

    def fold(turn: jax.Array, carry: int) -> int:
        part = share + turn * shares
        which, begin = table[batch, lax.div(part, in_page)], lax.rem(part, in_page) * size
        seen, place = part * size + each, pl.multiple_of(begin, size) + each
        found = [cut(cache_k, p, width, 1, which, head, place[:, None], p.lanes[None]) for p in pieces]
        others = [cut(cache_v, p, width, 0, which, head, p.lanes[:, None], place[None]) for p in pieces]
        if in_halves:  # behind the row's last token lies what another had there
            found = [jnp.where((seen <= at)[:, None], x, 0.0) for x in found]
            others = [jnp.where((seen <= at)[None], x, 0.0) for x in others]
        (keys, k_scale), (values, v_scale) = operands(found, in_halves), operands(others, in_halves)
        products = functools.reduce(jnp.add, map(product, queries, keys)) * (q_scale * k_scale)
        scores, mask = rule(products[None, None, None], jnp.broadcast_to(at, (1, tile)), seen[None], slopes)
        s, mask = scores[0, 0, 0], jnp.broadcast_to(mask[0, 0, 0], (tile, size))
        top = jnp.max(jnp.where(mask, s, -1e30), -1)
        p = jnp.where(mask, jnp.exp(s - top[:, None]), 0.0)
        weights, p_scale = weights_of(p, q.dtype, in_halves)
        for x, piece in zip(values, pieces, strict=True):
            plt.store(
                results[0].at[batch, part, query[:, None], piece.lanes[None]],
                product(weights, x) * (p_scale * v_scale),
                mask=real[:, None] & (piece.lanes < width)[None],
            )
        plt.store(results[1].at[batch, part, query], top, mask=real)
        plt.store(results[2].at[batch, part, query], jnp.sum(p, -1), mask=real)
        return carry

    first, last = first_seen(at, window, size), jnp.minimum(lax.div(at, size) + 1, results[0].shape[1])
    lax.fori_loop(lax.div(first - share + shares - 1, shares), lax.div(last - share + shares - 1, shares), fold, 0)


def _join(
    window: int | None, size: int, lanes: int, positions: Any, accs: Any, tops: Any, totals: Any, out: Any
) -> None:
    """What a row's parts gave one query, in their order, some at a time, of some dimensions."""
    batch, head, at = pl.program_id(0), pl.program_id(1), positions[pl.program_id(0), 0]
    mine = pl.program_id(2) * lanes + jnp.arange(lanes, dtype=jnp.int32)
    each, real = jnp.arange(_JOINED // lanes, dtype=jnp.int32), mine < out.shape[3]
    first, last = first_seen(at, window, size), jnp.minimum(lax.div(at, size) + 1, tops.shape[1])

    def turn(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        top, total, acc = carry
        part = first + i * len(each) + each
        mask = part < last
        its_top = plt.load(tops.at[batch, part, head], mask=mask, other=-1e30)
        its_total = plt.load(totals.at[batch, part, head], mask=mask, other=0)
        its_acc = plt.load(accs.at[batch, part[:, None], head, mine[None]], mask=mask[:, None] & real[None], other=0)
        new_top = jnp.maximum(top, jnp.max(its_top))
        old, its = jnp.exp(top - new_top), jnp.exp(its_top - new_top)
        return new_top, total * old + jnp.sum(its_total * its), acc * old + jnp.sum(its_acc * its[:, None], 0)

    start = (jnp.float32(-1e30), jnp.float32(0), jnp.zeros(lanes, jnp.float32))
    _, total, acc = lax.fori_loop(0, pl.cdiv(last - first, len(each)), turn, start)
    plt.store(out.at[batch, 0, head, mine], acc / total, mask=real)
