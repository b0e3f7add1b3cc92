"""Gemma 3, the text model (Gemma Team 2025, arXiv:2503.19786): Gemma 2 with norms of queries and keys in the place of
the soft-cap on scores, and five local layers to a global one, each kind with a rotation of its own."""

import dataclasses
from typing import Self

import jax
from flax import linen as nn

from llmjax.models.architecture import Architecture
from llmjax.models.attention import Scores, softcap
from llmjax.models.config import FULL, SLIDING, DecoderConfig, check_rope_types, dimensions, layer_windows
from llmjax.models.context import Context, tap
from llmjax.models.hf_config import Reader
from llmjax.models.layers import ACTIVATIONS, Attention, Embedding, GatedMLP, UnitOffsetRMSNorm, language_head
from llmjax.models.names import Names, hf_names
from llmjax.models.rope import Rope
from llmjax.models.stack import in_turn


@dataclasses.dataclass(frozen=True)
class Gemma3Config(DecoderConfig):
    """``Gemma3ForCausalLM``."""

    rms_norm_eps: float
    hidden_activation: str
    attention_bias: bool  # on q, k, v and o alike
    query_pre_attn_scalar: float
    final_logit_softcapping: float | None
    windows: tuple[int | None, ...]  # a local layer's sliding window in tokens; None for a global layer
    local_rope: Rope
    global_rope: Rope

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        shared = dimensions(r, tied=True, context=131072, kv_heads=4, head_dim=256)
        layers, width = shared["num_hidden_layers"], shared["head_dim"]
        r.expect("use_bidirectional_attention", (False,), False)
        r.ignore("attn_logit_softcapping")  # a remainder of Gemma 2 that no version of transformers applies
        r.ignore("hidden_act", "cache_implementation")  # the activation stands in hidden_activation
        pattern = r.size("sliding_window_pattern", 6)
        if r.get("layer_types") is None:  # beside which transformers writes the other one; alone it reads this one
            r.expect("_sliding_window_pattern", (pattern,), pattern)
        r.ignore("_sliding_window_pattern")
        kinds = [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]
        check_rope_types(r)
        return cls(
            **shared,
            rms_norm_eps=r.number("rms_norm_eps", 1e-6),
            hidden_activation=r.activation("hidden_activation", "gelu_pytorch_tanh"),
            attention_bias=r.flag("attention_bias", False),
            query_pre_attn_scalar=r.number("query_pre_attn_scalar", 256),
            final_logit_softcapping=r.optional_number("final_logit_softcapping"),
            windows=layer_windows(r, kinds, r.nullable(r.size, "sliding_window", 4096)),
            local_rope=r.rope(width, theta_key="rope_local_base_freq", scaling_key=None, layer_type=SLIDING),
            global_rope=r.rope(width, theta=1e6, layer_type=FULL),
        )

    def module(self) -> "Gemma3":
        """See ``DecoderConfig.module``."""
        return Gemma3(self)


class Block(nn.Module):
    """Each branch is normed before it and after it; norms multiply by 1 + w."""

    config: Gemma3Config
    window: int | None

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        h = UnitOffsetRMSNorm(c.rms_norm_eps, name="attn_norm")(x)
        attention = Attention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            Scores(scale=c.query_pre_attn_scalar**-0.5, window=self.window),
            rope=c.global_rope if self.window is None else c.local_rope,
            qkv_bias=c.attention_bias,
            out_bias=c.attention_bias,
            qk_norm=lambda name: UnitOffsetRMSNorm(c.rms_norm_eps, name=name),
            name="attn",
        )
        h = UnitOffsetRMSNorm(c.rms_norm_eps, name="post_attn_norm")(attention(h, ctx))
        x = tap(self, "resid_attn", x + h)
        h = UnitOffsetRMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        h = GatedMLP(c.intermediate_size, ACTIVATIONS[c.hidden_activation], name="mlp")(h, ctx)
        h = UnitOffsetRMSNorm(c.rms_norm_eps, name="post_mlp_norm")(h)
        return tap(self, "resid", x + h)


class Gemma3(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: Gemma3Config

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


LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "post_attn_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def names(prefix: str = "") -> Names:
    """The table, for a text model whose tensors' names begin with ``prefix``."""
    return hf_names(
        embed=f"{prefix}model.embed_tokens",
        layer=f"{prefix}model.layers.{{}}.",
        final_norm=f"{prefix}model.norm",
        head=f"{prefix}lm_head",
        **LAYER_NAMES,
    )


ARCHITECTURE = Architecture(
    model_type="gemma3_text",
    config=Gemma3Config,
    hf_names=lambda config: names(),
    gguf="gemma3",
    needs_bos=True,
)
