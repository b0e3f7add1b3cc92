"""Llama 1 to 3 (Touvron et al. 2023, arXiv:2302.13971; grouped heads from arXiv:2307.09288), SmolLM2 and TinyLlama.

Mistral, Qwen and Phi-3 are this model, too, but for the options of ``LlamaConfig``; what each sets stands in its file.
"""

import dataclasses
from collections.abc import Hashable
from typing import Self

import jax
from flax import linen as nn

from llmjax.models.architecture import ROTARY_BUFFERS, Architecture
from llmjax.models.attention import Scores
from llmjax.models.config import DecoderConfig, dimensions
from llmjax.models.context import Context, tap
from llmjax.models.hf_config import Reader
from llmjax.models.layers import ACTIVATIONS, Attention, Embedding, GatedMLP, RMSNorm, language_head
from llmjax.models.names import hf_names
from llmjax.models.rope import Rope
from llmjax.models.stack import in_turn


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """``LlamaForCausalLM``, and the options of its kin."""

    rms_norm_eps: float
    hidden_act: str
    rope: Rope
    windows: tuple[int | None, ...]  # a layer's sliding window in tokens; None sees all of the past
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # each head's query and key, before the rotation

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """Each layer's rotation."""
        return (self.rope,) * len(self.windows)

    @property
    def kinds(self) -> tuple[Hashable, ...]:
        """See ``DecoderConfig``."""
        return tuple(zip(self.windows, self.ropes, strict=True))

    def scores(self, window: int | None) -> Scores:
        """How a layer's products become scores."""
        return Scores(scale=self.head_dim**-0.5, window=window)

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        shared = dimensions(r, tied=False, context=2048)
        r.ignore("max_sequence_length")  # the first conversions of Llama 1 repeat the context length under this name
        bias = r.flag("attention_bias", False)
        return cls(
            **shared,
            rms_norm_eps=r.number("rms_norm_eps", 1e-6),
            hidden_act=r.activation("hidden_act", "silu"),
            rope=r.rope(shared["head_dim"]),
            windows=(None,) * shared["num_hidden_layers"],
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=r.flag("mlp_bias", False),
        )

    def block(self, layer: int) -> nn.Module:
        """What the model is made of, in the layer's place."""
        return Block(self, self.windows[layer], self.ropes[layer], name=f"layers_{layer}")

    def module(self) -> "Llama":
        """See ``DecoderConfig.module``."""
        return Llama(self)


class Block(nn.Module):
    """Pre-norm, sequential residual."""

    config: LlamaConfig
    window: int | None
    rope: Rope | None

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        h = RMSNorm(c.rms_norm_eps, name="attn_norm")(x)
        attention = Attention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.scores(self.window),
            rope=self.rope,
            qkv_bias=c.qkv_bias,
            out_bias=c.out_bias,
            qk_norm=(lambda name: RMSNorm(c.rms_norm_eps, name=name)) if c.qk_norm else None,
            name="attn",
        )
        x = tap(self, "resid_attn", x + attention(h, ctx))
        h = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        mlp = GatedMLP(c.intermediate_size, ACTIVATIONS[c.hidden_act], c.mlp_bias, name="mlp")
        return tap(self, "resid", x + mlp(h, ctx))


class Llama(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, name="embed")
        x = tap(self, "embed", embed(ids, ctx))
        x = in_turn(self, [c.block(layer) for layer in range(c.num_hidden_layers)], x, ctx)
        x = RMSNorm(c.rms_norm_eps, name="final_norm")(ctx.select_last(x))
        return tap(self, "logits", language_head(self, embed, x, ctx, tied=c.tie_word_embeddings))


HF_NAMES = hf_names(
    attn_norm="input_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)

ARCHITECTURE = Architecture(
    model_type="llama",
    config=LlamaConfig,
    hf_names=lambda config: HF_NAMES,
    gguf="llama",
    dropped=ROTARY_BUFFERS,
)
