"""Falcon-RW (Penedo et al. 2023, arXiv:2306.01116): ALiBi, sequential residual, one fused tensor for q, k and v.

The later Falcons (rotary, parallel residual, multi-query) share the name ``falcon`` and are refused.
"""

import dataclasses
from functools import partial

import jax
import numpy as np
from flax import linen as nn

from llmjax.models.attention import Scores
from llmjax.models.config import DecoderConfig
from llmjax.models.context import Context, tap
from llmjax.models.hf_config import Reader
from llmjax.models.layers import ACTIVATIONS, MLP, Attention, Embedding, LayerNorm, Projection, language_head
from llmjax.models.names import From, Names, Shape, hf_names
from llmjax.models.registry import Architecture


@dataclasses.dataclass(frozen=True)
class FalconConfig(DecoderConfig):
    """``FalconForCausalLM``."""

    layer_norm_epsilon: float
    activation: str
    bias: bool  # on every projection but the head

    @classmethod
    def from_hf(cls, r: Reader) -> "FalconConfig":
        """See ``DecoderConfig.from_hf``."""
        hidden, heads = r.size("hidden_size"), r.size("num_attention_heads")
        width = max(1, hidden // heads)
        if hidden % heads:
            r.problem(f"hidden_size: {hidden} is not a multiple of num_attention_heads {heads}")
        r.expect("alibi", (True,), False)
        r.expect("new_decoder_architecture", (False,), False)
        r.expect("multi_query", (False,), True)
        r.expect("parallel_attn", (False,), True)
        r.expect("apply_residual_connection_post_layernorm", (False,), False)
        r.expect("num_kv_heads", (heads,), heads)
        r.expect("head_dim", (width,), width)
        r.expect("n_embed", (hidden,), hidden)
        # Only rotary Falcons and parallel residuals read these.
        r.ignore("rope_theta", "rope_scaling", "rope_parameters", "num_ln_in_parallel_attn")
        return cls(
            vocab_size=r.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=r.size("ffn_hidden_size", 4 * hidden),
            num_hidden_layers=r.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=width,
            max_position_embeddings=r.size("max_position_embeddings", 2048),
            tie_word_embeddings=r.flag("tie_word_embeddings", True),
            layer_norm_epsilon=r.number("layer_norm_epsilon", 1e-5),
            activation=r.activation("activation", "gelu"),
            bias=r.flag("bias", False),
        )

    def module(self) -> "Falcon":
        """See ``DecoderConfig.module``."""
        return Falcon(self)


FalconLinear = partial(Projection, bias_apart=True)


class Block(nn.Module):
    """Pre-norm, sequential residual."""

    config: FalconConfig

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        h = LayerNorm(c.layer_norm_epsilon, name="attn_norm")(x)
        attention = Attention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            Scores(scale=c.head_dim**-0.5, alibi=True, fused=True),
            qkv_bias=c.bias,
            out_bias=c.bias,
            projection=FalconLinear,
            name="attn",
        )
        x = tap(self, "resid_attn", x + attention(h, ctx))
        h = LayerNorm(c.layer_norm_epsilon, name="mlp_norm")(x)
        mlp = MLP(c.intermediate_size, ACTIVATIONS[c.activation], c.bias, FalconLinear, name="mlp")
        return tap(self, "resid", x + mlp(h, ctx))


class Falcon(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: FalconConfig

    @nn.compact
    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, name="embed")
        x = tap(self, "embed", embed(ids, ctx))
        for i in range(c.num_hidden_layers):
            x = Block(c, name=f"layers_{i}")(x, ctx)
        x = LayerNorm(c.layer_norm_epsilon, name="final_norm")(ctx.select_last(x))
        return tap(self, "logits", language_head(embed, x, ctx, tied=c.tie_word_embeddings))


def _names(config: FalconConfig) -> Names:
    """Rows of the fused tensor come in groups, one for each key/value head: its query heads, its key, its value.

    Hence ``[K, G + 2, H]`` for every Falcon there is: RW has G = 1, 7B K = 1, 40B both greater.
    """
    num_kv, width = config.num_key_value_heads, config.head_dim
    groups = config.num_attention_heads // num_kv

    def part(members: slice) -> From:
        def make(arrays: list[np.ndarray]) -> np.ndarray:
            (fused,) = arrays
            rest = fused.shape[1:]  # none for a bias
            return fused.reshape(num_kv, groups + 2, width, *rest)[:, members].reshape(-1, *rest)

        def source_shape(shape: Shape) -> Shape:
            return num_kv * (groups + 2) * width, *shape[1:]

        return From(("self_attention.query_key_value",), make, source_shape)

    return hf_names(
        embed="transformer.word_embeddings",
        layer="transformer.h.{}.",
        final_norm="transformer.ln_f",
        attn_norm="input_layernorm",
        q=part(slice(0, groups)),
        k=part(slice(groups, groups + 1)),
        v=part(slice(groups + 1, groups + 2)),
        o="self_attention.dense",
        mlp_norm="post_attention_layernorm",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    )


ARCHITECTURE = Architecture(
    model_type="falcon",
    config=FalconConfig,
    hf_names=_names,
    reference_attention="sdpa",  # eager adds the ALiBi bias twice, as of transformers 5.23
)
