"""LFM2 (Liquid AI 2025, arXiv:2511.23404): most layers mix tokens by a short convolution between two gates, the others
by attention with normed queries and keys.

A convolution of ``k`` tokens needs the ``k - 1`` before the new ones.  What it is applied to is kept for every token,
in pages as keys are, so that whatever holds for them holds for it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmjax.errors import shown
from llmjax.models.architecture import Architecture
from llmjax.models.attention import Scores
from llmjax.models.config import FULL, MOST_LAYERS, MixedConfig, dimensions, layer_kinds
from llmjax.models.context import Context, tap
from llmjax.models.hf_config import Reader
from llmjax.models.layers import (
    Attention,
    Embedding,
    GatedMLP,
    Kernel,
    Projection,
    RMSNorm,
    kept,
    language_head,
    silu,
)
from llmjax.models.names import Names, depthwise, hf_names
from llmjax.models.pages import tokens
from llmjax.models.rope import Rope
from llmjax.models.stack import in_turn

CONVOLUTION = "conv"


@dataclasses.dataclass(frozen=True)
class Lfm2Config(MixedConfig):
    """``Lfm2ForCausalLM``."""

    norm_eps: float
    rope: Rope
    kernel: int  # tokens a convolution sees, the newest included
    conv_bias: bool

    def cache(self, layer: int) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """See ``DecoderConfig.cache``."""
        if self.kinds_of_layers[layer] == FULL:
            return super().cache(layer)
        return {"conv": {"x": (1, self.hidden_size)}}

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        r.ignore("tie_word_embeddings", "intermediate_size")  # where tie_embedding and block_ff_dim say otherwise
        width = r.size("block_ff_dim", r.get("intermediate_size", 12288))
        if r.flag("block_auto_adjust_ff_dim", True):
            width = int(r.number("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
            multiple = r.size("block_multiple_of", 256)
            width = multiple * -(-width // multiple)
        else:
            r.ignore("block_ffn_dim_multiplier", "block_multiple_of")
        shared = dimensions(r, tied=True, context=128000, kv_heads=8, intermediate=width)
        shared["tie_word_embeddings"] = r.flag("tie_embedding", shared["tie_word_embeddings"])
        # Of training, or repeated: transformers reads none of them.
        r.ignore("block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_swiglu")
        r.ignore(
            "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "use_pos_enc"
        )
        parallel = ("sequence_parallel_norm_across_tp", "ffn_te_autocast", "ffn_use_quantized_params")
        r.ignore(*parallel, *(f"block_{key}" for key in parallel))
        return cls(
            **shared,
            norm_eps=r.number("norm_eps", 1e-5),
            rope=r.rope(shared["head_dim"], theta=1e6),
            kernel=r.size("conv_L_cache", 3),
            conv_bias=r.flag("conv_bias", False),
            kinds_of_layers=_kinds(r, shared["num_hidden_layers"]),
        )

    def module(self) -> "Lfm2":
        """See ``DecoderConfig.module``."""
        return Lfm2(self)


def _kinds(r: Reader, layers: int) -> tuple[str, ...]:
    attends = r.get("full_attn_idxs", list(range(layers)))
    listed = layers if r.get("layer_types") is None else MOST_LAYERS  # which wins
    if not isinstance(attends, list) or not all(type(i) is int and 0 <= i < listed for i in attends):
        r.problem(f"full_attn_idxs: expected numbers of layers from 0 to {listed - 1}, found {shown(attends)}")
        attends = []
    return layer_kinds(r, (FULL, CONVOLUTION), [FULL if i in attends else CONVOLUTION for i in range(layers)])


class ShortConvolution(nn.Module):
    """``leave(c * convolution(b * x))``, where ``b``, ``c`` and ``x`` are ``enter``'s three parts.

    Attributes:
      kernel: tokens it sees.
      bias: of the projections and the convolution.
    """

    kernel: int
    bias: bool

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        features = x.shape[-1]
        b, c, x = jnp.split(Projection(3 * features, self.bias, name="enter")(x, ctx), 3, -1)
        x = (b * x).astype(ctx.numerics.products).astype(x.dtype)  # as it is kept
        y = tap(self, "convolved", Kernel(self.kernel, self.bias, name="kernel")(self._with_those_before(x, ctx)))
        return Projection(features, self.bias, name="leave")(tap(self, "out", c * y), ctx)

    def _with_those_before(self, x: jax.Array, ctx: Context) -> jax.Array:
        """``[B, T, D]`` to ``[B, k - 1 + T, D]``: zero before a text's first token."""
        count = self.kernel - 1
        cache = kept(self, "x", x[:, :, None], ctx)
        if ctx.table is None and ctx.mask is None:
            return jnp.pad(x, ((0, 0), (count, 0), (0, 0)))
        places = ctx.positions[:, :1] - count + jnp.arange(count, dtype=jnp.int32)[None]
        before = tokens(cache, jnp.maximum(places, 0), ctx)[:, :, 0].astype(x.dtype)
        return jnp.concatenate([jnp.where(places[..., None] < 0, 0, before), x], 1)


class Block(nn.Module):
    """Pre-norm, sequential residual."""

    config: Lfm2Config
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        mixer: nn.Module
        if self.kind == FULL:
            mixer = Attention(
                c.num_attention_heads,
                c.num_key_value_heads,
                c.head_dim,
                Scores(scale=c.head_dim**-0.5),
                rope=c.rope,
                qk_norm=lambda name: RMSNorm(c.norm_eps, name=name),
                name="attn",
            )
        else:
            mixer = ShortConvolution(c.kernel, c.conv_bias, name="conv")
        x = tap(self, "resid_attn", x + mixer(RMSNorm(c.norm_eps, name="attn_norm")(x), ctx))
        mlp = GatedMLP(c.intermediate_size, silu, name="mlp")
        return tap(self, "resid", x + mlp(RMSNorm(c.norm_eps, name="mlp_norm")(x), ctx))


class Lfm2(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: Lfm2Config

    @nn.compact
    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, name="embed")
        x = tap(self, "embed", embed(ids, ctx))
        blocks = [Block(c, kind, name=f"layers_{i}") for i, kind in enumerate(c.kinds_of_layers)]
        x = in_turn(self, blocks, x, ctx)
        x = RMSNorm(c.norm_eps, name="final_norm")(ctx.select_last(x))
        return tap(self, "logits", language_head(self, embed, x, ctx, tied=c.tie_word_embeddings))


def names(config: Lfm2Config) -> Names:
    """``embedding_norm`` is the final norm."""
    layer = "model.layers.{}."
    return {
        **hf_names(
            final_norm="model.embedding_norm",
            attn_norm="operator_norm",
            q="self_attn.q_proj",
            k="self_attn.k_proj",
            v="self_attn.v_proj",
            o="self_attn.out_proj",
            q_norm="self_attn.q_layernorm",
            k_norm="self_attn.k_layernorm",
            mlp_norm="ffn_norm",
            gate="feed_forward.w1",
            up="feed_forward.w3",
            down="feed_forward.w2",
        ),
        "layers.{}.conv.enter": f"{layer}conv.in_proj",
        "layers.{}.conv.leave": f"{layer}conv.out_proj",
        "layers.{}.conv.kernel": depthwise(f"{layer}conv.conv"),
    }


ARCHITECTURE = Architecture(model_type="lfm2", config=Lfm2Config, hf_names=names, gguf="lfm2")
