"""The container of MediaPipe's ``.bin`` files: a TFLite flatbuffer without operators, its tensors' data behind it.

``Buffer.offset`` and ``Buffer.size`` of the schema give each tensor's place in the file.  Metadata entries name a
buffer, or (model type, LoRA rank) hold a number in the field that would be the buffer's index.  Seen in files of
MediaPipe's own converter, 0.10.14 to 0.10.21, of which two layouts are known:

``cpu``
    buffers from a multiple of 64 bytes; tensors, then metadata.
``gpu``
    the flatbuffer is filled up to a multiple of 64 KiB, and so is the file; buffers from a multiple of 256 bytes;
    metadata, then tensors.

Schema: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/schema/schema.fbs.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from converters.readers.mapped import MappedFile
from converters.readers.source import problems_error
from llmjax.errors import CheckpointError, named

IDENTIFIER = b"TFL3"
PARAMETERS = "odml.infra.proto.LlmParameters"
VOCABULARY = "spm_vocab_model"
MODEL_TYPE = "odml.infra.LlmModelType"
BACKEND = "backend"
LORA_RANK = "lora_rank"

# By the numbers of TFLite's TensorType.
TYPES: dict[int, str] = {0: "FLOAT32", 2: "INT32", 9: "INT8", 17: "INT4"}
_BITS = {"FLOAT32": 32, "INT32": 32, "INT8": 8, "INT4": 4}
VERSION = 3
# The official runtime maps no more than this as the flatbuffer.
MAX_HEADER = 1 << 20
# Far above any model's: a hostile file must not cost minutes or gigabytes of table entries.
_MAX_TENSORS = 1 << 14
_MAX_DIMS = 8
_MAX_NAME = 512
_MAX_METADATA = 64 << 20
_DAMAGED = "truncated or damaged file, download or convert it again"


@dataclass(frozen=True)
class Entry:
    """A tensor's header.

    Attributes:
      name: as the file spells it.
      type: ``FLOAT32``, ``INT32``, ``INT8`` or ``INT4``.
      shape: as the file says: the dimensions (cpu), or the number of bytes (gpu).
      nbytes: size of its data.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


class BinFile:
    """Names, headers and bytes of one file, memory-mapped.

    Attributes:
      path: of the file.
      name: the subgraph's: the model type in the files of MediaPipe's converter.
      entries: tensors by name, in the order of the file.
      numbers: metadata entries by name: a buffer's index, or the number that stands in its place.

    Args:
      path: of the file.

    Raises:
      CheckpointError: no such container, truncated, or with a header that contradicts itself or the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = MappedFile(path)
        self.stamp = self._file.stamp
        self.entries: dict[str, Entry] = {}
        self.numbers: dict[str, int] = {}
        self._places: dict[str, int] = {}
        header = self._file.bytes[:MAX_HEADER].tobytes()
        if header[4:8] != IDENTIFIER:
            self._fail(f"not a MediaPipe model: expected {IDENTIFIER!r} at byte 4, found {header[4:8]!r}")
        try:
            self._read(header)
        # What the flatbuffers library raises where an offset leads out of the file, or into the middle of something.
        except (struct.error, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            self._fail(f"{_DAMAGED}: an offset or length in the flatbuffer is out of range ({error})")

    def _fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {problem}") from None

    def _read(self, header: bytes) -> None:
        from tflite.Model import Model

        model = Model.GetRootAs(header, 0)
        if model.Version() != VERSION:
            self._fail(f"expected a TFLite model of version {VERSION}, found {model.Version()}; {_DAMAGED}")
        counts = {"subgraphs": model.SubgraphsLength(), "buffers": model.BuffersLength()}
        if counts["subgraphs"] != 1:
            self._fail(f"expected one subgraph, found {counts['subgraphs']}: not a model of MediaPipe's converter")
        graph = model.Subgraphs(0)
        counts |= {"tensors": graph.TensorsLength(), "metadata entries": model.MetadataLength()}
        for what, count in counts.items():
            if count > _MAX_TENSORS:
                self._fail(f"{_DAMAGED}: the header counts {count} {what}, expected at most {_MAX_TENSORS}")
        if model.OperatorCodesLength() or graph.OperatorsLength():
            self._fail(
                "a TFLite graph of operators, expected named weights as MediaPipe's converter writes them; "
                "llmjax does not run such graphs"
            )
        self.name = self._text(graph.Name() or b"", "the subgraph's name")
        self._buffers = [(b.Offset(), b.Size()) for b in map(model.Buffers, range(counts["buffers"]))]
        problems: list[str] = []
        used: dict[int, str] = {}
        for i in range(counts["tensors"]):
            self._add(graph.Tensors(i), used, problems)
        for i in range(counts["metadata entries"]):
            entry = model.Metadata(i)
            name = self._text(entry.Name() or b"", "a metadata entry's name")
            if name in self.numbers:
                problems.append(f"metadata {named(name)} appears twice")
            self.numbers[name] = entry.Buffer()
        if problems:
            raise problems_error(self.path, _DAMAGED, problems, most=5)
        self._check_overlaps()

    def _text(self, text: bytes, what: str) -> str:
        if not 0 < len(text) <= _MAX_NAME:
            self._fail(f"{_DAMAGED}: {what}: expected 1 to {_MAX_NAME} bytes, found {len(text)}")
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            self._fail(f"{_DAMAGED}: {what} is not UTF-8: {error.reason}")

    def _add(self, tensor: Any, used: dict[int, str], problems: list[str]) -> None:
        name = self._text(tensor.Name() or b"", "a tensor's name")
        label = f"tensor {named(name)}"
        if name in self.entries:
            problems.append(f"{label} appears twice")
            return
        if tensor.Type() not in TYPES:
            expected = ", ".join(TYPES.values())
            problems.append(f"{label}: TFLite type {tensor.Type()} is not supported, expected {expected}")
            return
        if tensor.ShapeLength() > _MAX_DIMS:
            problems.append(f"{label}: expected at most {_MAX_DIMS} dimensions, found {tensor.ShapeLength()}")
            return
        shape = tuple(tensor.Shape(i) for i in range(tensor.ShapeLength()))
        index = tensor.Buffer()
        if min(shape, default=0) < 1 or not 0 < index < len(self._buffers):
            problems.append(f"{label}: shape {list(shape)}, buffer {index} of {len(self._buffers)}: out of range")
            return
        if index in used:
            problems.append(f"{label} shares a buffer with {named(used[index])}")
            return
        used[index] = name
        start, size = self._buffers[index]
        if start < 1 or start + size > len(self._file):
            problems.append(f"{label}: bytes {start} to {start + size}, the file has {len(self._file)}")
            return
        kind = TYPES[tensor.Type()]
        if math.prod(shape) * _BITS[kind] != 8 * size and shape != (size,):
            problems.append(f"{label}: {kind} {list(shape)} does not fit its {size} bytes")
            return
        self.entries[name] = Entry(name, kind, shape, size)
        self._places[name] = start

    def _check_overlaps(self) -> None:
        end, before = 0, ""
        for name in sorted(self.entries, key=lambda n: self._places[n]):
            if self._places[name] < end:
                self._fail(f"{_DAMAGED}: tensors {named(before)} and {named(name)} overlap")
            end, before = self._places[name] + self.entries[name].nbytes, name

    def blob(self, name: str) -> bytes | None:
        """The bytes of a metadata entry; None where there is none.

        Raises:
          CheckpointError: its buffer lies outside the file.
        """
        if name not in self.numbers:
            return None
        index = self.numbers[name]
        start, size = self._buffers[index] if 0 < index < len(self._buffers) else (0, 0)
        if start < 1 or start + size > len(self._file) or size > _MAX_METADATA:
            self._fail(f"{_DAMAGED}: metadata {named(name)}: buffer {index}, bytes {start} to {start + size}")
        return self._file.bytes[start : start + size].tobytes()

    def raw(self, name: str) -> np.ndarray:
        """uint8, a tensor's bytes as the file holds them: a view."""
        start = self._places[name]
        return self._file.bytes[start : start + self.entries[name].nbytes]

    def release(self, name: str) -> None:
        """Gives the mapped pages of a tensor back."""
        self._file.release(self._places[name], self.entries[name].nbytes)
