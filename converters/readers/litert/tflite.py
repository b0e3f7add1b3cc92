"""A TFLite file: its subgraphs' tensors and operators, its signatures, and its constants as they lie in the file.

Tables are read by field number: the published Python classes lack ``BlockwiseQuantization`` and ``INT2``.  Constants
lie in the flatbuffer or, in large files, behind it (``Buffer.offset``, from the file's beginning).

Schema: https://github.com/google-ai-edge/LiteRT (``tflite/converter/schema/schema.fbs``).
"""

import functools
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from converters.readers.litert import options
from converters.readers.litert.flatbuffer import Table
from converters.readers.mapped import MappedFile
from llmjax.errors import CheckpointError, named

IDENTIFIER = b"TFL3"
_VERSION = 3
# Far above any model's: a hostile file must not cost minutes.  Large mixtures of experts have an operator and more for
# each expert, and bytes to match: of so many there may be an entry.
_MAX_ENTRIES = 1 << 17
_ENTRY = 1 << 12
_MAX_LINKS = 1 << 12
_MAX_DIMS = 8
_MAX_SUBGRAPHS = 1 << 12
# Of a tensor's elements: no model has more, and a lying shape must not ask for the machine's memory.
_MAX_ELEMENTS = 1 << 36
BITS = {
    "FLOAT32": 32,
    "FLOAT16": 16,
    "BFLOAT16": 16,
    "FLOAT64": 64,
    "INT64": 64,
    "INT32": 32,
    "UINT32": 32,
    "INT16": 16,
    "INT8": 8,
    "UINT8": 8,
    "BOOL": 8,
    "INT4": 4,
    "INT2": 2,
}


@dataclass(frozen=True)
class Quantization:
    """What a tensor's integers mean.

    Attributes:
      scales: float32, one or one a channel; None where they are another tensor's.
      zeros: int64, as scales; those that are left out are 0.
      axis: of the channels.
      block: integers that share a scale within a channel; 0 for all.
      scales_tensor: holds the scales of blocks, ``[out, in / block]``.
    """

    scales: np.ndarray | None
    zeros: np.ndarray
    axis: int
    block: int = 0
    scales_tensor: int = -1

    @property
    def label(self) -> str:
        """In words: ``per channel``, ``blocks of 32``, ``per tensor``."""
        if self.block:
            return f"blocks of {self.block}"
        return "per channel" if self.scales is not None and len(self.scales) > 1 else "per tensor"


@dataclass(frozen=True)
class Tensor:
    """A tensor of a subgraph.

    Attributes:
      name: as the file spells it.
      type: TFLite's, such as ``FLOAT32``.
      shape: of it.
      buffer: that holds its value; 0 for none.
      quantization: None for floats.
      dims: as shape, -1 for a dimension that is not fixed.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    buffer: int
    quantization: Quantization | None
    dims: tuple[int, ...]

    @property
    def dynamic(self) -> bool:
        """A dimension is not fixed."""
        return min(self.dims, default=0) < 0


@dataclass(frozen=True)
class Operator:
    """One step of a subgraph.

    Attributes:
      name: TFLite's, such as ``FULLY_CONNECTED``; ``CUSTOM:`` and its own for one of somebody's.
      inputs: tensors; -1 for one that is left out.
      outputs: tensors.
      options: see ``converters.readers.litert.options``.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, Any]

    @property
    def label(self) -> str:
        """Its name, with that of a composite."""
        return f"{self.name}:{named(self.options['name'])}" if self.name == options.COMPOSITE else self.name


@dataclass(frozen=True)
class Subgraph:
    """Tensors and the operators between them, in the order they run."""

    name: str
    tensors: tuple[Tensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    operators: tuple[Operator, ...]


@dataclass(frozen=True)
class Signature:
    """A function of the file: a subgraph whose inputs and outputs have names.

    Attributes:
      name: such as ``prefill_128`` or ``decode``.
      subgraph: its number.
      inputs: tensors by name.
      outputs: tensors by name.
    """

    name: str
    subgraph: int
    inputs: dict[str, int]
    outputs: dict[str, int]


@dataclass
class TfliteFile:
    """What a file holds.

    Attributes:
      where: the file, for messages.
      subgraphs: in its order.
      signatures: by name; a file without any has one, ``main``, of its first subgraph and its tensors' names.
      metadata: its own notes, by name.
    """

    where: str
    subgraphs: tuple[Subgraph, ...]
    signatures: dict[str, Signature]
    metadata: dict[str, memoryview]
    _buffers: tuple[memoryview, ...] = field(repr=False)

    def fail(self, problem: str) -> NoReturn:
        """Raises CheckpointError."""
        raise CheckpointError(f"{self.where}: {problem}") from None

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether its value is in the file; a tensor of no elements needs no bytes."""
        return len(self._buffers[tensor.buffer]) > 0 or 0 in tensor.shape

    def data(self, tensor: Tensor) -> np.ndarray:
        """A constant's bytes, uint8, as they lie in the file.

        Raises:
          CheckpointError: they are not as many as its shape and type say.
        """
        found = np.frombuffer(self._buffers[tensor.buffer], np.uint8)
        expected = -(-math.prod(tensor.shape) * BITS.get(tensor.type, 0) // 8)
        if len(found) != expected:
            self.fail(
                f"damaged: tensor {named(tensor.name)} {tensor.type} {list(tensor.shape)}: expected {expected} bytes, "
                f"found {len(found)}"
            )
        return found


def is_tflite(path: Path) -> bool:
    """Whether a file is a TFLite flatbuffer; one that cannot be read is left to others to complain about."""
    try:
        with open(path, "rb") as file:
            return file.read(8)[4:] == IDENTIFIER
    except OSError:
        return False


def has_operators(path: Path) -> bool:
    """Whether a file is a TFLite flatbuffer whose first subgraph runs something; of one that is damaged there, whether
    it is called a ``.tflite``."""
    if not is_tflite(path):
        return path.suffix == ".tflite"
    try:
        graph = next(Table.root(MappedFile(path).bytes.data).tables(2, _MAX_SUBGRAPHS), None)
        return graph is not None and graph.count(3) > 0
    except (ValueError, struct.error, CheckpointError):
        return path.suffix == ".tflite"


def read_file(path: Path) -> TfliteFile:
    """See ``read``.

    Raises:
      CheckpointError: the file cannot be read either.
    """
    return read(MappedFile(path).bytes.data, str(path))


def read(data: memoryview, where: str) -> TfliteFile:
    """A TFLite file from its bytes, of which no weights are read.

    Raises:
      CheckpointError: it is none, or truncated or damaged.
    """
    if bytes(data[4:8]) != IDENTIFIER:
        raise CheckpointError(
            f"{where}: not a TFLite file: expected {IDENTIFIER!r} at byte 4, found {bytes(data[4:8])!r}"
        )
    try:
        return _read(data, where)
    except (struct.error, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: a TFLite file that is truncated or damaged, download or convert it again ({error})"
        ) from None


def _read(data: memoryview, where: str) -> TfliteFile:
    root = Table.root(data)
    if (version := root.number(0, "I")) != _VERSION:
        raise ValueError(f"version: expected {_VERSION}, found {version}")
    most = max(_MAX_ENTRIES, len(data) // _ENTRY)
    buffers = tuple(_buffer(table, data, i) for i, table in enumerate(root.tables(4, most)))
    codes = [_operator_name(table) for table in root.tables(1, _MAX_LINKS)]
    left = [most]  # entries that all subgraphs together may still have
    subgraphs = tuple(_subgraph(table, codes, len(buffers), left) for table in root.tables(2, _MAX_SUBGRAPHS))
    if not subgraphs:
        raise ValueError("it has no subgraph")
    signatures: dict[str, Signature] = {}
    for table in root.tables(7, _MAX_SUBGRAPHS):
        found = _signature(table, subgraphs)
        if found.name in signatures:
            raise ValueError(f"two signatures {named(found.name)}")
        signatures[found.name] = found
    metadata = {named(t.text(0)): _note(buffers, t.number(1, "I")) for t in root.tables(6, _MAX_LINKS)}
    return TfliteFile(where, subgraphs, signatures or {"main": _whole(subgraphs[0])}, metadata, buffers)


def _buffer(table: Table, data: memoryview, index: int) -> memoryview:
    offset, size = table.number(1, "Q"), table.number(2, "Q")
    if offset <= 1:
        return table.array(0, "u1").data
    if offset + size > len(data):
        raise ValueError(f"buffer {index}: ends at {offset + size}, the file has {len(data)} bytes")
    return data[offset : offset + size]


def _note(buffers: tuple[memoryview, ...], index: int) -> memoryview:
    if index >= len(buffers):
        raise ValueError(f"metadata in buffer {index} of {len(buffers)}")
    return buffers[index]


def _operator_name(table: Table) -> str:
    # Numbers above 127 do not fit the field that was there first.
    number = max(table.number(0, "b"), table.number(3, "i"))
    name = _names()[0].get(number, f"operator {number}")
    return f"CUSTOM:{named(table.text(1))}" if name == "CUSTOM" else name


@functools.cache
def _names() -> tuple[dict[int, str], dict[int, str]]:
    """Operators' and types' names by number; INT2 is younger than the package."""
    from tflite.BuiltinOperator import BuiltinOperator
    from tflite.TensorType import TensorType

    operators, types = (
        {number: name for name, number in vars(kind).items() if isinstance(number, int)}
        for kind in (BuiltinOperator, TensorType)
    )
    return operators, types | {19: "INT2"}


def _subgraph(table: Table, codes: list[str], buffers: int, left: list[int]) -> Subgraph:
    most = left[0]
    left[0] -= table.count(0) + table.count(3)
    if left[0] < 0:
        raise ValueError(f"expected at most {most} tensors and operators")
    tensors = tuple(_tensor(t, buffers) for t in table.tables(0, most))
    count = len(tensors)
    for tensor in tensors:
        if (q := tensor.quantization) and q.block and not 0 <= q.scales_tensor < count:
            raise ValueError(f"scales in tensor {q.scales_tensor} of {count}")
    operators = []
    for entry in table.tables(3, most):
        code = entry.number(0, "I")
        name = codes[code] if code < len(codes) else f"code {code} of {len(codes)}"
        operators.append(
            Operator(name, _links(entry, 1, count, -1), _links(entry, 2, count, 0), options.read(entry, name))
        )
    return Subgraph(
        named(table.text(4)), tensors, _links(table, 1, count, 0), _links(table, 2, count, 0), tuple(operators)
    )


def _links(table: Table, index: int, count: int, least: int) -> tuple[int, ...]:
    """Numbers of tensors."""
    if table.count(index) > _MAX_LINKS:
        raise ValueError(f"expected at most {_MAX_LINKS} inputs or outputs, found {table.count(index)}")
    found = tuple(table.array(index, "<i4").tolist())
    if found and not least <= min(found) <= max(found) < count:
        raise ValueError(f"tensor {next(i for i in found if not least <= i < count)} of {count}")
    return found


def _tensor(table: Table, buffers: int) -> Tensor:
    shape = table.array(0, "<i4")
    number = table.number(1, "b")
    buffer = table.number(2, "I")
    if buffer >= buffers:
        raise ValueError(f"a tensor in buffer {buffer} of {buffers}")
    if len(shape) > _MAX_DIMS:
        raise ValueError(f"a shape: expected at most {_MAX_DIMS} dimensions, found {len(shape)}")
    dims = tuple(shape.tolist())
    if any(d < 0 for d in dims) or math.prod(dims) > _MAX_ELEMENTS:
        raise ValueError(f"a tensor of shape {list(dims)}")
    kind = _names()[1].get(number, f"type {number}")
    if table.table(6) is not None:
        kind = f"sparse {kind}"
    if table.number(10, "I"):
        kind = f"{kind} of another file"  # a TFLiteWeights section, or a file beside this one
    free = tuple(table.array(7, "<i4").tolist()) or dims
    if len(free) != len(dims):
        raise ValueError(f"a tensor of shape {list(dims)} and {len(free)} dimensions")
    return Tensor(table.text(3), kind, dims, buffer, _quantization(table.table(4)), free)


def _quantization(table: Table | None) -> Quantization | None:
    if table is None:
        return None
    scales, zeros, axis = table.array(2, "<f4"), table.array(3, "<i8"), table.number(6, "i")
    kind, details = table.number(4, "B"), table.table(5)
    if details is not None and kind == 2:
        block = details.number(2, "i")
        if block <= 0:
            raise ValueError(f"blocks of {block}")
        return Quantization(None, zeros, axis, block, details.number(0, "i"))
    return Quantization(scales, zeros, axis) if len(scales) else None


def _signature(table: Table, subgraphs: tuple[Subgraph, ...]) -> Signature:
    number = table.number(4, "I")
    if number >= len(subgraphs):
        raise ValueError(f"a signature of subgraph {number} of {len(subgraphs)}")
    count = len(subgraphs[number].tensors)

    def ports(index: int) -> dict[str, int]:
        found = {entry.text(0): entry.number(1, "I") for entry in table.tables(index, _MAX_LINKS)}
        for name, tensor in found.items():
            if tensor >= count:
                raise ValueError(f"{named(name)}: tensor {tensor} of {count}")
        return found

    return Signature(table.text(2), number, ports(0), ports(1))


def _whole(graph: Subgraph) -> Signature:
    def ports(numbers: tuple[int, ...]) -> dict[str, int]:
        return {graph.tensors[i].name: i for i in numbers}

    return Signature("main", 0, ports(graph.inputs), ports(graph.outputs))
