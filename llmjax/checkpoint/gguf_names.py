"""GGUF's tensor names, by role, written once for all architectures; what llama.cpp rearranges when it writes a file is
undone here.

Source: gguf-py's ``tensor_mapping.py`` and ``modify_tensors`` of llama.cpp's converter (``conversion/``).
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from llmjax.models.config import DecoderConfig
from llmjax.models.names import DamagedError, From, Names, TornError, fused, stacked_experts
from llmjax.models.qwen3_5 import Qwen3_5Config
from llmjax.models.shared_keys import TAKEN

# Whose rotation pairs neighbours in llama.cpp.
_PERMUTED = ("llama", "mistral", "ministral3", "granite", "smollm3")

_LAYER: dict[str, str | From] = {
    "attn_norm": "attn_norm",
    "post_attn_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "post_mlp_norm": "post_ffw_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    # LFM2
    "conv.enter": "shortconv.in_proj",
    "conv.kernel": "shortconv.conv",
    "conv.leave": "shortconv.out_proj",
    # Qwen3.5
    "delta.qkv": "attn_qkv",
    "delta.gate": "attn_gate",
    "delta.beta": "ssm_beta",
    "delta.decay": "ssm_alpha",
    "delta.kernel": "ssm_conv1d",
    "delta.norm": "ssm_norm",
    "delta.o": "ssm_out",
    "delta.a_log": From(("",), endings={"a_log": "ssm_a"}),
    "delta.dt_bias": From(("",), endings={"dt_bias": "ssm_dt.bias"}),
    # Gemma 3n and 4
    "per_layer.gate": "inp_gate",
    "per_layer.project": "proj",
    "per_layer.norm": "post_norm",
    "laurel.left": "laurel_l",
    "laurel.right": "laurel_r",
    "laurel.norm": "laurel_post_norm",
    "altup.router": "altup_router",
    "altup.router_norm": "altup_router_norm",
    "altup.prediction": "altup_predict_coef",
    "altup.correction": "altup_correct_coef",
    "altup": From(("altup_correct_scale",), endings={"scale": "weight"}),
    "": From(("layer_output_scale",), endings={"scale": "weight"}),
    # mixtures of experts
    "experts.gate": "ffn_gate_exps",
    "experts.up": "ffn_up_exps",
    "experts.down": "ffn_down_exps",
    "experts_norm": "pre_ffw_norm_2",
    "post_dense_norm": "post_ffw_norm_1",
    "post_experts_norm": "post_ffw_norm_2",
    "router.project": "ffn_gate_inp",
}


def names(config: DecoderConfig, model_type: str, tensors: Collection[str]) -> Names:
    """The table of GGUF tensor names for a model.

    Args:
      config: the model's.
      model_type: Hugging Face's name of its architecture.
      tensors: all names in the file; some architectures have been written with q, k and v apart and fused.
    """
    layer: dict[str, str | From] = dict(_LAYER)
    if isinstance(config, Qwen3_5Config):
        layer |= _with_heads_in_groups(config, layer)
    elif "blk.0.attn_qkv.weight" in tensors:
        q, kv = (config.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
        layer |= fused("attn_qkv", {"attn.q": q, "attn.k": kv, "attn.v": kv})
    if model_type == "phi3":
        layer |= fused("ffn_up", {"mlp.gate": config.intermediate_size, "mlp.up": config.intermediate_size})
    if getattr(config, "separate_norms", False):  # Falcon 40B
        layer |= {"attn_norm": "attn_norm_2", "mlp_norm": "attn_norm"}
    if model_type == "gemma4_text":
        layer["router"] = From(
            ("",), endings={"scale": "ffn_gate_inp.scale", "per_expert_scale": "ffn_down_exps.scale"}
        )
    else:
        layer["router"] = "ffn_gate_inp"
    if "blk.0.ffn_gate_up_exps.weight" in tensors:
        size: int = getattr(config, "expert_size", 0)
        both = stacked_experts("", size, "ffn_gate_up_exps.weight", "ffn_down_exps.weight")
        layer |= {role.removeprefix("layers.{}."): entry for role, entry in both.items()}
    if model_type in _PERMUTED:
        layer["attn.q"] = _then(layer["attn.q"], _unpermuted(config.num_attention_heads))
        layer["attn.k"] = _then(layer["attn.k"], _unpermuted(config.num_key_value_heads))
    table: dict[str, str | From] = {
        "embed": "token_embd",
        "final_norm": "token_embd_norm" if model_type == "lfm2" else "output_norm",
        "head": "output",
        "per_layer.embed": "per_layer_token_embd",
        "per_layer.project": "per_layer_model_proj",
        "per_layer.norm": "per_layer_proj_norm",
    }
    streams: int = getattr(config, "streams", 1)  # of Gemma 3n
    for i in range(1, streams):
        table[f"enter_{i}"] = _one_of("altup_proj", i, streams)
        table[f"leave_{i}"] = _one_of("altup_unembd_proj", i, streams)
    for role, entry in layer.items():
        table[f"layers.{{}}.{role}".removesuffix(".")] = _in_layer(entry)
    if model_type in ("gemma", "gemma2", "gemma3_text", "qwen3_5_text"):
        for place in table:
            if place.endswith("norm") and not place.endswith("delta.norm"):
                table[place] = _then(table[place], _minus_one)
    return table


def unused(config: DecoderConfig, tensors: Collection[str]) -> frozenset[str]:
    """Tensors that files have all the same: those that would make the keys and values of layers which take others', and
    layers that guess tokens ahead."""
    takers = [i for i, keys in enumerate(getattr(config, "keys", ())) if keys == TAKEN]
    known = frozenset(f"blk.{i}.attn_{part}.weight" for i in takers for part in ("k", "v", "k_norm"))
    if not isinstance(config, Qwen3_5Config):
        return known
    guessing = {name.split(".nextn.")[0] for name in tensors if ".nextn." in name}
    guessing -= {f"blk.{i}" for i in range(config.num_hidden_layers)}
    return known | {name for name in tensors if ".".join(name.split(".")[:2]) in guessing}


def _in_layer(entry: str | From) -> str | From:
    if isinstance(entry, str):
        return f"blk.{{}}.{entry}"
    return dataclasses.replace(entry, modules=tuple(f"blk.{{}}.{m}".removesuffix(".") for m in entry.modules))


def _one_of(module: str, number: int, streams: int) -> From:
    """A matrix of a stack that has one for every stream but the first."""

    def make(arrays: list[np.ndarray]) -> np.ndarray:
        (stack,) = arrays
        return stack[number - 1]

    return From((module,), make, source_shape=lambda shape: (streams - 1, *shape))


def _then(entry: str | From, change: Callable[[np.ndarray], np.ndarray]) -> From:
    """An entry with one more step after it."""
    if isinstance(entry, str):
        entry = From((entry,))
    make = entry.make
    return dataclasses.replace(entry, make=lambda arrays: change(make(arrays)))


def _unpermuted(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The rotation of llama.cpp's ``llama`` pairs neighbours, so its q and k have the two halves of each head's rows
    interleaved; ours pairs halves."""

    def change(x: np.ndarray) -> np.ndarray:
        half = x.shape[0] // heads // 2
        return x.reshape(heads, half, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return change


def _with_heads_in_groups(config: Qwen3_5Config, layer: Mapping[str, str | From]) -> dict[str, str | From]:
    """Qwen3.5's entries: llama.cpp has the value heads of linear attention that share a key head as far apart as there
    are key heads, ours are neighbours; ``a_log`` is written as ``-exp(a_log)``."""
    keys, first = config.key_heads, 2 * config.key_heads * config.key_dim

    def grouped(x: np.ndarray, axis: int = 0) -> np.ndarray:
        size = x.shape[axis]
        if size % config.value_heads:
            raise TornError
        parts = x.reshape(*x.shape[:axis], config.value_heads // keys, keys, -1, *x.shape[axis + 1 :])
        return np.swapaxes(parts, axis, axis + 1).reshape(x.shape)

    def values_grouped(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[:first], grouped(x[first:])])

    def columns_grouped(x: np.ndarray) -> np.ndarray:
        # Groups have 16 or 32 weights, so of packed ones these are the fifth bits: of even columns, then of odd ones.
        fifth = 8 * x.shape[1] == config.value_heads * config.value_dim
        return np.concatenate([grouped(part, 1) for part in np.split(x, 2 if fifth else 1, 1)], 1)

    def logarithm(x: np.ndarray) -> np.ndarray:
        if not (x < 0).all():
            raise DamagedError(f"expected numbers below 0, as -exp(A_log) is, found {x.max():g}; is the file damaged?")
        return np.log(-grouped(x.astype(np.float64))).astype(np.float32)

    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {"delta.a_log": logarithm}
    if config.value_heads != keys:
        changes |= dict.fromkeys(("delta.gate", "delta.beta", "delta.decay", "delta.dt_bias"), grouped)
        changes |= dict.fromkeys(("delta.qkv", "delta.kernel"), values_grouped)
        changes["delta.o"] = columns_grouped
    return {"mlp_norm": "post_attention_norm"} | {role: _then(layer[role], change) for role, change in changes.items()}


def _minus_one(x: np.ndarray) -> Any:
    """Gemma's norms multiply by 1 + w, and files hold that sum, rounded to float32: w comes back to within 2^-24.

    What the model multiplies by is the file's value all the same: from 0.5 up the subtraction is exact, and adding 1
    again gives the value back; below that, to within 2^-25.
    """
    return x.astype(np.float32) - np.float32(1)
