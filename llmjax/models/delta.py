"""Linear attention by the gated delta rule (Yang et al. 2024, arXiv:2412.06464).

A layer keeps no keys and values of the past but one matrix a head, which every token lets decay and corrects: what it
had for the token's key moves towards the token's value.

Shapes: ``K`` key heads, ``G`` value heads to each, ``E`` width of a key, ``H`` of a value; ``k`` tokens that a
convolution sees.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from llmjax.device import by_device
from llmjax.models.context import Context, tap
from llmjax.models.layers import Kernel, Projection, RMSNorm, over, parameter, sigmoid
from llmjax.models.pages import carried, put_carried

_L2_EPS = 1e-6
# Tokens that are computed at once.
CHUNK = 64


class GatedDelta(nn.Module):
    """What Qwen3.5's layers of linear attention are.

    Attributes:
      key_heads: K.
      value_heads: ``K * G``; ``G`` neighbours have a key head in common.
      key_dim: E.
      value_dim: H.
      kernel: k, the newest token included.
      activation: of what the convolution gives.
      eps: of the norm of what is read.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    activation: Callable[[jax.Array], jax.Array]
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        qkv = Projection(2 * keys + values, name="qkv")(x, ctx)
        gate = Projection(values, name="gate")(x, ctx)
        beta = sigmoid(Projection(self.value_heads, name="beta")(x, ctx))
        rate = Projection(self.value_heads, name="decay")(x, ctx).astype(jnp.float32)
        bias = parameter(self, "dt_bias", nn.initializers.ones, (self.value_heads,)).astype(jnp.float32)
        speed = jnp.exp(parameter(self, "a_log", nn.initializers.zeros, (self.value_heads,)).astype(jnp.float32))
        decay = over(-speed, rate) * jax.nn.softplus(rate + over(bias, rate))  # its logarithm

        qkv = tap(self, "convolved", self.activation(self._convolved(qkv, ctx)))
        q, k, v = jnp.split(qkv, (keys, 2 * keys), -1)
        q, k = (y.reshape(*y.shape[:2], self.key_heads, self.key_dim) for y in (q, k))
        y = tap(self, "read", self._read(q, k, v, beta, decay, ctx).astype(x.dtype))

        y = RMSNorm(self.eps, name="norm")(y) * jax.nn.silu(gate.astype(jnp.float32)).reshape(y.shape)
        y = tap(self, "out", y.astype(x.dtype).reshape(*x.shape[:2], values))
        return Projection(x.shape[-1], name="o")(y, ctx)

    def _convolved(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Each channel's convolution: ``[B, T, C]`` to the same."""
        count = self.kernel - 1
        before = carried(self, "before", (count, x.shape[-1]), ctx)
        x = jnp.concatenate([before.astype(x.dtype), x], 1)
        ends = _new_tokens(ctx)[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        put_carried(self, "before", jnp.take_along_axis(x, ends[..., None], 1), ctx)
        return Kernel(self.kernel, name="kernel")(x)

    def _read(
        self, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, decay: jax.Array, ctx: Context
    ) -> jax.Array:
        """float32 ``[B, T, K * G, H]`` for ``q, k [B, T, K, E]``, ``v [B, T, K * G * H]``, ``beta, decay [B, T, K *
        G]``."""
        batch, tokens = v.shape[:2]
        heads = (self.key_heads, self.value_heads // self.key_heads)
        padding = (jnp.arange(tokens, dtype=jnp.int32)[None] >= _new_tokens(ctx)[:, None])[..., None]
        beta, decay = (  # padding leaves the state as it is
            jnp.where(padding, 0, y.astype(jnp.float32)).reshape(batch, tokens, *heads) for y in (beta, decay)
        )
        v = v.astype(jnp.float32).reshape(batch, tokens, *heads, self.value_dim)
        # It lies as a step sums it: XLA for a card else has the whole cache turned at every call, and turned back.
        state = carried(self, "state", (self.value_heads, self.value_dim, self.key_dim), ctx)
        state = state.reshape(batch, *heads, self.value_dim, self.key_dim)
        q = _unit(q) * jnp.float32(self.key_dim**-0.5)
        state, y = delta_rule(state, q, _unit(k), v, decay, beta, kept=ctx.recompute is None)
        put_carried(self, "state", state.reshape(batch, self.value_heads, self.value_dim, self.key_dim), ctx)
        return y.reshape(batch, tokens, self.value_heads, self.value_dim)


def delta_rule(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    beta: jax.Array,
    *,
    kept: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence itself: ``S = exp(decay) * S``, ``S = S + beta * (v - S k) k^T``, ``y = S q`` for token by token.

    Several tokens are computed in chunks, as products of matrices (Yang et al. 2024, arXiv:2406.06484, section 3): from
    one chunk to the next goes the state alone.

    Args:
      state: float32 ``[B, K, G, H, E]``, before the first token.
      q: float32 ``[B, T, K, E]``.
      k: as q.
      v: float32 ``[B, T, K, G, H]``.
      decay: float32 ``[B, T, K, G]``, 0 or less.
      beta: as decay.
      kept: on the way to a gradient all that is within a chunk is; otherwise the state before each, and the rest is
        computed again.

    Returns:
      the state behind the last token, and y ``[B, T, K, G, H]``.
    """
    if q.shape[1] == 1:
        state, y = _one(state, *(x[:, 0] for x in (q, k, v, decay, beta)))
        return state, y[:, None]
    return (_in_chunks if kept else _by_chunk)(state, q, k, v, decay, beta)


def _one(
    state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, beta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A token, as ``delta_rule`` has it written."""
    state = state * jnp.exp(decay)[..., None, None]
    change = (v - _read_at(state, k)) * beta[..., None]
    state = state + change[..., None] * k[:, :, None, None]
    return state, _read_at(state, q)


@partial(jax.jit, inline=True)  # outside of programs the loop would be compiled anew at every call
def _in_chunks(
    state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, beta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Many tokens: ``N`` chunks of ``C``, filled up with tokens that change nothing."""
    batch, tokens = q.shape[:2]
    size = min(CHUNK, 1 << (tokens - 1).bit_length())

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] to [N, B, ..., C, width]
        x = jnp.pad(x, [(0, 0), (0, -tokens % size), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), (1, 2), (0, -2))

    q, k = (cut(x)[:, :, :, None] for x in (q, k))  # [N, B, K, 1, C, E]
    v = cut(v)  # [N, B, K, G, C, H]
    decay, beta = (cut(x[..., None]) for x in (decay, beta))  # [N, B, K, G, C, 1]
    since = jnp.cumsum(decay, -2)  # of the state before the chunk
    left = jnp.exp(since)
    # Between one token and another: summed for each pair, as a difference of large sums would be no longer exact.
    after, not_before = (np.tri(size, k=k, dtype=bool)[(None,) * 4] for k in (-1, 0))
    between = jnp.where(not_before, jnp.exp(jnp.cumsum(jnp.where(after, decay, 0), -2)), 0)

    # What a token changes follows from what the others before it did: (1 + A) change = beta (v - left k S).
    alike = _product(k, _turned(k)) * between
    solved = _inverse(jnp.where(after, alike * beta, 0)) * _turned(beta)
    fresh, replaced = _product(solved, v), _product(solved, left * k)
    weights = _product(q, _turned(k)) * between
    kept = _turned(between[..., -1:, :])  # of each token's change, at the chunk's end
    each = fresh, replaced, weights, left * q, kept * k, left[..., -1:, :]

    def step(state: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        fresh, replaced, weights, q, k, left = chunk
        change = fresh - _product(replaced, _turned(state))
        y = _product(q, _turned(state)) + _product(weights, change)
        return left * state + _product(_turned(change), k), y

    state, y = lax.scan(step, state, each)
    return state, jnp.moveaxis(y, (0, -2), (1, 2)).reshape(batch, -1, *y.shape[2:4], y.shape[-1])[:, :tokens]


def _by_chunk(state: jax.Array, *each: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As ``_in_chunks``, of which each is done with before the next one begins."""
    batch, tokens = each[0].shape[:2]
    if tokens <= CHUNK:
        return _in_chunks(state, *each)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -tokens % CHUNK), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, -1, CHUNK, *x.shape[2:]), 1, 0)

    step = jax.checkpoint(lambda state, chunk: _in_chunks(state, *chunk), prevent_cse=False)  # within a loop
    state, y = lax.scan(step, state, tuple(map(cut, each)))
    return state, jnp.moveaxis(y, 0, 1).reshape(batch, -1, *y.shape[3:])[:, :tokens]


@jax.custom_jvp
def _inverse(lower: jax.Array) -> jax.Array:
    """``(1 + lower)^-1`` of matrices ``[..., C, C]`` with nothing on and above their diagonals, C a power of two: the
    diagonal's blocks, two by two, make those twice as large."""
    size, blocks = lower.shape[-1], jnp.ones((*lower.shape[:-1], 1, 1), lower.dtype)
    while (width := blocks.shape[-1]) < size:
        below = _below(lower, width)
        first, second = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
        corner = -_product(_product(second, below), first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        blocks = jnp.concatenate([upper, jnp.concatenate([corner, second], -1)], -2)
    return blocks[..., 0, :, :]


def _below(lower: jax.Array, width: int) -> jax.Array:
    """``[..., count, width, width]``: of each of the diagonal's blocks, two widths wide, the lower left.

    Cut out at once, for a slice each were sixty for XLA to compile: where all numbers lie one behind the other and rows
    of blocks are longer by a block, each begins where its own block does.
    """
    *rest, size, _ = lower.shape
    block = 2 * width
    flat = jnp.pad(lower.reshape(*rest, -1), [(0, 0)] * len(rest) + [(0, size)])
    rows = flat.reshape(*rest, size // block, (size + 1) * block)[..., : size * block]
    return rows.reshape(*rest, size // block, block, size)[..., width:, :width]


@_inverse.defjvp
def _(values: tuple[jax.Array], changes: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """``-X dL X`` for ``X = (1 + L)^-1``, of which no step needs to be kept, or compiled, on the way to a gradient."""
    inverse = _inverse(*values)
    return inverse, -_product(inverse, _product(*changes, inverse))


_product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _turned(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _summed(state: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.sum(state * key[:, :, None, None], -1)


def _multiplied(state: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.einsum("bkghe,bke->bkgh", state, key, precision=lax.Precision.HIGHEST)


# What states ``[B, K, G, H, E]`` have for keys ``[B, K, E]``: ``[B, K, G, H]``.  For a card sums are fused with what
# comes before; XLA:CPU adds them up number by number, twenty times slower than its product.
_read_at = by_device(_summed, cpu=_multiplied)


def _unit(x: jax.Array) -> jax.Array:
    """Of length 1 over the last dimension, float32."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + _L2_EPS)


def _new_tokens(ctx: Context) -> jax.Array:
    """int32 ``[B]``, how many of this call's tokens are no padding."""
    return jnp.clip(ctx.tokens - ctx.positions[:, 0], 0, ctx.positions.shape[1])
