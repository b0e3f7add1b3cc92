"""The ``config.json`` that an op graph amounts to: what its shapes, constants and operators say of the model that it
was made of.

What they do not say is left as the graph has it: its caches are shorter than the texts that the model was trained for.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from converters.readers.litert.options import HADAMARD
from llmjax.errors import ConfigError, named
from llmjax.litert.model import GraphModel
from llmjax.litert.roles import Attention, Roles
from llmjax.models.registry import architectures
from llmjax.models.rope import Rope
from llmjax.models.scalings import Llama3Scaling

# Whose norms multiply by 1 + w, which the exporter computes.
UNIT_OFFSET = ("gemma", "gemma2", "gemma3_text")
# What the exporter does to others' weights, so that no checkpoint is found in its graph.
_FOLDED = {
    "granite": "residual_multiplier and logits_scaling are multiplied into them, and it does not say what they were"
}
_MODULE = re.compile(r"transformers\.models\.(\w+)\.modeling_\w+\.")
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Llama 3.1 and 3.2's: the frequencies tell theta and the factor, these are as published.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def model_type(roles: Roles, where: str) -> str:
    """Hugging Face's name of the architecture, by the classes in tensors' names.

    Raises:
      ConfigError: there are none, or of an architecture that llmjax cannot take out of a graph.
    """
    found = next((m[1] for t in roles.graph.tensors if (m := _MODULE.search(t.name))), None)
    if found is None:
        raise ConfigError(
            f"{where}: its tensors do not say which model it was made of: llmjax knows the names that litert-torch's "
            "export_hf gives them"
        )
    kind = next((kind for kind in (found, f"{found}_text") if kind in _FAMILIES), None)
    if kind is None:
        known = ", ".join(sorted(_FAMILIES))
        why = f" ({_FOLDED[found]})" if found in _FOLDED else ""
        raise ConfigError(
            f"{where}: made of {named(found)}, whose weights llmjax cannot take out{why}; it can: {known}"
        )
    return kind


class _Facts:
    """What a graph says.

    Args:
      model: the graph.
      where: for messages.
    """

    def __init__(self, model: GraphModel, where: str):
        self.roles, self.where = model.roles, where
        roles = self.roles
        steps = list(roles.steps.values())
        self.eps = float(str(np.float32(next(step.eps for step in steps if step.eps is not None))))
        self.attentions = {
            next(s.layer for s in steps if s.input == a.out): a for a in roles.attentions.values()
        }  # by layer
        self.windows = [self.attentions[i].window if i in self.attentions else None for i in range(roles.layers)]
        self.any: Attention = next(iter(self.attentions.values()))
        self.size = {
            "hidden_size": self.shape(roles.head.input)[-1] if roles.head else 0,
            "intermediate_size": self.shape(next(iter(roles.acts.values())))[-1] if roles.acts else 0,
            "num_hidden_layers": roles.layers,
            "num_attention_heads": int(np.prod(self.shape(self.any.q_rot))) // self.any.width,
            "num_key_value_heads": model.config.num_key_value_heads,
            "vocab_size": model.config.vocab_size,
            "max_position_embeddings": model.config.max_position_embeddings,
        }
        self.head_dim = {"head_dim": self.any.width}

    def shape(self, i: int) -> tuple[int, ...]:
        """Of a tensor."""
        return self.roles.graph.tensors[i].shape

    def has_bias(self, ending: str) -> bool:
        """Whether the products called so have biases."""
        return any(m.endswith(ending) and s.bias is not None for m, s in self.roles.steps.items())

    def act(self) -> str:
        """The activation, as configurations call it."""
        op = self.roles.op(next(iter(self.roles.acts.values())))
        if op is not None and op.name == "GELU":
            return "gelu_pytorch_tanh" if op.options["approximate"] else "gelu"
        return "relu" if op is not None and op.name == "RELU" else "silu"

    def sliding(self) -> dict[str, Any]:
        """The windows, by kinds of layers."""
        kinds = [_SLIDING if window else _FULL for window in self.windows]
        return {"layer_types": kinds, "sliding_window": next((w for w in self.windows if w), None)}

    def query_scalar(self) -> dict[str, Any]:
        """What queries are divided by, squared."""
        value = self.any.scale**-2
        return {"query_pre_attn_scalar": round(value) if abs(value - round(value)) < 1e-4 * value else value}

    def rope(self, attention: Attention | None = None) -> dict[str, Any]:
        """Rope parameters, from the constant of a layer's angles.

        Raises:
          ConfigError: no base and scaling that llmjax tries gives them.
        """
        rotating = [a for a in self.attentions.values() if a.frequencies is not None]
        if attention is None and not rotating:
            return {"rope_type": "default", "rope_theta": 10000.0}
        attention = attention or rotating[0]
        assert attention.frequencies is not None
        tensor = self.roles.graph.tensors[attention.frequencies]
        found = self.roles.file.data(tensor).view("<f4").reshape(-1)
        dims = 2 * len(found)
        for parameters, rope in _ropes(found, dims):
            if np.allclose(rope.frequencies(), found, rtol=3e-6, atol=0):
                partial = {"partial_rotary_factor": dims / attention.width} if dims != attention.width else {}
                return parameters | partial
        raise ConfigError(
            f"{self.where}: no base and scaling of a rotation that llmjax tries gives the frequencies in this graph; "
            "give the configuration that it was exported from (--config)"
        )


def _ropes(found: np.ndarray, dims: int) -> Any:
    """Ropes that may have these frequencies, and what a configuration says of each."""
    if len(found) == 1:
        yield {"rope_type": "default", "rope_theta": 10000.0}, Rope(10000.0, dims)
        return
    count = len(found)
    factor = 1 / float(found[0])
    for exact in (float(found[-1] * factor) ** (-count / (count - 1)), float(found[1] * factor) ** -count):
        for theta in dict.fromkeys(float(f"{exact:.{digits}g}") for digits in (2, 3, 4, 5, 6, 7, 9)):
            plain = Rope(theta, dims)
            if abs(factor - 1) < 1e-6:
                yield {"rope_type": "default", "rope_theta": theta}, plain
                slower = round(float(plain.frequencies()[-1] / found[-1]))
                if slower > 1:
                    scaling = Llama3Scaling(slower, 1.0, 4.0, 8192)
                    parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": float(slower), **_LLAMA3}
                    yield parameters, Rope(theta, dims, llama3=scaling)
            else:
                linear = float(f"{factor:.6g}")
                yield {"rope_type": "linear", "rope_theta": theta, "factor": linear}, Rope(theta, dims, linear=linear)


def _llama(f: _Facts) -> dict[str, Any]:
    bias = {"attention_bias": f.has_bias("q_proj"), "mlp_bias": f.has_bias("up_proj")}
    return {"rms_norm_eps": f.eps, "hidden_act": f.act(), **f.head_dim, **bias, "rope_parameters": f.rope()}


def _without_bias(f: _Facts) -> dict[str, Any]:
    return {"rms_norm_eps": f.eps, "hidden_act": f.act(), "rope_parameters": f.rope()}


def _mistral(f: _Facts) -> dict[str, Any]:
    return _without_bias(f) | f.head_dim | {"sliding_window": f.windows[0]}


def _qwen2(f: _Facts) -> dict[str, Any]:
    return _without_bias(f) | {"use_sliding_window": any(f.windows)} | f.sliding()


def _qwen3(f: _Facts) -> dict[str, Any]:
    return _qwen2(f) | f.head_dim | {"attention_bias": f.has_bias("q_proj")}


def _olmo2(f: _Facts) -> dict[str, Any]:
    return _without_bias(f) | {"attention_bias": f.has_bias("q_proj")}


def _phi(f: _Facts) -> dict[str, Any]:
    normed = any(m.endswith("q_layernorm") for m in f.roles.steps)
    act = f.act().replace("gelu_pytorch_tanh", "gelu_new")
    return {"layer_norm_eps": f.eps, "hidden_act": act, "qk_layernorm": normed, "rope_parameters": f.rope()}


def _phi3(f: _Facts) -> dict[str, Any]:
    return _without_bias(f) | {"sliding_window": f.windows[0]}


def _smollm3(f: _Facts) -> dict[str, Any]:
    rotates = [int(f.attentions[i].frequencies is not None) for i in range(f.roles.layers)]
    return _llama(f) | {"no_rope_layers": rotates, "use_sliding_window": any(f.windows)} | f.sliding()


def _gemma(f: _Facts) -> dict[str, Any]:
    common: dict[str, Any] = {"rms_norm_eps": f.eps, "attention_bias": f.has_bias("q_proj"), **f.head_dim}
    return common | {"hidden_act": f.act(), "rope_parameters": f.rope()}


def _gemma2(f: _Facts) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": f.any.softcap, "final_logit_softcapping": f.roles.softcap}
    common: dict[str, Any] = {"rms_norm_eps": f.eps, "attention_bias": f.has_bias("q_proj"), **f.head_dim}
    common |= {"hidden_activation": f.act(), "rope_parameters": f.rope()}
    return common | caps | f.query_scalar() | f.sliding()


def _gemma3(f: _Facts) -> dict[str, Any]:
    local = next((a for a in f.attentions.values() if a.window), f.any)
    wide = next((a for a in f.attentions.values() if not a.window), f.any)
    own: dict[str, Any] = {"attn_logit_softcapping": None}
    own["rope_parameters"] = {_SLIDING: f.rope(local), _FULL: f.rope(wide)}
    return _gemma2(f) | own


def _lfm2(f: _Facts) -> dict[str, Any]:
    kinds = [_FULL if i in f.attentions else "conv" for i in range(f.roles.layers)]
    width = next((f.shape(i)[-1] for i, _ in f.roles.kernels.values()), 3)
    conv = {"layer_types": kinds, "conv_L_cache": width, "conv_bias": f.has_bias("out_proj")}
    return {"norm_eps": f.eps, "block_auto_adjust_ff_dim": False, "rope_parameters": f.rope(), **conv}


_FAMILIES: dict[str, Callable[[_Facts], dict[str, Any]]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "lfm2": _lfm2,
    "llama": _llama,
    "mistral": _mistral,
    "olmo2": _olmo2,
    "phi": _phi,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
}


def _rotates(roles: Roles) -> bool:
    """Whether some inputs of products are rotated."""
    for op in roles.graph.operators:
        if op.name == HADAMARD:
            return True
        weight = roles.graph.tensors[op.inputs[1]] if op.name == "FULLY_CONNECTED" else None
        if weight and weight.type == "FLOAT32" and len(set(weight.shape)) == 1 < weight.shape[0]:
            values = roles.file.data(weight).view("<f4") if roles.file.is_constant(weight) else np.zeros(1)
            if np.allclose(np.abs(values), weight.shape[0] ** -0.5, rtol=1e-5, atol=0):
                return True
    return False


def hf_config(model: GraphModel, tied: bool, where: str) -> dict[str, Any]:
    """The ``config.json``, whose ``eos_token_id`` and ``bos_token_id`` are the bundle's.

    Args:
      model: the graph.
      tied: the head is the embedding.
      where: for messages.

    Raises:
      ConfigError: a model of which llmjax does not know the names, or that says too little.
    """
    kind = model_type(model.roles, where)
    if _rotates(model.roles):
        raise ConfigError(
            f"{where}: its weights were rotated (by Hadamard's matrix) before they were rounded, and fit none; "
            "llmjax runs the graph as it is"
        )
    if not model.roles.attentions or not model.roles.acts:
        raise ConfigError(f"{where}: no attention or no MLP is found in its graph, so its sizes are not known")
    facts = _Facts(model, where)
    name = architectures()[kind].config.__name__.removesuffix("Config")
    found: dict[str, Any] = {"architectures": [f"{name}ForCausalLM"], "model_type": kind, **facts.size}
    found |= {"tie_word_embeddings": tied, **_FAMILIES[kind](facts)}
    tokenizer = model.tokenizer
    if tokenizer is not None:
        found |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids) or None}
    return found
