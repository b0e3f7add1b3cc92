"""MediaPipe's names: ``converter``, ``bundler``, and the LLM Inference API with its sessions.

Code written for MediaPipe changes one line: ``from llmjax.genai import converter, bundler``.

Every option of MediaPipe's guide to the LLM Inference API, in its order, and then what its later versions and llmjax
have; names are Python's.  A default of ``-`` is none: the option must be given.

===============================  ========  ================================  =========================================
option                           default   range                             what llmjax does
===============================  ========  ================================  =========================================
LlmInferenceOptions
model_path                       -         path                              loads what ``llmjax.load`` reads
max_tokens                       512       integer from 2                    limits prompt and answer together
top_k                            40        integer from 1                    draws among those; 1 is greedy
temperature                      0.8       0 to 100                          divides the logits; 0 is greedy
random_seed                      0         0 to 2**64 - 1                    fixes the draws, which are llmjax's own
lora_path                        None      path, LoraSource                  adds MediaPipe's LoRA file, or PEFT's
result_listener                  None      function(text, done)              is told of pieces, in another thread
error_listener                   None      function(error)                   is told what ended such an answer
max_top_k                        40        integer from 1                    limits the top_k of sessions
supported_lora_ranks             ()        integers from 1                   refuses other ranks; () refuses none
preferred_backend                None      cpu, gpu                          is refused where JAX runs on another
numerics                         fast      llmjax.numerics                   says how everything is computed
LlmInferenceSessionOptions
top_k                            40        integer from 1 to max_top_k       draws among those; 1 is greedy
top_p                            1.0       above 0, to 1                     keeps the likeliest up to this sum
temperature                      0.8       0 to 100                          divides the logits; 0 is greedy
random_seed                      0         0 to 2**64 - 1                    fixes the draws of every answer alike
lora_path                        None      path, LoraSource                  adds this adapter instead of the task's
prompt_templates                 None      PromptTemplates                   stands around what each role says
constraint_handle                None      None                              is refused: there are no constraints yet
graph_options                    None      None                              is refused: neither vision nor audio
ConversionConfig
input_ckpt                       -         path, pattern                     reads a directory, a file or several
ckpt_format                      -         safetensors, pytorch              says which files of a directory are meant
model_type                       -         one of MediaPipe's six            checks the checkpoint against it
backend                          -         cpu, gpu                          writes the one or the other layout
output_dir                       -         path                              gets raw weight files and layer_info.txt
output_tflite_file               None      path                              is the model; None: output_dir/model.tflite
vocab_model_file                 ''        path                              gives the vocabulary; '': the checkpoint's
lora_ckpt                        None      path                              is PEFT's, of q, k, v and o in every layer
lora_rank                        None      integer from 1                    is checked against lora_ckpt
lora_output_tflite_file          None      path                              is the LoRA file
BundleConfig
tflite_model                     -         path                              is packed as it is
tokenizer_model                  -         path                              is packed, if SentencePiece reads it
start_token                      -         string                            must be in the vocabulary
stop_tokens                      -         list of strings                   must be in the vocabulary
output_filename                  -         path                              gets .task where that is missing
enable_bytes_to_unicode_mapping  False     True, False                       says that texts are spelled as GPT-2 does
===============================  ========  ================================  =========================================

The other fields of ``ConversionConfig`` and ``BundleConfig`` are told at those.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmjax.genai import bundler, converter
    from llmjax.genai.session import LlmInferenceSession, LlmInferenceSessionOptions, PromptTemplates
    from llmjax.llm_inference import LlmInference, LlmInferenceOptions

_HOMES = {
    "LlmInference": "llmjax.llm_inference",
    "LlmInferenceOptions": "llmjax.llm_inference",
    "LlmInferenceSession": "llmjax.genai.session",
    "LlmInferenceSessionOptions": "llmjax.genai.session",
    "PromptTemplates": "llmjax.genai.session",
}
__all__ = [
    "LlmInference",
    "LlmInferenceOptions",
    "LlmInferenceSession",
    "LlmInferenceSessionOptions",
    "PromptTemplates",
    "bundler",
    "converter",
]


def __getattr__(name: str) -> Any:
    if name in ("bundler", "converter"):
        return importlib.import_module(f"llmjax.genai.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
