"""Gemma 3n, the text model (Google 2025, https://ai.google.dev/gemma/docs/gemma-3n).

Beside Gemma 3's block with its norms before and after each branch: ``A`` copies of the residual stream, of which a
layer computes one and predicts the others (AltUp, Baykal et al. 2023, arXiv:2301.13310); a low-rank branch beside
attention (LAuReL, Menghani et al. 2024, arXiv:2411.07501); an input of its own for each layer (``per_layer``); early
MLPs in which few neurons are active; and last layers that attend to the keys and values of earlier ones
(``shared_keys``).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from llmjax.errors import shown
from llmjax.models.architecture import Architecture
from llmjax.models.attention import Scores, softcap
from llmjax.models.config import FULL, MOST_LAYERS, MOST_WIDTH, SLIDING, check_rope_types, dimensions, layer_windows
from llmjax.models.context import Context, tap
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
    scaled,
)
from llmjax.models.names import From, Names, hf_names
from llmjax.models.per_layer import PerLayerBranch, PerLayerInputs, per_layer_names
from llmjax.models.rope import Rope
from llmjax.models.shared_keys import Kept, SharingAttention, SharingConfig, sharing, through_layers


@dataclasses.dataclass(frozen=True)
class Gemma3nConfig(SharingConfig):
    """``Gemma3nForCausalLM``; ``intermediate_size`` is the widest layer's."""

    rms_norm_eps: float
    hidden_activation: str
    attention_bias: bool
    final_logit_softcapping: float | None
    local_rope: Rope
    global_rope: Rope
    per_layer_vocab_size: int
    per_layer_size: int  # P
    streams: int  # A
    active: int  # the stream that layers compute
    correct_scale: bool
    laurel_rank: int
    widths: tuple[int, ...]  # F of each layer
    sparsity: tuple[float, ...]  # the share of a layer's neurons that is cut off; 0 for none

    @property
    def period(self) -> int:
        """See ``DecoderConfig``; each layer's own input stands in a place of its own."""
        return self.num_hidden_layers

    def unused(self) -> tuple[str, ...]:
        """See ``SharingConfig``; transformers saves a scale that it does not apply, too."""
        return (*super().unused(), *(() if self.correct_scale else (r"layers\.\d+\.altup\.correct_output_scale",)))

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        layers = r.size("num_hidden_layers", most=MOST_LAYERS)
        widths = _each(r, "intermediate_size", [16384] * layers, int, lambda v: 0 < v <= 4 * MOST_WIDTH)
        shared = dimensions(r, tied=True, context=32768, kv_heads=2, head_dim=256, intermediate=max(widths))
        # No version of transformers applies these when it infers; hidden_act stands in hidden_activation.
        r.ignore("query_pre_attn_scalar", "attn_logit_softcapping", "altup_coef_clip", "altup_lr_multiplier")
        r.ignore("hidden_act", "cache_implementation")
        check_rope_types(r)
        kinds = [FULL if (i + 1) % 5 == 0 else SLIDING for i in range(layers)]
        windows = layer_windows(r, kinds, r.nullable(r.size, "sliding_window", 512))
        sparse = [0.95 if layers > 10 and i < 10 else 0.0 for i in range(layers)]
        streams, active = r.size("altup_num_inputs", 4), r.count("altup_active_idx", 0)
        if active >= streams:
            r.problem(f"altup_active_idx: expected one of {streams} streams, found {active}")
        width = shared["head_dim"]
        return cls(
            **shared,
            rms_norm_eps=r.number("rms_norm_eps", 1e-6),
            hidden_activation=r.activation("hidden_activation", "gelu_pytorch_tanh"),
            attention_bias=r.flag("attention_bias", False),
            final_logit_softcapping=r.nullable(r.number, "final_logit_softcapping", 30.0),
            local_rope=r.rope(width, theta_key="rope_local_base_freq", scaling_key=None, layer_type=SLIDING),
            global_rope=r.rope(width, theta=1e6, layer_type=FULL),
            per_layer_vocab_size=r.size("vocab_size_per_layer_input", 262144),
            per_layer_size=r.size("hidden_size_per_layer_input", 256),
            streams=streams,
            active=active,
            correct_scale=r.flag("altup_correct_scale", True),
            laurel_rank=r.size("laurel_rank", 64),
            windows=windows,
            widths=widths,
            sparsity=_each(r, "activation_sparsity_pattern", sparse, float, lambda v: 0 <= v < 1),
            keys=sharing(r, windows, default=15),
        )

    def module(self) -> "Gemma3n":
        """See ``DecoderConfig.module``."""
        return Gemma3n(self)


def _each(r: Reader, key: str, default: list, kind: type, ok: Callable[[float], bool]) -> tuple:
    """A value for each layer, or one for all."""
    found = r.get(key, default)
    found = found if isinstance(found, list) else [found] * len(default)
    good = (kind, int)
    if len(found) != len(default) or not all(type(v) in good and ok(v) for v in found):
        r.problem(f"{key}: expected a number for each of {len(default)} layers, found {shown(r.get(key))}")
        found = default
    return tuple(map(kind, found))


class AltUp(nn.Module):
    """What relates the ``A`` streams ``[A, B, T, D]`` of the residual, by coefficients that depend on the token."""

    config: Gemma3nConfig

    def setup(self) -> None:
        c = self.config
        self.router_norm = WideRMSNorm(c.rms_norm_eps)
        self.router = Projection(c.streams)
        self.prediction = Projection(c.streams**2)
        self.correction = Projection(c.streams)
        if c.correct_scale:
            self.scale = parameter(self, "scale", nn.initializers.ones, (c.hidden_size,))

    def _modalities(self, x: jax.Array, ctx: Context) -> jax.Array:
        routed = self.router(scaled(self.router_norm(x), 1 / x.shape[-1], rounded=True), ctx)
        return jnp.tanh(routed.astype(jnp.float32)).astype(x.dtype)

    def predict(self, streams: jax.Array, ctx: Context) -> jax.Array:
        """Every stream plus a mixture of all of them."""
        count = self.config.streams
        mixing = self.prediction(self._modalities(streams[self.config.active], ctx), ctx)
        mixing = mixing.reshape(*mixing.shape[:-1], count, count, 1).astype(jnp.float32)
        mixed = [sum(mixing[:, :, to, i] * streams[i].astype(jnp.float32) for i in range(count)) for to in range(count)]
        return jnp.stack(mixed).astype(streams.dtype) + streams

    def correct(self, predicted: jax.Array, computed: jax.Array, ctx: Context) -> jax.Array:
        """Moves every stream by what was computed beyond the prediction of the active one."""
        coefficients = self.correction(self._modalities(computed, ctx), ctx) + 1
        return (
            predicted + (computed - predicted[self.config.active])[None] * jnp.moveaxis(coefficients, -1, 0)[..., None]
        )

    def scaled(self, x: jax.Array) -> jax.Array:
        """The active stream as the layer's own input meets it."""
        return x * over(self.scale.astype(x.dtype), x) if self.config.correct_scale else x


class Laurel(nn.Module):
    """``x + norm(right(left(x)))``."""

    rank: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        h = Projection(x.shape[-1], name="right")(Projection(self.rank, name="left")(x, ctx), ctx)
        return x + WideRMSNorm(self.eps, name="norm")(h)


def above_cutoff(share: float, activation: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """``activation`` of how far ``x [..., F]`` lies above the quantile ``share`` of its values, were they normal."""
    x = lax.optimization_barrier(x)  # or a GPU's compiler computes the product that it is for each of its uses
    wide = x.astype(jnp.float32)
    mean, deviation = (f(wide, -1, keepdims=True).astype(x.dtype) for f in (jnp.mean, jnp.std))
    deviations = jnp.float32(NormalDist().inv_cdf(float(np.float32(share)))).astype(x.dtype)
    return activation(jax.nn.relu(x - (mean + deviation * deviations)))


class Block(nn.Module):
    """The active stream goes through attention, LAuReL and MLP, then moves the others."""

    config: Gemma3nConfig
    window: int | None
    width: int
    sparsity: float
    keys: str

    @nn.compact
    def __call__(self, carried: tuple[jax.Array, Kept], ctx: Context, own: jax.Array) -> tuple[jax.Array, Kept]:
        c, (streams, given) = self.config, carried
        altup = AltUp(c, name="altup")
        predicted = altup.predict(streams, ctx)
        x = predicted[c.active]
        h = WideRMSNorm(c.rms_norm_eps, name="attn_norm")(x)
        laurel = Laurel(c.laurel_rank, c.rms_norm_eps, name="laurel")(h, ctx)
        attention = SharingAttention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            FULL if self.window is None else SLIDING,
            Scores(scale=1.0, window=self.window),
            c.global_rope if self.window is None else c.local_rope,
            c.rms_norm_eps,
            self.keys,
            c.attention_bias,
            name="attn",
        )
        h, given = attention(h, ctx, given)
        h = WideRMSNorm(c.rms_norm_eps, name="post_attn_norm")(h)
        x = tap(self, "resid_attn", scaled(x + h + laurel, 2**-0.5, rounded=False))
        activation = ACTIVATIONS[c.hidden_activation]
        if self.sparsity:
            activation = partial(above_cutoff, self.sparsity, activation)
        h = GatedMLP(self.width, activation, name="mlp")(WideRMSNorm(c.rms_norm_eps, name="mlp_norm")(x), ctx)
        x = tap(self, "resid_mlp", x + WideRMSNorm(c.rms_norm_eps, name="post_mlp_norm")(h))
        streams = altup.correct(predicted, x, ctx)
        branch = PerLayerBranch(ACTIVATIONS[c.hidden_activation], c.rms_norm_eps, name="per_layer")
        added = branch(altup.scaled(streams[c.active]), own, ctx)
        streams = jnp.concatenate([streams[:1], streams[1:] + added[None]])
        streams = tap(self, "streams", streams.transpose(1, 2, 0, 3)).transpose(2, 0, 1, 3)
        return streams.at[c.active].set(tap(self, "resid", streams[c.active])), given


def as_large_as(x: jax.Array, other: jax.Array) -> jax.Array:
    """``x [..., D]`` with the root mean square of ``other``."""

    def mean_square(x: jax.Array) -> jax.Array:
        return jnp.mean((x * x).astype(jnp.float32), -1, keepdims=True).astype(x.dtype)

    size = jnp.sqrt(jnp.maximum(mean_square(x), jnp.float32(1e-5).astype(x.dtype)))
    return x * jnp.sqrt(mean_square(other)) / size


class Gemma3n(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: Gemma3nConfig

    @nn.compact
    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, scale=c.hidden_size**0.5, name="embed")
        x = tap(self, "embed", embed(ids, ctx))
        inputs = PerLayerInputs(
            c.per_layer_vocab_size, c.num_hidden_layers, c.per_layer_size, c.rms_norm_eps, True, name="per_layer"
        )
        entries = [Projection(c.hidden_size, name=f"enter_{i}") for i in range(1, c.streams)]
        streams = jnp.stack([x, *(as_large_as(enter(x, ctx), x) for enter in entries)])
        layers = zip(c.windows, c.widths, c.sparsity, c.keys, strict=True)
        blocks = [Block(c, *layer, name=f"layers_{i}") for i, layer in enumerate(layers)]
        streams, ctx = through_layers(self, blocks, streams, ctx, inputs(ids, x, ctx))
        first, *others = ctx.select_last(streams)
        exits = [Projection(c.hidden_size, name=f"leave_{i}") for i in range(1, c.streams)]
        others = [as_large_as(leave(x, ctx), first) for leave, x in zip(exits, others, strict=True)]
        x = jnp.mean(jnp.stack([first, *others]).astype(jnp.float32), 0).astype(x.dtype)
        x = WideRMSNorm(c.rms_norm_eps, name="final_norm")(x)
        logits = language_head(self, embed, x, ctx, tied=c.tie_word_embeddings)
        if c.final_logit_softcapping is not None:
            logits = softcap(logits, c.final_logit_softcapping)
        return tap(self, "logits", logits)


def names(config: Gemma3nConfig, decoder: str = "model.") -> Names:
    """The table, for a text model whose tensors' names begin with ``decoder``."""
    layer = f"{decoder}layers.{{}}."
    others = range(1, config.streams)
    return {
        **hf_names(embed=f"{decoder}embed_tokens", layer=layer, final_norm=f"{decoder}norm", **LAYER_NAMES),
        **per_layer_names(decoder),
        **{f"enter_{i}": f"{decoder}altup_projections.{i - 1}" for i in others},
        **{f"leave_{i}": f"{decoder}altup_unembed_projections.{i - 1}" for i in others},
        "layers.{}.altup": From((f"{layer}altup",), endings={"scale": "correct_output_scale"}),
        "layers.{}.altup.router_norm": f"{layer}altup.router_norm",
        "layers.{}.altup.router": f"{layer}altup.modality_router",
        "layers.{}.altup.prediction": f"{layer}altup.prediction_coefs",
        "layers.{}.altup.correction": f"{layer}altup.correction_coefs",
        "layers.{}.laurel.left": f"{layer}laurel.linear_left",
        "layers.{}.laurel.right": f"{layer}laurel.linear_right",
        "layers.{}.laurel.norm": f"{layer}laurel.post_laurel_norm",
    }


ARCHITECTURE = Architecture(
    model_type="gemma3n_text",
    config=Gemma3nConfig,
    hf_names=names,
    gguf="gemma3n",
    unused=Gemma3nConfig.unused,
    needs_bos=True,
)
