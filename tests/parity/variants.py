"""Tiny adversarial models of every architecture: the options and proportions that hide bugs when they are at their
defaults.

Widths whose square root bfloat16 cannot hold, heads * width != D, windows shorter than the prompt, soft-caps that bite,
head counts that are no power of two, vocabulary rows that no prompt uses.  The suite is generated from the registry: an
architecture without variants of its own here, or a case, has its published checkpoint, made small.
"""

from llmjax import configs
from llmjax.models.registry import architectures
from tests.parity.test_cases import kinds

VOCAB = 160

_LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 56,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_MISTRAL = _LLAMA | {"model_type": "mistral", "sliding_window": 6, "head_dim": 10}
_QWEN2 = _LLAMA | {
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4,  # switched off
    "max_window_layers": 1,
    "tie_word_embeddings": True,
}
_QWEN3 = _QWEN2 | {"model_type": "qwen3", "head_dim": 20, "attention_bias": False}
_PHI3 = _LLAMA | {
    "model_type": "phi3",
    "hidden_size": 64,
    "original_max_position_embeddings": 512,
    "sliding_window": 7,
    "resid_pdrop": 0.1,
    "pad_token_id": 0,
}
_GEMMA = {
    "model_type": "gemma",
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 120,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 18,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": None,
}
_GEMMA2 = _GEMMA | {
    "model_type": "gemma2",
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 11,
    "sliding_window": 8,
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 6.0,
}
_GEMMA3 = _GEMMA | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 11,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
_GEMMA3_MULTIMODAL = {
    "model_type": "gemma3",
    "text_config": {k: v for k, v in _GEMMA3.items() if k != "num_key_value_heads"}  # 4, the class default
    | {"sliding_window_pattern": 2, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
    },
    "mm_tokens_per_image": 4,
    "boi_token_index": 151,
    "eoi_token_index": 152,
    "image_token_index": 153,
}
_PHI = {
    "model_type": "phi",
    "vocab_size": VOCAB,
    "hidden_size": 80,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.4,
    "hidden_act": "gelu_new",
    "resid_pdrop": 0.1,
    "tie_word_embeddings": False,
}
_FALCON = {
    "model_type": "falcon",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "alibi": True,
    "bias": True,
    "multi_query": False,
    "new_decoder_architecture": False,
    "parallel_attn": False,
    "layer_norm_epsilon": 1e-5,
}
_FALCON_7B = {
    "model_type": "falcon",
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_kv_heads": 6,  # without effect
    "alibi": False,
    "bias": False,
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
    "layer_norm_epsilon": 1e-5,
}
_FALCON_40B = _FALCON_7B | {"new_decoder_architecture": True, "num_kv_heads": 2, "rope_theta": 5e3}
_STABLELM = {
    "model_type": "stablelm",
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000,
    "partial_rotary_factor": 0.25,
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# What a published config has of these becomes small; everything else in it stays.
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 56,
    "intermediate_size": 104,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "sliding_window": 6,
}


def shrunk(config: dict) -> dict:
    """A published config at the size of a test, its options kept: grouped heads stay grouped, windows windows."""
    small = {k: _SMALL.get(k) if isinstance(v, int) else v for k, v in config.items() if k in _SMALL}
    kept = {k: v for k, v in config.items() if k not in small and not k.endswith("_token_id")}
    if "num_key_value_heads" in kept and kept["num_key_value_heads"] != config["num_attention_heads"]:
        small["num_key_value_heads"] = 2
    else:
        small["num_key_value_heads"] = 4
    if "layer_types" in kept:
        small["layer_types"] = kept["layer_types"][: _SMALL["num_hidden_layers"]]
    return kept | small


def _published() -> dict[str, dict]:
    """A config by model type."""
    return {(c := configs.read(name)["config"])["model_type"]: c for name in configs.names()}


VARIANTS: dict[str, dict] = {
    "llama": _LLAMA,
    "llama_biases_tied": _LLAMA
    | {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama_linear": _LLAMA | {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama_llama3": _LLAMA | {"rope_scaling": _LLAMA3, "rope_theta": 500000.0, "num_key_value_heads": 1},
    "mistral": _MISTRAL,
    "mistral_full_mqa_tied": _MISTRAL
    | {"sliding_window": None, "head_dim": None, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "ministral": _MISTRAL
    | {"model_type": "ministral", "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "qwen2": _QWEN2,
    "qwen2_windows_untied": _QWEN2
    | {"use_sliding_window": True, "tie_word_embeddings": False, "num_key_value_heads": 4},
    "qwen3": _QWEN3,
    "qwen3_bias_layer_types": _QWEN3
    | {
        "attention_bias": True,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        "num_key_value_heads": 1,
        "head_dim": 12,
        "tie_word_embeddings": False,
    },
    "phi3": _PHI3,
    "phi3_partial_mha_tied": _PHI3
    | {
        "partial_rotary_factor": 0.75,
        "sliding_window": None,
        "num_key_value_heads": None,
        "tie_word_embeddings": True,
        "rope_theta": 5e4,
    },
    "gemma_mqa": _GEMMA,
    "gemma_mha_wide": _GEMMA
    | {"hidden_size": 52, "head_dim": 16, "num_key_value_heads": 4, "intermediate_size": 416, "hidden_act": "gelu"},
    "gemma_gqa_bias": _GEMMA | {"num_attention_heads": 6, "num_key_value_heads": 2, "attention_bias": True},
    "gemma2": _GEMMA2,
    "gemma2_window_1": _GEMMA2 | {"sliding_window": 1, "num_key_value_heads": 4, "attn_logit_softcapping": None},
    "gemma2_layer_types": _GEMMA2
    | {
        "layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
        "sliding_window": 5,
        "final_logit_softcapping": None,
        "num_key_value_heads": 1,
    },
    "gemma3": _GEMMA3,
    "gemma3_linear_layer_types": _GEMMA3
    | {
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 5,
        "attention_bias": True,
        "final_logit_softcapping": 6.0,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
    "gemma3_multimodal": _GEMMA3_MULTIMODAL,
    "phi": _PHI,
    "phi_gqa_qk_norm": _PHI | {"num_key_value_heads": 2, "qk_layernorm": True, "partial_rotary_factor": 0.5},
    "falcon_rw": _FALCON,
    "falcon_11_heads_untied": _FALCON
    | {"hidden_size": 66, "num_attention_heads": 11, "tie_word_embeddings": False, "ffn_hidden_size": 100},
    "falcon_6_heads_no_bias": _FALCON | {"hidden_size": 60, "num_attention_heads": 6, "bias": False},
    "falcon_7b": _FALCON_7B,
    "falcon_7b_alibi_bias": _FALCON_7B | {"alibi": True, "bias": True},
    "falcon_sequential_rotary": _FALCON_7B
    | {"multi_query": False, "parallel_attn": False, "bias": True, "tie_word_embeddings": False},
    "falcon_40b": _FALCON_40B,
    "falcon_40b_one_norm_bias": _FALCON_40B | {"num_ln_in_parallel_attn": 1, "bias": True, "num_kv_heads": 3},
    "stablelm": _STABLELM,
    "stablelm_qkv_bias_qk_norm": _STABLELM
    | {"use_qkv_bias": True, "qk_layernorm": True, "num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    "stablelm_parallel_tied": _STABLELM | {"use_parallel_residual": True, "tie_word_embeddings": True},
}
VARIANTS |= {
    kind: shrunk(_published()[kind])
    for kind in sorted(architectures())
    if kind in _published() and kind not in {config["model_type"] for config in VARIANTS.values()} | kinds()
}
