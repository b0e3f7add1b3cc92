"""Qwen3.5, the dense models (Qwen 2026): three layers of linear attention to one of attention, whose output a gate
weighs."""

import dataclasses
from collections.abc import Mapping
from typing import Self

import jax
from flax import linen as nn

from llmjax.models.architecture import Architecture
from llmjax.models.attention import Scores
from llmjax.models.config import FULL, MOST_HEAD_DIM, MOST_HEADS, MixedConfig, dimensions, layer_kinds
from llmjax.models.context import Context, tap
from llmjax.models.delta import GatedDelta
from llmjax.models.hf_config import Reader
from llmjax.models.layers import (
    ACTIVATIONS,
    Embedding,
    GatedMLP,
    Projection,
    UnitOffsetRMSNorm,
    attended,
    keys_and_values,
    language_head,
    sigmoid,
)
from llmjax.models.llama import HF_NAMES
from llmjax.models.names import From, Names, depthwise
from llmjax.models.rope import Rope
from llmjax.models.stack import in_turn

LINEAR = "linear_attention"


@dataclasses.dataclass(frozen=True)
class Qwen3_5Config(MixedConfig):
    """``Qwen3_5ForCausalLM``."""

    rms_norm_eps: float
    hidden_act: str
    rope: Rope
    bias: bool  # of q, k, v and o
    key_heads: int  # of linear attention, as what follows
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int  # tokens its convolution sees, the newest included

    def carried(self, layer: int) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """See ``DecoderConfig.carried``."""
        if self.kinds_of_layers[layer] == FULL:
            return {}
        channels = 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
        return {
            "delta": {
                "before": (self.kernel - 1, channels),
                "state": (self.value_heads, self.value_dim, self.key_dim),
            }
        }

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        # Of training and of guessing several tokens at once, or repeated: transformers reads none of them.
        r.ignore("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
        r.expect("attn_output_gate", (True,), True)
        r.expect("mlp_only_layers", ([],), [])
        shared = dimensions(r, tied=False, context=32768, kv_heads=4, head_dim=256)
        key_heads = r.size("linear_num_key_heads", 16, MOST_HEADS)
        value_heads = r.size("linear_num_value_heads", 32, MOST_HEADS)
        if value_heads % key_heads:
            r.problem(f"linear_num_value_heads: {value_heads} is not a multiple of linear_num_key_heads {key_heads}")
        layers, every = shared["num_hidden_layers"], r.size("full_attention_interval", 4)
        return cls(
            **shared,
            rms_norm_eps=r.number("rms_norm_eps", 1e-6),
            hidden_act=r.activation("hidden_act", "silu"),
            # Parts of a head turn by an image's rows and columns, in text all by the token's position.
            rope=r.rope(shared["head_dim"], fraction=0.25, known=("mrope_section", "mrope_interleaved")),
            bias=r.flag("attention_bias", False),
            key_heads=key_heads,
            value_heads=value_heads,
            key_dim=r.size("linear_key_head_dim", 128, MOST_HEAD_DIM),
            value_dim=r.size("linear_value_head_dim", 128, MOST_HEAD_DIM),
            kernel=r.size("linear_conv_kernel_dim", 4, MOST_HEAD_DIM),
            kinds_of_layers=layer_kinds(
                r, (LINEAR, FULL), [LINEAR if (i + 1) % every else FULL for i in range(layers)]
            ),
        )

    def module(self) -> "Qwen3_5":
        """See ``DecoderConfig.module``."""
        return Qwen3_5(self)


class GatedAttention(nn.Module):
    """Attention with normed queries and keys, of whose output ``sigmoid`` of a gate lets a part through; ``q`` makes
    each head's query and gate."""

    config: Qwen3_5Config

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config

        def heads(name: str, count: int, width: int) -> jax.Array:
            y = Projection(count * width, c.bias, name=name)(x, ctx)
            return y.reshape(*y.shape[:2], count, width)

        q = heads("q", c.num_attention_heads, 2 * c.head_dim)
        q, gate = q[..., : c.head_dim], q[..., c.head_dim :]
        k, v = (heads(name, c.num_key_value_heads, c.head_dim) for name in ("k", "v"))
        q, k = (UnitOffsetRMSNorm(c.rms_norm_eps, name=f"{name}_norm")(y) for name, y in (("q", q), ("k", k)))
        q, k = tap(self, "q_rot", c.rope(q, ctx)), tap(self, "k_rot", c.rope(k, ctx))
        scores = Scores(scale=c.head_dim**-0.5)
        y = attended(self, q, *keys_and_values(self, k, v, ctx), scores, ctx)
        y = tap(self, "gated", y * sigmoid(gate).reshape(y.shape))
        return Projection(x.shape[-1], c.bias, name="o")(y, ctx)


class Block(nn.Module):
    """Pre-norm, sequential residual."""

    config: Qwen3_5Config
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c, activation = self.config, ACTIVATIONS[self.config.hidden_act]
        mixer: nn.Module
        if self.kind == FULL:
            mixer = GatedAttention(c, name="attn")
        else:
            sizes = c.key_heads, c.value_heads, c.key_dim, c.value_dim, c.kernel
            mixer = GatedDelta(*sizes, activation, c.rms_norm_eps, name="delta")
        x = tap(self, "resid_attn", x + mixer(UnitOffsetRMSNorm(c.rms_norm_eps, name="attn_norm")(x), ctx))
        mlp = GatedMLP(c.intermediate_size, activation, name="mlp")
        return tap(self, "resid", x + mlp(UnitOffsetRMSNorm(c.rms_norm_eps, name="mlp_norm")(x), ctx))


class Qwen3_5(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: Qwen3_5Config

    @nn.compact
    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, name="embed")
        x = tap(self, "embed", embed(ids, ctx))
        x = in_turn(self, [Block(c, kind, name=f"layers_{i}") for i, kind in enumerate(c.kinds_of_layers)], x, ctx)
        x = UnitOffsetRMSNorm(c.rms_norm_eps, name="final_norm")(ctx.select_last(x))
        return tap(self, "logits", language_head(self, embed, x, ctx, tied=c.tie_word_embeddings))


def names(config: Qwen3_5Config) -> Names:
    """Llama's, and those of linear attention."""
    linear = "model.layers.{}.linear_attn"
    return {
        **HF_NAMES,
        "layers.{}.delta.qkv": f"{linear}.in_proj_qkv",
        "layers.{}.delta.gate": f"{linear}.in_proj_z",
        "layers.{}.delta.beta": f"{linear}.in_proj_b",
        "layers.{}.delta.decay": f"{linear}.in_proj_a",
        "layers.{}.delta": From((linear,), endings={"a_log": "A_log"}),
        "layers.{}.delta.kernel": depthwise(f"{linear}.conv1d"),
        "layers.{}.delta.norm": f"{linear}.norm",
        "layers.{}.delta.o": f"{linear}.out_proj",
    }


# What guesses several tokens at once is not needed.
ARCHITECTURE = Architecture(
    model_type="qwen3_5_text", config=Qwen3_5Config, hf_names=names, gguf="qwen35", dropped=(r"mtp\..*", r"visual\..*")
)
