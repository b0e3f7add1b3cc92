"""``LlmParameters``: the protobuf that tells MediaPipe's runtime a model's dimensions and its start and stop tokens.

Fields and numbers: https://github.com/google-ai-edge/mediapipe (``tasks/cc/genai/inference/proto``).
"""

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from llmjax.errors import CheckpointError

# Of SamplerParameters.type, as _ENUMS numbers them.
TOP_K, TOP_P, GREEDY = 1, 2, 3
_TYPES = {"int64": 3, "int32": 5, "bool": 8, "float": 2, "string": 9, "enum": 14}
_ENUMS = {
    "Activation": ("ACTIVATION_UNSPECIFIED", "GELU", "SILU", "RELU", "RELU1P5"),
    "Norm": ("NORM_UNSPECIFIED", "NO_NORM", "RMS_NORM", "LAYER_NORM", "RMS_NO_SCALE"),
    "MaskType": ("UNSPECIFIED", "CAUSAL", "PREFIX", "BIDIRECTIONAL"),
    "ScaleType": ("SCALE_UNSPECIFIED", "PER_DIM", "INV_SQRT_HEAD_DIM", "INV_SQRT_MODEL_WIDTH", "RESCALE_FACTOR"),
    "Sampler": ("TYPE_UNSPECIFIED", "TOP_K", "TOP_P", "GREEDY"),
    "Normalization": ("NORMALIZATION_UNKNOWN", "BYTES_TO_UNICODE"),
}
# By message: fields as (number, name, type), * for repeated ones, ? for those that tell 0 from nothing.
_MESSAGES = {
    "FeedForwardParameters": (
        (1, "no_bias", "bool"),
        (2, "activation", "Activation"),
        (3, "pre_norm", "Norm"),
        (4, "post_norm", "Norm"),
    ),
    "FinalProjectParameters": ((1, "no_bias", "bool"), (2, "soft_cap_value", "float")),
    "SelfAttentionParameters": (
        (1, "qkv_no_bias", "bool"),
        (2, "post_proj_no_bias", "bool"),
        (3, "attention_mask_type", "MaskType"),
        (4, "soft_cap_value", "float"),
        (5, "attention_scale_type", "ScaleType"),
        (6, "sliding_window_size", "int32"),
        (7, "qk_norm", "bool"),
    ),
    "TransformerParameters": (
        (1, "batch_size", "int32"),
        (2, "max_seq_length", "int32"),
        (3, "embedding_dim", "int32"),
        (4, "hidden_dimension", "int32"),
        (5, "head_dimension", "int32"),
        (6, "num_heads", "int32"),
        (7, "num_stacks", "int32"),
        (9, "num_kv_heads", "int32"),
        (11, "feed_forward_parameters", "FeedForwardParameters"),
        (12, "final_project_parameters", "FinalProjectParameters"),
        (13, "pre_norm", "Norm"),
        (14, "post_norm", "Norm"),
        (15, "final_norm", "Norm"),
        (16, "self_attention_parameters", "SelfAttentionParameters"),
        (18, "skip_absolute_positional_embeddings", "bool"),
        (19, "num_local_layers_per_global", "int32"),
        # Reserved in the published schema; the converter's gpu files have 1 in both.
        (23, "reserved_23", "int32"),
        (24, "reserved_24", "int32"),
        (25, "query_rescale_factor", "float"),
        (32, "global_rope_wavelength", "float"),
        (33, "global_rope_scaling", "float"),
    ),
    "PromptTemplate": ((1, "session_prefix", "string"), (2, "prompt_prefix", "string"), (3, "prompt_suffix", "string")),
    "PromptTemplates": (
        (1, "user_template", "PromptTemplate"),
        (2, "model_template", "PromptTemplate"),
        (3, "system_template", "PromptTemplate"),
    ),
    "LlmParameters": (
        (1, "transformer_parameters", "TransformerParameters"),
        (2, "vocab_size", "int32"),
        (4, "start_token_id", "int32"),
        (6, "start_token", "string"),
        (5, "stop_tokens", "string*"),
        (7, "input_output_normalizations", "Normalization*"),
        (8, "prompt_template", "PromptTemplate"),
        (9, "num_draft_tokens", "int32"),
        (11, "user_role_token", "string"),
        (12, "system_role_token", "string"),
        (13, "model_role_token", "string"),
        (14, "end_role_token", "string"),
        (17, "prompt_templates", "PromptTemplates"),
        (18, "stop_token_ids", "int32*"),
    ),
}
_LITERT_LM = {
    "TokenIds": ((1, "ids", "int32*"),),
    "TokenUnion": ((1, "token_ids", "TokenIds"), (2, "token_str", "string")),
    "PromptAffixes": ((1, "prefix", "string"), (2, "suffix", "string")),
    "PromptTemplates": ((1, "user", "PromptAffixes"), (2, "model", "PromptAffixes"), (3, "system", "PromptAffixes")),
    "SamplerParameters": (
        (1, "type", "Sampler"),
        (2, "k", "int32"),
        (3, "p", "float"),
        (4, "temperature", "float"),
        (5, "seed", "int32"),
    ),
    # What a family's runtime code does beside the template, tool calls above all; only what is set here.
    **dict.fromkeys(("GenericModel", "Gemma3n", "FunctionGemma", "Gemma3", "Qwen3", "Qwen2p5", "Lfm2"), ()),
    "Gemma4": (
        (5, "code_fence_start", "string"),
        (6, "code_fence_end", "string"),
        (10, "open_quote", "string"),
        (11, "close_quote", "string"),
        (12, "function_response_start", "string"),
    ),
    "LlmModelType": (
        (1, "generic_model", "GenericModel"),
        (2, "gemma3n", "Gemma3n"),
        (3, "function_gemma", "FunctionGemma"),
        (4, "gemma3", "Gemma3"),
        (5, "qwen3", "Qwen3"),
        (7, "qwen2p5", "Qwen2p5"),
        (8, "gemma4", "Gemma4"),
        (11, "lfm2", "Lfm2"),
    ),
    "Channel": ((1, "channel_name", "string"), (2, "start", "string"), (3, "end", "string")),
    "LlmMetadata": (
        (1, "start_token", "TokenUnion"),
        (2, "stop_tokens", "TokenUnion*"),
        (3, "prompt_templates", "PromptTemplates"),
        (4, "sampler_params", "SamplerParameters"),
        (5, "max_num_tokens", "int32"),
        (6, "llm_model_type", "LlmModelType"),
        (7, "jinja_prompt_template", "string"),
        (8, "channels", "Channel*"),
        (9, "suppress_tokens", "TokenIds"),
        (10, "kv_cache_init_value", "int64"),
        (11, "supports_thinking", "bool?"),
        (12, "supports_function_calling", "bool?"),
        (13, "pad_token", "TokenUnion"),
        (14, "min_runtime_version", "string"),
    ),
}


def _make(package: str, messages: Mapping[str, Any], root: str) -> Any:
    """The class of a message, from its package's fields."""
    file = descriptor_pb2.FileDescriptorProto(name=f"llmjax/{root}.proto", package=package, syntax="proto3")
    used = {kind.rstrip("*?") for fields in messages.values() for _, _, kind in fields}
    for name in sorted(used & set(_ENUMS)):
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(_ENUMS[name]):
            enum.value.add(name=value, number=number)
    for name, fields in messages.items():
        entry = file.message_type.add(name=name)
        for number, field, kind in fields:
            base = kind.rstrip("*?")
            added = entry.field.add(name=field, number=number, label=3 if kind.endswith("*") else 1)
            added.type = _TYPES.get(base, 14 if base in _ENUMS else 11)
            if base not in _TYPES:
                added.type_name = f".{package}.{base}"
            if kind.endswith("?"):
                added.proto3_optional, added.oneof_index = True, len(entry.oneof_decl)
                entry.oneof_decl.add(name=f"_{field}")
            if field in ("start_token_id", "start_token") and name == "LlmParameters":
                added.oneof_index = 0
        if name == "LlmParameters":
            entry.oneof_decl.add(name="start_token_union")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{root}"))


LlmParameters: Any = _make("odml.infra.proto", _MESSAGES, "LlmParameters")
# Of LiteRT-LM, https://github.com/google-ai-edge/LiteRT-LM (``runtime/proto``).
LlmMetadata: Any = _make("litert.lm.proto", _LITERT_LM, "LlmMetadata")


def read(data: bytes, where: str, kind: Any = LlmParameters) -> Any:
    """A message from its bytes.

    Raises:
      CheckpointError: they are damaged.
    """
    found = kind()
    try:
        found.ParseFromString(data)
    except (message.DecodeError, UnicodeDecodeError) as error:
        name = kind.DESCRIPTOR.name
        raise CheckpointError(f"{where}: not an {name} protobuf, or a damaged one: {error}") from None
    return found
