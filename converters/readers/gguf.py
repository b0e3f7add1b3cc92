"""GGUF files, memory-mapped.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.  The header is parsed here, every count and offset
checked against the file, because ``gguf.GGUFReader`` trusts both and takes seconds on a vocabulary; what
block-quantized values mean is the ``gguf`` package's business.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from converters.readers.digest import Stamp
from converters.readers.gguf_header import Cursor
from converters.readers.mapped import MappedFile
from converters.readers.source import TensorSpec, problems_error
from llmjax.errors import CheckpointError, named

_VERSIONS = (2, 3)
_MAX_DIMS = 4
# Far above any model's, and low enough that a hostile file cannot fill the memory with table entries.
_MAX_ENTRIES = 1 << 17
# Types whose values are the bytes themselves.
_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
# Values expanded at a time: the temporaries of a block-quantized type are several times its float32 size.
_CHUNK_VALUES = 1 << 22
_DAMAGED = "truncated or damaged GGUF, download or convert it again"
# How llama.cpp names the parts of a file that is cut into several.
_PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def without_later_parts(files: list[Path]) -> list[Path]:
    """Files but those that are later parts of one of which an earlier part is among them."""
    kept: dict[Path, Path] = {}
    for file in sorted(files):
        match = _PART.fullmatch(file.name)
        kept.setdefault(file.with_name(_part(match, 1)) if match else file, file)
    return list(kept.values())


def _part(match: re.Match[str], number: int) -> str:
    return f"{match['name']}-{number:05}-of-{match['count']}.gguf"


class GgufSource:
    """A GGUF file as a ``Source``, or several that one was cut into, of which the first alone has the metadata.

    ``metadata`` holds Python numbers, booleans, strings, lists of strings, NumPy arrays of numbers and booleans, and
    lists of such arrays.

    Args:
      path: of the file, or of the first.
      alone: without the other parts.

    Raises:
      CheckpointError: it is no GGUF, of an unknown version or byte order, a later part of several, truncated, or
        inconsistent; or another part is missing, or not of the same file.
    """

    format = "gguf"

    def __init__(self, path: Path, *, alone: bool = False):
        self.path = Path(path)
        self.directory = self.path.parent
        self.config: dict[str, Any] = {}
        self.generation_config: dict[str, Any] | None = None
        self._file = MappedFile(self.path)
        self.files: tuple[Stamp, ...] = (self._file.stamp,)
        cursor = Cursor(self._file.bytes.data, self.path)
        tensors, pairs = self._header(cursor)
        self.metadata = self._metadata(cursor, pairs)
        self._specs, self._offsets = self._table(cursor, tensors)
        self._parts: dict[str, GgufSource] = {}  # by tensor, of those that are not in this file
        if not alone and self._split("count") > 1:
            self._join(self._split("count"))

    def _split(self, key: str) -> int:
        found = self.metadata.get(f"split.{key}", 0)
        if type(found) is not int or found < 0:
            raise CheckpointError(f"{self.path}: metadata split.{key}: expected an integer; the header is damaged")
        return found

    def _join(self, count: int) -> None:
        """Adds the other parts' tensors."""
        match, number = _PART.fullmatch(self.path.name), self._split("no")
        if not match or int(match["count"]) != count or int(match["number"]) != number + 1:
            raise CheckpointError(
                f"{self.path}: part {number + 1} of a GGUF split in {count}, which are found by names that end in "
                f"-{number + 1:05}-of-{count:05}.gguf; give them back their names"
            )
        if number:
            first = self.path.with_name(_part(match, 1))
            advice = f"name {first.name}" if first.is_file() else f"the first, {first.name}, is missing"
            raise CheckpointError(f"{self.path}: part {number + 1} of a GGUF split in {count}; {advice}")
        paths = [self.path.with_name(_part(match, i)) for i in range(2, count + 1)]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise problems_error(self.path, f"parts of a GGUF split in {count} are missing", missing)
        for i, path in enumerate(paths, 1):
            part = GgufSource(path, alone=True)
            own = part._split("no"), part._split("count"), part._split("tensors.count")
            if own != (i, count, self._split("tensors.count")) or part._specs.keys() & self._specs.keys():
                raise CheckpointError(f"{path}: not part {i + 1} of the GGUF that begins with {self.path.name}")
            self._parts |= dict.fromkeys(part._specs, part)
            self._specs |= part._specs
            self.files += part.files
        if len(self._specs) != self._split("tensors.count"):
            expected = self._split("tensors.count")
            raise CheckpointError(f"{self.path}: {count} parts hold {len(self._specs)} tensors, expected {expected}")

    def _header(self, cursor: Cursor) -> tuple[int, int]:
        magic = bytes(cursor.data[:4])
        if magic != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file: expected it to begin with 'GGUF', found {magic!r}")
        cursor.take(4, "the magic number")
        version = cursor.number("<I", "the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            found = f"a big-endian file (version {swapped})" if 1 <= swapped <= 3 else f"version {version}"
            raise CheckpointError(
                f"{self.path}: expected a little-endian GGUF of version 2 or 3, found {found}; convert it with a "
                "current llama.cpp"
            )
        tensors = cursor.number("<Q", "the tensor count")
        pairs = cursor.number("<Q", "the metadata count")
        for count, least, what in ((tensors, 24, "tensors"), (pairs, 13, "metadata entries")):
            if count * least > len(cursor.data) or count > _MAX_ENTRIES:
                raise CheckpointError(
                    f"{self.path}: {_DAMAGED}: the header counts {count} {what} in a file of {len(cursor.data)} bytes"
                )
        return tensors, pairs

    def _metadata(self, cursor: Cursor, pairs: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.text("a metadata key")
            if key in metadata:
                raise CheckpointError(f"{self.path}: metadata {named(key)} appears twice; the header is damaged")
            metadata[key] = cursor.value(key)
        return metadata

    def _table(self, cursor: Cursor, count: int) -> tuple[dict[str, TensorSpec], dict[str, int]]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        specs: dict[str, TensorSpec] = {}
        offsets: dict[str, int] = {}
        problems = []
        for _ in range(count):
            name = cursor.text("a tensor's name")
            label = f"tensor {named(name)}"
            dims = cursor.number("<I", f"the dimensions of {label}")
            if dims > _MAX_DIMS:  # where the next entry begins is not known then
                raise CheckpointError(f"{self.path}: {label}: expected at most {_MAX_DIMS} dimensions, found {dims}")
            shape = tuple(cursor.number("<Q", f"the shape of {label}") for _ in range(dims))[::-1]
            kind = cursor.number("<I", f"the type of {label}")
            offset = cursor.number("<Q", f"the offset of {label}")
            if name in specs:
                problems.append(f"{label} appears twice")
                continue
            try:
                dtype = GGMLQuantizationType(kind)
            except ValueError:
                problems.append(f"{label}: type {kind} is not known to the gguf package; a newer gguf may know it")
                continue
            block, block_bytes = GGML_QUANT_SIZES[dtype]
            if min(shape, default=1) < 1 or (shape[-1] if shape else 1) % block:
                problems.append(f"{label}: shape {list(shape)} does not fit type {dtype.name} with blocks of {block}")
                continue
            nbytes = math.prod(shape) // block * block_bytes
            specs[name] = TensorSpec(name, shape, dtype.name, nbytes, self.path)
            offsets[name] = offset
        if problems:
            raise problems_error(self.path, "tensors that cannot be read", problems)
        self._place(cursor, specs, offsets)
        return specs, offsets

    def _place(self, cursor: Cursor, specs: dict[str, TensorSpec], offsets: dict[str, int]) -> None:
        """Turns offsets into places in the file, and refuses tensors outside it or over each other."""
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise CheckpointError(
                f"{self.path}: general.alignment: expected a power of two, found {named(str(alignment))}"
            )
        base = -(-cursor.at // alignment) * alignment
        problems, end, before = [], base, ""
        for name in sorted(specs, key=lambda n: offsets[n]):
            start = offsets[name] = base + offsets[name]
            stop = start + specs[name].nbytes
            if stop > len(cursor.data):
                problems.append(f"tensor {named(name)} ends at {stop}, the file at {len(cursor.data)}")
            elif start % alignment:
                problems.append(f"tensor {named(name)} begins at {start}, not a multiple of {alignment}")
            elif start < end:
                problems.append(f"tensors {named(before)} and {named(name)} overlap")
            end, before = (stop, name) if stop > end else (end, before)
        if problems:
            raise problems_error(self.path, _DAMAGED, problems, most=5)

    def names(self) -> list[str]:
        """See ``Source``."""
        return list(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """See ``Source``."""
        return self._specs[name]

    def raw(self, name: str) -> np.ndarray:
        """uint8, the tensor's bytes as the file holds them."""
        if name in self._parts:
            return self._parts[name].raw(name)
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
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

        kind = GGMLQuantizationType[spec.dtype]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        # Blocks do not know of rows, so a row too wide for one chunk is cut like any other.
        width = spec.shape[-1] if spec.shape[-1] <= _CHUNK_VALUES else block
        packed = raw.reshape(-1, width // block * block_bytes)
        out = np.empty((len(packed), width), np.float32)
        step = _CHUNK_VALUES // width
        try:
            # Damaged scales show as inf or NaN, which is the caller's check.
            with np.errstate(all="ignore"):
                for i in range(0, len(packed), step):
                    out[i : i + step] = quants.dequantize(packed[i : i + step], kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: tensor {named(spec.name)}: the gguf package cannot decode type {spec.dtype}; "
                "convert the file to another type (llama-quantize)"
            ) from None
        return out.reshape(spec.shape)

    def release(self, name: str) -> None:
        """See ``Source``."""
        if name in self._parts:
            return self._parts[name].release(name)
        self._file.release(self._offsets[name], self._specs[name].nbytes)

    def close(self) -> None:
        """See ``Source``.  The map goes when the last array that views it does."""
