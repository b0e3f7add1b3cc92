"""``generation_config.json``: how the people who made a model would have it sampled."""

import warnings
from collections.abc import Mapping
from typing import Any

from llmjax.errors import ConfigError, RequestError, shown
from llmjax.models.generation_keys import HEEDED, NEUTRAL
from llmjax.outside.values import each, integer
from llmjax.runtime.params import SamplingParams

# What there is to do about a value that cannot be.
_WAY_OUT = "correct it, or take the plain defaults (generation_config='none', --generation-config none)"


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
    found = {ours: config[name] for name, ours in HEEDED.items() if name in config}
    if "max_tokens" in found and "min_tokens" in found:
        found["min_tokens"] = min(found["min_tokens"], found["max_tokens"])
    sampled = config.get("do_sample")
    if not isinstance(sampled, bool | None):
        raise ConfigError(f"{where}: do_sample: expected true or false, found {shown(sampled)}; {_WAY_OUT}")
    if sampled is False:
        found["temperature"] = 0.0
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise ConfigError(f"{where}: {error}; {_WAY_OUT}") from None
    left = [name for name, neutral in NEUTRAL.items() if name in config and config[name] != neutral]
    longest = config.get("max_length")  # prompt and answer; 20 is transformers' for nobody said anything
    if longest is not None and longest != 20 and not (isinstance(longest, int) and longest >= context):
        left.append("max_length")
    if left:
        warnings.warn(f"{where}: not heeded, for llmjax does not do it: {', '.join(left)}", stacklevel=4)
    return found


def suppressed(config: Mapping[str, Any], vocab_size: int, where: str, way_out: str = _WAY_OUT) -> tuple[int, ...]:
    """``suppress_tokens``: ids that are never drawn; what the model has no row for never is.

    Args:
      config: the file's keys.
      vocab_size: rows of the model's vocabulary.
      where: the file, for messages.
      way_out: what there is to do about a value that cannot be.

    Raises:
      ConfigError: they are no ids.
    """
    found = config.get("suppress_tokens") or []
    if problem := each(integer(0), "a list of token ids", kinds=(list, tuple)).problem(found):
        raise ConfigError(f"{where}: suppress_tokens: {problem}; {way_out}")
    return tuple(i for i in dict.fromkeys(found) if i < vocab_size)


def told(own: Mapping[str, Any], given: Mapping[str, Any], file: str) -> str:
    """A line that says which of the model's own settings, from ``file``, are in force; empty where none is."""
    heeded = [f"{name} {value!r}" for name, value in own.items() if name not in given]
    return f"{file}: {', '.join(heeded)} (--generation-config none for the plain defaults)" if heeded else ""
