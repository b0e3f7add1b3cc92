"""GGUF files of Hugging Face directories, as llama.cpp's converter (``conversion/*.py``) would write them.

Written from that converter and with the gguf package's own names, keys and quantization, never with llmjax's: what the
loader undoes must not come from the loader.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, quants
from safetensors.numpy import load_file

from tests import gguf_kinds

ARCHITECTURES = {
    "falcon": MODEL_ARCH.FALCON,
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "phi": MODEL_ARCH.PHI2,
    "phi3": MODEL_ARCH.PHI3,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "stablelm": MODEL_ARCH.STABLELM,
    **gguf_kinds.ARCHITECTURES,
}

Tensors = dict[str, np.ndarray]


def write(
    folder: Path,
    path: Path,
    kind: str = "F32",
    *,
    tokenizer: Callable[[GGUFWriter], None] | None = None,
    change: Callable[[Tensors], None] = lambda tensors: None,
    add: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Writes one.

    Args:
      folder: ``config.json`` and ``model.safetensors``.
      path: of the file.
      kind: the type of matrices; vectors stay F32, and so do rows that the type's blocks do not divide.
      tokenizer: writes the tokenizer's keys; by default the file says it has none.
      change: edits the tensors before they are written, by GGUF's names.
      add: writes further keys.
    """
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    architecture = ARCHITECTURES[config["model_type"]]
    raw = {n: x.astype(np.float32) for n, x in load_file(folder / "model.safetensors").items()}
    mapping = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    tensors: Tensors = {}
    raw = gguf_kinds.of_text_model(raw)
    for name, x in _modified(raw, config):
        module, _, ending = name.rpartition(".")
        found = module if module.startswith("blk.") else mapping.get_name(module)
        assert found, f"the gguf package has no name for {name}"
        tensors[f"{found}.{ending}"] = x
    if (config.get("rope_scaling") or {}).get("type") == "longrope":
        for length in ("short", "long"):
            tensors[f"rope_factors_{length}.weight"] = np.array(config["rope_scaling"][f"{length}_factor"], np.float32)
    if config["model_type"] == "gemma4_text":
        tensors["rope_freqs.weight"] = gguf_kinds.rope_freqs(config)
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = _llama3_factors(config)
    change(tensors)
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    if config["model_type"] in gguf_kinds.ARCHITECTURES:
        gguf_kinds.parameters(writer, config)
    else:
        _parameters(writer, config)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(len(tensors["token_embd.weight"]))
    else:
        tokenizer(writer)
    add(writer)
    for name, x in tensors.items():
        writer.add_tensor(name, *_stored(x, kind))
    finish(writer)
    return path


def finish(writer: GGUFWriter) -> None:
    """Writes what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored(x: np.ndarray, kind: str) -> tuple[np.ndarray, None, GGMLQuantizationType | None]:
    block = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
    if x.ndim == 1 or x.shape[-1] % block or kind == "F32":
        return np.ascontiguousarray(x), None, None
    if kind == "F16":
        return x.astype(np.float16), None, None
    return quants.quantize(np.ascontiguousarray(x), GGMLQuantizationType[kind]), None, GGMLQuantizationType[kind]


def dequantized(x: np.ndarray, kind: str) -> np.ndarray:
    """What a file of this type holds of a tensor."""
    stored, _, raw = _stored(x, kind)
    return stored.astype(np.float32) if raw is None else quants.dequantize(stored, raw)


def _modified(tensors: Mapping[str, np.ndarray], c: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """``modify_tensors`` of each architecture."""
    model_type, heads = c["model_type"], c["num_attention_heads"]
    per_head: dict[str, list[np.ndarray]] = {}
    for name, x in gguf_kinds.modified(tensors, c):
        if model_type in ("llama", "mistral", *gguf_kinds.PERMUTED):
            if ".q_proj." in name:
                x = _permute(x, heads)
            if ".k_proj." in name:
                x = _permute(x, c["num_key_value_heads"])
        elif model_type in ("gemma", "gemma2", "gemma3_text"):
            if name == "lm_head.weight":
                continue
            if name.endswith("norm.weight"):
                x = x + np.float32(1)
        elif model_type == "falcon" and "query_key_value" in name:
            x = _falcon_qkv(x, heads, _falcon_kv_heads(c))
        elif "layernorm.norms." in name:
            module, _, _ = name.partition(".norms.")
            per_head.setdefault(module, []).append(x)
            continue
        yield name, x
    for module, norms in per_head.items():
        yield f"{module}.weight", np.stack(norms)


def _permute(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _falcon_kv_heads(c: Mapping[str, Any]) -> int:
    """The converter believes ``num_kv_heads``, which published files of 7B do not have or have wrong."""
    return c["num_kv_heads"] if c["new_decoder_architecture"] else 1


def _falcon_qkv(x: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    width = x.shape[1] // heads
    groups = x.reshape(kv_heads, heads // kv_heads + 2, width, x.shape[1])
    parts = groups[:, :-2], groups[:, [-2]], groups[:, [-1]]
    return np.concatenate([p.reshape(-1, x.shape[1]) for p in parts])


def _llama3_factors(c: Mapping[str, Any]) -> np.ndarray:
    """``generate_extra_tensors``, but with the original context length that belongs to the scaling: the converter takes
    8192 unless it stands at the top level."""
    s = c["rope_scaling"]
    dims = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    context = s["original_max_position_embeddings"]
    factors = []
    for freq in 1.0 / (c["rope_theta"] ** (np.arange(0, dims, 2, dtype=np.float32) / dims)):
        wave = 2 * np.pi / freq
        if wave < context / s["high_freq_factor"]:
            factors.append(1.0)
        elif wave > context / s["low_freq_factor"]:
            factors.append(s["factor"])
        else:
            smooth = (context / wave - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / s["factor"] + smooth))
    return np.array(factors, np.float32)


def _parameters(w: GGUFWriter, c: Mapping[str, Any]) -> None:
    """``set_gguf_parameters`` of each architecture."""
    model_type, heads, hidden = c["model_type"], c["num_attention_heads"], c["hidden_size"]
    w.add_block_count(c["num_hidden_layers"])
    w.add_embedding_length(hidden)
    w.add_head_count(heads)
    if model_type == "falcon":
        w.add_context_length(2048)
        w.add_tensor_data_layout("jploski")
        w.add_feed_forward_length(4 * hidden)
        w.add_head_count_kv(_falcon_kv_heads(c))
        w.add_layer_norm_eps(c["layer_norm_epsilon"])
        return
    width = c.get("head_dim") or hidden // heads
    w.add_context_length(c["max_position_embeddings"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count_kv(c.get("num_key_value_heads") or heads)
    if model_type in ("phi", "stablelm"):
        w.add_layer_norm_eps(c["layer_norm_eps"])
        w.add_rope_dimension_count(int(c["partial_rotary_factor"] * width))
        if model_type == "stablelm":
            w.add_parallel_residual(c.get("use_parallel_residual", True))
        return
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    if model_type in ("gemma", "gemma2") or c.get("head_dim"):
        w.add_key_length(width)
        w.add_value_length(width)
    if model_type == "gemma2":
        w.add_attn_logit_softcapping(c["attn_logit_softcapping"])
        w.add_final_logit_softcapping(c["final_logit_softcapping"])
        w.add_sliding_window(c["sliding_window"])
    if model_type in ("gemma", "gemma2"):
        return
    w.add_rope_freq_base(c["rope_theta"])
    scaling = c.get("rope_scaling") or {}
    if scaling.get("type", scaling.get("rope_type")) == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(scaling["factor"])
    if model_type in ("llama", "mistral"):
        w.add_rope_dimension_count(width)
    if model_type == "phi3":
        w.add_rope_scaling_orig_ctx_len(c["original_max_position_embeddings"])
        w.add_rope_dimension_count(int(c.get("partial_rotary_factor", 1.0) * width))
        w.add_sliding_window(c["sliding_window"] or 0)
        if scaling.get("type") == "longrope":
            growth = c["max_position_embeddings"] / c["original_max_position_embeddings"]
            w.add_rope_scaling_attn_factors(
                math.sqrt(1 + math.log(growth) / math.log(c["original_max_position_embeddings"]))
            )
    if model_type == "gemma3_text":
        if c.get("final_logit_softcapping"):
            w.add_final_logit_softcapping(c["final_logit_softcapping"])
        w.add_sliding_window(c["sliding_window"])
        w.add_rope_freq_base_swa(c["rope_local_base_freq"])


def tokenizer(folder: Path, pre: str | None = None, size: int | None = None) -> Callable[[GGUFWriter], None]:
    """Writes the keys of a directory's tokenizer (``set_vocab``).

    Args:
      folder: ``tokenizer.json`` and ``tokenizer_config.json``, and ``tokenizer.model`` for SentencePiece.
      pre: the name of the pre-tokenizer, which the converter finds by a hash; None for SentencePiece.
      size: rows of the embedding, which unused tokens fill.
    """
    found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    kinds = gguf.TokenType

    def add(writer: GGUFWriter) -> None:
        vocab = {i: t for t, i in found["model"]["vocab"].items()}
        scores = dict.fromkeys(vocab, -10000.0)
        types = dict.fromkeys(vocab, kinds.NORMAL)
        if pre is None:
            import sentencepiece

            model = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
            for i in range(model.vocab_size()):
                vocab[i], scores[i] = model.IdToPiece(i), model.GetScore(i)
                tests = {
                    kinds.UNKNOWN: model.IsUnknown,
                    kinds.CONTROL: model.IsControl,
                    kinds.UNUSED: model.IsUnused,
                    kinds.BYTE: model.IsByte,
                }
                types[i] = next((t for t, is_one in tests.items() if is_one(i)), kinds.NORMAL)
        for token in found["added_tokens"]:
            i, text = token["id"], token["content"]
            special = token["special"] or text in ("<pad>", "<mask>") or text.startswith(("<|", "<unused"))
            vocab[i], scores[i] = text if special else text.replace("▁", " "), -1000.0
            types[i] = kinds.CONTROL if special else kinds.USER_DEFINED
        ids = range(size or len(vocab))
        writer.add_tokenizer_model("gpt2" if pre else "llama")
        writer.add_tokenizer_pre(pre or "default")
        writer.add_token_list([vocab.get(i, f"[PAD{i}]") for i in ids])
        writer.add_token_types([types.get(i, kinds.UNUSED) for i in ids])
        if pre is None:
            writer.add_token_scores([scores.get(i, -10000.0) for i in ids])
            writer.add_add_space_prefix(False)
        gguf.SpecialVocab(folder, load_merges=pre is not None, n_vocab=len(ids)).add_to_gguf(writer, quiet=True)

    return add
