"""The blocks that architecture files are written with.

Parameters keep the values and the layout of the checkpoint: ``[out, in]`` weights, norms without the 1 added, nothing
folded in.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from llmjax.device import by_device
from llmjax.models.attention import Scores, cached_attention, dense_attention, masked_attention
from llmjax.models.context import PROJECTED, Context, patched, tap
from llmjax.models.pages import written
from llmjax.models.rope import Rope
from llmjax.products.matmul import matmul, matmuls
from llmjax.quant.bits import look_up, to_storage
from llmjax.quant.qtensor import QTensor, take

_normal = nn.initializers.normal(0.02)


def parameter(module: nn.Module, name: str, init: Callable[..., jax.Array], shape: tuple[int, ...]) -> Any:
    """A parameter of ``module``: read where it is present, initialised (float32) where it is not.

    ``Module.param`` checks the value against the initialiser's shape and so refuses packed leaves; a leaf that is
    present was checked when the checkpoint was read.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, jnp.float32)


class Projection(nn.Module):
    """``x [..., in] -> x . W^T + b [..., out]``: the seam every product with a weight goes through.

    Its name in the tree is its role (``q``, ``gate``, ...).  A leaf ``lora`` beside its weight adds an adapter's delta
    (``llmjax.lora.apply``).

    Attributes:
      features: out.
      bias: has one.
      bias_apart: the product is rounded before the bias is added, not only after (Falcon was trained so).
    """

    features: int
    bias: bool = False
    bias_apart: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context, product: jax.Array | None = None) -> jax.Array:
        """``product`` is that of x with the weight, of whoever has made it together with others."""
        weight = parameter(self, "weight", _normal, (self.features, x.shape[-1]))
        lora: Any = self.get_variable("params", "lora")
        # What is kept for the way back: a magnitude's derivative needs the product, of which the rest is soon made.
        dora = lora is not None and lora.magnitude is not None
        product = matmul(x, weight, ctx.numerics) if product is None else product
        if ctx.recompute is not None and dora:
            product = checkpoint_name(product, PROJECTED)
        y = product.astype(ctx.numerics.activations) if self.bias_apart else product
        if self.bias:
            y = y + over(parameter(self, "bias", nn.initializers.zeros, (self.features,)).astype(y.dtype), y)
        y = y.astype(ctx.numerics.activations)
        y = with_lora(lora, y, x, product, weight, ctx)
        if ctx.recompute is not None and not dora:
            y = checkpoint_name(y, PROJECTED)
        return tap(self, "", y)


def products(module: nn.Module, names: tuple[str, ...], x: jax.Array, ctx: Context) -> list[jax.Array | None]:
    """Of x with the weights of the module's projections of these names, made together where that is quicker."""
    found: list[Any] = [module.get_variable("params", name, {}) for name in names]
    return matmuls(x, [projection.get("weight") for projection in found], ctx.numerics)


def with_lora(lora: Any, y: jax.Array, x: jax.Array, product: jax.Array, weight: Any, ctx: Context) -> jax.Array:
    """``y``, what became of ``product``, that of ``x`` with ``weight``, and what a module's leaf ``lora``, if it has
    one, adds."""
    delta: jax.Array | None = None if lora is None else lora(x, product, weight, ctx)
    return y if delta is None else (y.astype(jnp.float32) + delta).astype(y.dtype)


class Embedding(nn.Module):
    """Token embedding ``[V, D]``; ``attend`` uses the same table as a tied head.  A leaf ``lora`` is the head's alone.

    Attributes:
      vocab_size: V.
      features: D.
      scale: multiplies what is looked up, not the head (Gemma); rounded to the dtype of the activations, as
        transformers does.
    """

    vocab_size: int
    features: int
    scale: float = 1.0

    def setup(self) -> None:
        self.weight = parameter(self, "weight", _normal, (self.vocab_size, self.features))

    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        """int32 ``[B, T] -> [B, T, D]``."""
        rows = take(self.weight, ids) if isinstance(self.weight, QTensor) else look_up(self.weight, ids)
        x = rows.astype(ctx.numerics.activations)
        return x if self.scale == 1.0 else x * jnp.float32(self.scale).astype(x.dtype)

    def attend(self, x: jax.Array, ctx: Context, bias: jax.Array | None = None) -> jax.Array:
        """``[B, T, D] -> [B, T, V]``, ``bias [V]`` added where the head has one."""
        y = product = matmul(x, self.weight, ctx.numerics)
        y = (y if bias is None else y + over(bias.astype(y.dtype), y)).astype(ctx.numerics.activations)
        return with_lora(self.get_variable("params", "lora"), y, x, product, self.weight, ctx)


def language_head(model: nn.Module, embed: Embedding, x: jax.Array, ctx: Context, *, tied: bool) -> jax.Array:
    """``[B, T, D] -> [B, T, V]``: with the embedding's table where the config ties them, else by a projection
    ``head`` of the model."""
    return tap(model, "head", embed.attend(x, ctx)) if tied else Projection(embed.vocab_size, name="head")(x, ctx)


class RMSNorm(nn.Module):
    """``w * x / sqrt(mean(x^2) + eps)`` (Zhang & Sennrich 2019, arXiv:1910.07467), normalised in float32 and rounded
    before the weight, as Llama does."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.ones, (x.shape[-1],))
        return tap(self, "", over(weight.astype(x.dtype), x) * rms_normalised(x, self.eps).astype(x.dtype))


class WideRMSNorm(nn.Module):
    """``w * x / sqrt(mean(x^2) + eps)``, all of it in float32 before rounding."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.ones, (x.shape[-1],))
        return tap(self, "", (over(weight.astype(jnp.float32), x) * rms_normalised(x, self.eps)).astype(x.dtype))


class UnitOffsetRMSNorm(nn.Module):
    """``(1 + w) * x / sqrt(mean(x^2) + eps)``, all of it in float32 before rounding, as Gemma does."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.zeros, (x.shape[-1],))
        y = rms_normalised(x, self.eps) * over(1.0 + weight.astype(jnp.float32), x)
        return tap(self, "", y.astype(x.dtype))


def over(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector of the last dimension of ``x``, with as many dimensions as that: JAX can be told to ask for them."""
    return jax.lax.broadcast_to_rank(vector, x.ndim)


def rms_normalised(x: jax.Array, eps: float) -> jax.Array:
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(_mean(x * x, eps))


def _mean(x: jax.Array, more: float | None = None) -> jax.Array:
    """Over the last dimension, which stays, of float32 x; with ``more`` added."""

    def plainly(x: jax.Array) -> jax.Array:
        mean = jnp.mean(x, -1, keepdims=True)
        return mean if more is None else mean + more

    def within(x: jax.Array) -> jax.Array:
        return jnp.sum((x if more is None else x + more) * np.float32(1 / x.shape[-1]), -1, keepdims=True)

    # What is done to the one number that a step's only row has keeps XLA:GPU from a norm in one kernel.  That it takes
    # into the products that follow, too, in tiles of powers of two, which other widths would fill but in part.
    alone = x.size == x.shape[-1] and x.size.bit_count() == 1
    return by_device(plainly, cpu=plainly, cuda=within if alone else plainly)(x)


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) * w + b`` in float32 (Ba et al. 2016, arXiv:1607.06450)."""

    eps: float
    bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.ones, (x.shape[-1],))
        y = standardised(x, self.eps) * over(weight.astype(jnp.float32), x)
        if self.bias:
            y = y + over(parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32), y)
        return tap(self, "", y.astype(x.dtype))


def standardised(x: jax.Array, eps: float) -> jax.Array:
    """``(x - mean) / sqrt(var + eps)`` over the last dimension, float32."""
    x = x.astype(jnp.float32)
    return rms_normalised(x - _mean(x), eps)


def scaled(x: jax.Array, factor: float, *, rounded: bool) -> jax.Array:
    """``x * factor``, the factor ``rounded`` to x's dtype first or the product alone."""
    if rounded:
        return x * jnp.float32(factor).astype(x.dtype)
    return (x.astype(jnp.float32) * jnp.float32(factor)).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads (Ainslie et al. 2023, arXiv:2305.13245).

    With a ``cache`` collection (``k`` and ``v``, see ``models.pages``) the tokens are written at their positions and
    attend to all that is there; without one they attend to each other.

    Attributes:
      num_heads: N.
      num_kv_heads: K.
      head_dim: H; ``N * H`` need not be the model's width.
      scores: scale, soft-cap, window, ALiBi.
      rope: rotary embedding, or None.
      qkv_bias: q, k and v have biases.
      out_bias: o has one.
      qk_norm: makes the norm of each head's query and key (before the rotation) from its name; None for none.
      projection: makes q, k, v and o.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scores: Scores
    rope: Rope | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Callable[[str], nn.Module] | None = None
    projection: Callable[..., nn.Module] = Projection

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        def heads(name: str, count: int, product: jax.Array | None) -> jax.Array:
            made = () if product is None else (product,)
            y = self.projection(count * self.head_dim, self.qkv_bias, name=name)(x, ctx, *made)
            return y.reshape(*y.shape[:2], count, self.head_dim)

        counts = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}
        each = zip(counts.items(), products(self, tuple(counts), x, ctx), strict=True)
        q, k, v = (heads(name, count, product) for (name, count), product in each)
        if self.qk_norm is not None:
            q, k = self.qk_norm("q_norm")(q), self.qk_norm("k_norm")(k)
        if self.rope is not None:
            q = tap(self, "q_rot", self.rope(q, ctx))
            k = tap(self, "k_rot", self.rope(k, ctx))
        q = self.scores.grown(q, ctx.positions)
        out = attended(self, q, *keys_and_values(self, k, v, ctx), self.scores, ctx)
        return self.projection(x.shape[-1], self.out_bias, name="o")(out, ctx)


def kept(module: nn.Module, name: str, new: jax.Array, ctx: Context) -> jax.Array:
    """Where there is a cache, puts ``new [B, T, K, H]`` at each token's position in the module's buffer of this name
    and returns all of that; else ``new`` itself."""
    if not module.has_variable("cache", name):
        return new
    new = to_storage(new.astype(ctx.numerics.products))
    cache = written(module.get_variable("cache", name), name, new, ctx)
    module.put_variable("cache", name, cache)
    return cache


def keys_and_values(module: nn.Module, k: jax.Array, v: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array]:
    """``kept`` for both, ``[B, T, K, H]``.

    A value that is not finite is kept as 0, its key as NaN instead: whoever sees the token gets NaN all the same.  A
    mask hides keys; of a hidden value it makes 0 * NaN, in a row that has the page next, too.
    """
    if module.has_variable("cache", "v") and ctx.mask is None:
        is_finite = jnp.isfinite(v.astype(ctx.numerics.products))
        k, v = jnp.where(is_finite, k, jnp.nan), jnp.where(is_finite, v, 0)
    return kept(module, "k", k, ctx), kept(module, "v", v, ctx)


def attended(module: nn.Module, q: jax.Array, k: jax.Array, v: jax.Array, scores: Scores, ctx: Context) -> jax.Array:
    """``[B, T, N * H]``: queries ``[B, T, N, H]`` attend to keys and values that were ``kept``, by this module or by
    another."""
    probs = partial(tap, module, "probs")
    if ctx.mask is not None:
        out = masked_attention(q, k, v, scores, ctx, probs)
    elif ctx.table is None:
        out, _ = dense_attention(q, k, v, scores, ctx, probs)
    else:
        out = cached_attention(q, k, v, scores, ctx, probs if patched(module, "probs") else None)
    return tap(module, "out", out.reshape(*out.shape[:2], -1))


class Kernel(nn.Module):
    """Each channel's convolution: ``[B, k - 1 + T, D]`` to ``[B, T, D]``.

    Attributes:
      size: k, the tokens it sees, the newest included.
      bias: has one.
    """

    size: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", _normal, (x.shape[-1], self.size)).astype(jnp.float32)
        count = x.shape[1] - self.size + 1
        y: Any = sum(x[:, i : i + count].astype(jnp.float32) * over(weight[:, i], x) for i in range(self.size))
        if self.bias:
            y = y + over(parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32), x)
        return y.astype(x.dtype)


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` (Shazeer 2020, arXiv:2002.05202)."""

    hidden: int
    activation: Callable[[jax.Array], jax.Array]
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        gate, up = (
            Projection(self.hidden, self.bias, name=name)(x, ctx, product)
            for name, product in zip(("gate", "up"), products(self, ("gate", "up"), x, ctx), strict=True)
        )
        y = tap(self, "act", self.activation(gate)) * up
        return Projection(x.shape[-1], self.bias, name="down")(y, ctx)


class MLP(nn.Module):
    """``down(act(up(x)))``."""

    hidden: int
    activation: Callable[[jax.Array], jax.Array]
    bias: bool = False
    projection: Callable[..., nn.Module] = Projection

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        y = tap(self, "act", self.activation(self.projection(self.hidden, self.bias, name="up")(x, ctx)))
        return self.projection(x.shape[-1], self.bias, name="down")(y, ctx)


def _in_float32(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Evaluates in float32 and rounds once, as torch does for bfloat16 inputs."""

    def activation(x: jax.Array) -> jax.Array:
        return function(x.astype(jnp.float32)).astype(x.dtype)

    return activation


# What is jitted here is known by its name to what writes op graphs.
@jax.jit
def _gelu_tanh(x: jax.Array) -> jax.Array:
    # 1 + tanh(z) is 2 sigmoid(2z), which keeps its digits where tanh is near -1.  A narrow branch all of whose
    # activations lie there (Gemma 4's per-layer inputs), and which is normed then, has no others.
    return x * jax.nn.sigmoid(8**0.5 / math.pi**0.5 * (x + 0.044715 * x**3))


@jax.jit
def _gelu_erf(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


gelu_tanh = _in_float32(_gelu_tanh)
gelu_erf = _in_float32(_gelu_erf)
silu = _in_float32(jax.nn.silu)
sigmoid = _in_float32(jax.nn.sigmoid)
relu = _in_float32(jax.nn.relu)


@jax.jit
def gelu_new(x: jax.Array) -> jax.Array:
    """GELU's tanh form with every step rounded to x's dtype, as transformers writes it out under this name."""

    def times(a: jax.Array, b: float) -> jax.Array:  # the constants stay float32
        return (a.astype(jnp.float32) * jnp.float32(b)).astype(x.dtype)

    return times(x, 0.5) * (1 + jnp.tanh(times(x + times(x * x * x, 0.044715), (2 / math.pi) ** 0.5)))


# By the names transformers' configs use.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": silu,
    "swish": silu,
    "relu": relu,
    "gelu": gelu_erf,
    "gelu_new": gelu_new,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}
