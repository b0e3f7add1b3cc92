"""Causal attention, with and without a cache, and the position encodings that act inside it.

Shapes: ``B`` batch, ``T`` query positions, ``S`` cache positions, ``N`` query heads, ``K`` key/value heads,
``G = N / K``, ``H`` head width.  A window of ``W`` means a token sees itself and the ``W - 1`` before it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmjax.device import by_device
from llmjax.models.context import Context
from llmjax.models.pages import block as cut
from llmjax.models.pages import whole
from llmjax.products.sums import by_cache
from llmjax.quant.bits import from_storage, rounded_off

# Not -inf: the running maximum of a block that is masked for some row must stay finite, or exp(-inf - -inf) makes NaN.
MASKED = -1e30
# Blocks in a page of the cache.  A step folds a page in one turn; it is short of things to do at once.  Prompts take a
# block.
PAGE_BLOCKS = 2


def alibi_slopes(num_heads: int) -> np.ndarray:
    """float32 ``[N]`` (Press et al. 2021, arXiv:2108.12409).

    For a head count that is no power of two: the slopes of the next lower power, then every other slope of the doubled
    series.
    """

    def series(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    lower = 2 ** int(np.floor(np.log2(num_heads)))
    return np.array(series(lower) + series(2 * lower)[0::2][: num_heads - lower], np.float32)


@dataclasses.dataclass(frozen=True)
class Scores:
    """How raw products ``q . k`` become attention scores: everything here is static.

    Attributes:
      scale: multiplies ``q . k`` (and the ALiBi bias, which Falcon adds before scaling).
      softcap: ``cap * tanh(s / cap)`` after the scale and before the mask (Gemma 2); None for none.
      window: sliding window in tokens, itself included; None for all of the past.
      alibi: add ``slope[head] * key position``.
      fused: round as torch's fused attention does, which transformers uses for Falcon: scores stay float32, and
        probabilities are rounded before they are normalised.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    alibi: bool = False
    fused: bool = False

    def grown(self, q: jax.Array, positions: jax.Array) -> jax.Array:
        """Queries ``[B, T, N, H]`` at positions ``[B, T]`` as they meet keys."""
        return q

    def __call__(
        self,
        products: jax.Array,
        queries: jax.Array,
        keys: jax.Array,
        ctx: Context,
        slopes: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Scores and the mask of what each query may see.

        Args:
          products: float32 ``[B, K, G, T, S]``.
          queries: int32 positions ``[B, T]``.
          keys: int32 positions ``[B, S]``; ``[1, S]`` where they are the same in all rows.
          ctx: for the roundings of the profile.
          slopes: ALiBi's, broadcastable to products, of whoever has its queries in another order.

        Returns:
          ``(scores, mask)``, scores as products, mask broadcastable to them.
        """
        dtype = jnp.float32 if self.fused else ctx.numerics.activations
        scores = (products.astype(dtype).astype(jnp.float32) * jnp.float32(self.scale)).astype(dtype)
        if self.alibi:
            if slopes is None:
                num_kv, groups = products.shape[1:3]
                slopes = jnp.asarray(alibi_slopes(num_kv * groups).reshape(num_kv, groups, 1, 1))
            bias = _alibi_bias(slopes, keys, ctx.numerics.round_alibi) * jnp.float32(self.scale)
            scores = scores + bias.astype(ctx.numerics.activations).astype(dtype)
        if self.softcap is not None:
            scores = softcap(scores, self.softcap)
        scores = scores.astype(jnp.float32)
        mask = keys[:, None, :] <= queries[:, :, None]
        if self.window is not None:
            mask &= keys[:, None, :] > queries[:, :, None] - self.window
        return scores, mask[:, None, None]


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """``cap * tanh(x / cap)``, every step rounded to x's dtype; Triton has no tanh of 16 bits."""
    y = jnp.tanh((x.astype(jnp.float32) / jnp.float32(cap)).astype(x.dtype).astype(jnp.float32)).astype(x.dtype)
    return (y.astype(jnp.float32) * jnp.float32(cap)).astype(x.dtype)


def _alibi_bias(slopes: jax.Array, keys: jax.Array, rounded: bool) -> jax.Array:
    """float32 ``[B, K, G, 1, S]`` for keys ``[B, S]``; ``rounded`` rounds slopes, positions and product to bfloat16
    (transformers' build_alibi_tensor)."""
    positions = keys.astype(jnp.float32)[:, None, None, None]
    round_ = partial(rounded_off, bits=16) if rounded else lambda x: x  # to bfloat16
    return round_(round_(lax.broadcast_to_rank(slopes, positions.ndim)) * round_(positions))


def _grouped(q: jax.Array, num_kv: int) -> jax.Array:
    """``[B, T, N, H] -> [B, K, G, T, H]``."""
    b, t, n, h = q.shape
    return q.reshape(b, t, num_kv, n // num_kv, h).transpose(0, 2, 3, 1, 4)


def _ungrouped(x: jax.Array) -> jax.Array:
    """``[B, K, G, T, H] -> [B, T, N, H]``."""
    b, k, g, t, h = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(b, t, k * g, h)


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scores: Scores,
    ctx: Context,
    seen: Callable[[jax.Array], jax.Array] = lambda probs: probs,
) -> tuple[jax.Array, jax.Array]:
    """Attention over the tokens of this call, written as in the paper; differentiable.

    Args:
      q: ``[B, T, N, H]``.
      k: ``[B, T, K, H]``.
      v: ``[B, T, K, H]``.
      scores: the layer's rule.
      ctx: positions must be ``arange(T)`` in every row.
      seen: is shown the probabilities and may give others.

    Returns:
      output ``[B, T, N, H]`` and the probabilities ``[B, K, G, T, T]``.
    """
    dtype = q.dtype
    products = _einsum("BKGTH,BSKH->BKGTS", _grouped(q, k.shape[2]), k)
    s, mask = scores(products, ctx.positions, jnp.arange(k.shape[1], dtype=jnp.int32)[None], ctx)
    s = jnp.where(mask, s, MASKED)
    if scores.fused:
        unnormalised = jnp.exp(s - lax.stop_gradient(jnp.max(s, -1, keepdims=True)))
        total = jnp.sum(unnormalised, -1, keepdims=True)
        normalised = (unnormalised / total).astype(dtype)
        probs = seen(normalised)
        if probs is normalised:
            out = _einsum("BKGTS,BSKH->BKGTH", unnormalised.astype(dtype), v) / total
        else:
            out = _einsum("BKGTS,BSKH->BKGTH", probs, v)
        return _ungrouped(out.astype(dtype)), probs
    probs = seen(jax.nn.softmax(s, axis=-1).astype(dtype))
    out = _einsum("BKGTS,BSKH->BKGTH", probs, v).astype(dtype)
    return _ungrouped(out), probs


def cached_attention(
    q: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    scores: Scores,
    ctx: Context,
    seen: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Attention over a cache, folding blocks of fixed size with a running softmax (Milakov & Gimelshein 2018,
    arXiv:1805.02867).

    Each row begins with the first block its window reaches, and there are as many turns as the row with the most blocks
    needs: neither the cache's length nor a row at rest, nor one that is elsewhere in its text, adds any.  A block that
    is masked for a row is the exact identity for it, so its neighbours move no bit of a row's result.

    Args:
      q: ``[B, T, N, H]``.
      cache_k: ``[P, K, page, H]``, as ``bits.storage`` of the products' dtype, this call's tokens already written; a
        page is a multiple of ``ctx.block``.
      cache_v: ``[P, K, H, page]``, else as cache_k.
      scores: the layer's rule.
      ctx: positions, table, block.
      seen: is shown the probabilities ``[B, K, G, T, S]`` and may give others; None if nobody wants to.

    Returns:
      ``[B, T, N, H]`` in q's dtype.
    """
    folded = partial(_folded, scores=scores, seen=seen)
    if seen is not None:
        return folded(q, cache_k, cache_v, ctx)
    return by_device(folded, cpu=folded, cuda=partial(_in_a_kernel, scores))(q, cache_k, cache_v, ctx)


def _in_a_kernel(scores: Scores, q: jax.Array, cache_k: jax.Array, cache_v: jax.Array, ctx: Context) -> jax.Array:
    """``cached_attention`` by ``models.flash``, where that knows how."""
    from llmjax.models import flash  # Pallas takes as long to import as all of llmjax

    if not flash.can_serve(cache_k):
        return _folded(q, cache_k, cache_v, ctx, scores, None)
    assert ctx.table is not None

    def rule(products: jax.Array, queries: jax.Array, keys: jax.Array, slopes: jax.Array | None) -> Any:
        return scores(products, queries, keys, ctx, slopes)

    queries, slopes = q.astype(ctx.numerics.products), jnp.asarray(alibi_slopes(q.shape[2])) if scores.alibi else None
    args = (queries, cache_k, cache_v, ctx.table, ctx.positions, slopes)
    return flash.flash_attention(rule, ctx.numerics, scores.window, *args).astype(q.dtype)


def _folded(
    q: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    ctx: Context,
    scores: Scores,
    seen: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    """``cached_attention`` as it is defined."""
    batch, count, _, width = q.shape
    num_kv, page = cache_k.shape[1:3]
    dtype = ctx.numerics.products
    step = count == 1
    block = page if step else ctx.block
    product = by_cache if step and ctx.numerics.reassociates else _row_products
    qg = _grouped(q, num_kv).astype(dtype)
    rows = qg.reshape(batch, num_kv, -1, width)
    first, turns = block_range(ctx.positions, block, scores.window)

    def fold(turn: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, acc = carry
        start = (first + turn) * block
        keys, values = cut(cache_k, "k", start, block, ctx), cut(cache_v, "v", start, block, ctx)
        products = product(rows, from_storage(keys, dtype)).reshape(*qg.shape[:-1], block)
        s, mask = scores(products, ctx.positions, start[:, None] + jnp.arange(block, dtype=jnp.int32)[None], ctx)
        new_top = jnp.maximum(top, jnp.max(jnp.where(mask, s, MASKED), -1, keepdims=True))
        p = jnp.where(mask, jnp.exp(s - new_top), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(p, -1, keepdims=True)
        weights = p.astype(dtype).reshape(batch, num_kv, -1, block)
        acc = acc * shrink + product(weights, from_storage(values, dtype)).reshape(qg.shape)
        return new_top, total, acc

    stats = jnp.zeros((*qg.shape[:-1], 1), jnp.float32)
    zero = (stats + MASKED, stats, jnp.zeros(qg.shape, jnp.float32))
    top, total, acc = lax.fori_loop(0, turns, fold, zero)
    out = acc / total
    if seen is not None:
        out = out + _by_others(qg, cache_k, cache_v, top, total, scores, ctx, seen)
    return _ungrouped(out).astype(q.dtype)


def _by_others(
    qg: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    top: jax.Array,
    total: jax.Array,
    scores: Scores,
    ctx: Context,
    seen: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """What other probabilities than its own add to the output of attention over a cache: zero where ``seen`` gives back
    what it is shown, so that it then moves no bit of what was folded.

    Args:
      qg: ``[B, K, G, T, H]``.
      cache_k: see ``cached_attention``, as the others.
      cache_v: likewise.
      top: ``[B, K, G, T, 1]``, the largest score of each query.
      total: ``[B, K, G, T, 1]``, the sum that its exponentials are divided by.
      scores: likewise.
      ctx: likewise.
      seen: likewise.

    Returns:
      float32 ``[B, K, G, T, H]``.
    """
    keys, values = (from_storage(whole(cache, name, ctx), qg.dtype) for cache, name in ((cache_k, "k"), (cache_v, "v")))
    products = _einsum("BKGTH,BKSH->BKGTS", qg, keys)
    s, mask = scores(products, ctx.positions, jnp.arange(keys.shape[2], dtype=jnp.int32)[None], ctx)
    probs = jnp.where(mask, jnp.exp(s - top) / total, 0.0).astype(ctx.numerics.activations)
    # What a token does not see may be nobody's: a page that no row has yet, or has no more.
    change = jnp.where(mask, seen(probs) - probs, 0)
    return _einsum("BKGTS,BKHS->BKGTH", change.astype(qg.dtype), values)


def masked_attention(
    q: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    scores: Scores,
    ctx: Context,
    seen: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Attention over the whole cache of one row under ``ctx.mask``, in float32.

    What the layer's rule hides gets -1e4, not less: a token that sees nothing, as padding does, must not make NaN.

    Args:
      q: ``[1, T, N, H]``.
      cache_k: ``[1, K, S, H]``, this call's tokens already written.
      cache_v: ``[1, K, H, S]``.
      scores: the layer's rule.
      ctx: positions, mask.
      seen: is shown the probabilities ``[1, K, G, T, S]`` and may give others.

    Returns:
      ``[1, T, N, H]``.
    """
    _, count, heads, width = q.shape
    num_kv, size = cache_k.shape[1:3]
    rows = q.transpose(0, 2, 1, 3).reshape(1, num_kv, -1, width)
    products = _row_products(rows, cache_k).reshape(1, num_kv, heads // num_kv, count, size)
    s, mask = scores(products, ctx.positions, jnp.arange(size, dtype=jnp.int32)[None], ctx)
    assert ctx.mask is not None
    probs = seen(softmax(s + (ctx.mask[:, :, None] + jnp.where(mask, 0.0, -1e4))))
    out = _row_products(probs.reshape(1, num_kv, -1, size), cache_v)
    return out.reshape(1, heads, count, width).transpose(0, 2, 1, 3)


@jax.jit
def softmax(x: jax.Array) -> jax.Array:
    """Over the last axis; known by its name to what writes op graphs."""
    return jax.nn.softmax(x, axis=-1)


def block_range(positions: jax.Array, block: int, window: int | None) -> tuple[jax.Array, jax.Array]:
    """Which blocks the rows attend to: each row's first, int32 ``[B]``, and how many the row with the most has.

    Args:
      positions: int32 ``[B, T]`` of the queries; 0 of a row at rest.
      block: positions in one.
      window: of the layer.
    """
    last = jnp.max(positions, 1) // block
    if window is None:
        return jnp.zeros_like(last), jnp.max(last) + 1
    first = jnp.maximum(0, jnp.min(positions, 1) - window + 1) // block
    return first, jnp.max(last - first) + 1


def _row_products(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x [B, K, M, in] . w [B, K, out, in] -> float32 [B, K, M, out]``."""
    return _einsum("BKMI,BKOI->BKMO", x, w)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Einsum with a float32 sum at the highest precision (no TF32 on GPUs)."""
    return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
