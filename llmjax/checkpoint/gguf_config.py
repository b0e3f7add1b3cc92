"""GGUF metadata as Hugging Face's config keys, and what llama.cpp knows of an architecture without writing it down.

Every key of the architecture's own namespace (``llama.*``) is used, checked, known to change nothing, or refused by
name.  A value that a file does not give is the one llama.cpp assumes then, not the default of Hugging Face's class.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's converter (``conversion/``) and
``load_arch_hparams`` of each architecture (``src/models/``).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from llmjax.errors import ConfigError, named, shown
from llmjax.models.config import FULL, SLIDING, DecoderConfig

T = TypeVar("T")
Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

ROPE_FREQS = "rope_freqs.weight"

# Bookkeeping, and what only scalings need that are refused (YaRN, longrope).
_IRRELEVANT = ("rope.scaling.finetuned", "rope.scaling.original_context_length")


class _Keys:
    """The keys of one architecture, taken out with their types checked; problems are collected.

    Args:
      metadata: the file's key-value pairs.
      tensors: shapes by name.
      architecture: the prefix of the keys.
    """

    def __init__(self, metadata: Mapping[str, Any], tensors: Shapes, architecture: str):
        self._prefix = f"{architecture}."
        self._values = {k.removeprefix(self._prefix): v for k, v in metadata.items() if k.startswith(self._prefix)}
        self._seen: set[str] = set()
        self._tensors = tensors
        self.problems: list[str] = []

    def has(self, *tensors: str) -> bool:
        """Whether the file, or its first layer, has any of these."""
        return any(t in self._tensors or f"blk.0.{t}" in self._tensors for t in tensors)

    def rows(self, tensor: str) -> int:
        """The first dimension of a tensor."""
        if not self._tensors.get(tensor):
            self.problems.append(f"tensor {tensor}: missing, expected a table of rows")
            return 1
        return self._tensors[tensor][0]

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands."""
        self._seen.add(key)
        return self._values.get(key, default)

    def problem(self, key: str, text: str) -> None:
        """Adds a line to the error that ``finish`` raises."""
        self.problems.append(f"{self._prefix}{named(key)}: {text}")

    def _checked(self, key: str, default: T | None, what: str, ok: Callable[[Any], bool], instead: T) -> T:
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
            value = value.flat[0].item()  # one value a layer, all the same
        if value is None:
            self.problem(key, f"missing, expected {what}")
        elif ok(value):
            return value
        else:
            differs = "values that differ by layer: " if isinstance(value, np.ndarray) else ""
            self.problem(key, f"expected {what}, found {differs}{shown(value)}")
        return instead  # lets the reading go on to collect the other problems

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        return self._checked(key, default, "a positive integer", lambda v: type(v) is int and v > 0, 1)

    def count(self, key: str) -> int:
        """A number that may be 0, which stands for absence as well."""
        return self._checked(key, 0, "a whole number, 0 or more", lambda v: type(v) is int and v >= 0, 0)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number: the shortest decimal that the stored float32 stands for."""
        ok = lambda v: type(v) in (int, float) and 1e-38 < v < 1e38  # noqa: E731 (what float32 holds)
        value = float(self._checked(key, default, "a positive number", ok, 1.0))
        return float(str(np.float32(value))) if np.float32(value) == value else value

    def optional(self, key: str) -> float | None:
        """A positive number, or None where the key is absent or 0."""
        value = self.get(key, 0)
        return None if type(value) in (int, float) and value == 0 else self.number(key)

    def expect(self, key: str, *allowed: Any) -> None:
        """A value, where there is one, that llmjax knows nothing else for."""
        value = self.get(key, allowed[0])
        if isinstance(value, np.ndarray) or value not in allowed:
            wanted = " or ".join(repr(a) for a in dict.fromkeys(allowed))
            self.problem(key, f"{shown(value)} is not supported, expected {wanted}")

    def finish(self, where: str) -> None:
        """Raises for everything that was wrong or left over.

        Raises:
          ConfigError: one line per problem.
        """
        for key in sorted(set(self._values) - self._seen - set(_IRRELEVANT)):
            self.problem(
                key,
                f"llmjax does not know this key (value {shown(self._values[key])}) and will not guess what it changes",
            )
        if len(self.problems) == 1:
            raise ConfigError(f"{where}: {self.problems[0]}")
        if self.problems:
            raise ConfigError(f"{where}: " + "\n  ".join(["unsupported metadata:", *self.problems]))


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
    entries = _Keys(metadata, tensors, architecture)
    config = _common(entries)
    ARCHITECTURES[architecture](entries, config)
    _attention_scale(entries, config)
    entries.finish(where)
    return config


def _common(e: _Keys) -> Config:
    hidden, heads = e.size("embedding_length"), e.size("attention.head_count")
    width = e.size("attention.key_length", hidden // heads or 1)
    if e.get("attention.key_length") is None and hidden % heads:
        e.problem("attention.head_count", f"embedding_length {hidden} is not a multiple of {heads}")
    kv_heads = e.size("attention.head_count_kv", heads)
    if heads % kv_heads:
        e.problem("attention.head_count_kv", f"attention.head_count {heads} is not a multiple of {kv_heads}")
    layers = e.size("block_count")
    if not e.has(f"blk.{layers - 1}.ffn_down.weight"):  # before anything is built of so many
        e.problem("block_count", f"{layers} layers, but there is no tensor blk.{layers - 1}.ffn_down.weight")
        layers = 1
    vocabulary = e.rows("token_embd.weight")
    e.expect("attention.value_length", width)
    e.expect("vocab_size", vocabulary)
    e.expect("attention.causal", True)
    for key in ("attention.max_alibi_bias", "attention.clamp_kqv", "expert_count", "expert_used_count", "pooling_type"):
        e.expect(key, 0)
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": e.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "max_position_embeddings": e.size("context_length"),
        "tie_word_embeddings": not e.has("output.weight"),
    }


def _attention_scale(e: _Keys, c: Config) -> None:
    """Elsewhere it follows from the head width, and a file that says so must say the same."""
    scalar: float = c["query_pre_attn_scalar"] if "query_pre_attn_scalar" in c else c["head_dim"]
    expected = scalar**-0.5
    found = e.optional("attention.scale")
    if found is not None and abs(found - expected) > 1e-6 * expected:
        e.problem("attention.scale", f"{found!r} is not supported, expected {expected!r}")


def _rope(e: _Keys, c: Config, *, partial: bool = False) -> None:
    """The base, linear scaling, and (where ``partial``) how much of a head rotates."""
    c["rope_theta"] = e.number("rope.freq_base", 10000.0)
    e.expect("rope.scaling.attn_factor", 1.0)
    factor = e.optional("rope.scaling.factor") or e.optional("rope.scale_linear")
    kind = e.get("rope.scaling.type", "linear")
    if not isinstance(kind, str) or kind not in ("none", "linear"):
        e.problem("rope.scaling.type", f"{shown(kind)} is not supported, expected 'none' or 'linear'")
    elif kind == "linear" and factor not in (None, 1.0):
        c["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if not partial:
        e.expect("rope.dimension_count", c["head_dim"])
        return
    dims, width = e.size("rope.dimension_count", c["head_dim"]), c["head_dim"]
    if dims > width or dims % 2:
        e.problem("rope.dimension_count", f"expected an even number up to the head width {width}, found {dims}")
    # Hugging Face keeps a fraction and cuts H * fraction down to an integer: half a dimension more is safe.
    c["partial_rotary_factor"] = dims / width if int(width * (dims / width)) == dims else (dims + 0.5) / width


def _windows(e: _Keys, c: Config, window: int, period: int) -> None:
    """Sliding layers: all but the last of every ``period``, unless the file says otherwise."""
    layers = c["num_hidden_layers"]
    pattern = e.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, np.ndarray) and pattern.dtype == bool and len(pattern) == layers:
        slides = pattern.tolist()
    elif type(pattern) is int and pattern >= 0:
        slides = [pattern == 0 or i % pattern < pattern - 1 for i in range(layers)]
    else:
        e.problem(
            "attention.sliding_window_pattern",
            f"expected a whole number, or {layers} booleans, found {shown(pattern)}",
        )
        return
    c["sliding_window"] = window or None
    c["layer_types"] = [SLIDING if s and window else FULL for s in slides]


def _llama(e: _Keys, c: Config) -> None:
    """Llama and Mistral share a name.  llama.cpp's converter leaves Mistral's window out, and llama.cpp runs without
    one; a file that has it is a Mistral."""
    e.expect("tensor_data_layout", "reference", "Meta AI original pth")  # one layout by two names
    window = e.count("attention.sliding_window")
    c |= {"model_type": "mistral", "sliding_window": window} if window else {"model_type": "llama"}
    c["rms_norm_eps"] = e.number("attention.layer_norm_rms_epsilon")
    if not window:
        c |= {"attention_bias": e.has("attn_q.bias", "attn_qkv.bias"), "mlp_bias": e.has("ffn_gate.bias")}
    _rope(e, c)


def _qwen2(e: _Keys, c: Config) -> None:
    c |= {"model_type": "qwen2", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    _rope(e, c)


def _qwen3(e: _Keys, c: Config) -> None:
    c |= {"model_type": "qwen3", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c["attention_bias"] = e.has("attn_q.bias", "attn_qkv.bias")
    _rope(e, c)


def _phi3(e: _Keys, c: Config) -> None:
    """The window is the file's; llama.cpp itself reads it and, for now, runs without."""
    c |= {"model_type": "phi3", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c["sliding_window"] = e.count("attention.sliding_window") or None
    _rope(e, c, partial=True)


def _gemma(e: _Keys, c: Config) -> None:
    c |= {"model_type": "gemma", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c["hidden_act"] = "gelu_pytorch_tanh"
    _rope(e, c)


def _gemma2(e: _Keys, c: Config) -> None:
    c |= {"model_type": "gemma2", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c["query_pre_attn_scalar"] = _query_scalar(e, c, layers_of_27b=46)
    c["attn_logit_softcapping"] = e.number("attn_logit_softcapping", 50.0)
    c["final_logit_softcapping"] = e.number("final_logit_softcapping", 30.0)
    _windows(e, c, e.size("attention.sliding_window", 4096), period=2)
    _rope(e, c)
    e.expect("rope.freq_base_swa", c["rope_theta"])


def _gemma3(e: _Keys, c: Config) -> None:
    """The local base is 10000 unless the file says otherwise, and scaling is for global layers alone."""
    c |= {"model_type": "gemma3_text", "rms_norm_eps": e.number("attention.layer_norm_rms_epsilon")}
    c["query_pre_attn_scalar"] = _query_scalar(e, c, layers_of_27b=62)
    c["final_logit_softcapping"] = e.optional("final_logit_softcapping")
    _windows(e, c, e.count("attention.sliding_window"), period=6)
    _rope(e, c)
    c["rope_local_base_freq"] = e.number("rope.freq_base_swa", 10000.0)


def _query_scalar(e: _Keys, c: Config, layers_of_27b: int) -> float:
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


def _phi2(e: _Keys, c: Config) -> None:
    c |= {"model_type": "phi", "layer_norm_eps": e.number("attention.layer_norm_epsilon")}
    _rope(e, c, partial=True)


def _stablelm(e: _Keys, c: Config) -> None:
    """Whether the residual is parallel shows in the missing norm: the key says true for files without the option."""
    e.get("use_parallel_residual")
    c |= {"model_type": "stablelm", "layer_norm_eps": e.number("attention.layer_norm_epsilon")}
    c["use_qkv_bias"] = e.has("attn_q.bias", "attn_qkv.bias")
    c["qk_layernorm"] = e.has("attn_q_norm.weight")
    c["use_parallel_residual"] = not e.has("ffn_norm.weight")
    _rope(e, c, partial=True)


def _falcon(e: _Keys, c: Config) -> None:
    """The rotary Falcons: llama.cpp has neither ALiBi nor biases for them, so no Falcon-RW."""
    e.expect("tensor_data_layout", "jploski")
    if e.has("attn_qkv.bias"):
        e.problems.append(
            "tensor blk.0.attn_qkv.bias: Falcon-RW (ALiBi, biases) has no GGUF form; use its Hugging Face directory"
        )
    _rope(e, c)
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
ARCHITECTURES: dict[str, Callable[[_Keys, Config], None]] = {
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "llama": _llama,
    "phi2": _phi2,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "stablelm": _stablelm,
}


def with_rope_freqs(config: DecoderConfig, divisors: np.ndarray, where: str) -> DecoderConfig:
    """``rope_freqs.weight`` put into a config: Llama 3's scaling, which GGUF keeps as a divisor of each frequency.

    Args:
      config: with a ``rope``.
      divisors: ``[H / 2]``.
      where: for messages.

    Raises:
      ConfigError: another shape, or a divisor that is not a positive number.
    """
    rope = getattr(config, "rope", None)
    if rope is None:
        raise ConfigError(f"{where}: tensor {ROPE_FREQS} is not supported in this architecture")
    if divisors.shape != (rope.dims // 2,):
        raise ConfigError(
            f"{where}: tensor {ROPE_FREQS}: expected shape {[rope.dims // 2]}, found {list(divisors.shape)}"
        )
    values = tuple(float(d) for d in divisors)
    if not all(0 < d < float("inf") for d in values):
        raise ConfigError(f"{where}: tensor {ROPE_FREQS}: expected positive numbers, found {shown(divisors)}")
    if set(values) == {1.0}:
        return config
    return dataclasses.replace(config, rope=dataclasses.replace(rope, divisors=values))  # type: ignore[call-arg]
