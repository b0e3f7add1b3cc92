"""Gemma (Gemma Team 2024, arXiv:2403.08295), 2B and 7B, 1.0 and 1.1."""

import dataclasses

import jax
from flax import linen as nn

from llmjax.models.architecture import ROTARY_BUFFERS, Architecture
from llmjax.models.attention import Scores
from llmjax.models.config import DecoderConfig, dimensions
from llmjax.models.context import Context, tap
from llmjax.models.hf_config import Reader
from llmjax.models.layers import ACTIVATIONS, Attention, Embedding, GatedMLP, UnitOffsetRMSNorm, language_head
from llmjax.models.names import hf_names
from llmjax.models.rope import Rope
from llmjax.models.stack import in_turn


@dataclasses.dataclass(frozen=True)
class GemmaConfig(DecoderConfig):
    """``GemmaForCausalLM``."""

    rms_norm_eps: float
    hidden_act: str
    attention_bias: bool  # on q, k, v and o alike
    rope: Rope

    @classmethod
    def from_hf(cls, r: Reader) -> "GemmaConfig":
        """See ``DecoderConfig.from_hf``."""
        shared = dimensions(r, tied=True, context=8192, kv_heads=16, head_dim=256)
        r.expect("use_bidirectional_attention", (False,), False)
        return cls(
            **shared,
            rms_norm_eps=r.number("rms_norm_eps", 1e-6),
            hidden_act=_activation(r),
            attention_bias=r.flag("attention_bias", False),
            rope=r.rope(shared["head_dim"]),
        )

    def module(self) -> "Gemma":
        """See ``DecoderConfig.module``."""
        return Gemma(self)


def _activation(r: Reader) -> str:
    """The tanh form under the name ``gelu``, too: the official files say so and were trained with tanh."""
    name = r.activation("hidden_act", "gelu_pytorch_tanh")
    name = "gelu_pytorch_tanh" if name == "gelu" else name
    # transformers 4 obeys this key where it is not null, transformers 5 never.
    newer = r.get("hidden_activation", name)
    if newer != name:
        r.problem(f"hidden_activation: {newer!r} contradicts hidden_act, which means {name!r}")
    return name


class Block(nn.Module):
    """Pre-norm, sequential residual; norms multiply by 1 + w."""

    config: GemmaConfig

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        h = UnitOffsetRMSNorm(c.rms_norm_eps, name="attn_norm")(x)
        attention = Attention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            Scores(scale=c.head_dim**-0.5),
            rope=c.rope,
            qkv_bias=c.attention_bias,
            out_bias=c.attention_bias,
            name="attn",
        )
        x = tap(self, "resid_attn", x + attention(h, ctx))
        h = UnitOffsetRMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        mlp = GatedMLP(c.intermediate_size, ACTIVATIONS[c.hidden_act], name="mlp")
        return tap(self, "resid", x + mlp(h, ctx))


class Gemma(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: GemmaConfig

    @nn.compact
    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, scale=c.hidden_size**0.5, name="embed")
        x = tap(self, "embed", embed(ids, ctx))
        x = in_turn(self, [Block(c, name=f"layers_{i}") for i in range(c.num_hidden_layers)], x, ctx)
        x = UnitOffsetRMSNorm(c.rms_norm_eps, name="final_norm")(ctx.select_last(x))
        return tap(self, "logits", language_head(self, embed, x, ctx, tied=c.tie_word_embeddings))


HF_NAMES = hf_names(
    attn_norm="input_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)

ARCHITECTURE = Architecture(
    model_type="gemma",
    config=GemmaConfig,
    hf_names=lambda config: HF_NAMES,
    gguf="gemma",
    dropped=ROTARY_BUFFERS,
    needs_bos=True,
)
