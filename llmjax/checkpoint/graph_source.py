"""The weights in an op graph (``.tflite``, ``.task``, ``.litertlm``) as a ``Source``: under Hugging Face's names, with
what the exporter folded into them taken out again, quantized ones as they are.  Graphs that llmjax wrote say what they
were made of.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.readers.digest import Stamp
from converters.readers.litert import record
from converters.readers.mediapipe import package
from converters.readers.opening import is_graph, open_source
from converters.readers.source import Source, TensorSpec
from llmjax.checkpoint import graph_config
from llmjax.errors import CheckpointError
from llmjax.litert.loading import load_graph, tokenizers_of
from llmjax.litert.model import GraphModel
from llmjax.litert.module import EMBEDDER, MAIN
from llmjax.litert.products import Filter
from llmjax.litert.steps import DAMAGE
from llmjax.quant.qtensor import QTensor, dequantize

_TABLE, _HEAD = "embed_tokens.weight", "lm_head.weight"
_DTYPES = {"float32": "F32", "float16": "F16"}


@dataclasses.dataclass(frozen=True)
class _Held:
    """A constant, and what became of the weight it was made of: ``value = weight * factor + offset``."""

    value: Any
    factor: float = 1.0
    offset: float = 0.0
    axes: tuple[int, ...] | None = None

    def packed(self) -> QTensor | None:
        """None for floats."""
        if not isinstance(self.value, QTensor):
            return None
        q = jax.tree.map(np.asarray, self.value)
        if self.factor == 1:
            return q
        return q.replace(scales=(q.scales.astype(np.float32) / np.float32(self.factor)))

    def read(self) -> np.ndarray:
        """The weight; vectors without leading dimensions of one."""
        q = self.packed()
        if q is not None:
            return np.asarray(dequantize(q))
        found = self.value
        array = np.asarray(found.values * found.scales if isinstance(found, Filter) else found)
        if self.axes is not None:
            array = array.transpose(self.axes)
        elif array.ndim > 2 or (array.ndim == 2 and self.offset):
            array = array.reshape(-1)
        if self.factor == 1 and not self.offset:
            return array
        return (array.astype(np.float64) / self.factor - self.offset).astype(np.float32)


class GraphSource:
    """A bundle, or a graph alone, as a ``Source``.

    Attributes:
      model: that runs the graph.
      recorded: whether it is one of llmjax's own, and the names are llmjax's.
      vocabulary: the bundle's SentencePiece model; None where there is none.

    Args:
      path: of the file.

    Raises:
      CheckpointError: no language model's, damaged, or not of an exporter whose names are known.
    """

    format = "graph"

    def __init__(self, path: Path):
        self.path, self.directory = path, path.parent
        self.model: GraphModel = load_graph(path)
        self.metadata: dict[str, Any] = {}
        assert self.model.origin is not None
        bundle = None if package.kind_of(path) is None else package.Package(path)
        ends = {"eos_token_id": list(self.model.eos_ids), **self.model.generation_config}
        self.recorded = record.NAME in self.model.module.graphs[MAIN].file.metadata
        # A graph alone knows no end of texts; what it was made of may.
        self.generation_config: dict[str, Any] | None = None if self.recorded and bundle is None else ends
        parts = tokenizers_of(bundle) if bundle else []
        vocabularies = [part for part in parts if part.kind == package.SENTENCEPIECE]
        self.vocabulary = bytes(bundle.read(vocabularies[0])) if bundle and vocabularies else None
        self.files: tuple[Stamp, ...] = self.model.origin.files
        self.config: dict[str, Any]
        if self.recorded:
            self.config, self._held = self._recorded()
            return
        try:
            self._held = self._find()
            tied = _HEAD not in self._held
            self.config = graph_config.hf_config(self.model, tied, str(path))
        except DAMAGE as error:
            raise CheckpointError(
                f"{path}: damaged, or not supported: its weights cannot be told apart: {type(error).__name__} {error}"
            ) from None

    def _recorded(self) -> tuple[dict[str, Any], dict[str, _Held]]:
        """Of a graph that llmjax wrote: the configuration, and every parameter."""
        graph = self.model.module.graphs[MAIN]
        number = graph.file.signatures[self.model.module.decode_ports.name].subgraph
        found: dict[str, Any] = {}
        stacks: dict[str, dict[int, Any]] = {}
        try:
            config, values = record.read(bytes(graph.file.metadata[record.NAME]))
            for i, tensor in enumerate(graph.file.subgraphs[number].tensors):
                if tensor.name and graph.file.is_constant(tensor) and not tensor.name.endswith(record.SCALES):
                    found[tensor.name] = graph.constant(number, i)
            for name in [name for name in found if re.search(r"\.\d{1,9}$", name)]:
                stack, _, place = name.rpartition(".")
                stacks.setdefault(stack, {})[int(place)] = found.pop(name)
            for name, parts in stacks.items():
                each = [parts[i] for i in range(len(parts))]
                found[name] = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{self.path}: damaged: {record.NAME}: {type(error).__name__} {error}") from None
        return config, {name: _Held(x, axes=tuple(range(len(x.shape)))) for name, x in (found | values).items()}

    def _find(self) -> dict[str, _Held]:
        model, roles = self.model, self.model.roles
        kind = graph_config.model_type(roles, str(self.path))
        graph, number = model.module.graphs[MAIN], roles.index
        offset = 1.0 if kind in graph_config.UNIT_OFFSET else 0.0

        def value(i: int) -> Any:
            return graph.constant(number, i)

        found: dict[str, _Held] = {}
        for step in roles.steps.values():
            if step.weight is not None:
                held = _Held(value(step.weight), step.factor, offset if step.eps is not None else 0.0)
                found[f"{step.module}.weight"] = held
            if step.bias is not None:
                found[f"{step.module}.bias"] = _Held(value(step.bias), step.factor)
        for module, (i, bias) in roles.kernels.items():  # [1, D, k] for [D, 1, k]
            found[f"{module}.weight"] = _Held(value(i), axes=(1, 0, 2))
            if bias is not None:
                found[f"{module}.bias"] = _Held(value(bias).reshape(-1))
        if roles.table is not None:
            found[_TABLE] = _Held(value(roles.table))
        elif EMBEDDER in model.module.graphs:
            other = model.module.graphs[EMBEDDER]
            signature = next(iter(other.signatures.values()))
            lookups = [op for op in other.file.subgraphs[signature.subgraph].operators if op.name == "EMBEDDING_LOOKUP"]
            if lookups:
                found[_TABLE] = _Held(other.constant(signature.subgraph, lookups[0].inputs[1]))
        missing = [name for name in (_TABLE, _HEAD) if name not in found]
        if missing or not roles.layers:
            raise CheckpointError(
                f"{self.path}: the weights of this graph cannot be told apart ({', '.join(missing) or 'no layers'}): "
                "llmjax knows the names that litert-torch's export_hf gives them"
            )
        if _same(found[_TABLE], found[_HEAD]):
            del found[_HEAD]
        return found

    def names(self) -> list[str]:
        """See ``Source``."""
        return list(self._held)

    def spec(self, name: str) -> TensorSpec:
        """See ``Source``."""
        value = self._held[name].value
        if isinstance(value, QTensor):
            kind = "INT4" if value.bits == 4 else "INT8"
            return TensorSpec(name, value.shape, kind, value.nbytes, self.path)
        array = self._held[name].read()
        return TensorSpec(name, array.shape, _DTYPES.get(array.dtype.name, array.dtype.name), array.nbytes, self.path)

    def packed(self, name: str) -> QTensor | None:
        """A quantized weight as it is stored; None for floats."""
        return self._held[name].packed()

    def read(self, name: str) -> np.ndarray:
        """See ``Source``."""
        return self._held[name].read()

    def release(self, name: str) -> None:
        """See ``Source``."""

    def close(self) -> None:
        """See ``Source``."""


def _same(table: _Held, head: _Held) -> bool:
    """Whether the head is the embedding: one constant, or a copy that a soft-cap was folded into."""
    if table.value is head.value:
        return True
    a, b = table.packed(), head.packed()
    if a is None or b is None:
        both = [a, b] == [None, None]
        return both and np.allclose(table.read(), head.read(), rtol=1e-6, atol=0)
    if (a.scheme, a.shape) != (b.scheme, b.shape):
        return False
    return np.array_equal(a.values, b.values) and np.allclose(a.scales, b.scales, rtol=1e-6, atol=0)


def open_checkpoint(path: Path) -> Source:
    """The weights at a path, those in an op graph, too.

    Raises:
      CheckpointError: see ``open_source`` and ``GraphSource``.
    """
    return GraphSource(path) if is_graph(path) else open_source(path)
