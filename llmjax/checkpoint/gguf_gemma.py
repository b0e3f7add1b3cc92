"""The Gemmas' GGUF metadata as Hugging Face's config keys; see ``gguf_config``."""

import math

import numpy as np

from llmjax.checkpoint.gguf_keys import Config, Keys, rope, sliding
from llmjax.checkpoint.gguf_ropes import FREQS
from llmjax.errors import shown
from llmjax.models.config import FULL


def gemma(e: Keys, c: Config) -> None:
    """The first one: its activation has gone by two names."""
    c |= {"model_type": "gemma", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c["hidden_act"] = "gelu_pytorch_tanh"
    rope(e, c)


def gemma2(e: Keys, c: Config) -> None:
    """Every second layer slides."""
    c |= {"model_type": "gemma2", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c["query_pre_attn_scalar"] = _query_scalar(e, c, layers_of_27b=46)
    c["attn_logit_softcapping"] = e.number("attn_logit_softcapping", 50.0)
    c["final_logit_softcapping"] = e.number("final_logit_softcapping", 30.0)
    sliding(e, c, e.size("attention.sliding_window", 4096), period=2)
    rope(e, c)
    e.expect("rope.freq_base_swa", c["rope_theta"])


def gemma3(e: Keys, c: Config) -> None:
    """The local base is 10000 unless the file says otherwise, and scaling is for global layers alone."""
    c |= {"model_type": "gemma3_text", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c["query_pre_attn_scalar"] = _query_scalar(e, c, layers_of_27b=62)
    c["final_logit_softcapping"] = e.optional("final_logit_softcapping")
    sliding(e, c, e.count("attention.sliding_window"), period=6)
    rope(e, c)
    c["rope_local_base_freq"] = e.number("rope.freq_base_swa", 10000.0)


def _query_scalar(e: Keys, c: Config, layers_of_27b: int) -> float:
    """``query_pre_attn_scalar``: converters do not store it.  The head width, but D / N in the 27B models, which
    llama.cpp tells by their number of layers; a file with a scale of its own means that one."""
    scale = e.optional("attention.scale")
    if scale is not None:
        scalar = 1 / scale / scale
        if not 1 <= scalar < 1e9:
            e.problem("attention.scale", f"expected one over a root of a head's width, found {scale!r}")
            return 1
        return round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar
    if c["num_hidden_layers"] == layers_of_27b:
        return c["hidden_size"] // c["num_attention_heads"]
    return c["head_dim"]


def gemma3n(e: Keys, c: Config) -> None:
    """llama.cpp knows the layers that share keys and the cut of the first ten by heart, and files say the same."""
    c |= {"model_type": "gemma3n_text", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    layers = c["num_hidden_layers"]
    c["intermediate_size"] = e.each("feed_forward_length", layers)
    c["final_logit_softcapping"] = e.number("final_logit_softcapping", 30.0)
    sliding(e, c, e.size("attention.sliding_window"), period=5)
    rope(e, c)
    c["rope_local_base_freq"] = e.number("rope.freq_base_swa", 10000.0)
    c["num_kv_shared_layers"] = _shared(e, max(0, layers - 20))
    c["altup_num_inputs"], c["altup_active_idx"] = e.size("altup.num_inputs", 4), e.count("altup.active_idx")
    c["laurel_rank"] = e.rows("blk.0.laurel_l.weight")
    c["hidden_size_per_layer_input"] = e.size("embedding_length_per_layer_input", 256)
    c["vocab_size_per_layer_input"] = e.rows("per_layer_token_embd.weight")
    c["activation_sparsity_pattern"] = _sparsity(e, layers)
    e.expect("attention.scale", 1.0)


def _shared(e: Keys, default: int) -> int:
    return e.count("attention.shared_kv_layers") if e.get("attention.shared_kv_layers") is not None else default


def _sparsity(e: Keys, layers: int) -> list[float]:
    """The share of neurons that are cut off, from how many standard deviations the cut lies above the mean."""
    cuts = e.get("activation_sparsity_scale")
    if cuts is None:
        return [0.95 if layers > 10 and i < 10 else 0.0 for i in range(layers)]
    good = isinstance(cuts, np.ndarray) and cuts.shape == (layers,) and np.issubdtype(cuts.dtype, np.floating)
    if not good or np.isnan(cuts).any() or (cuts > 5).any():
        e.problem("activation_sparsity_scale", f"expected {layers} numbers up to 5, found {shown(cuts)}")
        return [0.0] * layers
    shares = [0.5 * (1 + math.erf(cut / math.sqrt(2))) for cut in cuts.astype(np.float64)]
    return [float(str(np.float32(share))) for share in shares]  # the decimals that were meant


def gemma4(e: Keys, c: Config) -> None:
    """Keys without more are about global layers, those in ``_swa`` about local ones."""
    c |= {"model_type": "gemma4_text", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    layers = c["num_hidden_layers"]
    c["final_logit_softcapping"] = e.optional("final_logit_softcapping")
    if e.get("attention.sliding_window_pattern") is None:
        e.problem("attention.sliding_window_pattern", f"missing, expected {layers} booleans")
    sliding(e, c, e.size("attention.sliding_window"), period=6)
    kinds = c.get("layer_types", [FULL] * layers)
    heads = e.each("attention.head_count_kv", layers, c["num_attention_heads"])
    wide, c["head_dim"] = c["head_dim"], e.size("attention.key_length_swa")
    e.expect("attention.value_length_swa", c["head_dim"])
    c["num_key_value_heads"] = next((h for h, kind in zip(heads, kinds, strict=True) if kind != FULL), heads[0])
    c["per_layer_config"] = {
        str(i): {"num_key_value_heads": heads[i]} | ({"head_dim": wide} if kind == FULL else {})
        for i, kind in enumerate(kinds)
    }
    first = kinds.index(FULL) if FULL in kinds else 0
    c["attention_k_eq_v"] = not e.has(f"blk.{first}.attn_v.weight", f"blk.{first}.attn_qkv.weight")
    shared = c["num_kv_shared_layers"] = _shared(e, 0)
    widths = e.each("feed_forward_length", layers)
    c["intermediate_size"] = widths[0]
    c["use_double_wide_mlp"] = shared > 0 and widths[-1] == 2 * widths[0]
    last = widths[0] * (2 if c["use_double_wide_mlp"] else 1)
    if widths != [last if i >= layers - shared else widths[0] for i in range(layers)]:
        e.problem("feed_forward_length", f"expected one width, or twice as much in the last {shared}, found {widths}")
    c["hidden_size_per_layer_input"] = e.count("embedding_length_per_layer_input")
    c["vocab_size_per_layer_input"] = c["vocab_size"]
    if e.has("ffn_gate_inp.weight"):
        c |= {"enable_moe_block": True, "num_experts": e.size("expert_count")}
        c["top_k_experts"] = e.size("expert_used_count")
        c["moe_intermediate_size"] = e.size("expert_feed_forward_length")
    else:
        e.expect_no_experts()
    if not e.has(FREQS):
        e.problems.append(f"tensor {FREQS}: missing, expected the divisors of the global layers' frequencies")
    e.expect("rope.scaling.type", "none", "linear")
    e.expect("rope.scaling.factor", 1.0, 0.0)
    e.expect("rope.dimension_count", wide)
    e.expect("rope.dimension_count_swa", c["head_dim"])
    e.expect("attention.scale", 1.0)
    c["rope_parameters"] = {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 1.0,
            "rope_theta": e.number("rope.freq_base", 10000.0),
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": e.number("rope.freq_base_swa", 10000.0)},
    }
