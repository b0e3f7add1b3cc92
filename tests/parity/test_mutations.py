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
from llmjax.models.attention import Scores
from llmjax.models.rope import Rope
from tests.parity import golden
from tests.parity.golden import TOLERANCE, arrays, error, meta
from tests.tiny import slow

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


def interleaved_rope(self: Rope, x: jax.Array, ctx: Any) -> jax.Array:
    angles = (ctx.positions[..., None] * self.frequencies())[:, :, None]
    even, odd, rest = x[..., : self.dims : 2], x[..., 1 : self.dims : 2], x[..., self.dims :]
    pairs = [even * jnp.cos(angles) - odd * jnp.sin(angles), odd * jnp.cos(angles) + even * jnp.sin(angles)]
    return jnp.concatenate([jnp.stack(pairs, -1).reshape(*x.shape[:-1], -1), rest], -1)


def future_visible(right: Callable) -> Callable:
    def scores(self: Scores, products: jax.Array, queries: jax.Array, keys: jax.Array, ctx: Any) -> Any:
        return right(self, products, queries + 1, keys, ctx)

    return scores


def queries_first(layer: dict) -> None:
    """Reads the grouped fused tensor of Falcon 40B as all queries, then all keys, then all values."""
    kv, width = 2, 10
    q, k, v = (layer["attn"][n]["weight"].reshape(kv, -1, width, 60) for n in ("q", "k", "v"))
    fused = jnp.concatenate([q, k, v], 1).reshape(-1, 60)
    for n, x in zip(("q", "k", "v"), jnp.split(fused, [60, 80]), strict=True):
        layer["attn"][n] = {"weight": x}


def groups_first(layer: dict) -> None:
    """Reads the fused tensor of Phi-3 as q, k, v of each key/value head."""
    kv, width = 2, 16
    fused = jnp.concatenate([layer["attn"][n]["weight"] for n in ("q", "k", "v")]).reshape(kv, -1, width, 64)
    for n, x in zip(("q", "k", "v"), jnp.split(fused, [2, 3], axis=1), strict=True):
        layer["attn"][n] = {"weight": x.reshape(-1, 64)}


def norm_before_heads(right: Callable) -> Callable:
    """Norms all heads' widths together instead of each head's."""

    def norm(self: layers.RMSNorm, x: jax.Array) -> jax.Array:
        if x.ndim < 4:
            return right(self, x)
        flat = layers.rms_normalised(x.reshape(*x.shape[:2], -1), self.eps).reshape(x.shape)
        return flat * self.get_variable("params", "weight")

    return norm


def sequential(m: llmjax.Model, patcher: pytest.MonkeyPatch) -> llmjax.Model:
    """Falcon 7B's tensors in RW's order, its one norm used twice."""
    m = params(lambda layer: layer.update(mlp_norm=layer["attn_norm"]))(m, patcher)
    return config(parallel_attn=False)(m, patcher)


def scaled_by(factor: float) -> Callable[[Any], Any]:
    def make(right: Callable) -> Callable:
        return lambda self, products, *rest: right(self, products * factor, *rest)

    return make


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
    return layers.rms_normalised(x, self.eps) * self.get_variable("params", "weight")


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
    "gemma3: window + 1": ("gemma3", config(windows=lambda w: tuple(x and x + 1 for x in w))),
    "gemma3: every second layer global": ("gemma3", config(windows=(8, None, 8, None))),
    "gemma3: no window, local base": ("gemma3", config(windows=(None,) * 4)),
    "gemma3: one base for all layers": ("gemma3", config(local_rope=lambda r: dataclasses.replace(r, theta=1e6))),
    "gemma3: query norm missing": ("gemma3", patch(layers.UnitOffsetRMSNorm, "__call__", no_norm_of("q_norm"))),
    "gemma3: key norm missing": ("gemma3", patch(layers.UnitOffsetRMSNorm, "__call__", no_norm_of("k_norm"))),
    "gemma3: post_mlp_norm missing": ("gemma3", patch(layers.UnitOffsetRMSNorm, "__call__", no_norm_of("post_mlp_norm"))),
    "gemma3: scale from the head width": ("gemma3", config(query_pre_attn_scalar=16)),
    "gemma3: scaling of global layers ignored": ("gemma3_linear_layer_types", config(global_rope=lambda r: dataclasses.replace(r, linear=1.0))),
    "gemma3: scaling on local layers, too": ("gemma3_linear_layer_types", config(local_rope=lambda r: dataclasses.replace(r, linear=8.0))),
    "gemma3 multimodal: scaling of global layers ignored": ("gemma3_multimodal", config(global_rope=lambda r: dataclasses.replace(r, linear=1.0))),
    "gemma3 multimodal: no window, local base": ("gemma3_multimodal", config(windows=(None,) * 4)),
    "gemma3 multimodal: norm without + 1": ("gemma3_multimodal", patch(layers.UnitOffsetRMSNorm, "__call__", lambda right: plain_norm)),
    "gemma3: no soft-cap on logits": ("gemma3_linear_layer_types", config(final_logit_softcapping=None)),
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
    "falcon 7b: sequential residual": ("falcon_7b", sequential),
    "falcon 7b: ALiBi for the rotation": ("falcon_7b", config(rope=None)),
    "falcon 7b: k and v swapped": ("falcon_7b", swap("attn.k", "attn.v")),
    "falcon 7b: tanh GELU": ("falcon_7b", config(activation="gelu_pytorch_tanh")),
    "falcon 40b: one norm for both": ("falcon_40b", config(separate_norms=False)),
    "falcon 40b: rope base of the class default": ("falcon_40b", rope(theta=10000.0)),
    "falcon 40b: fused tensor read in blocks": ("falcon_40b", params(queries_first)),
    "falcon 40b: o bias dropped": ("falcon_40b_one_norm_bias", without_bias("attn.o")),
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
    "llama: mlp bias dropped": ("llama_biases_tied", without_bias("mlp.gate")),
    "mistral: no window": ("mistral", config(windows=(None,) * 3)),
    "mistral: window + 1": ("mistral", config(windows=(7,) * 3)),
    "mistral: window on every other layer": ("mistral", config(windows=(6, None, 6))),
    "mistral: scale from the model's width": ("mistral", patch(Scores, "__call__", scaled_by((10 / 14) ** 0.5))),
    "qwen2: k and v swapped": ("qwen2", swap("attn.k", "attn.v")),
    "qwen2: q bias dropped": ("qwen2", without_bias("attn.q")),
    "qwen2: v bias dropped": ("qwen2", without_bias("attn.v")),
    "qwen2: window switched on": ("qwen2", config(windows=(None, 4, 4, 4))),
    "qwen2: window switched off": ("qwen2_windows_untied", config(windows=(None,) * 4)),
    "qwen2: first layers slide instead of last": ("qwen2_windows_untied", config(windows=(4, 4, 4, None))),
    "qwen3: norms missing": ("qwen3", config(qk_norm=False)),
    "qwen3: key norm missing": ("qwen3", patch(layers.RMSNorm, "__call__", no_norm_of("k_norm"))),
    "qwen3: all heads normed together": ("qwen3", patch(layers.RMSNorm, "__call__", norm_before_heads)),
    "qwen3: layer types reversed": ("qwen3_bias_layer_types", config(windows=(None, 4, 4, None))),
    "qwen3: o bias dropped": ("qwen3_bias_layer_types", without_bias("attn.o")),
    "phi3: no window": ("phi3", config(windows=(None,) * 3)),
    "phi3: gate and up swapped": ("phi3", swap("mlp.gate", "mlp.up")),
    "phi3: fused tensor read by heads": ("phi3", params(groups_first)),
    "phi3: whole head rotates": ("phi3_partial_mha_tied", rope(dims=16)),
}  # fmt: skip


def error_of(m: llmjax.Model, name: str) -> float:
    """On the short prompt, and on the long one where the short one shows nothing."""
    expected = arrays(name)
    found = error(m.logits([expected["short"].tolist()])[0], expected["logits_short"])
    if found > CLEARLY * TOLERANCE:
        return found
    return error(m.logits([expected["long"].tolist()])[0][meta(name)["rows"]], expected["logits_long"])


def faults() -> list:
    """All of them with --runslow; by default every twelfth."""
    return [name if i % 12 == 0 else slow(name) for i, name in enumerate(FAULTS)]


@pytest.mark.parametrize("fault", faults())
def test_fault_is_seen(fault, monkeypatch, record_property):
    name, make = FAULTS[fault]
    broken = make(dataclasses.replace(model(name)), monkeypatch)
    found = error_of(broken, name)
    record_property("error", found)
    assert found > CLEARLY * TOLERANCE, f"{found:.1e} would go unnoticed"
