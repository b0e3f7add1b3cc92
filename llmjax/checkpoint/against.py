"""Whether two checkpoints are one model but for the rounding of its weights: ``llmjax inspect Q --against SRC``."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.readers.opening import open_source
from llmjax.checkpoint.loading import find_model, read_tokenizer
from llmjax.checkpoint.plan import make_plan
from llmjax.errors import printable
from llmjax.text.disagreement import disagreement
from llmjax.text.tokenizer import Tokenizer

# Of something that differs, by name: what the checkpoint has, and what the reference.
Differences = dict[str, tuple[Any, Any]]


def differences(candidate: str | Path, reference: str | Path) -> Differences:
    """Fields of the configuration and what decides token ids, where two checkpoints differ in them.

    Of numbers the first 24 bits count: some formats hold no more.  A field that one of them does not have is as one
    that is off.  A head of its own that the reference ties is no difference: the weights are another matter
    (``weight_error.errors``).  Of vocabularies the first token that differs is named,
    of how they are used the first text that becomes other tokens (``llmjax.text.disagreement``); of tokens that end a
    text what the candidate lacks.

    Args:
      candidate: a checkpoint.
      reference: the one it was made from.

    Raises:
      LlmjaxError: one of them is damaged or not supported.
    """
    configs, tokenizers = [], []
    for path in (candidate, reference):
        source = open_source(find_model(path))
        try:
            config = make_plan(source).config
            facts = json.loads(json.dumps(dataclasses.asdict(config))) | {"model": type(config.module()).__name__}
            configs.append(dict(_flat(facts)))
            tokenizers.append(read_tokenizer(source))
        finally:
            source.close()
    here, there = configs
    found = {
        name: (here.get(name), there.get(name))
        for name in sorted({*here, *there})
        if _comparable(here.get(name)) != _comparable(there.get(name))
    }
    if found.get("tie_word_embeddings") == (False, True):
        del found["tie_word_embeddings"]
    return found | _of_tokenizers(*tokenizers)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _comparable(value: Any) -> Any:
    if isinstance(value, list):
        return [_comparable(x) for x in value] if any(value) else None
    return float(np.float32(value)) if isinstance(value, int | float) and value else value or None


def _of_tokenizers(here: Tokenizer | None, there: Tokenizer | None) -> Differences:
    found: Differences = {}
    if here is None or there is None:  # a file without one is used with the other's
        return found
    if here.fingerprint() != there.fingerprint():
        a, b = (t.backend.get_vocab(with_added_tokens=True) for t in (here, there))
        other = sorted(token for token in a.keys() | b.keys() if a.get(token) != b.get(token))
        if other:
            found["tokenizer.vocabulary"] = ({other[0]: a.get(other[0])}, {other[0]: b.get(other[0])})
        for name in ("prefix_ids", "suffix_ids"):
            if getattr(here, name) != getattr(there, name):
                found[f"tokenizer.{name}"] = getattr(here, name), getattr(there, name)
        if parting := disagreement(here, there):
            found[f"tokenizer.{parting.of}"] = {parting.text: parting.here}, {parting.text: parting.there}
        stops = {i for i in there.eos_ids if there.piece(i) in here.stop}
        if not stops.union(here.eos_ids).issuperset(there.eos_ids):  # GGUF ends a text at more tokens than others do
            found["tokenizer.eos_ids"] = here.eos_ids, there.eos_ids
    if None not in (here.chat_template, there.chat_template) and here.chat_template != there.chat_template:
        found["tokenizer.chat_template"] = here.chat_template, there.chat_template
    return found


def to_text(found: Differences) -> str:
    """For a terminal."""
    if not found:
        return "configuration and tokenizer: the same"
    width = max(map(len, found))
    lines = [f"  {name:{width}}  {_as_json(here)}, not {_as_json(there)}" for name, (here, there) in found.items()]
    return printable("\n".join(["differs in", *lines]))


def _as_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else f"{text[:100]}..."


def to_dict(found: Differences) -> dict[str, dict[str, Any]]:
    """As JSON would hold it."""
    return {name: {"value": here, "reference": there} for name, (here, there) in found.items()}
