"""Gemma 4, the text model (Google 2026, https://ai.google.dev/gemma/docs/core/model_card_4).

Gemma 3's block with two kinds of attention: local layers, and global ones whose heads are wider and rotate in part.
Around it, in one size or another: an input of its own for each layer (``per_layer``), last layers that attend to the
keys and values of earlier ones (``shared_keys``), values that are the keys, and a mixture of experts beside the MLP.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmjax.errors import shown
from llmjax.models.architecture import Architecture
from llmjax.models.attention import Scores, softcap
from llmjax.models.config import FULL, SLIDING, check_rope_types, dimensions, layer_windows
from llmjax.models.context import Context, tap
from llmjax.models.experts import Choice, Experts
from llmjax.models.gemma3 import LAYER_NAMES
from llmjax.models.hf_config import Reader
from llmjax.models.layers import (
    ACTIVATIONS,
    Embedding,
    GatedMLP,
    Projection,
    WideRMSNorm,
    language_head,
    over,
    parameter,
    rms_normalised,
)
from llmjax.models.names import From, Names, hf_names, stacked_experts
from llmjax.models.per_layer import PerLayerBranch, PerLayerInputs, per_layer_names
from llmjax.models.rope import Rope
from llmjax.models.shared_keys import TAKEN, Kept, SharingAttention, SharingConfig, sharing, through_layers


@dataclasses.dataclass(frozen=True)
class Gemma4Config(SharingConfig):
    """``Gemma4ForCausalLM``; ``num_key_value_heads`` and ``head_dim`` are those of local layers."""

    rms_norm_eps: float
    hidden_activation: str
    attention_bias: bool
    final_logit_softcapping: float | None
    local_rope: Rope
    global_rope: Rope
    global_kv_heads: int  # K of global layers
    global_head_dim: int  # and their H
    keys_are_values: bool  # in global layers
    wide_takers: bool  # layers that take keys and values have an MLP twice as wide
    per_layer_size: int  # P; 0 for none
    experts: int  # 0 for none
    experts_used: int
    expert_size: int

    @property
    def kinds(self) -> tuple[Any, ...]:
        """See ``DecoderConfig``."""
        return tuple(zip(self.windows, self.keys, strict=True))

    @property
    def period(self) -> int:
        """See ``DecoderConfig``; each layer's own input stands in a place of its own."""
        return self.num_hidden_layers if self.per_layer_size else super().period

    def heads(self, window: int | None) -> tuple[int, int]:
        """``(K, H)`` of layers with such a window, None for global ones."""
        if window is None:
            return self.global_kv_heads, self.global_head_dim
        return self.num_key_value_heads, self.head_dim

    def attention(self, layer: int) -> tuple[int, int]:
        """See ``DecoderConfig.attention``."""
        return self.heads(self.windows[layer])

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        shared = dimensions(r, tied=True, context=131072, kv_heads=4, head_dim=256)
        layers = shared["num_hidden_layers"]
        r.expect("use_bidirectional_attention", (None, "vision"))  # "vision" is about the tokens of images
        r.ignore("hidden_act", "cache_implementation")  # the activation stands in hidden_activation
        kinds = [SLIDING if (i + 1) % 6 else FULL for i in range(layers)]
        windows = layer_windows(r, kinds, r.nullable(r.size, "sliding_window", 512))
        windows = (*windows[:-1], None)  # the last is global, whatever the file says: so transformers has it
        check_rope_types(r)
        r.default("rope_parameters", _ROPES)
        keys_are_values = r.flag("attention_k_eq_v", False)
        local, wide = _heads(r, shared, windows, keys_are_values)
        size = r.count("hidden_size_per_layer_input", 256)
        vocabulary = r.size("vocab_size_per_layer_input", 262144)
        if size and vocabulary != shared["vocab_size"]:
            r.problem(f"vocab_size_per_layer_input: expected vocab_size {shared['vocab_size']}, found {vocabulary}")
        mixture = r.flag("enable_moe_block", False)
        experts = r.size("num_experts") if mixture else 0
        used = r.size("top_k_experts") if mixture else 0
        if used > experts:
            r.problem(f"top_k_experts: {used} of {experts} experts")
        r.ignore("num_experts", "top_k_experts", "moe_intermediate_size")  # null or not, without the block
        return cls(
            **{**shared, "num_key_value_heads": local[0], "head_dim": local[1]},
            rms_norm_eps=r.number("rms_norm_eps", 1e-6),
            hidden_activation=r.activation("hidden_activation", "gelu_pytorch_tanh"),
            attention_bias=r.flag("attention_bias", False),
            final_logit_softcapping=r.optional_number("final_logit_softcapping"),
            local_rope=r.rope(local[1], layer_type=SLIDING, scaling_key=None),
            global_rope=r.rope(wide[1], layer_type=FULL, scaling_key=None),
            global_kv_heads=wide[0],
            global_head_dim=wide[1],
            keys_are_values=keys_are_values,
            wide_takers=r.flag("use_double_wide_mlp", False),
            per_layer_size=size,
            experts=experts,
            experts_used=used,
            expert_size=r.size("moe_intermediate_size") if mixture else 0,
            windows=windows,
            keys=sharing(r, windows, default=0),
        )

    def module(self) -> "Gemma4":
        """See ``DecoderConfig.module``."""
        return Gemma4(self)


_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}


def _heads(
    r: Reader, shared: dict[str, Any], windows: tuple[int | None, ...], keys_are_values: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """K and H of local and of global layers: those of ``per_layer_config``, as transformers 5 saves them, or of
    ``num_global_key_value_heads`` and ``global_head_dim``."""
    common = shared["num_key_value_heads"], shared["head_dim"]
    own = r.get("per_layer_config")
    if own is None:
        count = r.size("num_global_key_value_heads", common[0])
        return common, (count if keys_are_values else common[0], r.size("global_head_dim", 512))
    r.ignore("global_head_dim", "num_global_key_value_heads")
    each = [common] * len(windows)
    for layer, values in own.items() if isinstance(own, dict) else [(None, own)]:
        known = {"num_key_value_heads", "head_dim"}
        index = int(str(layer)) if str(layer).isdecimal() else len(windows)
        if index >= len(windows) or not isinstance(values, dict) or set(values) - known or not _sizes(values):
            what = f"expected {' and '.join(sorted(known))} by layer"
            r.problem(f"per_layer_config: {what}, found {shown(layer)}: {shown(values)}")
            continue
        each[index] = values.get("num_key_value_heads", common[0]), values.get("head_dim", common[1])
    found = []
    for kind in (False, True):
        heads = {heads for heads, window in zip(each, windows, strict=True) if (window is None) == kind}
        if len(heads) > 1:
            r.problem(f"per_layer_config: {'global' if kind else 'local'} layers of different heads: {sorted(heads)}")
        found.append(next(iter(heads), common))
    for count, _ in found:
        if shared["num_attention_heads"] % count:
            r.problem(f"num_attention_heads: {shared['num_attention_heads']} is not a multiple of {count} key heads")
    return found[0], found[1]


def _sizes(values: dict[str, Any]) -> bool:
    return all(type(v) is int and v > 0 for v in values.values())


class Router(nn.Module):
    """Which experts a token gets, and how much of each: ``x [B, T, D]`` to weights and numbers ``[B, T, k]``."""

    config: Gemma4Config

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array]:
        c = self.config
        scale = parameter(self, "scale", nn.initializers.ones, (c.hidden_size,))
        each = parameter(self, "per_expert_scale", nn.initializers.ones, (c.experts,))
        x = rms_normalised(x, c.rms_norm_eps).astype(x.dtype) * over(scale.astype(x.dtype), x)
        x = (x.astype(jnp.float32) * c.hidden_size**-0.5).astype(x.dtype)
        scores = Projection(c.experts, name="project")(x, ctx)
        weights, chosen = Choice(c.experts_used, normalised=True, name="choice")(scores)
        return tap(self, "weights", weights * jnp.take(each.astype(jnp.float32), chosen)), chosen


class Block(nn.Module):
    """Each branch is normed before it and after it."""

    config: Gemma4Config
    window: int | None
    keys: str

    @nn.compact
    def __call__(
        self, carried: tuple[jax.Array, Kept], ctx: Context, own: jax.Array | None = None
    ) -> tuple[jax.Array, Kept]:
        c, (x, given) = self.config, carried
        activation = ACTIVATIONS[c.hidden_activation]

        def norm(name: str, x: jax.Array) -> jax.Array:
            return WideRMSNorm(c.rms_norm_eps, name=name)(x)

        is_global = self.window is None
        attention = SharingAttention(
            c.num_attention_heads,
            *c.heads(self.window),
            FULL if self.window is None else SLIDING,
            Scores(scale=1.0, window=self.window),
            c.global_rope if is_global else c.local_rope,
            c.rms_norm_eps,
            self.keys,
            c.attention_bias,
            c.keys_are_values and is_global,
            name="attn",
        )
        h, given = attention(norm("attn_norm", x), ctx, given)
        x = tap(self, "resid_attn", x + norm("post_attn_norm", h))
        width = c.intermediate_size * (2 if c.wide_takers and self.keys == TAKEN else 1)
        h = GatedMLP(width, activation, name="mlp")(norm("mlp_norm", x), ctx)
        if c.experts:
            weights, chosen = Router(c, name="router")(x, ctx)
            experts = Experts(c.experts, c.expert_size, activation, name="experts")
            mixed = experts(norm("experts_norm", x), weights, chosen, ctx)
            h = norm("post_dense_norm", h) + norm("post_experts_norm", mixed)
        x = x + norm("post_mlp_norm", h)
        if own is not None:
            x = tap(self, "resid_mlp", x)
            x = x + PerLayerBranch(activation, c.rms_norm_eps, name="per_layer")(x, own, ctx)
        scale = parameter(self, "scale", nn.initializers.ones, (1,))
        return tap(self, "resid", x * over(scale.astype(x.dtype), x)), given


class Gemma4(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: Gemma4Config

    @nn.compact
    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, scale=c.hidden_size**0.5, name="embed")
        x = tap(self, "embed", embed(ids, ctx))
        own = None
        if c.per_layer_size:
            inputs = PerLayerInputs(
                c.vocab_size, c.num_hidden_layers, c.per_layer_size, c.rms_norm_eps, False, name="per_layer"
            )
            own = inputs(ids, x, ctx)
        layers = zip(c.windows, c.keys, strict=True)
        blocks = [Block(c, *layer, name=f"layers_{i}") for i, layer in enumerate(layers)]
        x, ctx = through_layers(self, blocks, x, ctx, own)
        x = WideRMSNorm(c.rms_norm_eps, name="final_norm")(ctx.select_last(x))
        logits = language_head(self, embed, x, ctx, tied=c.tie_word_embeddings)
        if c.final_logit_softcapping is not None:
            logits = softcap(logits, c.final_logit_softcapping)
        return tap(self, "logits", logits)


def names(config: Gemma4Config, decoder: str = "model.") -> Names:
    """The table, for a text model whose tensors' names begin with ``decoder``."""
    layer = f"{decoder}layers.{{}}."
    return {
        **hf_names(embed=f"{decoder}embed_tokens", layer=layer, final_norm=f"{decoder}norm", **LAYER_NAMES),
        **per_layer_names(decoder),
        "layers.{}": From((layer.removesuffix("."),), endings={"scale": "layer_scalar"}),
        "layers.{}.router": f"{layer}router",
        "layers.{}.router.project": f"{layer}router.proj",
        **stacked_experts(f"{layer}experts", config.expert_size),
        "layers.{}.experts_norm": f"{layer}pre_feedforward_layernorm_2",
        "layers.{}.post_dense_norm": f"{layer}post_feedforward_layernorm_1",
        "layers.{}.post_experts_norm": f"{layer}post_feedforward_layernorm_2",
    }


ARCHITECTURE = Architecture(
    model_type="gemma4_text",
    config=Gemma4Config,
    hf_names=names,
    gguf="gemma4",
    unused=Gemma4Config.unused,
    needs_bos=True,
)
