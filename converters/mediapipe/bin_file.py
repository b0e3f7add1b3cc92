"""Writes MediaPipe's ``.bin`` files, in the two layouts that ``converters.readers.mediapipe.container`` describes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.readers.mediapipe.container import (
    BACKEND,
    IDENTIFIER,
    MAX_HEADER,
    MODEL_TYPE,
    PARAMETERS,
    TYPES,
    VERSION,
    VOCABULARY,
    Entry,
)
from llmjax.errors import CheckpointError

_PAGE = 1 << 16


class BinWriter:
    """Writes a file tensor by tensor, in any order; where each lies follows from the headers.

    Args:
      path: a new file.
      name: the subgraph's.
      backend: ``cpu`` or ``gpu``: the layout.
      entries: all tensors, in order.
      blobs: metadata of bytes.
      numbers: metadata of numbers.

    Raises:
      CheckpointError: more tensors than the runtime's header holds.
      OSError: as ``open`` and ``write`` raise it.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        backend: str,
        entries: Sequence[Entry],
        blobs: Mapping[str, bytes],
        numbers: Mapping[str, int],
    ):
        tensors = {e.name: e.nbytes for e in entries}
        texts = {key: len(value) for key, value in blobs.items()}
        sizes = [*texts.values(), *tensors.values()] if backend == "gpu" else [*tensors.values(), *texts.values()]
        first = len(texts) if backend == "gpu" else 0
        keys = {key: 1 + i + (0 if backend == "gpu" else len(tensors)) for i, key in enumerate(texts)}
        unit, page = (256, _PAGE) if backend == "gpu" else (64, 64)

        def header(places: Sequence[int]) -> bytes:
            return _header(name, entries, first + 1, keys, numbers, list(zip(places, sizes, strict=True)))

        # Every number in the flatbuffer has a fixed width, so places do not change its length.
        at = -(-len(header([1] * len(sizes))) // page) * page
        places = []
        for size in sizes:
            places.append(at)
            at += -(-size // unit) * unit
        head = header(places)
        if len(head) > MAX_HEADER:
            raise CheckpointError(
                f"{path}: a header of {len(head)} bytes; MediaPipe's runtime reads no more than {MAX_HEADER}"
            )
        self._places = dict(zip(tensors, places[first:], strict=False))
        self._file = open(path, "xb")
        self._file.write(head)
        for key, index in keys.items():
            self._file.seek(places[index - 1])
            self._file.write(blobs[key])
        self._file.truncate(-(-at // page) * page)

    def write(self, name: str, data: np.ndarray) -> None:
        """Puts a tensor's data, of any type and strides, in its place."""
        self._file.seek(self._places[name])
        self._file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Closes the file, whole or not."""
        self._file.close()


def _header(
    name: str,
    entries: Sequence[Entry],
    first: int,
    keys: Mapping[str, int],
    numbers: Mapping[str, int],
    buffers: Sequence[tuple[int, int]],
) -> bytes:
    """The flatbuffer: ``entries`` have the buffers from ``first`` on, metadata those of ``keys``."""
    import flatbuffers
    import tflite

    b = flatbuffers.Builder(1 << 16)
    codes = {kind: code for code, kind in TYPES.items()}

    def vector(start: Any, items: Sequence[int]) -> int:
        start(b, len(items))
        for item in reversed(items):
            b.PrependUOffsetTRelative(item)
        return b.EndVector()

    tensors = []
    for i, entry in enumerate(entries):
        label = b.CreateString(entry.name)
        tflite.TensorStartShapeVector(b, len(entry.shape))
        for size in reversed(entry.shape):
            b.PrependInt32(size)
        shape = b.EndVector()
        tflite.TensorStart(b)
        tflite.TensorAddShape(b, shape)
        tflite.TensorAddType(b, codes[entry.type])
        tflite.TensorAddBuffer(b, first + i)
        tflite.TensorAddName(b, label)
        tflite.TensorAddHasRank(b, True)
        tensors.append(tflite.TensorEnd(b))
    label, listed = b.CreateString(name), vector(tflite.SubGraphStartTensorsVector, tensors)
    tflite.SubGraphStart(b)
    tflite.SubGraphAddTensors(b, listed)
    tflite.SubGraphAddName(b, label)
    graphs = vector(tflite.ModelStartSubgraphsVector, [tflite.SubGraphEnd(b)])
    places = []
    for start, size in [(0, 0), *buffers]:
        tflite.BufferStart(b)
        if size:
            tflite.BufferAddOffset(b, start)
            tflite.BufferAddSize(b, size)
        places.append(tflite.BufferEnd(b))
    stored = vector(tflite.ModelStartBuffersVector, places)
    notes = []
    for key, number in _ordered({**keys, **numbers}):
        label = b.CreateString(key)
        tflite.MetadataStart(b)
        tflite.MetadataAddName(b, label)
        tflite.MetadataAddBuffer(b, number)
        notes.append(tflite.MetadataEnd(b))
    metadata = vector(tflite.ModelStartMetadataVector, notes)
    tflite.ModelStart(b)
    tflite.ModelAddVersion(b, VERSION)
    tflite.ModelAddSubgraphs(b, graphs)
    tflite.ModelAddBuffers(b, stored)
    tflite.ModelAddMetadata(b, metadata)
    b.Finish(tflite.ModelEnd(b), IDENTIFIER)
    return bytes(b.Output())


def _ordered(entries: Mapping[str, int]) -> list[tuple[str, int]]:
    """As MediaPipe's converter orders them."""
    known = (PARAMETERS, VOCABULARY, MODEL_TYPE, BACKEND)
    return sorted(entries.items(), key=lambda e: known.index(e[0]) if e[0] in known else len(known))
