"""GGUF metadata as Hugging Face's config keys, and what llama.cpp knows of an architecture without writing it down.

Every key of the architecture's own namespace (``llama.*``) is used, checked, known to change nothing, or refused by
name.  A value that a file does not give is the one llama.cpp assumes then, not the default of Hugging Face's class.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's converter (``conversion/``) and
``load_arch_hparams`` of each architecture (``src/models/``).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmjax.checkpoint.gguf_gemma import gemma, gemma2, gemma3, gemma3n, gemma4
from llmjax.checkpoint.gguf_keys import Config, Keys, Shapes, rope, sliding
from llmjax.checkpoint.gguf_ropes import LONG_FACTORS
from llmjax.errors import ConfigError, shown
from llmjax.models import olmo3
from llmjax.models.config import FULL, MOST_HEAD_DIM, SLIDING
from llmjax.models.qwen3_5 import LINEAR

# What may differ by layer, and then its largest value is the model's.
_BY_LAYER = {
    "gemma3n": ("feed_forward_length",),
    "gemma4": ("feed_forward_length", "attention.head_count_kv"),
    "lfm2": ("attention.head_count_kv",),
}
_MIXTURES = ("gemma4", "qwen3moe")
# Whose last layers may guess tokens ahead, which llmjax does not (see ``gguf_names.unused``).
_GUESSING = ("qwen35",)


def hf_config(metadata: Mapping[str, Any], tensors: Shapes, where: str) -> Config:
    """The ``config.json`` that a GGUF file's metadata amounts to.

    Args:
      metadata: the file's key-value pairs.
      tensors: shapes by name; the vocabulary's size, biases and norms that not every model has are read off them.
      where: for messages.

    Raises:
      ConfigError: an unknown architecture, or keys that are missing, wrong or unknown, all at once.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{where}: general.architecture {shown(architecture)} is not supported; "
            f"llmjax has {', '.join(sorted(ARCHITECTURES))}"
        )
    entries = Keys(metadata, tensors, architecture)
    guessing = entries.count("nextn_predict_layers") if architecture in _GUESSING else 0
    config = _common(entries, _BY_LAYER.get(architecture, ()), guessing)
    if architecture not in _MIXTURES:
        entries.expect_no_experts()
    ARCHITECTURES[architecture](entries, config)
    if not entries.read("attention.scale"):
        _attention_scale(entries, config)
    entries.finish(where)
    return config


def _common(e: Keys, by_layer: tuple[str, ...], guessing: int) -> Config:
    layers = max(1, e.size("block_count") - guessing)
    last = f"blk.{layers - 1}.ffn_down"
    if not e.has(f"{last}.weight", f"{last}_exps.weight"):  # before anything is built of so many
        e.problem("block_count", f"{layers} layers, but there is no tensor {last}.weight")
        layers = 1

    def size(key: str, default: int | None = None) -> int:
        return max(1, *e.each(key, layers, default, least=0)) if key in by_layer else e.size(key, default)

    hidden, heads = e.size("embedding_length"), e.size("attention.head_count")
    width = e.size("attention.key_length", hidden // heads or 1)
    if e.get("attention.key_length") is None and hidden % heads:
        e.problem("attention.head_count", f"embedding_length {hidden} is not a multiple of {heads}")
    kv_heads = size("attention.head_count_kv", heads)
    if heads % kv_heads:
        e.problem("attention.head_count_kv", f"attention.head_count {heads} is not a multiple of {kv_heads}")
    vocabulary = e.rows("token_embd.weight")
    e.expect("attention.value_length", width)
    e.expect("vocab_size", vocabulary)
    e.expect("attention.causal", True)
    for key in ("attention.max_alibi_bias", "attention.clamp_kqv", "pooling_type"):
        e.expect(key, 0)
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "max_position_embeddings": e.size("context_length"),
        "tie_word_embeddings": not e.has("output.weight"),
    }


def _attention_scale(e: Keys, c: Config) -> None:
    """Where it is no option it follows from the head width, and a file that says so must say the same."""
    expected = c["head_dim"] ** -0.5
    found = e.optional("attention.scale")
    if found is not None and abs(found - expected) > 1e-6 * expected:
        e.problem("attention.scale", f"{found!r} is not supported, expected {expected!r}")


def _attention_bias(e: Keys) -> Config:
    return {"attention_bias": e.has("attn_q.bias", "attn_qkv.bias")}


def _biases(e: Keys) -> Config:
    return _attention_bias(e) | {"mlp_bias": e.has("ffn_gate.bias")}


def _llama(e: Keys, c: Config) -> None:
    """Llama and Mistral share a name.  llama.cpp's converter leaves Mistral's window out, and llama.cpp runs without
    one; a file that has it is a Mistral."""
    e.expect("tensor_data_layout", "reference", "Meta AI original pth")  # one layout by two names
    window = e.count("attention.sliding_window")
    c |= {"model_type": "mistral", "sliding_window": window} if window else {"model_type": "llama"}
    c["rms_norm_eps"] = e.number("attention.layer_norm_rms_epsilon")
    if not window:
        c |= _biases(e)
    rope(e, c, also="yarn")


def _qwen2(e: Keys, c: Config) -> None:
    c |= {"model_type": "qwen2", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    rope(e, c, also="yarn")


def _qwen3(e: Keys, c: Config) -> None:
    c |= {"model_type": "qwen3", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c |= _attention_bias(e)
    rope(e, c, also="yarn")


def _phi3(e: Keys, c: Config) -> None:
    """The window is the file's; llama.cpp itself reads it and, for now, runs without.  Longrope's factors are tensors
    (``gguf_ropes``); llama.cpp chooses between them by the size of its context, transformers and llmjax by a text's."""
    c |= {"model_type": "phi3", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c["sliding_window"] = e.count("attention.sliding_window") or None
    if e.has(LONG_FACTORS):
        dims = e.size("rope.dimension_count", c["head_dim"])
        factors = [1.0] * (dims // 2)
        c["original_max_position_embeddings"] = e.size("rope.scaling.original_context_length")
        c["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": e.number("rope.scaling.attn_factor", 1.0),
        }
    rope(e, c, partial=True, also="longrope")


def _qwen3moe(e: Keys, c: Config) -> None:
    """llama.cpp's have experts in every layer, whose weights add up to 1."""
    used = e.size("expert_used_count")
    c |= {"model_type": "qwen3_moe", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c |= {"num_experts": e.size("expert_count"), "num_experts_per_tok": used, "norm_topk_prob": True}
    c["moe_intermediate_size"] = e.size("expert_feed_forward_length", c["intermediate_size"] // used or 1)
    c |= _attention_bias(e)
    e.expect("expert_weights_scale", 1.0, 0.0)
    rope(e, c, also="yarn")


def _qwen35(e: Keys, c: Config) -> None:
    """Qwen3.5.  Which layers attend is said one by one, or by how many lie between."""
    layers, blocks = c["num_hidden_layers"], e.size("block_count")  # fewer than blocks where some guess
    every, recurrent = e.size("full_attention_interval", 4), e.get("attention.recurrent_layers")
    kinds = [LINEAR if (i + 1) % every else FULL for i in range(layers)]
    if isinstance(recurrent, np.ndarray) and recurrent.dtype == bool and len(recurrent) == blocks >= layers:
        kinds = [LINEAR if is_recurrent else FULL for is_recurrent in recurrent[:layers]]
    elif recurrent is not None:
        e.problem("attention.recurrent_layers", f"expected {blocks} booleans, found {shown(recurrent)}")
    heads, width = e.size("ssm.time_step_rank"), e.size("ssm.inner_size")
    if width % heads:
        e.problem("ssm.inner_size", f"{width} is not a multiple of ssm.time_step_rank {heads}")
    c |= {
        "model_type": "qwen3_5_text",
        "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon"),
        "attention_bias": e.has(*(f"blk.{i}.attn_q.bias" for i, kind in enumerate(kinds) if kind == FULL)),
        "layer_types": kinds,
        "full_attention_interval": every,
        "linear_num_key_heads": e.size("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": e.size("ssm.state_size"),
        "linear_value_head_dim": max(1, width // heads),
        "linear_conv_kernel_dim": e.size("ssm.conv_kernel"),
    }
    rope(e, c, partial=True, also="yarn")
    _sections(e, e.size("rope.dimension_count", c["head_dim"]) // 2)


def _sections(e: Keys, pairs: int) -> None:
    """Of images some pairs of a head turn by the row or the column; where they leave a pair out, llama.cpp does not
    turn it in texts either, as no checkpoint has it."""
    found = e.get("rope.dimension_sections")
    if not (isinstance(found, np.ndarray) and found.shape == (4,) and found.dtype.kind in "iu" and found.sum() > 0):
        e.problem("rope.dimension_sections", f"expected four whole numbers, found {shown(found)}")
        return
    places = np.arange(min(pairs, MOST_HEAD_DIM)) % found.sum()
    if (places >= 3 * found[places % 3]).any():
        e.problem("rope.dimension_sections", f"{found.tolist()} leaves out some of the {pairs} pairs that turn")


def _smollm3(e: Keys, c: Config) -> None:
    """Every fourth layer does not rotate: no key says so."""
    c |= {"model_type": "smollm3", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c |= _biases(e)
    rope(e, c, also="yarn")


def _granite(e: Keys, c: Config) -> None:
    c |= {"model_type": "granite", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c |= _biases(e)
    c["logits_scaling"] = e.number("logit_scale")
    c["attention_multiplier"] = e.optional("attention.scale") or c["head_dim"] ** -0.5
    c["residual_multiplier"] = e.optional("residual_scale") or 1.0
    c["embedding_multiplier"] = e.optional("embedding_scale") or 1.0
    e.expect("rope.scaling.finetuned", True)  # a switch of the rotation there
    rope(e, c, also="yarn")


def _olmo2(e: Keys, c: Config) -> None:
    """OLMo 2, and OLMo 3 if there is a window; its local layers' rotation has the same base, and is never scaled."""
    c |= {"model_type": "olmo2", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c |= _attention_bias(e)
    rope(e, c, also="yarn")
    if window := e.count("attention.sliding_window"):
        c["model_type"] = "olmo3"
        sliding(e, c, window, period=4)
        base = c["rope_theta"]
        e.expect("rope.freq_base_swa", base)  # llama.cpp reads another and does not apply it
        if base != olmo3.THETA:  # which transformers has for local layers in the older spelling, whatever the base is
            whole = {**c.pop("rope_scaling", {"rope_type": "default"}), "rope_theta": c.pop("rope_theta")}
            c["rope_parameters"] = {FULL: whole, SLIDING: {"rope_type": "default", "rope_theta": base}}


def _mistral3(e: Keys, c: Config) -> None:
    """Ministral 3; without a temperature, Mistral Small 3."""
    c |= {"model_type": "mistral", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c["sliding_window"] = e.count("attention.sliding_window") or None
    rope(e, c, also="yarn")
    if (beta := e.optional("attention.temperature_scale")) is not None:
        c["model_type"] = "ministral3"
        scaling = c.pop("rope_scaling", {"rope_type": "default"})
        original = e.size("rope.scaling.original_context_length", c["max_position_embeddings"])
        own = {"rope_theta": c.pop("rope_theta"), "original_max_position_embeddings": original}
        c["rope_parameters"] = {**scaling, **own, "llama_4_scaling_beta": beta}


def _lfm2(e: Keys, c: Config) -> None:
    """A layer without key heads is a convolution."""
    layers = c["num_hidden_layers"]
    heads = e.each("attention.head_count_kv", layers, c["num_attention_heads"], least=0)
    if len(set(heads) - {0}) > 1:
        e.problem("attention.head_count_kv", f"expected one number of key heads, or 0 for a convolution, found {heads}")
    c |= {
        "model_type": "lfm2",
        "norm_eps": e.number("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": e.size("shortconv.l_cache"),
        "layer_types": [FULL if h else "conv" for h in heads],
        "block_auto_adjust_ff_dim": False,
    }
    e.expect("attention.sliding_window", 0)
    rope(e, c)


def _phi2(e: Keys, c: Config) -> None:
    c |= {"model_type": "phi", "layer_norm_eps": e.number("attention.layer_norm_epsilon")}
    rope(e, c, partial=True)


def _stablelm(e: Keys, c: Config) -> None:
    """Whether the residual is parallel shows in the missing norm: the key says true for files without the option."""
    e.get("use_parallel_residual")
    c |= {"model_type": "stablelm", "layer_norm_eps": e.number("attention.layer_norm_epsilon")}
    c["use_qkv_bias"] = e.has("attn_q.bias", "attn_qkv.bias")
    c["qk_layernorm"] = e.has("attn_q_norm.weight")
    c["use_parallel_residual"] = not e.has("ffn_norm.weight")
    rope(e, c, partial=True)


def _falcon(e: Keys, c: Config) -> None:
    """The rotary Falcons: llama.cpp has neither ALiBi nor biases for them, so no Falcon-RW."""
    e.expect("tensor_data_layout", "jploski")
    if e.has("attn_qkv.bias"):
        e.problems.append(
            "tensor blk.0.attn_qkv.bias: Falcon-RW (ALiBi, biases) has no GGUF form; use its Hugging Face directory"
        )
    rope(e, c)
    kv_heads, norms = c.pop("num_key_value_heads"), 2 if e.has("attn_norm_2.weight") else 1
    c |= {
        "model_type": "falcon",
        "ffn_hidden_size": c.pop("intermediate_size"),
        "layer_norm_epsilon": e.number("attention.layer_norm_epsilon"),
        "alibi": False,
        "bias": False,
        "parallel_attn": True,
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": kv_heads > 1 or norms == 2,
        "num_kv_heads": kv_heads,
        "num_ln_in_parallel_attn": norms,
    }


# By general.architecture.
ARCHITECTURES: dict[str, Callable[[Keys, Config], None]] = {
    "falcon": _falcon,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma3n": gemma3n,
    "gemma4": gemma4,
    "granite": _granite,
    "lfm2": _lfm2,
    "llama": _llama,
    "mistral3": _mistral3,
    "olmo2": _olmo2,
    "phi2": _phi2,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen35": _qwen35,
    "qwen3moe": _qwen3moe,
    "smollm3": _smollm3,
    "stablelm": _stablelm,
}
