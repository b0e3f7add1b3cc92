"""Falcon, in the three layouts that share its name (Penedo et al. 2023, arXiv:2306.01116; Almazrouei et al. 2023,
arXiv:2311.16867).

RW: ALiBi, attention and MLP one after the other, biases.  7B: rotary, one key/value head, attention and MLP side by
side on one norm.  40B: rotary, grouped heads, side by side with a norm each.  In all of them q, k and v are one tensor.
"""

import dataclasses
from functools import partial

import jax
import numpy as np
from flax import linen as nn

from llmjax.models.architecture import Architecture
from llmjax.models.attention import Scores
from llmjax.models.config import MOST_HEADS, MOST_LAYERS, MOST_TOKENS, MOST_WIDTH, DecoderConfig
from llmjax.models.context import Context, tap
from llmjax.models.hf_config import Reader
from llmjax.models.layers import ACTIVATIONS, MLP, Attention, Embedding, LayerNorm, Projection, language_head
from llmjax.models.names import From, Names, Shape, hf_names
from llmjax.models.rope import Rope
from llmjax.models.stack import in_turn


@dataclasses.dataclass(frozen=True)
class FalconConfig(DecoderConfig):
    """``FalconForCausalLM``."""

    layer_norm_epsilon: float
    activation: str
    bias: bool  # on every projection but the head
    rope: Rope | None  # None for ALiBi
    parallel_attn: bool
    separate_norms: bool  # in parallel, the MLP has a norm of its own

    @classmethod
    def from_hf(cls, r: Reader) -> "FalconConfig":
        """See ``DecoderConfig.from_hf``."""
        hidden, heads = r.size("hidden_size", most=MOST_WIDTH), r.size("num_attention_heads", most=MOST_HEADS)
        width = max(1, hidden // heads)
        if hidden % heads:
            r.problem(f"hidden_size: {hidden} is not a multiple of num_attention_heads {heads}")
        r.expect("apply_residual_connection_post_layernorm", (False,), False)
        r.expect("head_dim", (width,), width)
        r.expect("n_embed", (hidden,), hidden)
        grouped = r.flag("new_decoder_architecture", False)
        alibi, parallel = r.flag("alibi", False), _true(r, "parallel_attn")
        r.context = r.size("max_position_embeddings", 2048)
        if alibi:
            r.ignore("rope_theta", "rope_scaling", "rope_parameters")
        return cls(
            vocab_size=r.size("vocab_size", most=MOST_TOKENS),
            hidden_size=hidden,
            intermediate_size=r.size("ffn_hidden_size", 4 * hidden, most=4 * MOST_WIDTH),
            num_hidden_layers=r.size("num_hidden_layers", most=MOST_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=_kv_heads(r, heads, grouped),
            head_dim=width,
            max_position_embeddings=r.context,
            tie_word_embeddings=_true(r, "tie_word_embeddings"),
            layer_norm_epsilon=r.number("layer_norm_epsilon", 1e-5),
            activation=r.activation("activation", "gelu"),
            bias=r.flag("bias", False),
            rope=None if alibi else r.rope(width),
            parallel_attn=parallel,
            separate_norms=_separate_norms(r, grouped, parallel),
        )

    def module(self) -> "Falcon":
        """See ``DecoderConfig.module``."""
        return Falcon(self)


def _true(r: Reader, key: str) -> bool:
    """A flag that is set where it is absent, and not where it is null, which transformers takes for false."""
    return bool(r.nullable(r.flag, key, True))


def _kv_heads(r: Reader, heads: int, grouped: bool) -> int:
    if _true(r, "multi_query") and not grouped:
        r.ignore("num_kv_heads")  # the files of 7B say 71
        return 1
    found = r.size("num_kv_heads", heads)
    if grouped and heads % found:
        r.problem(f"num_attention_heads: {heads} is not a multiple of num_kv_heads {found}")
    if not grouped and found != heads:
        r.problem(f"num_kv_heads: {found} is not supported without new_decoder_architecture, expected {heads}")
    return found


def _separate_norms(r: Reader, grouped: bool, parallel: bool) -> bool:
    if grouped and not parallel:
        r.problem("parallel_attn: False is not supported with new_decoder_architecture, expected True")
    if not parallel:
        r.ignore("num_ln_in_parallel_attn")
        return False
    return r.expect("num_ln_in_parallel_attn", (1, 2) if grouped else (1,), 2 if grouped else 1) == 2


FalconLinear = partial(Projection, bias_apart=True)


class Block(nn.Module):
    """Attention and MLP one after the other, each on its norm, or side by side on one norm or one each."""

    config: FalconConfig

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        attention = Attention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            Scores(scale=c.head_dim**-0.5, alibi=c.rope is None, fused=True),
            rope=c.rope,
            qkv_bias=c.bias,
            out_bias=c.bias,
            projection=FalconLinear,
            name="attn",
        )
        mlp = MLP(c.intermediate_size, ACTIVATIONS[c.activation], c.bias, FalconLinear, name="mlp")
        h = LayerNorm(c.layer_norm_epsilon, name="attn_norm")(x)
        y = attention(h, ctx)
        if c.parallel_attn:
            if c.separate_norms:
                h = LayerNorm(c.layer_norm_epsilon, name="mlp_norm")(x)
            return tap(self, "resid", x + (mlp(h, ctx) + y))
        x = tap(self, "resid_attn", x + y)
        h = LayerNorm(c.layer_norm_epsilon, name="mlp_norm")(x)
        return tap(self, "resid", x + mlp(h, ctx))


class Falcon(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: FalconConfig

    @nn.compact
    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, name="embed")
        x = tap(self, "embed", embed(ids, ctx))
        x = in_turn(self, [Block(c, name=f"layers_{i}") for i in range(c.num_hidden_layers)], x, ctx)
        x = LayerNorm(c.layer_norm_epsilon, name="final_norm")(ctx.select_last(x))
        return tap(self, "logits", language_head(self, embed, x, ctx, tied=c.tie_word_embeddings))


def _names(config: FalconConfig) -> Names:
    """Rows of the fused tensor come in groups, one for each key/value head: its query heads, its key, its value.

    Hence ``[K, G + 2, H]`` for all three layouts: RW has G = 1, 7B K = 1, 40B both greater.
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
        attn_norm="ln_attn" if config.separate_norms else "input_layernorm",
        q=part(slice(0, groups)),
        k=part(slice(groups, groups + 1)),
        v=part(slice(groups + 1, groups + 2)),
        o="self_attention.dense",
        mlp_norm="ln_mlp" if config.separate_norms else "post_attention_layernorm",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    )


ARCHITECTURE = Architecture(
    model_type="falcon",
    config=FalconConfig,
    hf_names=_names,
    gguf="falcon",
    reference_attention="sdpa",  # eager adds the ALiBi bias twice, as of transformers 5.23
)
