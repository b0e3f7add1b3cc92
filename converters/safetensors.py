"""One safetensors file, memory-mapped.  Format: https://github.com/huggingface/safetensors#format.

The official library checks the header (lengths, JSON, offsets without holes or overlaps, shapes against sizes); this
adds views of the map, bfloat16, and giving pages back, which its NumPy side does not have.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from converters.mapped import MappedFile
from converters.source import TensorSpec
from llmjax.errors import CheckpointError

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "?",
}  # fmt: skip


class SafetensorsFile:
    """Names, headers and values of one file.

    Args:
      path: of the file.

    Raises:
      CheckpointError: truncated, not safetensors, or with a header that contradicts itself or the file.
    """

    def __init__(self, path: Path):
        import safetensors

        self.path = path
        self._file = MappedFile(path)
        try:
            with safetensors.safe_open(path, framework="numpy"):
                pass
        except (safetensors.SafetensorError, OSError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{path}: damaged or truncated safetensors file: {error}; download it again"
            ) from None
        (length,) = struct.unpack_from("<Q", self._file.bytes.data)
        header = json.loads(bytes(self._file.bytes[8 : 8 + length]), object_pairs_hook=self._unique)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._base = 8 + length
        self._span: dict[str, tuple[int, int]] = {n: tuple(e["data_offsets"]) for n, e in header.items()}
        self._specs = {
            name: TensorSpec(name, tuple(e["shape"]), e["dtype"], self._span[name][1] - self._span[name][0], path)
            for name, e in header.items()
        }

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(n for n in names if names.count(n) > 1)
            raise CheckpointError(f"{self.path}: the header names {twice!r} twice")
        return result

    def names(self) -> list[str]:
        """See ``Source``."""
        return list(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """See ``Source``."""
        return self._specs[name]

    def read(self, name: str) -> np.ndarray:
        """See ``Source``.

        Raises:
          CheckpointError: a type NumPy cannot hold (8-bit floats).
        """
        import ml_dtypes

        spec, (start, stop) = self._specs[name], self._span[name]
        if spec.dtype != "BF16" and spec.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name}: type {spec.dtype} is not supported; expected F32, F16 or BF16"
            )
        dtype = ml_dtypes.bfloat16 if spec.dtype == "BF16" else _DTYPES[spec.dtype]
        raw = self._file.bytes[self._base + start : self._base + stop]
        return np.frombuffer(raw, dtype).reshape(spec.shape)

    def release(self, name: str) -> None:
        """See ``Source``."""
        start, stop = self._span[name]
        self._file.release(self._base + start, stop - start)
