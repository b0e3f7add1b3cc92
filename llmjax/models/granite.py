"""Granite 3, the dense models (IBM 2024, https://github.com/ibm-granite/granite-3.0-language-models): Llama with four
multipliers (muP, Yang et al. 2022, arXiv:2203.03466)."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmjax.models.architecture import Architecture
from llmjax.models.attention import Scores
from llmjax.models.context import Context, tap
from llmjax.models.hf_config import Reader
from llmjax.models.layers import ACTIVATIONS, Attention, Embedding, GatedMLP, RMSNorm, language_head, scaled
from llmjax.models.llama import HF_NAMES, LlamaConfig
from llmjax.models.stack import in_turn


@dataclasses.dataclass(frozen=True)
class GraniteConfig(LlamaConfig):
    """``GraniteForCausalLM``."""

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0  # of scores, in the place of 1 / sqrt(H)
    residual_multiplier: float = 1.0  # of what a branch adds
    logits_scaling: float = 1.0  # logits are divided by it

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
        multipliers: dict[str, Any] = {name: r.number(name, 1.0) for name in names}
        return dataclasses.replace(super().from_hf(r), **multipliers)

    def scores(self, window: int | None) -> Scores:
        """See ``LlamaConfig``."""
        return Scores(scale=self.attention_multiplier, window=window)

    def module(self) -> "Granite":  # type: ignore[override]
        """See ``DecoderConfig.module``."""
        return Granite(self)


class Block(nn.Module):
    """Pre-norm, sequential residual, branches scaled."""

    config: GraniteConfig

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        h = RMSNorm(c.rms_norm_eps, name="attn_norm")(x)
        attention = Attention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.scores(None),
            rope=c.rope,
            qkv_bias=c.qkv_bias,
            out_bias=c.out_bias,
            name="attn",
        )
        x = tap(self, "resid_attn", x + scaled(attention(h, ctx), c.residual_multiplier, rounded=False))
        h = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        mlp = GatedMLP(c.intermediate_size, ACTIVATIONS[c.hidden_act], c.mlp_bias, name="mlp")
        return tap(self, "resid", x + scaled(mlp(h, ctx), c.residual_multiplier, rounded=False))


class Granite(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: GraniteConfig

    @nn.compact
    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, name="embed")
        x = tap(self, "embed", scaled(embed(ids, ctx), c.embedding_multiplier, rounded=False))
        x = in_turn(self, [Block(c, name=f"layers_{i}") for i in range(c.num_hidden_layers)], x, ctx)
        x = RMSNorm(c.rms_norm_eps, name="final_norm")(ctx.select_last(x))
        logits = language_head(self, embed, x, ctx, tied=c.tie_word_embeddings)
        return tap(self, "logits", (logits / jnp.float32(c.logits_scaling)).astype(logits.dtype))


ARCHITECTURE = Architecture(
    model_type="granite", config=GraniteConfig, hf_names=lambda config: HF_NAMES, gguf="granite"
)
