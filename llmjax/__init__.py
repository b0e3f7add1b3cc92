"""A pure-JAX reference implementation of on-device LLM inference.

The public names are imported when first used: ``import llmjax`` alone loads neither JAX nor a tokenizer, and changes
nothing global.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmjax.checkpoint.inspection import inspect
    from llmjax.checkpoint.loading import load
    from llmjax.errors import (
        CheckpointError,
        ConfigError,
        LlmjaxError,
        LoraError,
        RequestError,
        ResumeError,
        TokenizerError,
        TrainingError,
    )
    from llmjax.genai.session import LlmInferenceSession, LlmInferenceSessionOptions
    from llmjax.llm import LLM
    from llmjax.llm_inference import LlmInference, LlmInferenceOptions
    from llmjax.model import Model
    from llmjax.models.architecture import Architecture
    from llmjax.models.registry import register
    from llmjax.oracle.compare import compare
    from llmjax.oracle.comparison import Comparison
    from llmjax.oracle.hidden_states import HiddenStates, hidden_states
    from llmjax.oracle.trace import Trace, trace
    from llmjax.runtime.outputs import CompletionOutput, RequestOutput, Score
    from llmjax.runtime.params import SamplingParams
    from llmjax.training.config import TrainConfig
    from llmjax.training.loop import Training, finetune
    from llmjax.writing import convert

_HOME = {
    "Architecture": "models.architecture",
    "register": "models.registry",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "LlmjaxError": "errors",
    "LoraError": "errors",
    "RequestError": "errors",
    "ResumeError": "errors",
    "TokenizerError": "errors",
    "TrainingError": "errors",
    "Comparison": "oracle.comparison",
    "compare": "oracle.compare",
    "convert": "writing",
    "finetune": "training.loop",
    "TrainConfig": "training.config",
    "Training": "training.loop",
    "HiddenStates": "oracle.hidden_states",
    "hidden_states": "oracle.hidden_states",
    "inspect": "checkpoint.inspection",
    "LLM": "llm",
    "LlmInference": "llm_inference",
    "LlmInferenceOptions": "llm_inference",
    "LlmInferenceSession": "genai.session",
    "LlmInferenceSessionOptions": "genai.session",
    "Trace": "oracle.trace",
    "load": "checkpoint.loading",
    "trace": "oracle.trace",
    "Model": "model",
    "CompletionOutput": "runtime.outputs",
    "RequestOutput": "runtime.outputs",
    "Score": "runtime.outputs",
    "SamplingParams": "runtime.params",
}

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Architecture",
    "CheckpointError",
    "Comparison",
    "CompletionOutput",
    "ConfigError",
    "HiddenStates",
    "LlmInference",
    "LlmInferenceOptions",
    "LlmInferenceSession",
    "LlmInferenceSessionOptions",
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
    "TrainConfig",
    "Training",
    "TrainingError",
    "compare",
    "convert",
    "finetune",
    "hidden_states",
    "inspect",
    "load",
    "register",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmjax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llmjax.{_HOME[name]}"), name)
