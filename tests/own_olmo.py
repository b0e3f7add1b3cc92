"""An architecture outside the package: OLMo 2 under a name of its own, from llmjax's parts and two of its own."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

import llmjax
from llmjax.models.attention import Scores
from llmjax.models.config import DecoderConfig, dimensions
from llmjax.models.context import Context, tap
from llmjax.models.layers import (
    ACTIVATIONS,
    Embedding,
    GatedMLP,
    Projection,
    attended,
    keys_and_values,
    language_head,
    parameter,
)
from llmjax.models.names import hf_names
from llmjax.models.rope import Rope
from llmjax.models.stack import in_turn


@dataclasses.dataclass(frozen=True)
class Config(DecoderConfig):
    """The keys of its ``config.json``."""

    rms_norm_eps: float
    hidden_act: str
    rope: Rope

    @classmethod
    def from_hf(cls, r):
        shared = dimensions(r, tied=False, context=2048)
        r.ignore("attention_bias")
        return cls(
            **shared,
            rms_norm_eps=r.number("rms_norm_eps", 1e-5),
            hidden_act=r.activation("hidden_act", "silu"),
            rope=r.rope(shared["head_dim"]),
        )

    def module(self):
        return Olmo(self)


class Norm(nn.Module):
    """``w * x / sqrt(mean(x^2) + eps)`` in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide / jnp.sqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return tap(self, "", (weight.astype(jnp.float32) * wide).astype(x.dtype))


class Attention(nn.Module):
    """Norms of all heads together, before the rotation."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c, shape = self.config, (*x.shape[:2], -1, self.config.head_dim)
        heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        q = Norm(c.rms_norm_eps, name="q_norm")(Projection(heads, name="q")(x, ctx))
        k = Norm(c.rms_norm_eps, name="k_norm")(Projection(kv, name="k")(x, ctx))
        v = Projection(kv, name="v")(x, ctx).reshape(shape)
        q, k = (tap(self, f"{n}_rot", c.rope(a.reshape(shape), ctx)) for n, a in (("q", q), ("k", k)))
        scores = Scores(scale=c.head_dim**-0.5)
        out = attended(self, q, *keys_and_values(self, k, v, ctx), scores, ctx)
        return Projection(c.hidden_size, name="o")(out, ctx)


class Block(nn.Module):
    """Norms behind what they are of."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        h = Attention(c, name="attn")(x, ctx)
        x = tap(self, "resid_attn", x + Norm(c.rms_norm_eps, name="post_attn_norm")(h))
        h = GatedMLP(c.intermediate_size, ACTIVATIONS[c.hidden_act], name="mlp")(x, ctx)
        return tap(self, "resid", x + Norm(c.rms_norm_eps, name="post_mlp_norm")(h))


class Olmo(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: Config

    @nn.compact
    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, name="embed")
        x = tap(self, "embed", embed(ids, ctx))
        x = in_turn(self, [Block(c, name=f"layers_{i}") for i in range(c.num_hidden_layers)], x, ctx)
        x = Norm(c.rms_norm_eps, name="final_norm")(ctx.select_last(x))
        return tap(self, "logits", language_head(self, embed, x, ctx, tied=c.tie_word_embeddings))


NAMES = hf_names(
    **{role: f"self_attn.{role}_proj" for role in "qkvo"},
    **{role: f"self_attn.{role}" for role in ("q_norm", "k_norm")},
    **{role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
    post_attn_norm="post_attention_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)
ARCHITECTURE = llmjax.Architecture("own_olmo", Config, hf_names=lambda config: NAMES)
