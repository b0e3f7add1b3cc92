"""One safetensors file, memory-mapped.  Format: https://github.com/huggingface/safetensors#format.

The header is checked here as strictly as the official library does it (no holes, no overlaps, nothing after the last
tensor), with all problems in one message; its NumPy side knows neither bfloat16 nor giving pages back.
"""

import math
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from converters.readers.jsonfile import parse_json
from converters.readers.mapped import MappedFile
from converters.readers.source import TensorSpec, problems_error
from llmjax.errors import CheckpointError, named, shown

_MAX_HEADER = 100_000_000  # the official limit
_MOST_TENSORS = 1 << 17  # far above any model's
_MAX_DIMS = 32  # NumPy before 2.0 has no more
_MAX_BYTES = 1 << 62
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "?",
}  # fmt: skip
CODES = {np.dtype(code).str: name for name, code in _DTYPES.items()}
# Known to the format: listed, and refused only when read.
_BITS = {name: np.dtype(code).itemsize * 8 for name, code in _DTYPES.items()} | {
    "BF16": 16, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip
_DAMAGED = "truncated or damaged safetensors file, download it again"


class SafetensorsFile:
    """Names, headers and values of one file.

    Args:
      path: of the file.

    Raises:
      CheckpointError: truncated, not safetensors, or with a header that contradicts itself or the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = MappedFile(path)
        self.stamp = self._file.stamp
        header, self._base = self._read_header()
        self.metadata: dict[str, str] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._starts: dict[str, int] = {}
        problems = []
        if len(header) > _MOST_TENSORS:
            self._fail(f"{_DAMAGED}: {len(header):,} tensors, expected at most {_MOST_TENSORS:,}")
        for name, entry in header.items():
            if name == "__metadata__":
                problem = self._add_metadata(entry)
            else:
                problem = self._add_tensor(name, entry)
            if problem:
                problems.append(problem)
        if problems:
            raise problems_error(self.path, _DAMAGED, problems, most=5)
        self._check_layout()

    def _fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {problem}") from None

    def _read_header(self) -> tuple[dict[str, Any], int]:
        data = self._file.bytes
        if len(data) < 8:
            self._fail(f"{_DAMAGED}: expected 8 bytes for the header's length, the file has {len(data)}")
        length = int.from_bytes(data[:8].tobytes(), "little")
        if length > min(_MAX_HEADER, len(data) - 8):
            self._fail(
                f"not a safetensors file, or truncated: a header of {length} bytes in a file of {len(data)}, expected "
                f"at most {_MAX_HEADER}; download it again"
            )
        try:
            header = parse_json(data[8 : 8 + length].tobytes().decode("utf-8"), _no_constant)
        except (ValueError, RecursionError) as error:
            self._fail(f"{_DAMAGED}: the header is not valid JSON: {error}")
        if not isinstance(header, dict):
            self._fail(f"{_DAMAGED}: expected the header to be a JSON object, found {type(header).__name__}")
        return header, 8 + length

    def _add_metadata(self, entry: Any) -> str:
        if entry is None:
            return ""
        if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
            return "__metadata__: expected an object of strings"
        self.metadata = entry
        return ""

    def _add_tensor(self, name: str, entry: Any) -> str:
        """Remembers a tensor; returns what is wrong with its entry, if anything is."""
        label = f"tensor {named(name)}"
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            return f"{label}: expected an object with dtype, shape and data_offsets"
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            return f"{label}: unknown dtype {named(dtype) if isinstance(dtype, str) else shown(dtype)}"
        if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
            return f"{label}: shape: expected at most {_MAX_DIMS} sizes, found {shown(shape)}"
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            return f"{label}: data_offsets: expected [begin, end], found {shown(offsets)}"
        # NumPy refuses an empty array whose other dimensions alone are too many.
        if math.prod(n for n in shape if n) * 8 > _MAX_BYTES:
            return f"{label}: shape {shape} has more values than any file"
        bits = math.prod(shape) * _BITS[dtype]
        start, stop = offsets
        if bits != (stop - start) * 8:
            return f"{label}: {dtype} {shape} takes {bits / 8:g} bytes, data_offsets give {stop - start}"
        self._specs[name] = TensorSpec(name, tuple(shape), dtype, stop - start, self.path)
        self._starts[name] = start
        return ""

    def _check_layout(self) -> None:
        """The format wants the tensors back to back from the header's end to the file's."""
        size, at = len(self._file) - self._base, 0
        problems = []
        for name in sorted(self._specs, key=lambda n: (self._starts[n], self._specs[n].nbytes)):
            start, stop = self._starts[name], self._starts[name] + self._specs[name].nbytes
            if start != at:
                what = "overlaps the one before" if start < at else "leaves a hole before it"
                problems.append(f"tensor {named(name)} {what}: expected it to begin at {at}, found {start}")
            at = max(at, stop)
        if at != size:
            problems.append(f"the tensors end at {at}, the data in the file at {size}")
        if problems:
            raise problems_error(self.path, _DAMAGED, problems, most=5)

    def names(self) -> list[str]:
        """See ``Source``."""
        return list(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """See ``Source``."""
        return self._specs[name]

    def read(self, name: str) -> np.ndarray:
        """See ``Source``.

        Raises:
          CheckpointError: a type llmjax does not compute with (floats of 8 bits and fewer, complex numbers).
        """
        import ml_dtypes

        spec = self._specs[name]
        if spec.dtype != "BF16" and spec.dtype not in _DTYPES:
            self._fail(f"tensor {named(name)}: type {spec.dtype} is not supported; expected F32, F16 or BF16")
        dtype = np.dtype(ml_dtypes.bfloat16 if spec.dtype == "BF16" else _DTYPES[spec.dtype])
        return self.raw(name).view(dtype).reshape(spec.shape)

    def raw(self, name: str) -> np.ndarray:
        """uint8, the tensor's bytes as the file holds them."""
        start = self._base + self._starts[name]
        return self._file.bytes[start : start + self._specs[name].nbytes]

    def release(self, name: str) -> None:
        """See ``Source``."""
        self._file.release(self._base + self._starts[name], self._specs[name].nbytes)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 64 for n in value)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")
