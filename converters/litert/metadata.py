"""``LlmMetadata``: what LiteRT-LM knows of a model beside its graph."""

from collections.abc import Mapping
from typing import Any

from converters.litert.templates import Carried
from converters.readers.mediapipe.parameters import TOP_P, LlmMetadata
from llmjax.errors import ConfigError, TokenizerError
from llmjax.outside.values import COUNT, FLAG, number
from llmjax.runtime.generation import suppressed
from llmjax.text.thinking import KINDS
from llmjax.text.tokenizer import Tokenizer

# What LiteRT-LM calls a family, by ``model_type``: it decides how tool calls are written and found.
_FAMILIES = {
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gemma3n": "gemma3n",
    "gemma3n_text": "gemma3n",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "qwen2": "qwen2p5",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "qwen3_5": "qwen3",
    "qwen3_5_text": "qwen3",
    "lfm2": "lfm2",
}
# FunctionGemma has the type of any Gemma 3, and this token.
_CALLS = "<start_function_call>"
_GEMMA4 = {
    "code_fence_start": "<|tool_call>",
    "code_fence_end": "<tool_call|>",
    "open_quote": '<|"|>',
    "close_quote": '<|"|>',
    "function_response_start": "<|tool_response>",
}
_SHARE = number(0, 1)
_HEAT = number(0, 100)


def llm_metadata(
    tokenizer: Tokenizer,
    carried: Carried,
    model_type: str,
    context: int,
    vocab_size: int,
    generation: Mapping[str, Any],
    file: str,
) -> Any:
    """The message for a model.

    Args:
      tokenizer: the model's.
      carried: its chat template.
      model_type: of its ``config.json``.
      context: tokens that the caches hold.
      vocab_size: rows of its embedding.
      generation: of which the sampling is kept, where it samples at all, and tokens that are never drawn.
      file: which says so.

    Raises:
      TokenizerError: no token of the model ends a text.
      ConfigError: what is said of generation cannot be.
    """
    message = LlmMetadata(max_num_tokens=context)
    if tokenizer.prefix_ids:
        message.start_token.token_ids.ids.extend(tokenizer.prefix_ids)
    for ids in stop_ids(tokenizer, carried, vocab_size):
        message.stop_tokens.add().token_ids.ids.append(ids)
    for text in stop_texts(tokenizer):
        message.stop_tokens.add().token_str = text
    pad = tokenizer.backend.token_to_id(tokenizer.special.get("pad_token") or "")
    if pad is not None and pad < vocab_size:
        message.pad_token.token_ids.ids.append(pad)
    if carried.source:
        message.jinja_prompt_template = carried.source
    _family(message, tokenizer, model_type)
    _sampling(message, generation, vocab_size, file)
    for begin, end, heading in KINDS:
        if begin in carried.source and None not in map(tokenizer.backend.token_to_id, (begin, end)):
            message.channels.add(channel_name="thought", start=begin + heading, end=end)
    message.supports_thinking = bool(message.channels)
    message.supports_function_calling = carried.tools
    return message


def stop_ids(tokenizer: Tokenizer, carried: Carried, vocab_size: int) -> list[int]:
    """Every token that ends a text: the checkpoint's, and the special one that its template puts behind an answer.

    Raises:
      TokenizerError: there is none.
    """
    special = tokenizer.special_tokens
    named = (special[text] for text in tokenizer.stop if text in special)
    found = {i for i in (*tokenizer.eos_ids, *named) if i < vocab_size}
    closing = next((i for text, i in special.items() if carried.turn_end.strip() == text), None)
    if closing is not None and closing < vocab_size:
        found.add(closing)
    if not found and not tokenizer.stop:
        raise TokenizerError(
            f"{tokenizer.where}: no token of the model ends a text, and LiteRT-LM needs one that does; name it: "
            '--config FILE with {"eos_token_id": ID}'
        )
    return sorted(found)


def stop_texts(tokenizer: Tokenizer) -> list[str]:
    """What ends a text and is no special token."""
    return [text for text in tokenizer.stop if text not in tokenizer.special_tokens]


def _family(message: Any, tokenizer: Tokenizer, model_type: str) -> None:
    family = _FAMILIES.get(model_type, "generic_model")
    if not message.jinja_prompt_template:
        family = "generic_model"  # of other families LiteRT-LM may have no template, and loads no file without one
    if family == "gemma3" and tokenizer.backend.token_to_id(_CALLS) is not None:
        family = "function_gemma"
    kind = getattr(message.llm_model_type, family)
    kind.SetInParent()
    if family == "gemma4":
        for field, text in _GEMMA4.items():
            if tokenizer.backend.token_to_id(text) is not None:
                setattr(kind, field, text)


def _sampling(message: Any, config: Mapping[str, Any], vocab_size: int, file: str) -> None:
    if barred := suppressed(config, vocab_size, file, "correct it"):
        message.suppress_tokens.ids.extend(barred)
    sampled = config.get("do_sample")
    if sampled is not None and (problem := FLAG.problem(sampled)):
        raise ConfigError(f"{file}: do_sample: {problem}")
    if not sampled:
        return
    found: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    for key, rule in (("top_k", COUNT), ("top_p", _SHARE), ("temperature", _HEAT)):
        if config.get(key) is not None:
            found[key] = config[key]
        if problem := rule.problem(found[key]):
            raise ConfigError(f"{file}: {key}: {problem}")
    if not found["top_p"] or not found["temperature"]:
        found = {"top_k": 1, "top_p": 1.0, "temperature": 1.0}  # the likeliest token
    # LiteRT-LM 0.18 has this sampler alone, and it wants a number of tokens.
    sampler = message.sampler_params
    sampler.type, sampler.k = TOP_P, min(found["top_k"] or vocab_size, vocab_size)
    sampler.p, sampler.temperature = found["top_p"], found["temperature"]
