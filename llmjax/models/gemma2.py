"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): four norms a block, soft-capped scores and logits, and sliding windows
on every other layer."""

import dataclasses

import jax
from flax import linen as nn

from llmjax.models.architecture import ROTARY_BUFFERS, Architecture
from llmjax.models.attention import Scores, softcap
from llmjax.models.config import FULL, SLIDING, DecoderConfig, dimensions, layer_windows
from llmjax.models.context import Context, tap
from llmjax.models.hf_config import Reader
from llmjax.models.layers import ACTIVATIONS, Attention, Embedding, GatedMLP, UnitOffsetRMSNorm, language_head
from llmjax.models.names import hf_names
from llmjax.models.rope import Rope
from llmjax.models.stack import in_turn


@dataclasses.dataclass(frozen=True)
class Gemma2Config(DecoderConfig):
    """``Gemma2ForCausalLM``."""

    rms_norm_eps: float
    hidden_activation: str
    attention_bias: bool  # on q, k, v and o alike
    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    windows: tuple[int | None, ...]  # a layer's sliding window in tokens; None sees all of the past
    rope: Rope

    @classmethod
    def from_hf(cls, r: Reader) -> "Gemma2Config":
        """See ``DecoderConfig.from_hf``."""
        shared = dimensions(r, tied=True, context=8192, kv_heads=4, head_dim=256)
        r.expect("use_bidirectional_attention", (False,), False)
        r.ignore("hidden_act", "cache_implementation")  # the activation stands in hidden_activation
        alternating = [FULL if i % 2 else SLIDING for i in range(shared["num_hidden_layers"])]
        return cls(
            **shared,
            rms_norm_eps=r.number("rms_norm_eps", 1e-6),
            hidden_activation=r.activation("hidden_activation", "gelu_pytorch_tanh"),
            attention_bias=r.flag("attention_bias", False),
            query_pre_attn_scalar=r.number("query_pre_attn_scalar", 256),
            attn_logit_softcapping=r.nullable(r.number, "attn_logit_softcapping", 50.0),
            final_logit_softcapping=r.nullable(r.number, "final_logit_softcapping", 30.0),
            windows=layer_windows(r, alternating, r.nullable(r.size, "sliding_window", 4096)),
            rope=r.rope(shared["head_dim"]),
        )

    def module(self) -> "Gemma2":
        """See ``DecoderConfig.module``."""
        return Gemma2(self)


class Block(nn.Module):
    """Each branch is normed before it and after it; norms multiply by 1 + w."""

    config: Gemma2Config
    window: int | None

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        h = UnitOffsetRMSNorm(c.rms_norm_eps, name="attn_norm")(x)
        attention = Attention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            Scores(scale=c.query_pre_attn_scalar**-0.5, softcap=c.attn_logit_softcapping, window=self.window),
            rope=c.rope,
            qkv_bias=c.attention_bias,
            out_bias=c.attention_bias,
            name="attn",
        )
        h = UnitOffsetRMSNorm(c.rms_norm_eps, name="post_attn_norm")(attention(h, ctx))
        x = tap(self, "resid_attn", x + h)
        h = UnitOffsetRMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        h = GatedMLP(c.intermediate_size, ACTIVATIONS[c.hidden_activation], name="mlp")(h, ctx)
        h = UnitOffsetRMSNorm(c.rms_norm_eps, name="post_mlp_norm")(h)
        return tap(self, "resid", x + h)


class Gemma2(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: Gemma2Config

    @nn.compact
    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, scale=c.hidden_size**0.5, name="embed")
        x = tap(self, "embed", embed(ids, ctx))
        x = in_turn(self, [Block(c, window, name=f"layers_{i}") for i, window in enumerate(c.windows)], x, ctx)
        x = UnitOffsetRMSNorm(c.rms_norm_eps, name="final_norm")(ctx.select_last(x))
        logits = language_head(self, embed, x, ctx, tied=c.tie_word_embeddings)
        if c.final_logit_softcapping is not None:
            logits = softcap(logits, c.final_logit_softcapping)
        return tap(self, "logits", logits)


HF_NAMES = hf_names(
    attn_norm="input_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    post_attn_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    post_mlp_norm="post_feedforward_layernorm",
)

ARCHITECTURE = Architecture(
    model_type="gemma2",
    config=Gemma2Config,
    hf_names=lambda config: HF_NAMES,
    gguf="gemma2",
    dropped=ROTARY_BUFFERS,
    needs_bos=True,
)
