"""Writes safetensors files.

Format: https://huggingface.co/docs/safetensors.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from converters.readers.safetensors import CODES

# Bytes of a tensor that may wait for the others.
_SMALL = 1 << 20


class SafetensorsWriter:
    """Writes a file tensor by tensor, so that no more than one is in memory.

    The header comes first in the format and is known last here: room is left for it and filled up with spaces, which
    the format allows.  Tensors begin at a multiple of 64 bytes, so that JAX can take it as it lies in the file;
    as holes are not allowed, small ones whose size is none come last and begin anywhere.

    Args:
      path: a new file.
      tensors: how many will be written, at most.

    Raises:
      OSError: as ``open`` and ``write`` raise it.
    """

    def __init__(self, path: Path, tensors: int):
        # A tensor's entry is its name twice at most, a shape and two offsets; data begin at a multiple of 64 bytes.
        self._room = -(-(2048 + 512 * tensors) // 64) * 64 - 8
        self._entries: dict[str, dict[str, Any]] = {}
        self._at = 0
        self._last: list[tuple[str, np.ndarray]] = []
        self._file = open(path, "xb")
        self._file.seek(8 + self._room)

    def write(self, name: str, array: np.ndarray) -> None:
        """Appends a tensor, which may be of any strides."""
        if array.nbytes % 64 and array.nbytes <= _SMALL:
            self._last.append((name, np.array(array)))
        else:
            self._append(name, array)

    def _append(self, name: str, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        self._file.write(array.reshape(-1).view(np.uint8).data)
        stop = self._at + array.nbytes
        code = "BF16" if array.dtype.name == "bfloat16" else CODES[array.dtype.str]
        self._entries[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [self._at, stop]}
        self._at = stop

    def close(self, metadata: dict[str, str]) -> None:
        """Writes the header."""
        for name, array in self._last:
            self._append(name, array)
        header = json.dumps({"__metadata__": metadata, **self._entries}, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise ValueError(f"a header of {len(header)} bytes, room for {self._room}")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._file.close()
