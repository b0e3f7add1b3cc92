"""The cache lies in pages: a row owns some of them, and its table names them in the order of its positions.

Shapes: ``P`` pages, ``page`` positions in one, ``K`` key/value heads, ``H`` head width.  A buffer of keys is ``[P, K,
page, H]``, one of values (``v``) ``[P, K, H, page]``: both are then read along what is summed.  Whatever else a layer
keeps of each token lies as keys do.  What it carries from token to token instead (``DecoderConfig.carried``) lies in
no page but once for each slot, ``[slots, ...]``.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from llmjax.device import by_device
from llmjax.models.context import Context
from llmjax.quant.bits import from_storage


def position_axis(name: str) -> int:
    """Where positions stand in the cache's buffer of this name."""
    return 3 if name == "v" else 2


def shape(name: str, pages: int, heads: int, width: int, page: int) -> tuple[int, int, int, int]:
    """That of the buffer of this name."""
    return (pages, heads, width, page) if position_axis(name) == 3 else (pages, heads, page, width)


def written(cache: jax.Array, name: str, new: jax.Array, ctx: Context) -> jax.Array:
    """``cache`` with ``new [B, T, K, H]`` at each token's position.

    A part of one row's prompt (``B`` 1, ``T`` above 1, no ``ctx.active``) must begin at a multiple of its length.
    """
    axis = position_axis(name)
    page = cache.shape[axis]
    part = new.transpose(0, 2, 1, 3) if axis == 2 else new.transpose(0, 2, 3, 1)
    if ctx.mask is not None:
        place: list[jax.Array | int] = [ctx.positions[0, 0] if i == axis else 0 for i in range(4)]
        return lax.dynamic_update_slice(cache, part, place, allow_negative_indices=False)
    if ctx.active is None and new.shape[0] == 1 and new.shape[1] > 1:
        # In as few pieces as lie in a page each: XLA:CPU scatters one by one.
        size = math.gcd(page, new.shape[1])
        in_pieces = partial(_in_pieces, axis, size)
        if size < page:
            return in_pieces(cache, part, ctx)
        return by_device(partial(_in_pages, axis), cpu=in_pieces)(cache, part, ctx)
    pages, places = _pages(ctx, ctx.positions // page), ctx.positions % page
    if new.shape[:2] == (1, 1) and ctx.active is not None:
        # One row: one that is at rest writes zeros where nobody has a page.
        active = ctx.active[0]
        begin = _place(axis, jnp.where(active, places[0, 0], 0), jnp.where(active, pages[0, 0], 0))
        return lax.dynamic_update_slice(cache, jnp.where(active, part, 0), begin, allow_negative_indices=False)
    if ctx.active is not None:
        places = jnp.where(ctx.active[:, None], places, page)  # out of range: dropped
    at = cache.at[pages, :, places] if axis == 2 else cache.at[pages, :, :, places]
    return at.set(new, mode="drop", unique_indices=True)


def _in_pieces(axis: int, size: int, cache: jax.Array, part: jax.Array, ctx: Context) -> jax.Array:
    """``written`` for a part of one row's prompt, ``size`` positions at a time."""
    page = cache.shape[axis]
    for start in range(0, part.shape[axis], size):
        position = ctx.positions[0, start]
        begin = _place(axis, position % page, _pages(ctx, position[None, None] // page)[0, 0])
        cache = lax.dynamic_update_slice(cache, lax.slice_in_dim(part, start, start + size, axis=axis), begin)
    return cache


def _place(axis: int, offset: jax.Array | int, page: jax.Array) -> list[jax.Array]:
    """Where a piece of a buffer begins; all of one type, also where numbers without one have 64 bits."""
    begin: list[jax.Array | int] = [page, 0, 0, 0]
    begin[axis] = offset
    return [jnp.asarray(number, jnp.int32) for number in begin]


def _in_pages(axis: int, cache: jax.Array, part: jax.Array, ctx: Context) -> jax.Array:
    """``written`` for whole pages of one row, in one kernel."""
    page = cache.shape[axis]
    numbers = _pages(ctx, ctx.positions[:, ::page] // page)[0]
    pages = part[0].reshape(*part.shape[1:axis], -1, page, *part.shape[axis + 1 :])
    return cache.at[numbers].set(jnp.moveaxis(pages, axis - 1, 0), unique_indices=True)


def block(cache: jax.Array, name: str, start: jax.Array, size: int, ctx: Context) -> jax.Array:
    """``size`` positions of each row from ``start`` int32 ``[B]`` on, a multiple of ``size`` as the page is: ``[B, K,
    size, H]`` of keys, ``[B, K, H, size]`` of values.  Behind a row's table: anything."""
    axis = position_axis(name)
    page = cache.shape[axis]

    def one(number: jax.Array, offset: jax.Array | int) -> jax.Array:
        begin = _place(axis, offset, number)
        return lax.dynamic_slice(cache, begin, [1, *(size if i == axis else cache.shape[i] for i in (1, 2, 3))])[0]

    numbers = _pages(ctx, start[:, None] // page)[:, 0]
    return jax.vmap(one, (0, None))(numbers, 0) if size == page else jax.vmap(one)(numbers, start % page)


def whole(cache: jax.Array, name: str, ctx: Context) -> jax.Array:
    """All that the rows' tables have room for, as ``block`` gives a part of it."""
    assert ctx.table is not None
    pages = jnp.moveaxis(cache[ctx.table], 1, position_axis(name))  # [B, K, pages, page, H], [B, K, H, pages, page]
    return pages.reshape(*pages.shape[: position_axis(name)], -1, *pages.shape[position_axis(name) + 2 :])


def tokens(cache: jax.Array, positions: jax.Array, ctx: Context) -> jax.Array:
    """What a buffer that lies as keys do holds of some tokens: ``[B, n, K, H]`` for positions int32 ``[B, n]``, none of
    them negative."""
    page = cache.shape[2]
    if ctx.mask is not None:
        return jnp.take(cache, positions[0], axis=2).transpose(0, 2, 1, 3)
    found = cache[_pages(ctx, positions // page), :, positions % page]
    return from_storage(found, ctx.numerics.products)


def carried(module: nn.Module, name: str, size: tuple[int, ...], ctx: Context) -> jax.Array:
    """What the module's buffer of this name has of each row, float32 ``[B, *size]``; zero where a text begins."""
    rows = ctx.positions.shape[0]
    if not module.has_variable("cache", name):
        return jnp.zeros((rows, *size), jnp.float32)
    found = _slots(module, name, ctx)
    return jnp.where(_each(ctx.positions[:, 0] == 0, found), 0, found)


def put_carried(module: nn.Module, name: str, new: jax.Array, ctx: Context) -> None:
    """Where there is a cache, has its buffer carry ``new [B, ...]`` on."""
    if not module.has_variable("cache", name):
        return
    assert ctx.slot is not None
    if ctx.active is not None:
        new = jnp.where(_each(ctx.active, new), new, _slots(module, name, ctx))
    buffer: jax.Array = module.get_variable("cache", name)
    changed = lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), ctx.slot, 0)
    module.put_variable("cache", name, changed)


def _slots(module: nn.Module, name: str, ctx: Context) -> jax.Array:
    """What lies in the rows' slots of a buffer."""
    assert ctx.slot is not None
    buffer: jax.Array = module.get_variable("cache", name)
    return lax.dynamic_slice_in_dim(buffer, ctx.slot, ctx.positions.shape[0], 0)


def _each(rows: jax.Array, like: jax.Array) -> jax.Array:
    """``[B]`` with as many dimensions as ``like`` has."""
    return rows.reshape(-1, *(1 for _ in like.shape[1:]))


def _pages(ctx: Context, index: jax.Array) -> jax.Array:
    """The pages ``[B, T]`` at these places of the rows' tables."""
    assert ctx.table is not None
    return jnp.take_along_axis(ctx.table, jnp.minimum(index, ctx.table.shape[1] - 1), axis=1)
