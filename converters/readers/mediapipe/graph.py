"""What a TFLite graph offers: its signatures, from the flatbuffer's tables alone.

Schema: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/schema/schema.fbs.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.readers.mapped import MappedFile
from converters.readers.mediapipe.container import IDENTIFIER
from llmjax.errors import CheckpointError, named

_VERSION = 3
# Far above any model's: a hostile file must not cost minutes.
_MAX_COUNT = 1 << 16
_MAX_TENSORS = 1 << 14
_MAX_DIMS = 8


@dataclass(frozen=True)
class Port:
    """An input or output of a signature.

    Attributes:
      name: within the signature.
      type: TFLite's, such as ``FLOAT32``.
      shape: -1 for a dimension that is not fixed.
    """

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """A function of the graph.

    Attributes:
      name: such as ``prefill_128`` or ``decode``.
      inputs: what it takes.
      outputs: what it gives.
      operators: how many it runs.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: int


@dataclass(frozen=True)
class Graph:
    """A TFLite file.

    Attributes:
      signatures: in the order of the file.
      subgraphs: how many there are.
      operators: how many, in all subgraphs.
    """

    signatures: tuple[Signature, ...]
    subgraphs: int
    operators: int


def read_file(path: Path) -> Graph:
    """See ``read``.

    Raises:
      CheckpointError: the file cannot be read either.
    """
    return read(MappedFile(path).bytes.data, str(path))


def read(data: memoryview, where: str) -> Graph:
    """A graph from a TFLite file's bytes, of which its tables are read and no weights.

    Raises:
      CheckpointError: it is none, or truncated or damaged.
    """
    if bytes(data[4:8]) != IDENTIFIER:
        raise CheckpointError(
            f"{where}: not a TFLite file: expected {IDENTIFIER!r} at byte 4, found {bytes(data[4:8])!r}"
        )
    try:
        return _read(data)
    # What the flatbuffers library raises where an offset leads out of the file, or into the middle of something.
    except (struct.error, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: a TFLite file that is truncated or damaged, download or convert it again ({error})"
        ) from None


def _read(data: memoryview) -> Graph:
    from tflite.Model import Model

    model = Model.GetRootAs(data, 0)
    if model.Version() != _VERSION:
        raise ValueError(f"version: expected {_VERSION}, found {model.Version()}")
    _check_buffers(model, len(data))
    graphs = [model.Subgraphs(i) for i in range(_count(model.SubgraphsLength(), "subgraphs"))]
    if not graphs:
        raise ValueError("it has no subgraph")
    signatures, ports = [], 0
    for i in range(_count(model.SignatureDefsLength(), "signatures")):
        signature = model.SignatureDefs(i)
        graph = graphs[signature.SubgraphIndex()]
        ports += signature.InputsLength() + signature.OutputsLength()
        if ports > _MAX_TENSORS:
            raise ValueError(f"signatures: expected at most {_MAX_TENSORS} inputs and outputs, found {ports}")
        inputs = [_port(graph, signature.Inputs(k)) for k in range(signature.InputsLength())]
        outputs = [_port(graph, signature.Outputs(k)) for k in range(signature.OutputsLength())]
        signatures.append(
            Signature(_text(signature.SignatureKey()), tuple(inputs), tuple(outputs), graph.OperatorsLength())
        )
    return Graph(tuple(signatures), len(graphs), sum(graph.OperatorsLength() for graph in graphs))


def _check_buffers(model: Any, size: int) -> None:
    """Notices a file that was cut off."""
    for i in range(_count(model.BuffersLength(), "buffers")):
        buffer = model.Buffers(i)
        if length := buffer.DataLength():
            buffer.Data(length - 1)
        if buffer.Offset() > 1 and buffer.Offset() + buffer.Size() > size:
            raise ValueError(f"buffer {i}: ends at {buffer.Offset() + buffer.Size()}, the file has {size} bytes")


def _port(graph: Any, entry: Any) -> Port:
    index = entry.TensorIndex()
    if not 0 <= index < graph.TensorsLength():
        raise ValueError(f"tensor {index} of {graph.TensorsLength()}")
    tensor = graph.Tensors(index)
    dynamic = tensor.ShapeSignatureLength()
    get, dims = (tensor.ShapeSignature, dynamic) if dynamic else (tensor.Shape, tensor.ShapeLength())
    if dims > _MAX_DIMS:
        raise ValueError(f"a shape: expected at most {_MAX_DIMS} dimensions, found {dims}")
    return Port(_text(entry.Name()), _type_name(tensor.Type()), tuple(get(i) for i in range(dims)))


def _type_name(number: int) -> str:
    from tflite.TensorType import TensorType

    return next((k for k, v in vars(TensorType).items() if v == number and not k.startswith("_")), f"type {number}")


def _text(text: bytes | None) -> str:
    return named((text or b"").decode("utf-8", errors="replace"))


def _count(number: int, what: str) -> int:
    if number > _MAX_COUNT:
        raise ValueError(f"{what}: expected at most {_MAX_COUNT}, found {number}")
    return number
