"""A read-only memory map whose pages can be given back."""

import contextlib
import mmap
import zlib
from pathlib import Path

import numpy as np

from converters.readers.digest import stamp
from llmjax.errors import CheckpointError, lfs_pointer

_AT_ONCE = 16 << 20


class MappedFile:
    """A file mapped into memory.

    Args:
      path: of the file.

    Attributes:
      stamp: the file as it is mapped.

    Raises:
      CheckpointError: it cannot be read, is empty, or a git-lfs pointer.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.stamp = stamp(path, file.fileno())
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise CheckpointError(f"{path}: the file is empty") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read the file: {error.strerror}") from None
        self.bytes = np.frombuffer(self._map, np.uint8)
        if pointer := lfs_pointer(self._map[:64]):
            raise CheckpointError(f"{path}: {pointer}")

    def __len__(self) -> int:
        return len(self.bytes)

    def crc32(self, start: int, length: int) -> int:
        """The CRC-32 of the range, which is read for it and released."""
        found = 0
        for at in range(start, start + length, _AT_ONCE):
            piece = min(_AT_ONCE, start + length - at)
            found = zlib.crc32(self.bytes[at : at + piece].data, found)
            self.release(at, piece)
        return found

    def release(self, start: int, length: int) -> None:
        """Tells the system that the pages inside the range are not needed now; reading them again is allowed."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            with contextlib.suppress(OSError):  # advice that the system may decline
                self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
