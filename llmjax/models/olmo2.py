"""OLMo 2 (OLMo team 2024, arXiv:2501.00656): Llama with norms behind attention and MLP instead of before them, and
norms of the whole query and key.

Two roundings differ from Llama's: norms multiply by their weight in float32, and so does the rotation.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmjax.models.architecture import Architecture
from llmjax.models.context import Context, tap
from llmjax.models.hf_config import Reader
from llmjax.models.layers import (
    ACTIVATIONS,
    Attention,
    Embedding,
    GatedMLP,
    WideRMSNorm,
    language_head,
)
from llmjax.models.llama import LlamaConfig
from llmjax.models.names import hf_names
from llmjax.models.rope import Rope
from llmjax.models.stack import in_turn


class WideRope(Rope):
    """``Rope`` in float32, rounded once."""

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """See ``Rope``."""
        return super().__call__(x.astype(jnp.float32), ctx).astype(x.dtype)


def wide(rope: Rope) -> WideRope:
    """The same in float32."""
    return WideRope(**vars(rope))


class AllHeadsNorm(WideRMSNorm):
    """That of all heads of a query or key ``[B, T, N, H]`` together."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


class Olmo2Config(LlamaConfig):
    """``Olmo2ForCausalLM``."""

    @classmethod
    def from_hf(cls, r: Reader) -> "Olmo2Config":
        """See ``DecoderConfig.from_hf``."""
        llama = LlamaConfig.from_hf(r)
        return cls(**{**vars(llama), "rope": wide(llama.rope), "rms_norm_eps": r.number("rms_norm_eps", 1e-5)})

    def module(self) -> "Olmo2":  # type: ignore[override]
        """See ``DecoderConfig.module``."""
        return Olmo2(self)


class Block(nn.Module):
    """Post-norm, sequential residual."""

    config: Olmo2Config
    window: int | None
    rope: Rope | None

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        attention = Attention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.scores(self.window),
            rope=self.rope,
            qkv_bias=c.qkv_bias,
            out_bias=c.out_bias,
            qk_norm=lambda name: AllHeadsNorm(c.rms_norm_eps, name=name),
            name="attn",
        )
        x = tap(self, "resid_attn", x + WideRMSNorm(c.rms_norm_eps, name="post_attn_norm")(attention(x, ctx)))
        mlp = GatedMLP(c.intermediate_size, ACTIVATIONS[c.hidden_act], name="mlp")
        return tap(self, "resid", x + WideRMSNorm(c.rms_norm_eps, name="post_mlp_norm")(mlp(x, ctx)))


class Olmo2(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: Olmo2Config

    @nn.compact
    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, name="embed")
        x = tap(self, "embed", embed(ids, ctx))
        layers = zip(c.windows, c.ropes, strict=True)
        x = in_turn(self, [Block(c, *layer, name=f"layers_{i}") for i, layer in enumerate(layers)], x, ctx)
        x = WideRMSNorm(c.rms_norm_eps, name="final_norm")(ctx.select_last(x))
        return tap(self, "logits", language_head(self, embed, x, ctx, tied=c.tie_word_embeddings))


HF_NAMES = hf_names(
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
    post_attn_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    post_mlp_norm="post_feedforward_layernorm",
)

ARCHITECTURE = Architecture(model_type="olmo2", config=Olmo2Config, hf_names=lambda config: HF_NAMES, gguf="olmo2")
