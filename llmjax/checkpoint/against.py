"""Where two checkpoints differ beside their weights: ``llmjax inspect Q --against SRC``, ``llmjax diff A B``."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.readers.opening import is_graph, open_source
from converters.readers.source import Source
from llmjax.checkpoint.loading import find_model, read_tokenizer
from llmjax.checkpoint.opened import held
from llmjax.checkpoint.plan import make_plan
from llmjax.errors import CheckpointError, TokenizerError, printable
from llmjax.litert.loading import load_graph
from llmjax.text import reading
from llmjax.text.disagreement import disagreement
from llmjax.text.tokenizer import Tokenizer

# Of something that differs, by name: what the checkpoint has, and what the reference.
Differences = dict[str, tuple[Any, Any]]


def differences(candidate: str | Path | Source, reference: str | Path | Source, *, either: bool = False) -> Differences:
    """Fields of the configuration and what decides token ids, where two checkpoints differ in them.

    Of numbers the first 24 bits count: some formats hold no more.  A field that one of them does not have is as one
    that is off.  A head of its own that the reference ties is no difference: the weights are another matter
    (``weight_error.errors``).  Of vocabularies the first token that differs is named, of how they are used the first
    text that becomes other tokens (``llmjax.text.disagreement``).  A form that has no chat template or no tokenizer, or
    that ends a text at more tokens, is no difference unless ``either``.

    Args:
      candidate: a checkpoint, or its source.
      reference: the one it was made from.
      either: neither was made from the other: what one of them lacks counts.

    Raises:
      LlmjaxError: one of them is damaged or not supported.
    """
    configs, tokenizers = [], []
    for which in (candidate, reference):
        with held(which) as source:
            config = make_plan(source).config
            facts = json.loads(json.dumps(dataclasses.asdict(config))) | {"model": type(config.module()).__name__}
            configs.append(dict(_flat(facts)))
            tokenizers.append(read_tokenizer(source))
    here, there = configs
    found = {
        name: (here.get(name), there.get(name))
        for name in sorted({*here, *there})
        if _comparable(here.get(name)) != _comparable(there.get(name))
    }
    if found.get("tie_word_embeddings") == (False, True):
        del found["tie_word_embeddings"]
    return found | _of_tokenizers(tokenizers[0], tokenizers[1], either)


def tokenizer_differences(candidate: str | Path, reference: str | Path) -> Differences:
    """``differences`` of the tokenizers alone, ``either`` way; a directory needs no weights, a bundle none that can be
    taken out.

    Raises:
      LlmjaxError: one of them has no tokenizer, or a damaged one.
    """
    return _of_tokenizers(_tokenizer(candidate), _tokenizer(reference), either=True)


def _tokenizer(path: str | Path) -> Tokenizer:
    found = find_model(path)
    if is_graph(found):
        tokenizer = load_graph(found).tokenizer
    else:
        try:
            source = open_source(found)
        except CheckpointError:
            if not reading.is_in(found):
                raise
            return reading.from_huggingface(found)
        try:
            tokenizer = read_tokenizer(source)
        finally:
            source.close()
    if tokenizer is None:
        raise TokenizerError(f"{path}: has no tokenizer")
    return tokenizer


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


def _of_tokenizers(here: Tokenizer | None, there: Tokenizer | None, either: bool) -> Differences:
    found: Differences = {}
    if here is None or there is None:
        if either and here is not there:
            found["tokenizer"] = here and repr(here), there and repr(there)
        return found
    if here.fingerprint() != there.fingerprint():
        a, b = (t.backend.get_vocab(with_added_tokens=True) for t in (here, there))
        other = sorted(token for token in a.keys() | b.keys() if a.get(token) != b.get(token))
        if other:
            found["tokenizer.vocabulary"] = ({other[0]: a.get(other[0])}, {other[0]: b.get(other[0])})
        if parting := disagreement(here, there):
            found[f"tokenizer.{parting.of}"] = {parting.text: parting.here}, {parting.text: parting.there}
        stops = {i for i in there.eos_ids if there.piece(i) in here.stop}
        lacking = not stops.union(here.eos_ids).issuperset(there.eos_ids)
        for name in ("prefix_ids", "suffix_ids", *["eos_ids"] * (either or lacking)):
            if getattr(here, name) != getattr(there, name):
                found[f"tokenizer.{name}"] = getattr(here, name), getattr(there, name)
    for name in ("chat_template", "tools_template"):
        templates = getattr(here, name), getattr(there, name)
        if templates[0] != templates[1] and (either or None not in templates):
            found[f"tokenizer.{name}"] = templates
    return found


def to_text(found: Differences, of: str = "configuration and tokenizer") -> str:
    """For a terminal; ``of`` what was looked at."""
    if not found:
        return f"{of}: the same"
    width = max(map(len, found))
    lines = [f"  {name:{width}}  {_as_json(here)}, not {_as_json(there)}" for name, (here, there) in found.items()]
    return printable("\n".join(["differs in", *lines]))


def _as_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else f"{text[:100]}..."


def to_dict(found: Differences) -> dict[str, dict[str, Any]]:
    """As JSON would hold it."""
    return {name: {"value": here, "reference": there} for name, (here, there) in found.items()}
