"""``generation_config.json``: how the people who made a model would have it sampled."""

import warnings
from collections.abc import Mapping
from typing import Any

from llmjax.errors import ConfigError, RequestError
from llmjax.outside.values import each, integer
from llmjax.runtime.params import SamplingParams

FILE = "generation_config.json"
# Its names for ours; as in vLLM, and stop_strings.
_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
# What else changes the text there, by the value that changes nothing.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "exponential_decay_length_penalty": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "max_time": None,
    "num_return_sequences": 1,
    "constraints": [],
    "force_words_ids": [],
    "watermarking_config": {},
    "token_healing": False,
    "dola_layers": None,
}


def sampling_defaults(config: Mapping[str, Any], context: int, where: str) -> dict[str, Any]:
    """Fields of ``SamplingParams`` that the file sets; a text that is not sampled there (``do_sample`` false) is greedy
    here.  What it asks for beside those, and llmjax does not do, is warned of.

    Args:
      config: its keys; null says nothing.
      context: of the model, in tokens.
      where: the file, for messages.

    Raises:
      ConfigError: a value is out of range.
    """
    config = {name: value for name, value in config.items() if value is not None}
    found = {ours: config[name] for name, ours in _NAMES.items() if name in config}
    if "max_tokens" in found and "min_tokens" in found:
        found["min_tokens"] = min(found["min_tokens"], found["max_tokens"])
    sampled = config.get("do_sample")
    if not isinstance(sampled, bool | None):
        raise ConfigError(f"{where}: do_sample: expected true or false, found {sampled!r:.80}")
    if sampled is False:
        found["temperature"] = 0.0
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise ConfigError(
            f"{where}: {error}; correct it, or take the plain defaults (generation_config='none')"
        ) from None
    left = [name for name, neutral in _NEUTRAL.items() if name in config and config[name] != neutral]
    longest = config.get("max_length")  # prompt and answer; 20 is transformers' for nobody said anything
    if longest is not None and longest != 20 and not (isinstance(longest, int) and longest >= context):
        left.append("max_length")
    if left:
        warnings.warn(f"{where}: not heeded, for llmjax does not do it: {', '.join(left)}", stacklevel=4)
    return found


def suppressed(config: Mapping[str, Any], vocab_size: int, where: str) -> tuple[int, ...]:
    """``suppress_tokens``: ids that are never drawn.

    Raises:
      ConfigError: they are no ids of this vocabulary.
    """
    found = config.get("suppress_tokens") or []
    ids = each(integer(0, vocab_size - 1), f"a list of token ids below {vocab_size}", kinds=(list, tuple))
    if problem := ids.problem(found):
        raise ConfigError(
            f"{where}: suppress_tokens: {problem}; correct it, or take the plain defaults (generation_config='none')"
        )
    return tuple(dict.fromkeys(found))


def told(own: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """A line that says which of the model's own settings are in force; empty where none is."""
    heeded = [f"{name} {value!r}" for name, value in own.items() if name not in given]
    return f"{FILE}: {', '.join(heeded)} (--generation-config none for the plain defaults)" if heeded else ""
