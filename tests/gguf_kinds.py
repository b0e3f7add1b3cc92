"""``tests.gguf_files`` for kinds whose converters do more than rename: what each writes of a config and of tensors.

Written, as there, from llama.cpp's converter and the gguf package's names.
"""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH, GGUFWriter

ARCHITECTURES = {
    "gemma3n_text": MODEL_ARCH.GEMMA3N,
    "gemma4_text": MODEL_ARCH.GEMMA4,
    "granite": MODEL_ARCH.GRANITE,
    "lfm2": MODEL_ARCH.LFM2,
    "ministral3": MODEL_ARCH.MISTRAL3,
    "olmo2": MODEL_ARCH.OLMO2,
    "olmo3": MODEL_ARCH.OLMO2,
    "qwen3_5_text": MODEL_ARCH.QWEN35,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "smollm3": MODEL_ARCH.SMOLLM3,
}
PERMUTED = ("granite", "ministral3", "smollm3")

Tensors = Mapping[str, np.ndarray]


def of_text_model(tensors: Tensors) -> dict[str, np.ndarray]:
    """Without the towers of a multimodal model and the words that its text model's names begin with."""
    others = ("_tower.", "embed_vision", "embed_audio", "projector", "visual.")
    texts = {n: x for n, x in tensors.items() if not any(part in n for part in others)}
    return {
        n.replace("language_model.model.", "model.").replace("model.language_model.", "model."): x
        for n, x in texts.items()
    }


def modified(tensors: Tensors, c: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """``modify_tensors`` of each architecture: GGUF's names where the package has no module for one, Hugging Face's
    elsewhere."""
    if c["model_type"] == "gemma3n_text":
        tensors = dict(tensors)
        for name in ("altup_projections", "altup_unembed_projections"):
            parts = [tensors.pop(f"model.{name}.{i}.weight") for i in range(3)]
            yield f"model.{name}.weight", np.stack(parts)
    experts: dict[str, list[np.ndarray]] = {}
    for name, x in tensors.items():
        if c["model_type"] == "gemma3n_text" and name.startswith("model.embed_tokens"):
            x = np.pad(x, ((0, c["vocab_size"] - len(x)), (0, 0)))
        elif name.endswith(("correct_output_scale", "layer_scalar", "experts.gate_up_proj", "experts.down_proj")):
            name += ".weight"
        elif name.endswith(("router.scale", "router.per_expert_scale")):
            layer, which = name.split(".")[2], "ffn_gate_inp" if name.endswith("router.scale") else "ffn_down_exps"
            name = f"blk.{layer}.{which}.scale"
        elif ".mlp.experts." in name:
            before, _, rest = name.partition(".experts.")
            module = f"{before}.experts.{rest.split('.')[1]}"
            experts.setdefault(module, []).append((int(rest.split(".")[0]), x))
            continue
        elif "conv.conv" in name:
            x = x.squeeze(1)
        elif c["model_type"] == "qwen3_5_text":
            if name.startswith("mtp."):
                continue
            name, x = _qwen35(name, x, c)
        yield name, x
    for module, found in experts.items():
        yield f"{module}.weight", np.stack([x for _, x in sorted(found, key=lambda pair: pair[0])])


def parameters(w: GGUFWriter, c: Mapping[str, Any]) -> None:
    """``set_gguf_parameters`` of each architecture."""
    model_type, layers, heads = c["model_type"], c["num_hidden_layers"], c["num_attention_heads"]
    w.add_block_count(layers)
    w.add_embedding_length(c["hidden_size"])
    w.add_head_count(heads)
    w.add_context_length(c["max_position_embeddings"])
    w.add_layer_norm_rms_eps(c["norm_eps"] if model_type == "lfm2" else c["rms_norm_eps"])
    width = c.get("head_dim") or c["hidden_size"] // heads
    if model_type == "lfm2":
        w.add_head_count_kv([c["num_key_value_heads"] if i in c["full_attn_idxs"] else 0 for i in range(layers)])
        w.add_shortconv_l_cache(c["conv_L_cache"])
        width = c["block_ff_dim"]
        if c["block_auto_adjust_ff_dim"]:
            multiple = c["block_multiple_of"]
            width = int(c["block_ffn_dim_multiplier"] * int(2 * width / 3))
            width = multiple * ((width + multiple - 1) // multiple)
        w.add_feed_forward_length(width)
    else:
        w.add_feed_forward_length(c["intermediate_size"])
        w.add_head_count_kv(c["num_key_value_heads"])
    ropes = c.get("rope_parameters") or {}
    if not {"full_attention", "sliding_attention"} & set(ropes):
        _rope(w, {"rope_theta": c.get("rope_theta"), **(c.get("rope_scaling") or {}), **ropes})
    if model_type == "gemma3n_text":
        w.add_rope_freq_base(c["rope_theta"])
        w.add_rope_freq_base_swa(c["rope_local_base_freq"])
    if model_type == "gemma4_text":
        _gemma4(w, c, ropes)
    elif c.get("head_dim"):
        w.add_key_length(width)
        w.add_value_length(width)
    if model_type in PERMUTED:
        w.add_rope_dimension_count(width)
    if model_type.startswith("gemma"):
        w.add_final_logit_softcapping(c["final_logit_softcapping"])
        w.add_embedding_length_per_layer_input(c["hidden_size_per_layer_input"])
        w.add_shared_kv_layers(c["num_kv_shared_layers"])
    if model_type in ("gemma3n_text", "gemma4_text", "olmo3"):
        w.add_sliding_window(c["sliding_window"])
        w.add_sliding_window_pattern([kind == "sliding_attention" for kind in c["layer_types"]])
    if model_type == "gemma3n_text":
        w.add_altup_active_idx(c["altup_active_idx"])
        w.add_altup_num_inputs(c["altup_num_inputs"])
        normal = statistics.NormalDist()
        cuts = [normal.inv_cdf(s) if s else -np.inf for s in c["activation_sparsity_pattern"]]
        w.add_activation_sparsity_scale([float(np.float32(cut)) for cut in cuts])
    if model_type == "granite":
        w.add_attention_scale(c["attention_multiplier"])
        w.add_embedding_scale(c["embedding_multiplier"])
        w.add_residual_scale(c["residual_multiplier"])
        w.add_logit_scale(c["logits_scaling"])
    if model_type == "ministral3":
        w.add_rope_scaling_yarn_log_mul(ropes["mscale_all_dim"])
        w.add_attn_temperature_scale(ropes["llama_4_scaling_beta"])
    if model_type == "qwen3_5_text":
        w.add_ssm_conv_kernel(c["linear_conv_kernel_dim"])
        w.add_ssm_state_size(c["linear_key_head_dim"])
        w.add_ssm_group_count(c["linear_num_key_heads"])
        w.add_ssm_time_step_rank(c["linear_num_value_heads"])
        w.add_ssm_inner_size(c["linear_value_head_dim"] * c["linear_num_value_heads"])
        w.add_array("qwen35.attention.recurrent_layers", [kind == "linear_attention" for kind in c["layer_types"]])
        w.add_full_attention_interval(c["full_attention_interval"])
        w.add_rope_dimension_count(int(width * ropes["partial_rotary_factor"]))
        w.add_rope_dimension_sections([*ropes["mrope_section"], 0])
    if model_type == "qwen3_moe":
        w.add_expert_count(c["num_experts"])
        w.add_expert_used_count(c["num_experts_per_tok"])
        w.add_expert_feed_forward_length(c["moe_intermediate_size"])


def _qwen35(name: str, x: np.ndarray, c: Mapping[str, Any]) -> tuple[str, np.ndarray]:
    """Value heads in turn by their key heads, instead of those of a key head together."""
    keys, values = c["linear_num_key_heads"], c["linear_num_value_heads"]

    def in_turn(x: np.ndarray, width: int) -> np.ndarray:
        heads = [x[i * width : (i + 1) * width] for i in range(values)]
        return np.concatenate([heads[k * (values // keys) + g] for g in range(values // keys) for k in range(keys)])

    first, width = 2 * keys * c["linear_key_head_dim"], c["linear_value_head_dim"]
    if "linear_attn." not in name:
        return name, x + np.float32(1) if name.endswith("norm.weight") else x
    if "conv1d" in name:
        x = x.squeeze(1)
    if "conv1d" in name or "in_proj_qkv" in name:
        x = np.concatenate([x[:first], in_turn(x[first:], width)])
    elif "in_proj_z" in name:
        x = in_turn(x, width)
    elif "out_proj" in name:
        x = in_turn(x.T, width).T
    elif not name.endswith("norm.weight"):
        x = in_turn(x, 1)
    if name.endswith("dt_bias"):
        return name.replace("dt_bias", "dt_proj.bias"), x
    layer = name.split(".")[2]
    return (f"blk.{layer}.ssm_a", -np.exp(x)) if name.endswith("A_log") else (name, x)


def _rope(w: GGUFWriter, ropes: Mapping[str, Any]) -> None:
    w.add_rope_freq_base(ropes["rope_theta"])
    if ropes.get("rope_type", ropes.get("type")) == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(ropes["factor"])
        w.add_rope_scaling_orig_ctx_len(ropes["original_max_position_embeddings"])
        if ropes.get("attention_factor"):
            w.add_rope_scaling_yarn_attn_factor(ropes["attention_factor"])
        w.add_rope_scaling_yarn_beta_fast(ropes["beta_fast"])
        w.add_rope_scaling_yarn_beta_slow(ropes["beta_slow"])


def _gemma4(w: GGUFWriter, c: Mapping[str, Any], ropes: Mapping[str, Any]) -> None:
    wide, local, layers = c["global_head_dim"], c["head_dim"], c["num_hidden_layers"]
    w.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
    w.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    w.add_key_length(wide)
    w.add_value_length(wide)
    w.add_key_length_swa(local)
    w.add_value_length_swa(local)
    w.add_rope_dimension_count(wide)
    w.add_rope_dimension_count_swa(local)
    if c["use_double_wide_mlp"]:
        first = layers - c["num_kv_shared_layers"]
        w.add_feed_forward_length([c["intermediate_size"] * (1 + (i >= first)) for i in range(layers)])
    if c["num_global_key_value_heads"]:
        counts = {"sliding_attention": c["num_key_value_heads"], "full_attention": c["num_global_key_value_heads"]}
        w.add_head_count_kv([counts[kind] for kind in c["layer_types"]])
    if c["enable_moe_block"]:
        w.add_expert_count(c["num_experts"])
        w.add_expert_used_count(c["top_k_experts"])
        w.add_expert_feed_forward_length(c["moe_intermediate_size"])


def rope_freqs(c: Mapping[str, Any]) -> np.ndarray:
    """Gemma 4's divisors of the global layers' frequencies: 1, and 1e30 for what does not turn."""
    pairs = c["global_head_dim"] // 2
    turning = int(c["global_head_dim"] * c["rope_parameters"]["full_attention"]["partial_rotary_factor"] / 2)
    return np.array([1.0] * turning + [1e30] * (pairs - turning), np.float32)
