"""NumPy memory as JAX takes it, and large arrays a piece at a time."""

from collections.abc import Iterator

import numpy as np

# Values worked on at a time: temporaries are a few times their size.
_CHUNK = 1 << 22


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins at a multiple of 64 bytes: ``jax.device_put`` then uses it as it is on the CPU,
    without a second copy."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def row_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices that cut the rows of an array of ``shape`` into pieces that temporaries may be made of."""
    step = max(1, _CHUNK // max(1, int(np.prod(shape[1:], dtype=np.int64))))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))
