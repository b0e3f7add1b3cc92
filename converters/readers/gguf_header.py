"""The primitive values of a GGUF header, every count and length checked before anything is allocated.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.errors import CheckpointError, named

_BOOL, _STRING, _ARRAY = 7, 8, 9
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
_MAX_DEPTH = 4
# Of a whole file: an inner array takes 12 bytes there and hundreds in Python.
_MAX_INNER = 1 << 16


class Cursor:
    """Reads the header front to back and never past the end of the file.

    Args:
      data: the whole file.
      where: its path, for messages.
    """

    def __init__(self, data: memoryview, where: Path):
        self.data, self.where, self.at = data, where, 0
        self._inner = 0

    def take(self, size: int, what: str) -> int:
        """Advances over ``size`` bytes and returns where they begin.

        Raises:
          CheckpointError: the file ends before.
        """
        start = self.at
        if size > len(self.data) - start:
            raise CheckpointError(
                f"{self.where}: truncated or damaged GGUF: {what} needs {size} bytes at offset {start}, the file ends "
                f"at {len(self.data)}; download or convert it again"
            )
        self.at = start + size
        return start

    def number(self, code: str, what: str) -> Any:
        """One number by its ``struct`` code."""
        start = self.take(struct.calcsize(code), what)
        return struct.unpack_from(code, self.data, start)[0]

    def text(self, what: str) -> str:
        """One string.

        Raises:
          CheckpointError: it runs past the end of the file, or is not UTF-8.
        """
        size = self.number("<Q", f"the length of {what}")
        start = self.take(size, what)
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.where}: {what} at offset {start} is not UTF-8: {error.reason}") from None

    def value(self, key: str) -> Any:
        """One metadata value with its type before it: a Python number, bool, string, or an array.

        Numbers in an array come as a NumPy array, strings as a list, inner arrays as a list of these.

        Raises:
          CheckpointError: an unknown type, or arrays nested too deep.
        """
        what = f"metadata {named(key)}"
        kind = self.number("<I", f"the type of {what}")
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self._array(what, 1)
        return self._numbers(kind, 1, what)[0].item()

    def _numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.where}: {what}: unknown value type {kind}; the header is damaged")
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self.data, dtype, count, self.take(count * dtype.itemsize, what))
        return values.astype(bool) if kind == _BOOL else values

    def _array(self, what: str, depth: int) -> Any:
        kind = self.number("<I", f"the type of {what}")
        count = self.number("<Q", f"the length of {what}")
        if kind == _STRING:
            return self._strings(count, what)
        if kind != _ARRAY:
            return self._numbers(kind, count, what)
        self._inner += count
        if depth == _MAX_DEPTH or self._inner > _MAX_INNER:
            raise CheckpointError(
                f"{self.where}: {what}: expected at most {_MAX_DEPTH} levels of arrays, and {_MAX_INNER} inner "
                "arrays in the file; the header is damaged"
            )
        return [self._array(what, depth + 1) for _ in range(count)]

    def _strings(self, count: int, what: str) -> list[str]:
        if count * 8 > len(self.data) - self.at:  # a string takes at least its length: refuse before building a list
            self.take(count * 8, what)
        data, at, end, unpack = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                size = unpack(data, at)[0]
                at += 8
                if size > end - at:
                    self.at = at
                    self.take(size, f"a string in {what}")
                strings.append(str(data[at : at + size], "utf-8"))
                at += size
        except struct.error:
            self.at = at
            self.take(8, f"the length of a string in {what}")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.where}: {what}: string {len(strings)} at offset {at} is not UTF-8: {error.reason}"
            ) from None
        self.at = at
        return strings
