"""GGUF's tensor names, by role, written once for all architectures; what llama.cpp rearranges when it writes a file is
undone here.

Source: gguf-py's ``tensor_mapping.py`` and ``modify_tensors`` of llama.cpp's converter (``conversion/``).
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from llmjax.models.config import DecoderConfig
from llmjax.models.names import From, Names, fused

_LAYER = {
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
}


def names(config: DecoderConfig, model_type: str, tensors: Collection[str]) -> Names:
    """The table of GGUF tensor names for a model.

    Args:
      config: the model's.
      model_type: Hugging Face's name of its architecture.
      tensors: all names in the file; some architectures have been written with q, k and v apart and fused.
    """
    layer: dict[str, str | From] = dict(_LAYER)
    if "blk.0.attn_qkv.weight" in tensors:
        q, kv = (config.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
        layer |= fused("attn_qkv", {"attn.q": q, "attn.k": kv, "attn.v": kv})
    if model_type == "phi3":
        layer |= fused("ffn_up", {"mlp.gate": config.intermediate_size, "mlp.up": config.intermediate_size})
    if getattr(config, "separate_norms", False):  # Falcon 40B
        layer |= {"attn_norm": "attn_norm_2", "mlp_norm": "attn_norm"}
    if model_type in ("llama", "mistral"):
        layer["attn.q"] = _then(layer["attn.q"], _unpermuted(config.num_attention_heads))
        layer["attn.k"] = _then(layer["attn.k"], _unpermuted(config.num_key_value_heads))
    table: dict[str, str | From] = {"embed": "token_embd", "final_norm": "output_norm", "head": "output"}
    for role, entry in layer.items():
        table[f"layers.{{}}.{role}"] = _in_layer(entry)
    if model_type.startswith("gemma"):
        for place in table:
            if place.endswith("norm"):
                table[place] = _then(table[place], _minus_one)
    return table


def _in_layer(entry: str | From) -> str | From:
    if isinstance(entry, str):
        return f"blk.{{}}.{entry}"
    return dataclasses.replace(entry, modules=tuple(f"blk.{{}}.{m}" for m in entry.modules))


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


def _minus_one(x: np.ndarray) -> Any:
    """Gemma's norms multiply by 1 + w, and files hold that sum, rounded to float32: w comes back to within 2^-24.

    What the model multiplies by is the file's value all the same: from 0.5 up the subtraction is exact, and adding 1
    again gives the value back; below that, to within 2^-25.
    """
    return x.astype(np.float32) - np.float32(1)
