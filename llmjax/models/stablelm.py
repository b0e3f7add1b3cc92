"""StableLM-3B-4E1T (Tow et al. 2023) and StableLM 2 (Bellagente et al. 2024, arXiv:2402.17834): Llama's shape with
LayerNorms and a partial rotation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llmjax.models.architecture import ROTARY_BUFFERS, Architecture
from llmjax.models.attention import Scores
from llmjax.models.config import DecoderConfig, dimensions
from llmjax.models.context import Context, tap
from llmjax.models.hf_config import Reader
from llmjax.models.layers import (
    ACTIVATIONS,
    Attention,
    Embedding,
    GatedMLP,
    LayerNorm,
    language_head,
    over,
    parameter,
    standardised,
)
from llmjax.models.names import From, Names, hf_names
from llmjax.models.rope import Rope
from llmjax.models.stack import in_turn


@dataclasses.dataclass(frozen=True)
class StableLmConfig(DecoderConfig):
    """``StableLmForCausalLM``."""

    layer_norm_eps: float
    hidden_act: str
    use_qkv_bias: bool
    qk_layernorm: bool
    use_parallel_residual: bool
    rope: Rope

    @classmethod
    def from_hf(cls, r: Reader) -> "StableLmConfig":
        """See ``DecoderConfig.from_hf``."""
        shared = dimensions(r, tied=False, context=4096, kv_heads=32)
        width = shared["hidden_size"] // shared["num_attention_heads"]
        r.expect("head_dim", (width,), width)
        return cls(
            **shared,
            layer_norm_eps=r.number("layer_norm_eps", 1e-5),
            hidden_act=r.activation("hidden_act", "silu"),
            use_qkv_bias=r.flag("use_qkv_bias", False),
            qk_layernorm=r.flag("qk_layernorm", False),
            use_parallel_residual=r.flag("use_parallel_residual", False),
            rope=r.rope(shared["head_dim"], fraction=0.25),
        )

    def module(self) -> "StableLm":
        """See ``DecoderConfig.module``."""
        return StableLm(self)


class LayerNormPerHead(nn.Module):
    """A LayerNorm without bias for each head: ``x [B, T, N, H]``, weight ``[N, H]``."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.ones, x.shape[-2:])
        return tap(self, "", (standardised(x, self.eps) * over(weight.astype(jnp.float32), x)).astype(x.dtype))


class Block(nn.Module):
    """Pre-norm; sequential residual, or (StableLM 2 12B) both branches side by side on one norm."""

    config: StableLmConfig

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        h = LayerNorm(c.layer_norm_eps, name="attn_norm")(x)
        attention = Attention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            Scores(scale=c.head_dim**-0.5),
            rope=c.rope,
            qkv_bias=c.use_qkv_bias,
            qk_norm=(lambda name: LayerNormPerHead(c.layer_norm_eps, name=name)) if c.qk_layernorm else None,
            name="attn",
        )
        x = tap(self, "resid_attn", x + attention(h, ctx))
        if not c.use_parallel_residual:
            h = LayerNorm(c.layer_norm_eps, name="mlp_norm")(x)
        mlp = GatedMLP(c.intermediate_size, ACTIVATIONS[c.hidden_act], name="mlp")
        return tap(self, "resid", x + mlp(h, ctx))


class StableLm(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: StableLmConfig

    @nn.compact
    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, name="embed")
        x = tap(self, "embed", embed(ids, ctx))
        x = in_turn(self, [Block(c, name=f"layers_{i}") for i in range(c.num_hidden_layers)], x, ctx)
        x = LayerNorm(c.layer_norm_eps, name="final_norm")(ctx.select_last(x))
        return tap(self, "logits", language_head(self, embed, x, ctx, tied=c.tie_word_embeddings))


def _names(config: StableLmConfig) -> Names:
    def per_head(norm: str, heads: int) -> From:
        modules = tuple(f"self_attn.{norm}.norms.{h}" for h in range(heads))
        return From(modules, np.stack, source_shape=lambda shape: shape[1:])

    return hf_names(
        attn_norm="input_layernorm",
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.o_proj",
        q_norm=per_head("q_layernorm", config.num_attention_heads),
        k_norm=per_head("k_layernorm", config.num_key_value_heads),
        mlp_norm="post_attention_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
    )


ARCHITECTURE = Architecture(
    model_type="stablelm",
    config=StableLmConfig,
    hf_names=_names,
    gguf="stablelm",
    dropped=ROTARY_BUFFERS,
)
