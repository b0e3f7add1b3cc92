"""MediaPipe's model types: what each is in Hugging Face's terms, and what a ``.bin`` file says of one.

A file holds dimensions, kinds of norms and activations, and Gemma 2's soft-caps.  The rest (the rotary part of a head,
eps, Gemma 2's window, the context length) its runtime knows by the model type, as do we: it is that of the published
checkpoint.

Source: ``well_known_models.cc`` of MediaPipe, and files of its converter.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from converters.readers.mediapipe.parameters import LlmParameters
from llmjax import configs
from llmjax.errors import ConfigError
from llmjax.models.config import DecoderConfig
from llmjax.models.registry import read_config

# Bounds what a damaged file can make us build.
_MAX_LAYERS = 512


@dataclasses.dataclass(frozen=True)
class ModelType:
    """One of MediaPipe's model types.

    Attributes:
      name: MediaPipe's.
      number: its ``LlmModelType``.
      published: the checkpoint it is made for, by its name in ``configs``.
      start_id: the token every prompt begins with.
      stop: the text that ends an answer.
      norm: of ``TransformerParameters.Norm``.
      activation: of ``TransformerParameters.Activation``.
      biases: on every projection in the layers.
      head_bias: on the head.
      mlp_norm: the MLP has a norm of its own.
      post_norms: norms after attention and MLP.
      bytes_to_unicode: texts are mapped as GPT-2 does before SentencePiece sees them.
    """

    name: str
    number: int
    published: str
    start_id: int
    stop: str
    norm: str = "RMS_NORM"
    activation: str = "GELU"
    biases: bool = False
    head_bias: bool = False
    mlp_norm: bool = True
    post_norms: bool = False
    bytes_to_unicode: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """``config.json`` of the published checkpoint."""
        return configs.read(self.published)["config"]

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the architecture."""
        return self.config["model_type"]


_END = "<|endoftext|>"
MODEL_TYPES: dict[str, ModelType] = {
    m.name: m
    for m in (
        ModelType("GEMMA_2B", 6, "gemma-2b", 2, "<eos>"),
        ModelType("GEMMA_7B", 12, "gemma-7b", 2, "<eos>"),
        ModelType("GEMMA2_2B", 18, "gemma-2-2b", 2, "<eos>", post_norms=True),
        ModelType(
            "PHI_2",
            11,
            "phi-2",
            50256,
            _END,
            norm="LAYER_NORM",
            biases=True,
            head_bias=True,
            mlp_norm=False,
            bytes_to_unicode=True,
        ),
        ModelType("FALCON_RW_1B", 5, "falcon-rw-1b", 1, _END, norm="LAYER_NORM", biases=True, bytes_to_unicode=True),
        ModelType(
            "STABLELM_4E1T_3B",
            8,
            "stablelm-3b-4e1t",
            0,
            _END,
            norm="LAYER_NORM",
            activation="SILU",
            bytes_to_unicode=True,
        ),
    )
}


def find(number: int | None, where: str) -> ModelType:
    """The model type of a file's metadata.

    Raises:
      ConfigError: none, or one llmjax does not have.
    """
    for found in MODEL_TYPES.values():
        if found.number == number:
            return found
    known = ", ".join(f"{m.name} ({m.number})" for m in MODEL_TYPES.values())
    raise ConfigError(f"{where}: model type {number} is not supported; llmjax has {known}")


def hf_config(parameters: Any, kind: ModelType, where: str) -> dict[str, Any]:
    """The ``config.json`` that a file amounts to.

    Args:
      parameters: its ``LlmParameters``.
      kind: its model type.
      where: for messages.

    Raises:
      ConfigError: dimensions that cannot be, or a field that says what this model type is not; all at once.
    """
    t = parameters.transformer_parameters
    sizes = {
        "hidden_size": t.embedding_dim,
        "ffn_hidden_size" if kind.model_type == "falcon" else "intermediate_size": t.hidden_dimension,
        "num_hidden_layers": t.num_stacks,
        "num_attention_heads": t.num_heads,
        "num_kv_heads" if kind.model_type == "falcon" else "num_key_value_heads": t.num_kv_heads or t.num_heads,
        "head_dim": t.head_dimension,
        "vocab_size": parameters.vocab_size,
    }
    problems = [f"{key}: expected a positive number, found {value}" for key, value in sizes.items() if value < 1]
    if t.num_stacks > _MAX_LAYERS:
        problems.append(f"num_stacks: expected at most {_MAX_LAYERS} layers, found {t.num_stacks}")
    own: dict[str, Any] = {"tie_word_embeddings": kind.model_type.startswith("gemma")}
    if kind.post_norms:
        own["query_pre_attn_scalar"] = t.head_dimension
        caps = {
            "attn_logit_softcapping": t.self_attention_parameters.soft_cap_value,
            "final_logit_softcapping": t.final_project_parameters.soft_cap_value,
        }
        own |= {key: cap for key, cap in caps.items() if cap > 0}
    expected = LlmParameters()
    expected.CopyFrom(parameters)
    _describe(expected.transformer_parameters, kind)
    problems += _differences(t, expected.transformer_parameters, "")
    if problems:
        raise ConfigError(f"{where}: " + "\n  ".join([f"not a {kind.name} as llmjax runs it:", *problems]))
    return kind.config | sizes | own


def parameters(config: DecoderConfig, kind: ModelType, backend: str) -> Any:
    """The ``LlmParameters`` of a model, as MediaPipe's converter writes them."""
    found = LlmParameters(vocab_size=config.vocab_size, start_token_id=kind.start_id, stop_tokens=[kind.stop])
    t = found.transformer_parameters
    t.batch_size = 1
    t.embedding_dim = config.hidden_size
    t.hidden_dimension = config.intermediate_size
    t.head_dimension = config.head_dim
    t.num_heads = config.num_attention_heads
    t.num_stacks = config.num_hidden_layers
    # 0 stands for as many as query heads, except where the converter spells it out.
    spelled = kind.name in ("GEMMA_2B", "GEMMA2_2B", "FALCON_RW_1B")
    if spelled or config.num_key_value_heads != config.num_attention_heads:
        t.num_kv_heads = config.num_key_value_heads
    if kind.post_norms:
        t.self_attention_parameters.soft_cap_value = getattr(config, "attn_logit_softcapping", None) or 0
        t.final_project_parameters.soft_cap_value = getattr(config, "final_logit_softcapping", None) or 0
    _describe(t, kind)
    if backend == "gpu":
        t.reserved_23 = t.reserved_24 = 1
    return found


def emulated(config: DecoderConfig, profile: str, where: str) -> DecoderConfig:
    """The model as MediaPipe's runtimes compute it, under the profiles ``mediapipe_gpu`` and ``mediapipe_cpu``.

    In both, GELU is the erf form, which Gemma and Phi were not trained with.  (Measured for Gemma on the gpu; the files
    name one GELU for all model types.)  The open cpu runtime besides clamps the root of RMSNorm at 1e-6 instead of
    adding eps (what eps = 1e-12 amounts to), and leaves out Gemma 2's windows and final soft-cap.

    Raises:
      ConfigError: the runtimes do not know this architecture.
    """
    if not profile.startswith("mediapipe"):
        return config
    known = sorted({read_config(m.config, m.name)[0].model_type for m in MODEL_TYPES.values()})
    found = type(config).__name__.removesuffix("Config").lower()
    if found not in known:
        raise ConfigError(f"{where}: numerics {profile}: MediaPipe's runtimes know {', '.join(known)}, found {found}")
    changes: dict[str, Any] = {}
    for field in ("hidden_act", "hidden_activation", "activation"):
        if getattr(config, field, "").startswith("gelu"):
            changes[field] = "gelu"
    if profile == "mediapipe_cpu":
        instead = {"rms_norm_eps": 1e-12, "final_logit_softcapping": None}
        changes |= {field: value for field, value in instead.items() if hasattr(config, field)}
        if hasattr(config, "windows"):
            changes["windows"] = (None,) * config.num_hidden_layers
    return dataclasses.replace(config, **changes)


def _describe(t: Any, kind: ModelType) -> None:
    """Sets what follows from the model type."""
    ff, attention = t.feed_forward_parameters, t.self_attention_parameters
    post = "RMS_NORM" if kind.post_norms else "NO_NORM"
    t.pre_norm = t.final_norm = _value(t, "pre_norm", kind.norm)
    t.post_norm = ff.post_norm = _value(t, "post_norm", post)
    ff.pre_norm = _value(ff, "pre_norm", kind.norm if kind.mlp_norm else "NO_NORM")
    ff.activation = _value(ff, "activation", kind.activation)
    ff.no_bias = attention.qkv_no_bias = attention.post_proj_no_bias = not kind.biases
    t.final_project_parameters.SetInParent()
    t.final_project_parameters.no_bias = not kind.head_bias
    if not kind.post_norms:
        t.final_project_parameters.ClearField("soft_cap_value")
        attention.ClearField("soft_cap_value")
    attention.attention_mask_type = _value(attention, "attention_mask_type", "CAUSAL")
    attention.attention_scale_type = _value(attention, "attention_scale_type", "INV_SQRT_HEAD_DIM")
    attention.ClearField("sliding_window_size")
    attention.ClearField("qk_norm")
    t.skip_absolute_positional_embeddings = True
    for field in ("num_local_layers_per_global", "query_rescale_factor", "global_rope_wavelength"):
        t.ClearField(field)
    t.ClearField("global_rope_scaling")


def _value(of: Any, field: str, name: str) -> int:
    return of.DESCRIPTOR.fields_by_name[field].enum_type.values_by_name[name].number


def _differences(found: Any, expected: Any, prefix: str) -> Iterator[str]:
    for field in found.DESCRIPTOR.fields:
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if field.message_type is not None:
            yield from _differences(a, b, f"{prefix}{field.name}.")
        elif a != b:
            yield f"{prefix}{field.name}: expected {_value_name(field, b)}, found {_value_name(field, a)}"


def _value_name(field: Any, value: Any) -> Any:
    known = field.enum_type.values_by_number if field.enum_type is not None else {}
    return known[value].name if value in known else value
