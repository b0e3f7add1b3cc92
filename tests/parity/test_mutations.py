"""The golden tests can fail: each deliberate fault moves the logits beyond their tolerance, most by orders of magnitude."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmjax
from llmjax.models import attention, layers, stablelm
from llmjax.models.attention import Rope, Scores
from tests.parity import golden
from tests.parity.golden import TOLERANCE, arrays, error, meta

Fault = Callable[[llmjax.Model, pytest.MonkeyPatch], llmjax.Model]

# A fault must miss by this many tolerances; the smallest real one (an epsilon) misses by more.
CLEARLY = 5


@functools.cache
def model(name: str) -> llmjax.Model:
    return golden.load(name)


def config(**changes: Any) -> Fault:
    """Another value in the config."""

    def fault(m: llmjax.Model, _: pytest.MonkeyPatch) -> llmjax.Model:
        found = {k: v(getattr(m.config, k)) if callable(v) else v for k, v in changes.items()}
        return dataclasses.replace(m, config=dataclasses.replace(m.config, **found))

    return fault


def rope(**changes: Any) -> Fault:
    return config(rope=lambda r: dataclasses.replace(r, **changes))


def params(edit: Callable[[dict], None]) -> Fault:
    """Another parameter; ``edit`` gets one layer's tree at a time."""

    def fault(m: llmjax.Model, _: pytest.MonkeyPatch) -> llmjax.Model:
        tree = jax.tree.map(lambda x: x, m.params)
        for name, branch in tree.items():
            if name.startswith("layers_"):
                edit(branch)
        return dataclasses.replace(m, params=tree)

    return fault


def patch(owner: Any, name: str, make: Callable[[Any], Any]) -> Fault:
    """Another function in the place of one of ours; ``make`` gets the right one."""

    def fault(m: llmjax.Model, patcher: pytest.MonkeyPatch) -> llmjax.Model:
        patcher.setattr(owner, name, make(getattr(owner, name)))
        return m

    return fault


def swap(a: str, b: str) -> Fault:
    """Two projections exchanged: ``attn.k``, ``mlp.gate``, ..."""

    def edit(layer: dict) -> None:
        (part, x), (_, y) = a.split("."), b.split(".")
        layer[part][x], layer[part][y] = layer[part][y], layer[part][x]

    return params(edit)


def without_bias(path: str) -> Fault:
    def edit(layer: dict) -> None:
        part, name = path.split(".")
        layer[part][name] = layer[part][name] | {"bias": jnp.zeros_like(layer[part][name]["bias"])}

    return params(edit)


def without_head_bias(m: llmjax.Model, _: pytest.MonkeyPatch) -> llmjax.Model:
    head = m.params["head"] | {"bias": jnp.zeros_like(m.params["head"]["bias"])}
    return dataclasses.replace(m, params=m.params | {"head": head})


def blocks_for_fused(layer: dict) -> None:
    """Reads the fused tensor as [Q | K | V] instead of q, k, v of each head."""
    names = ("q", "k", "v")
    heads = 16
    for end in ("weight", "bias"):
        split = [layer["attn"][n][end] for n in names]
        each = [x.reshape(heads, -1, *x.shape[1:]) for x in split]
        fused = jnp.stack(each, 1).reshape(-1, *split[0].shape[1:])
        for n, x in zip(names, jnp.split(fused, 3), strict=True):
            layer["attn"][n] = layer["attn"][n] | {end: x}


def interleaved_rope(self: Rope, x: jax.Array, positions: jax.Array) -> jax.Array:
    angles = (positions[..., None] * self.frequencies())[:, :, None]
    even, odd, rest = x[..., : self.dims : 2], x[..., 1 : self.dims : 2], x[..., self.dims :]
    pairs = [even * jnp.cos(angles) - odd * jnp.sin(angles), odd * jnp.cos(angles) + even * jnp.sin(angles)]
    return jnp.concatenate([jnp.stack(pairs, -1).reshape(*x.shape[:-1], -1), rest], -1)


def future_visible(right: Callable) -> Callable:
    def scores(self: Scores, products: jax.Array, queries: jax.Array, keys: jax.Array, ctx: Any) -> Any:
        return right(self, products, queries + 1, keys, ctx)

    return scores


def unscaled_alibi(right: Callable) -> Callable:
    """ALiBi added after the division by sqrt(H), as in BLOOM."""

    def bias(shape: tuple, keys: jax.Array, rounded: bool) -> jax.Array:
        return right(shape, keys, rounded) * 2.0  # sqrt(H) of falcon_rw

    return bias


def naive_slopes(num_heads: int) -> np.ndarray:
    return 2.0 ** (-8 * np.arange(1, num_heads + 1, dtype=np.float32) / num_heads)


def tiled_heads(q: jax.Array, num_kv: int) -> jax.Array:
    """Query head n with key head n mod K instead of n // G."""
    b, t, n, h = q.shape
    return q.reshape(b, t, n // num_kv, num_kv, h).transpose(0, 3, 2, 1, 4)


def plain_norm(self: layers.UnitOffsetRMSNorm, x: jax.Array) -> jax.Array:
    return layers._rms_normalised(x, self.eps) * self.get_variable("params", "weight")


def no_norm_of(name: str) -> Callable[[Any], Any]:
    def make(right: Callable) -> Callable:
        return lambda self, x: x if self.name == name else right(self, x)

    return make


FAULTS: dict[str, tuple[str, Fault]] = {
    "gemma: erf GELU": ("gemma_mqa", config(hidden_act="gelu")),
    "gemma: epsilon 1e-5": ("gemma_mqa", config(rms_norm_eps=1e-5)),
    "gemma: embedding not scaled": ("gemma_mqa", patch(layers.Embedding, "__call__", lambda right: lambda self, ids, ctx: jnp.take(self.weight, ids, axis=0))),
    "gemma: norm without + 1": ("gemma_mqa", patch(layers.UnitOffsetRMSNorm, "__call__", lambda right: plain_norm)),
    "gemma: gate and up swapped": ("gemma_mqa", swap("mlp.gate", "mlp.up")),
    "gemma: q bias dropped": ("gemma_gqa_bias", without_bias("attn.q")),
    "gemma: o bias dropped": ("gemma_gqa_bias", without_bias("attn.o")),
    "gemma: query heads tiled over key heads": ("gemma_gqa_bias", patch(attention, "_grouped", lambda right: tiled_heads)),
    "gemma2: window + 1": ("gemma2", config(windows=lambda w: tuple(x and x + 1 for x in w))),
    "gemma2: window - 1": ("gemma2", config(windows=lambda w: tuple(x and x - 1 for x in w))),
    "gemma2: odd layers local": ("gemma2", config(windows=lambda w: w[::-1])),
    "gemma2: no window": ("gemma2", config(windows=lambda w: (None,) * len(w))),
    "gemma2: no soft-cap on scores": ("gemma2", config(attn_logit_softcapping=None)),
    "gemma2: no soft-cap on logits": ("gemma2", config(final_logit_softcapping=None)),
    "gemma2: scale from the head width": ("gemma2", config(query_pre_attn_scalar=16)),
    "gemma2: post_attn_norm missing": ("gemma2", patch(layers.UnitOffsetRMSNorm, "__call__", no_norm_of("post_attn_norm"))),
    "gemma2: post_mlp_norm missing": ("gemma2", patch(layers.UnitOffsetRMSNorm, "__call__", no_norm_of("post_mlp_norm"))),
    "phi: rotary fraction of the class default": ("phi", rope(dims=10)),
    "phi: whole head rotates": ("phi", rope(dims=20)),
    "phi: erf GELU": ("phi", config(hidden_act="gelu")),
    "phi: head bias dropped": ("phi", without_head_bias),
    "phi: mlp bias dropped": ("phi", without_bias("mlp.down")),
    "phi: query norm missing": ("phi_gqa_qk_norm", patch(layers.LayerNorm, "__call__", no_norm_of("q_norm"))),
    "falcon: tanh GELU": ("falcon_rw", config(activation="gelu_pytorch_tanh")),
    "falcon: ALiBi not divided by sqrt(H)": ("falcon_rw", patch(attention, "_alibi_bias", unscaled_alibi)),
    "falcon: slopes by the power-of-two formula": ("falcon_11_heads_untied", patch(attention, "alibi_slopes", lambda right: naive_slopes)),
    "falcon: fused tensor read in blocks": ("falcon_rw", params(blocks_for_fused)),
    "falcon: v bias dropped": ("falcon_rw", without_bias("attn.v")),
    "stablelm: parallel residual": ("stablelm", config(use_parallel_residual=True)),
    "stablelm: rotary fraction": ("stablelm", rope(dims=8)),
    "stablelm: key norm missing": ("stablelm_qkv_bias_qk_norm", patch(stablelm.LayerNormPerHead, "__call__", no_norm_of("k_norm"))),
    "stablelm: k bias dropped": ("stablelm_qkv_bias_qk_norm", without_bias("attn.k")),
    "stablelm: GELU instead of SiLU": ("stablelm", config(hidden_act="gelu")),
    "llama: k and v swapped": ("llama", swap("attn.k", "attn.v")),
    "llama: rope pairs neighbours": ("llama", patch(Rope, "__call__", lambda right: interleaved_rope)),
    "llama: rope base": ("llama", rope(theta=10500.0)),
    "llama: next token visible": ("llama", patch(Scores, "__call__", future_visible)),
    "llama: epsilon 1e-6": ("llama", config(rms_norm_eps=1e-6)),
    "llama: linear scaling ignored": ("llama_linear", rope(linear=1.0)),
    "llama: llama3 scaling ignored": ("llama_llama3", rope(llama3=None)),
    "llama: o bias dropped": ("llama_biases_tied", without_bias("attn.o")),
}  # fmt: skip


def error_of(m: llmjax.Model, name: str) -> float:
    expected = arrays(name)
    long = m.logits([expected["long"].tolist()])[0][meta(name)["rows"]]
    return max(
        error(m.logits([expected["short"].tolist()])[0], expected["logits_short"]), error(long, expected["logits_long"])
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, monkeypatch, record_property):
    name, make = FAULTS[fault]
    broken = make(dataclasses.replace(model(name)), monkeypatch)
    found = error_of(broken, name)
    record_property("error", found)
    assert found > CLEARLY * TOLERANCE, f"{found:.1e} would go unnoticed"
