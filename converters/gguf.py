"""GGUF files, memory-mapped.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.  The header is parsed here, every count and offset
checked against the file, because ``gguf.GGUFReader`` trusts both and takes seconds on a vocabulary; what
block-quantized values mean is the ``gguf`` package's business.
"""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from converters.mapped import MappedFile
from converters.source import TensorSpec
from llmjax.errors import CheckpointError

_VERSIONS = (2, 3)
_MAX_DIMS = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
# Types whose values are the bytes themselves.
_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
# Rows expanded at a time: the temporaries of a block-quantized type are several times its float32 size.
_CHUNK_VALUES = 1 << 22


class _Cursor:
    """Reads the header front to back and never past the end of the file."""

    def __init__(self, data: memoryview, where: Path):
        self.data, self.where, self.at = data, where, 0

    def take(self, size: int, what: str) -> int:
        """Advances over ``size`` bytes and returns where they begin."""
        start = self.at
        if size > len(self.data) - start:
            raise CheckpointError(
                f"{self.where}: truncated GGUF: {what} needs {size} bytes at offset {start}, the file ends at "
                f"{len(self.data)}; download or convert it again"
            )
        self.at = start + size
        return start

    def number(self, code: str, what: str) -> Any:
        start = self.take(struct.calcsize(code), what)
        return struct.unpack_from(code, self.data, start)[0]

    def text(self, what: str) -> str:
        size = self.number("<Q", what)
        start = self.take(size, what)
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.where}: {what} at offset {start} is not UTF-8: {error.reason}") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(f"value of {key}")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.where}: metadata {key}: unknown value type {kind}; the header is damaged")
        number = np.frombuffer(self.data, _SCALARS[kind], 1, self.take(_size(kind), f"value of {key}"))[0].item()
        return bool(number) if kind == _BOOL else number

    def _array(self, key: str) -> Any:
        kind = self.number("<I", f"type of {key}")
        count = self.number("<Q", f"length of {key}")
        if kind == _STRING:
            return self._strings(count, key)
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.where}: metadata {key}: arrays of type {kind} are not supported")
        start = self.take(count * _size(kind), f"array {key}")
        return np.frombuffer(self.data, _SCALARS[kind], count, start)

    def _strings(self, count: int, key: str) -> list[str]:
        if count * 8 > len(self.data) - self.at:  # a string takes at least its length: refuse before building a list
            self.take(count * 8, f"{count} strings of {key}")
        data, at, end, unpack = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                size = unpack(data, at)[0]
                at += 8
                if size > end - at:
                    self.at = at
                    self.take(size, f"a string of {key}")
                strings.append(str(data[at : at + size], "utf-8"))
                at += size
        except struct.error:
            self.at = at
            self.take(8, f"a string's length in {key}")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.where}: a string of {key} at {at} is not UTF-8: {error.reason}") from None
        self.at = at
        return strings


def _size(kind: int) -> int:
    return np.dtype(_SCALARS[kind]).itemsize


class GgufSource:
    """A GGUF file as a ``Source``.

    ``metadata`` holds Python numbers, strings and lists of strings, and NumPy arrays of numbers.

    Args:
      path: of the file.

    Raises:
      CheckpointError: it is no GGUF, of an unknown version or byte order, truncated, or inconsistent.
    """

    format = "gguf"

    def __init__(self, path: Path):
        self.path = Path(path)
        self.directory = self.path.parent
        self.config: dict[str, Any] = {}
        self.generation_config: dict[str, Any] | None = None
        self._file = MappedFile(self.path)
        cursor = _Cursor(self._file.bytes.data, self.path)
        tensors = self._header(cursor)
        self.metadata = self._metadata(cursor)
        self._specs, self._offsets = self._table(cursor, tensors)

    def _header(self, cursor: _Cursor) -> int:
        magic = bytes(cursor.data[:4])
        cursor.take(4, "the magic number")
        if magic != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file: expected it to begin with 'GGUF', found {magic!r}")
        version = cursor.number("<I", "the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            found = f"a big-endian file (version {swapped})" if swapped in _VERSIONS else f"version {version}"
            raise CheckpointError(f"{self.path}: expected a little-endian GGUF of version 2 or 3, found {found}")
        tensors = cursor.number("<Q", "the tensor count")
        self._pairs = cursor.number("<Q", "the metadata count")
        for count, least, what in ((tensors, 24, "tensors"), (self._pairs, 13, "metadata entries")):
            if count * least > len(cursor.data):
                raise CheckpointError(f"{self.path}: damaged GGUF: {count} {what} cannot fit {len(cursor.data)} bytes")
        return tensors

    def _metadata(self, cursor: _Cursor) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(self._pairs):
            key = cursor.text("a metadata key")
            if key in metadata:
                raise CheckpointError(f"{self.path}: metadata {key} appears twice")
            metadata[key] = cursor.value(cursor.number("<I", f"type of {key}"), key)
        if metadata.get("split.count", 0) > 1:
            raise CheckpointError(
                f"{self.path}: one part of a GGUF split in {metadata['split.count']}; join the parts first "
                "(llama-gguf-split --merge)"
            )
        return metadata

    def _table(self, cursor: _Cursor, count: int) -> tuple[dict[str, TensorSpec], dict[str, int]]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        specs: dict[str, TensorSpec] = {}
        offsets: dict[str, int] = {}
        for _ in range(count):
            name = cursor.text("a tensor's name")
            dims = cursor.number("<I", f"dimensions of {name}")
            if not 1 <= dims <= _MAX_DIMS:
                raise CheckpointError(f"{self.path}: tensor {name}: expected 1 to {_MAX_DIMS} dimensions, found {dims}")
            shape = tuple(cursor.number("<Q", f"shape of {name}") for _ in range(dims))[::-1]
            kind = cursor.number("<I", f"type of {name}")
            offset = cursor.number("<Q", f"offset of {name}")
            if name in specs:
                raise CheckpointError(f"{self.path}: tensor {name} appears twice")
            try:
                dtype = GGMLQuantizationType(kind)
            except ValueError:
                raise CheckpointError(
                    f"{self.path}: tensor {name}: type {kind} is not known to the gguf package; a newer gguf may know it"
                ) from None
            block, block_bytes = GGML_QUANT_SIZES[dtype]
            if min(shape) < 1 or shape[-1] % block:
                raise CheckpointError(f"{self.path}: tensor {name}: shape {list(shape)} does not fit type {dtype.name}")
            nbytes = math.prod(shape) // block * block_bytes
            specs[name] = TensorSpec(name, shape, dtype.name, nbytes, self.path)
            offsets[name] = offset
        self._place(cursor, specs, offsets)
        return specs, offsets

    def _place(self, cursor: _Cursor, specs: dict[str, TensorSpec], offsets: dict[str, int]) -> None:
        """Turns offsets into places in the file, and refuses tensors outside it or over each other."""
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise CheckpointError(f"{self.path}: general.alignment: expected a power of two, found {alignment!r}")
        base = -(-cursor.at // alignment) * alignment
        problems, end, before = [], base, ""
        for name in sorted(specs, key=lambda n: offsets[n]):
            start = offsets[name] = base + offsets[name]
            stop = start + specs[name].nbytes
            if stop > len(cursor.data):
                problems.append(f"tensor {name} ends at {stop}, the file at {len(cursor.data)}")
            elif start % alignment:
                problems.append(f"tensor {name} begins at {start}, not a multiple of {alignment}")
            elif start < end:
                problems.append(f"tensors {before} and {name} overlap")
            end, before = max(end, stop), name
        if problems:
            more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
            what = "truncated or damaged GGUF; download or convert it again:"
            raise CheckpointError(f"{self.path}: " + "\n  ".join([what, *problems[:5]]) + more)

    def names(self) -> list[str]:
        """See ``Source``."""
        return list(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """See ``Source``."""
        return self._specs[name]

    def raw(self, name: str) -> np.ndarray:
        """uint8, the tensor's bytes as the file holds them."""
        start = self._offsets[name]
        return self._file.bytes[start : start + self._specs[name].nbytes]

    def read(self, name: str) -> np.ndarray:
        """See ``Source``.

        Raises:
          CheckpointError: the gguf package cannot decode the tensor's type.
        """
        import ml_dtypes

        spec, raw = self._specs[name], self.raw(name)
        if spec.dtype in _PLAIN:
            return raw.view(_PLAIN[spec.dtype]).reshape(spec.shape)
        if spec.dtype == "BF16":
            return raw.view(ml_dtypes.bfloat16).reshape(spec.shape)
        return self._dequantized(spec, raw)

    def _dequantized(self, spec: TensorSpec, raw: np.ndarray) -> np.ndarray:
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType[spec.dtype]
        rows = math.prod(spec.shape[:-1])
        packed = raw.reshape(rows, -1)
        out = np.empty((rows, spec.shape[-1]), np.float32)
        step = max(1, _CHUNK_VALUES // spec.shape[-1])
        try:
            # Damaged scales show as inf or NaN, which is the caller's check.
            with np.errstate(over="ignore", invalid="ignore"):
                for i in range(0, rows, step):
                    out[i : i + step] = quants.dequantize(packed[i : i + step], kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: tensor {spec.name}: the gguf package cannot decode type {spec.dtype}; "
                "convert the file to another type (llama-quantize)"
            ) from None
        return out.reshape(spec.shape)

    def release(self, name: str) -> None:
        """See ``Source``."""
        self._file.release(self._offsets[name], self._specs[name].nbytes)

    def close(self) -> None:
        """See ``Source``.  The map goes when the last array that views it does."""
