"""GGUF's names, by role: metadata keys become Hugging Face's config keys, tensor names become canonical ones.

Written once for all architectures; what llama.cpp rearranges when it writes a file is undone here.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and gguf-py's constants.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmjax.errors import ConfigError
from llmjax.models.config import DecoderConfig
from llmjax.models.names import From, Names

# GGUF key (after the architecture's prefix) -> Hugging Face key
_CONFIG_KEYS: dict[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
# Checked against the values above rather than copied, or without effect on a logit.
_CHECKED_KEYS = frozenset({"rope.dimension_count", "attention.value_length", "rope.scaling.type"})

MODEL_TYPES: dict[str, str] = {"llama": "llama"}


def hf_config(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """The ``config.json`` that a GGUF file's metadata amounts to.

    Args:
      metadata: the file's key-value pairs.
      tensors: shapes by name; the vocabulary's size and whether the head is tied are read off them.
      where: for messages.

    Raises:
      ConfigError: an unknown architecture, or keys llmjax does not know, all at once.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in MODEL_TYPES:
        raise ConfigError(
            f"{where}: general.architecture {architecture!r} is not supported; llmjax has {', '.join(MODEL_TYPES)}"
        )
    prefix = f"{architecture}."
    config: dict[str, Any] = {"model_type": MODEL_TYPES[architecture]}
    problems = []
    values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    for key, value in values.items():
        if key in _CONFIG_KEYS:
            config[_CONFIG_KEYS[key]] = value
        elif key not in _CHECKED_KEYS:
            problems.append(f"{prefix}{key}: llmjax does not know this key (value {value!r})")
    if "token_embd.weight" in tensors:
        config["vocab_size"] = tensors["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    head_dim = config.get("head_dim") or (
        width // heads if isinstance(heads, int) and heads and isinstance(width, int) else None
    )
    for key in ("rope.dimension_count", "attention.value_length"):
        if values.get(key, head_dim) != head_dim:
            problems.append(f"{prefix}{key}: expected the head width {head_dim}, found {values[key]}")
    if values.get("rope.scaling.type", "none") != "none":
        problems.append(f"{prefix}rope.scaling.type: {values['rope.scaling.type']!r} is not supported, expected 'none'")
    if problems:
        raise ConfigError(f"{where}: " + "\n  ".join(["unsupported metadata:", *problems]))
    return config


def _unpermute(heads: int) -> Any:
    """Undoes llama.cpp's interleaving of the two halves of each rotary head in rows of q and k."""

    def make(arrays: list[np.ndarray]) -> np.ndarray:
        (x,) = arrays
        half = x.shape[0] // heads // 2
        return x.reshape(heads, half, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return make


def names(config: DecoderConfig, model_type: str) -> Names:
    """The table of GGUF tensor names for a model."""
    table: dict[str, str | From] = {
        "embed": "token_embd",
        "final_norm": "output_norm",
        "head": "output",
        "layers.{}.attn_norm": "blk.{}.attn_norm",
        "layers.{}.attn.q": "blk.{}.attn_q",
        "layers.{}.attn.k": "blk.{}.attn_k",
        "layers.{}.attn.v": "blk.{}.attn_v",
        "layers.{}.attn.o": "blk.{}.attn_output",
        "layers.{}.mlp_norm": "blk.{}.ffn_norm",
        "layers.{}.mlp.gate": "blk.{}.ffn_gate",
        "layers.{}.mlp.up": "blk.{}.ffn_up",
        "layers.{}.mlp.down": "blk.{}.ffn_down",
    }
    if model_type == "llama":
        table["layers.{}.attn.q"] = From(("blk.{}.attn_q",), _unpermute(config.num_attention_heads))
        table["layers.{}.attn.k"] = From(("blk.{}.attn_k",), _unpermute(config.num_key_value_heads))
    return table
