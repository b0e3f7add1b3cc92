"""A pure-JAX reference implementation of on-device LLM inference.

The public names are imported when first used: ``import llmjax`` alone loads neither JAX nor a tokenizer, and changes
nothing global.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmjax.conversion import convert
    from llmjax.errors import (
        CheckpointError,
        ConfigError,
        LlmjaxError,
        LoraError,
        RequestError,
        ResumeError,
        TokenizerError,
    )
    from llmjax.inspection import inspect
    from llmjax.llm import LLM
    from llmjax.llm_inference import LlmInference, LlmInferenceOptions
    from llmjax.loading import load
    from llmjax.model import Model
    from llmjax.oracle.trace import Trace, trace
    from llmjax.outputs import CompletionOutput, RequestOutput, Score
    from llmjax.runtime.params import SamplingParams

_HOME = {
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "LlmjaxError": "errors",
    "LoraError": "errors",
    "RequestError": "errors",
    "ResumeError": "errors",
    "TokenizerError": "errors",
    "convert": "conversion",
    "inspect": "inspection",
    "LLM": "llm",
    "LlmInference": "llm_inference",
    "LlmInferenceOptions": "llm_inference",
    "Trace": "oracle.trace",
    "load": "loading",
    "trace": "oracle.trace",
    "Model": "model",
    "CompletionOutput": "outputs",
    "RequestOutput": "outputs",
    "Score": "outputs",
    "SamplingParams": "runtime.params",
}

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "LlmInference",
    "LlmInferenceOptions",
    "LlmjaxError",
    "LoraError",
    "Model",
    "RequestError",
    "RequestOutput",
    "ResumeError",
    "SamplingParams",
    "Score",
    "TokenizerError",
    "Trace",
    "convert",
    "inspect",
    "load",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmjax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llmjax.{_HOME[name]}"), name)
