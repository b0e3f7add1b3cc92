"""TFLite graphs in the making: tensors, operators, and the file that holds them.

An operator with the inputs and options of an earlier one is that one; what no output needs is left out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tflite.BuiltinOperator import BuiltinOperator
from tflite.BuiltinOptions import BuiltinOptions
from tflite.TensorType import TensorType

from converters.litert.tables import Field, Tables
from converters.readers.litert import record
from converters.readers.litert.options import FIELDS
from converters.readers.litert.tflite import IDENTIFIER

Shape = tuple[int, ...]
TYPES = {"float32": "FLOAT32", "int32": "INT32", "bool": "BOOL"}
# Where a buffer outside the flatbuffer begins: cache lines, and more than any runtime asks for.
ALIGNMENT = 64
# The schema's names of options, where they are not the operator's in another spelling.
_OPTIONS = {"BATCH_MATMUL": "BatchMatMulOptions", "GELU": "GeluOptions", "SUM": "ReducerOptions"}
_OPTIONS |= {"MEAN": "ReducerOptions", "REDUCE_MAX": "ReducerOptions", "REDUCE_MIN": "ReducerOptions"}
# The first versions that take few bits, or that there are; all else is of version 1.
_VERSIONS = {"BROADCAST_TO": 2, "FULLY_CONNECTED": 12, "EMBEDDING_LOOKUP": 4, "DEQUANTIZE": 6}


@dataclasses.dataclass(frozen=True)
class Form:
    """How a weight's values are stored.

    Attributes:
      type: ``FLOAT32``, ``INT8``, ``INT4``.
      block: inputs that share a scale; 0 for one scale a row.
    """

    type: str
    block: int = 0

    @property
    def bits(self) -> int:
        """Of one value."""
        return {"FLOAT32": 32, "INT8": 8, "INT4": 4}[self.type]


FLOAT32 = Form("FLOAT32")


@dataclasses.dataclass
class Weight:
    """A weight ``[out, in]``, whose values stand behind the flatbuffer.

    Attributes:
      name: of the parameter.
      shape: of it.
      form: how it is stored.
      scales: float32 ``[out]`` of a form with a scale a row, once they are known.
    """

    name: str
    shape: tuple[int, int]
    form: Form
    scales: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Of the values."""
        return self.shape[0] * self.shape[1] * self.form.bits // 8

    @property
    def blocks(self) -> int:
        """Scales of a row that stand in a buffer of their own, float16; 0 for none."""
        return self.shape[1] // self.form.block if self.form.block else 0

    @property
    def scale_bytes(self) -> int:
        """Of that buffer."""
        return 2 * self.shape[0] * self.blocks

    @property
    def parts(self) -> "tuple[Weight, ...]":
        """Itself."""
        return (self,)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Weights of one shape and form, which are one parameter ``[E, out, in]``."""

    parts: tuple[Weight, ...]

    @property
    def shape(self) -> Shape:
        """Of the parameter."""
        return (len(self.parts), *self.parts[0].shape)

    @property
    def form(self) -> Form:
        """How each is stored."""
        return self.parts[0].form


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor: of a constant its bytes, or the weight whose values or scales it is."""

    name: str
    type: str
    shape: Shape
    data: bytes | None = None
    weight: str | None = None


@dataclasses.dataclass(frozen=True)
class Operator:
    """One step; numbers of tensors, -1 for an input that is left out."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def output(self) -> int:
        """The first one, of most operators the only one."""
        return self.outputs[0]


class Graph:
    """One signature.

    Args:
      name: of the signature.

    Attributes:
      inputs: tensors by name.
      outputs: tensors by name.
    """

    def __init__(self, name: str):
        self.name = name
        self.tensors: list[Tensor] = []
        self.operators: list[Operator] = []
        self.inputs: dict[str, int] = {}
        self.outputs: dict[str, int] = {}
        self._found: dict[Any, Any] = {}
        self._makers: dict[int, Operator] = {}

    def input(self, name: str, shape: Shape, type: str) -> int:
        """A new input."""
        self.inputs[name] = self._tensor(Tensor(name, type, shape))
        return self.inputs[name]

    def constant(self, array: np.ndarray) -> int:
        """A constant."""
        array = np.asarray(array)
        return self._once(Tensor("", TYPES[array.dtype.name], array.shape, array.tobytes()))

    def weight(self, weight: Weight) -> int:
        """A weight, with its scales before it where they are a tensor of their own."""
        if weight.blocks:
            self._once(Tensor(scales_of(weight.name), "FLOAT16", (weight.shape[0], weight.blocks), None, weight.name))
        return self._once(Tensor(weight.name, weight.form.type, weight.shape, None, weight.name))

    def op(self, name: str, inputs: Sequence[int], shape: Shape, type: str = "FLOAT32", **options: Any) -> int:
        """What an operator makes of its inputs."""
        return self.several(name, inputs, [(shape, type)], **options)[0]

    def several(
        self, name: str, inputs: Sequence[int], made: Sequence[tuple[Shape, str]], **options: Any
    ) -> tuple[int, ...]:
        """What an operator of several outputs makes, given their shapes and types."""
        key = (name, tuple(inputs), tuple(made), tuple(options.items()))
        if key not in self._found:
            self._found[key] = tuple(self._tensor(Tensor("", type, shape)) for shape, type in made)
            self.operators.append(Operator(name, tuple(inputs), self._found[key], tuple(options.items())))
            self._makers |= dict.fromkeys(self._found[key], self.operators[-1])
        return self._found[key]

    def maker(self, tensor: int) -> Operator | None:
        """What made a tensor; None for inputs and constants."""
        return self._makers.get(tensor)

    def _once(self, tensor: Tensor) -> int:
        if tensor not in self._found:
            self._found[tensor] = self._tensor(tensor)
        return self._found[tensor]

    def _tensor(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def pruned(self) -> "Graph":
        """Without what no output needs."""
        needed = set(self.outputs.values())
        kept = []
        for op in reversed(self.operators):
            if not needed.isdisjoint(op.outputs):
                needed.update(op.outputs)
                needed.update(i for i in op.inputs if i >= 0)
                kept.append(op)
        needed.update(self.inputs.values())
        blocks = {self.tensors[i].weight for i in needed}
        numbers: dict[int, int] = {-1: -1}
        graph = Graph(self.name)
        for i, tensor in enumerate(self.tensors):
            if i in needed or (tensor.weight is not None and tensor.weight in blocks):
                numbers[i] = graph._tensor(tensor)
        for op in reversed(kept):
            inputs, outputs = (tuple(numbers[i] for i in ends) for ends in (op.inputs, op.outputs))
            graph.operators.append(Operator(op.name, inputs, outputs, op.options))
        graph.inputs = {name: numbers[i] for name, i in self.inputs.items()}
        graph.outputs = {name: numbers[i] for name, i in self.outputs.items()}
        return graph


def scales_of(name: str) -> str:
    """The name of the tensor that holds a weight's scales."""
    return f"{name}{record.SCALES}"


class File:
    """A file of several graphs, whose weights stand behind the flatbuffer.

    Args:
      graphs: pruned.
      weights: by name; all that the graphs use.
      notes: see ``converters.readers.litert.record``; empty for none.

    Attributes:
      places: where a weight's values begin in the file, and where its scales do.
      size: of the whole file.
    """

    def __init__(self, graphs: Sequence[Graph], weights: Mapping[str, Weight], notes: bytes = b""):
        self._graphs, self._weights, self._notes = graphs, weights, notes
        # At first anything that no two share, lest they share a table; 0 and 1 mean that it is inside.
        self.places: dict[str, tuple[int, int]] = {name: (2 * i, 2 * i + 1) for i, name in enumerate(weights, 1)}
        at = self._length = len(self.header())
        for name, weight in weights.items():
            values = -(-at // ALIGNMENT) * ALIGNMENT
            scales = -(-(values + weight.nbytes) // ALIGNMENT) * ALIGNMENT
            at = scales + weight.scale_bytes if weight.blocks else values + weight.nbytes
            self.places[name] = values, scales
        self.size = at

    def header(self) -> bytes:
        """The flatbuffer.  Its size depends on no scale's value."""
        tables = Tables()
        codes = {name: i for i, name in enumerate(sorted({op.name for g in self._graphs for op in g.operators}))}
        buffers: dict[Any, tuple[int, Field]] = {None: (0, tables.table({}))}

        def buffer(tensor: Tensor) -> int:
            key: Any = tensor.data if tensor.weight is None else tensor.name
            if key not in buffers:
                if tensor.weight is None:
                    entry = tables.table({0: tables.array(np.frombuffer(key, np.uint8))})
                else:
                    weight, inner = self._weights[tensor.weight], tensor.name != tensor.weight
                    size = weight.scale_bytes if inner else weight.nbytes
                    entry = tables.table({1: ("Q", self.places[tensor.weight][inner]), 2: ("Q", size)})
                buffers[key] = len(buffers), entry
            return buffers[key][0]

        subgraphs = [self._subgraph(tables, graph, codes, buffer) for graph in self._graphs]
        signatures = [
            tables.table(
                {
                    0: _ports(tables, graph.inputs),
                    1: _ports(tables, graph.outputs),
                    2: tables.text(graph.name),
                    4: ("I", number),
                }
            )
            for number, graph in enumerate(self._graphs)
        ]
        metadata = []
        if self._notes:
            metadata.append(tables.table({0: tables.text(record.NAME), 1: ("I", len(buffers))}))
            buffers[record.NAME] = len(buffers), tables.table({0: tables.array(np.frombuffer(self._notes, np.uint8))})
        model = {
            0: ("I", 3),
            1: tables.several(_code(tables, name) for name in codes),
            2: tables.several(subgraphs),
            3: tables.text("llmjax"),
            4: tables.several(entry for _, entry in buffers.values()),
            6: tables.several(metadata),
            7: tables.several(signatures),
        }
        found = tables.finish(tables.table(model), IDENTIFIER)
        assert getattr(self, "_length", len(found)) == len(found)
        return found

    def _subgraph(self, tables: Tables, graph: Graph, codes: Mapping[str, int], buffer: Any) -> Field:
        numbers = {tensor.name: i for i, tensor in enumerate(graph.tensors) if tensor.weight is not None}
        tensors = []
        for tensor in graph.tensors:
            fields = {
                0: tables.array(np.array(tensor.shape, np.int32)),
                1: ("b", getattr(TensorType, tensor.type)),
                2: ("I", buffer(tensor)),
                3: tables.text(tensor.name),
                8: ("?", True),
            }
            if tensor.weight == tensor.name and (weight := self._weights[tensor.weight]).form.type != "FLOAT32":
                fields[4] = _quantization(tables, weight, numbers.get(scales_of(weight.name), 0))
            tensors.append(tables.table(fields))
        operators = []
        for op in graph.operators:
            fields = {
                0: ("I", codes[op.name]),
                1: tables.array(np.array(op.inputs, np.int32)),
                2: tables.array(np.array(op.outputs, np.int32)),
            }
            if op.name in FIELDS:
                fields[3] = ("B", getattr(BuiltinOptions, _options(op.name)))
                known = FIELDS[op.name]
                fields[4] = tables.table({known[name][0]: (known[name][1], value) for name, value in op.options})
            operators.append(tables.table(fields))
        return tables.table(
            {
                0: tables.several(tensors),
                1: tables.array(np.array(list(graph.inputs.values()), np.int32)),
                2: tables.array(np.array(list(graph.outputs.values()), np.int32)),
                3: tables.several(operators),
                4: tables.text(graph.name),
            }
        )


def _quantization(tables: Tables, weight: Weight, scales: int) -> Field:
    if weight.blocks:
        details = {0: ("i", scales), 1: ("i", -1), 2: ("i", weight.form.block)}
        return tables.table({4: ("B", 2), 5: tables.table(details)})
    rows = np.ones(weight.shape[0], np.float32) if weight.scales is None else weight.scales
    return tables.table({2: tables.array(rows, weight.name), 3: tables.array(np.zeros(weight.shape[0], np.int64))})


def _code(tables: Tables, name: str) -> Field:
    number = getattr(BuiltinOperator, name)
    return tables.table({0: ("b", min(number, 127)), 2: ("i", _VERSIONS.get(name, 1)), 3: ("i", number)})


def _ports(tables: Tables, ports: Mapping[str, int]) -> Field:
    return tables.several(tables.table({0: tables.text(name), 1: ("I", i)}) for name, i in sorted(ports.items()))


def _options(operator: str) -> str:
    return _OPTIONS.get(operator, "".join(map(str.title, operator.split("_"))) + "Options")
