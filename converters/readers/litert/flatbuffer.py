"""Tables of a flatbuffer without generated code: fields by their numbers, every offset checked.

Format: https://flatbuffers.dev/internals.  A file is not to be trusted: whatever leads out of it, or asks for more than
any model has, raises ``ValueError``, which readers turn into their own message.
"""

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

_MAX_TEXT = 1 << 16
_INT, _UINT, _FLOAT, _MAP, _MAX_ENTRIES = 1, 2, 3, 9, 1 << 12  # of a flexbuffer
_SCALARS = {code: struct.Struct(f"<{code}") for code in "bBhHiIqQfd?"}


class Table:
    """A table in a file's bytes.

    Args:
      data: the whole file.
      position: where the table begins.

    Raises:
      ValueError: there can be none.
    """

    __slots__ = ("_data", "_fields", "_position")

    def __init__(self, data: memoryview, position: int):
        self._data, self._position = data, position
        start = position - int(self._at(position, "i"))
        size = int(self._at(start, "H"))
        if size < 4 or size % 2 or start + size > len(data):
            raise ValueError(f"a table at byte {position} has a description of {size} bytes")
        self._fields = struct.unpack_from(f"<{size // 2 - 2}H", data, start + 4)

    @classmethod
    def root(cls, data: memoryview) -> "Table":
        """The table a flatbuffer begins with."""
        if len(data) < 8:
            raise ValueError(f"{len(data)} bytes are no flatbuffer")
        return cls(data, struct.unpack_from("<I", data)[0])

    def _at(self, position: int, code: str) -> Any:
        scalar = _SCALARS[code]
        if not 0 <= position <= len(self._data) - scalar.size:
            raise ValueError(f"an offset leads to byte {position} of {len(self._data)}")
        return scalar.unpack_from(self._data, position)[0]

    def _field(self, index: int) -> int:
        """Where a field is; 0 where it is not set."""
        offset = self._fields[index] if index < len(self._fields) else 0
        return self._position + offset if offset else 0

    def number(self, index: int, code: str, default: float = 0) -> Any:
        """A number by ``struct``'s letter for its type."""
        position = self._field(index)
        return self._at(position, code) if position else default

    def table(self, index: int) -> "Table | None":
        """The table a field refers to."""
        position = self._field(index)
        return Table(self._data, position + self._at(position, "I")) if position else None

    def _vector(self, index: int) -> tuple[int, int]:
        """Where a vector's elements begin and how many there are."""
        position = self._field(index)
        if not position:
            return 0, 0
        start = position + self._at(position, "I")
        return start + 4, self._at(start, "I")

    def count(self, index: int) -> int:
        """Elements of a vector."""
        return self._vector(index)[1]

    def array(self, index: int, dtype: str) -> np.ndarray:
        """A vector of numbers, as a view of the file."""
        start, count = self._vector(index)
        size = np.dtype(dtype).itemsize
        if count * size > len(self._data) - start:
            raise ValueError(f"{count} values at byte {start} of {len(self._data)}")
        return np.frombuffer(self._data, dtype, count, start)

    def tables(self, index: int, most: int) -> "Iterator[Table]":
        """A vector of tables, ``most`` at most."""
        start, count = self._vector(index)
        if count > most:
            raise ValueError(f"expected at most {most} entries, found {count}")
        for place in range(start, start + 4 * count, 4):
            yield Table(self._data, place + self._at(place, "I"))

    def text(self, index: int) -> str:
        """A string; what is not UTF-8 is replaced."""
        start, size = self._vector(index)
        if size > _MAX_TEXT or start + size > len(self._data):
            raise ValueError(f"a text of {size} bytes at byte {start} of {len(self._data)}")
        return str(self._data[start : start + size], "utf-8", "replace")


def map_of_numbers(data: bytes) -> dict[str, float | int]:
    """The floats and integers in the map that a flexbuffer is; nothing of one that is no map.

    Format: https://flatbuffers.dev/flexbuffers.  Of a float of 8 bytes the first 4 count, as to XNNPACK.

    Raises:
      ValueError: it is damaged.
    """
    sizes = "BHIQ"

    def number(position: int, width: int) -> int:
        if width not in (1, 2, 4, 8) or not 0 <= position <= len(data) - width:
            raise ValueError(f"a number of {width} bytes at byte {position} of {len(data)}")
        return int(struct.unpack_from(f"<{sizes[width.bit_length() - 1]}", data, position)[0])

    if len(data) < 3 or data[-2] >> 2 != _MAP:
        return {}
    root, width = len(data) - 2 - data[-1], 1 << (data[-2] & 3)
    values = root - number(root, data[-1])
    count, names = number(values - width, width), values - 3 * width
    if count > _MAX_ENTRIES:
        raise ValueError(f"a map: expected at most {_MAX_ENTRIES} entries, found {count}")
    names, step = names - number(names, width), number(values - 2 * width, width)
    found: dict[str, float | int] = {}
    for i in range(count):
        place = names + i * step
        start = max(place - number(place, step), 0)
        kind, value = number(values + count * width + i, 1) >> 2, values + i * width
        name = data[start : data.index(0, start)].decode("utf-8", "replace")
        if kind == _FLOAT and width >= 4:
            found[name] = struct.unpack("<f", struct.pack("<I", number(value, 4)))[0]
        elif kind in (_INT, _UINT):
            raw = number(value, width).to_bytes(width, "little")
            found[name] = int.from_bytes(raw, "little", signed=kind == _INT)
    return found
