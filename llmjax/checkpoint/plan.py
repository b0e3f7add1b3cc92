"""Which tensor of a checkpoint fills which parameter of the model its config describes: from headers alone."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from converters.readers.huggingface import HuggingFaceSource
from converters.readers.mediapipe.source import MediapipeSource
from converters.readers.source import Source, TensorSpec
from llmjax.checkpoint import gguf_config, gguf_names, gguf_ropes, mediapipe_config, mediapipe_names
from llmjax.checkpoint.graph_source import GraphSource
from llmjax.errors import named
from llmjax.models.architecture import Architecture
from llmjax.models.config import DecoderConfig
from llmjax.models.names import Names, SameNames, sources_of, stem
from llmjax.models.registry import read_config
from llmjax.models.tree import parameter_shapes

# Keys of a config.json.
Override = Mapping[str, Any] | None
# What no weight is stored as, whatever it was quantized by: what the integers mean is not in the file.
_WHOLE = frozenset({"BOOL", *(f"{sign}{bits}" for sign in "IU" for bits in (8, 16, 32, 64))})


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One parameter and the source tensors it is made from."""

    parameter: str
    shape: tuple[int, ...]
    sources: tuple[TensorSpec, ...]
    make: Callable[[list[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What loading a checkpoint would do, known from headers alone.

    Attributes:
      architecture: the registry's entry.
      config: the model's dimensions.
      assignments: one per parameter, in the order of the tree.
      tied: source tensors that repeat the embedding; loading checks that they do.
      dropped: source tensors that are known and not needed.
      configuring: source tensors whose values are in the config (``rope_freqs`` of a GGUF file).
      problems: what is missing, left over or of the wrong shape; loading refuses when there is any.
    """

    architecture: Architecture
    config: DecoderConfig
    assignments: list[Assignment]
    tied: list[TensorSpec]
    dropped: list[TensorSpec]
    configuring: list[TensorSpec]
    problems: list[str]


def describe(source: Source, override: Override = None) -> tuple[Mapping[str, Any], str]:
    """The source's configuration as Hugging Face would write it, and how messages call it.

    Args:
      source: the checkpoint.
      override: keys that win over the source's own; with ``model_type`` among them it is the whole configuration.
    """
    if override is not None and "model_type" in override:
        return override, f"{source.path}: the configuration given for it"
    raw, where = _own_config(source)
    return (raw, where) if override is None else ({**raw, **override}, f"{where} with the configuration given for it")


def _own_config(source: Source) -> tuple[Mapping[str, Any], str]:
    if source.format == "gguf":
        shapes = {n: source.spec(n).shape for n in source.names()}
        config = gguf_config.hf_config(source.metadata, shapes, str(source.path))
        return gguf_ropes.described(config, _ropes(source)), str(source.path)
    if source.format == "graph":
        return source.config, f"{source.path}: the configuration found in its graph (--config gives another)"
    if isinstance(source, MediapipeSource):
        kind = mediapipe_config.find(source.model_type, str(source.path))
        return mediapipe_config.hf_config(source.parameters, kind, str(source.path)), str(source.path)
    return source.config, str(source.directory / "config.json")


def make_plan(source: Source, override: Override = None) -> Plan:
    """Matches a source's tensors with the parameters of the model its config describes.

    Args:
      source: the checkpoint.
      override: see ``describe``.

    Raises:
      ConfigError: the configuration is not supported.
    """
    raw, where = describe(source, override)
    architecture, config = read_config(raw, where)
    specs = {name: source.spec(name) for name in source.names()}
    stems = {_stem(source, name): name for name in specs}
    problems: list[str] = []
    used: set[str] = set()
    configuring = []
    names = _names(source, architecture, config, specs)
    ignored: frozenset[str] = frozenset()
    if source.format == "gguf":
        ropes = _ropes(source)
        config = gguf_ropes.with_ropes(config, ropes, where)
        configuring = [specs[name] for name in ropes]
        used |= set(ropes)
        ignored = gguf_names.unused(config, specs)
    assignments = []
    known = min(config.num_hidden_layers, _last_layer(specs) + 2)  # one without tensors tells of all the others
    if known < config.num_hidden_layers:
        layers = config.num_hidden_layers
        problems.append(f"num_hidden_layers: {layers}, but no tensor is of a layer after number {known - 2}")

    absent = source.absent if isinstance(source, HuggingFaceSource) else {}
    embedding, head = (_stem(source, sources_of(f"{end}.weight", names)[1][0]) for end in ("embed", "head"))
    if config.tie_word_embeddings and head in stems:  # of one table under two names a file may keep either
        stems.setdefault(embedding, stems[head])

    def has(name: str) -> bool:
        return name in specs or _stem(source, name) in stems

    for parameter, shape in parameter_shapes(config.shortened(known)).items():
        entry, files = sources_of(parameter, names, has)
        found = []
        for name in files:
            name = name if name in specs else stems.get(_stem(source, name), name)
            if name not in specs:
                there = f"; the index says it is in {named(absent[name])}" if name in absent else ""
                problems.append(f"missing tensor {named(name)}, needed for {parameter} {list(shape)}{there}")
                continue
            used.add(name)
            found.append(specs[name])
            expected = entry.source_shape(shape)
            if specs[name].shape != expected:
                found_shape = list(specs[name].shape)
                problems.append(f"tensor {named(name)}: expected shape {list(expected)}, found {found_shape}")
            if specs[name].dtype in _WHOLE:
                problems.append(f"tensor {named(name)}: expected floats, found whole numbers ({specs[name].dtype})")
        assignments.append(Assignment(parameter, shape, tuple(found), entry.make))
    tied, dropped = [], []
    for name in sorted(set(specs) - used):
        if config.tie_word_embeddings and _stem(source, name) == head:
            tied.append(specs[name])
        elif name in ignored or architecture.drops(name, config):
            dropped.append(specs[name])
        else:
            what = f"tensor {named(name)} {list(specs[name].shape)}"
            problems.append(f"{what} is not part of a {architecture.model_type} model")
    return Plan(architecture, config, assignments, tied, dropped, configuring, problems)


def _ropes(source: Source) -> dict[str, np.ndarray]:
    """Those tensors of a GGUF file that its configuration needs."""
    return {name: source.read(name) for name in gguf_ropes.TENSORS if name in source.names()}


def _last_layer(names: Iterable[str]) -> int:
    """The highest number of a layer in names of tensors; -1 where there is none."""
    return max((int(n) for name in names for n in re.findall(r"[._](\d{1,4})\.", name)), default=-1)


def _stem(source: Source, name: str) -> str:
    """What decides which parameter a tensor is of: Hugging Face's names alone come in several ways."""
    return stem(name) if source.format in ("huggingface", "graph") else name


def _names(source: Source, architecture: Architecture, config: DecoderConfig, specs: Mapping[str, TensorSpec]) -> Names:
    if source.format == "gguf":
        return gguf_names.names(config, architecture.model_type, specs)
    if isinstance(source, MediapipeSource):
        return mediapipe_names.names(architecture.model_type, source.backend)
    own = source.format == "llmjax" or (isinstance(source, GraphSource) and source.recorded)
    return SameNames() if own else architecture.hf_names(config)
