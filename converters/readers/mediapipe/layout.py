"""How weights lie in ``.bin`` files: by rows (cpu), or in blocks of 4 x 4 (gpu).

A weight is ``[out, in]`` on our side.  On the gpu's it is ``[in / 4][out / 4][4 in][4 out]``, both counts rounded up;
what fills up the last blocks means zero.  (Measured on files of MediaPipe's converter for multiples of 4; how it fills
up others is not known.)  Integers:

======  ======================================  =============================
bits    here, as ``QTensor`` keeps them         in the gpu's blocks
======  ======================================  =============================
8       int8 ``[out, in]``                      uint8, 128 more
4       uint8 ``[out, in / 2]``, 8 more, the    two to a byte, 8 more, the
        even index in the low half              even index in the low half
32      float32 ``[out, in]``                   float32
======  ======================================  =============================

The cpu's layout is ours.
"""

import numpy as np

from llmjax.quant.arrays import aligned, row_chunks

Shape = tuple[int, int]
# What stands for zero in a gpu file.
_ZERO = {8: 128, 4: 8, 32: 0}


def stored_bytes(shape: Shape, bits: int, backend: str) -> int:
    """Size of a weight's data."""
    out, width = shape
    if backend == "gpu":
        out, width = (-(-n // 4) * 4 for n in shape)
    return out * width * bits // 8


def from_rows(raw: np.ndarray, shape: Shape, bits: int) -> np.ndarray:
    """The cpu's layout: uint8 bytes as the file has them to values ``[out, in]``, a view."""
    out, width = shape
    if bits == 4:
        return raw.reshape(out, width // 2)
    return raw.view(np.int8 if bits == 8 else "<f4").reshape(shape)


def from_blocks(raw: np.ndarray, shape: Shape, bits: int) -> np.ndarray:
    """The gpu's layout: uint8 bytes as the file has them to values ``[out, in]``, some rows at a time."""
    out, width = shape
    across, down = -(-width // 4), -(-out // 4)
    blocks = raw.reshape(across, down, 2 * bits)
    values = _empty(shape, bits)
    for part in row_chunks((down, 4 * width)):
        block = blocks[:, part]
        if bits == 4:
            block = np.stack([block & 15, block >> 4], -1)
        elif bits == 32:
            block = np.ascontiguousarray(block).view("<f4")
        rows = block.reshape(across, -1, 4, 4).transpose(1, 3, 0, 2).reshape(-1, 4 * across)
        rows = rows[: out - 4 * part.start, :width]
        if bits == 8:
            rows = (rows ^ np.uint8(128)).view(np.int8)
        elif bits == 4:
            rows = rows[:, 0::2] | rows[:, 1::2] << np.uint8(4)
        values[4 * part.start : 4 * part.start + len(rows)] = rows
    return values


def to_blocks(values: np.ndarray, shape: Shape, bits: int) -> np.ndarray:
    """The gpu's layout: values ``[out, in]`` to uint8 bytes as the file has them, some rows at a time."""
    out, width = shape
    across, down = -(-width // 4), -(-out // 4)
    blocks = np.empty((across, down, 2 * bits), np.uint8)
    for part in row_chunks((down, 4 * width)):
        rows = values[4 * part.start : 4 * part.stop]
        if bits == 8:
            rows = rows.view(np.uint8) ^ np.uint8(128)
        elif bits == 4:
            rows = np.stack([rows & np.uint8(15), rows >> np.uint8(4)], -1).reshape(len(rows), width)
        count = part.stop - part.start
        full = np.full((4 * count, 4 * across), _ZERO[bits], np.float32 if bits == 32 else np.uint8)
        full[: len(rows), :width] = rows
        block = full.reshape(count, 4, across, 4).transpose(2, 0, 3, 1).reshape(across, count, 16)
        if bits == 4:
            block = block[..., 0::2] | block[..., 1::2] << np.uint8(4)
        blocks[:, part] = np.ascontiguousarray(block).view(np.uint8)
    return blocks.reshape(-1)


def row_sums(values: np.ndarray, bits: int) -> np.ndarray:
    """int32 ``[out]``: the sum of each row's integers."""
    sums = np.empty(len(values), np.int32)
    for part in row_chunks(values.shape):
        rows = values[part]
        if bits == 4:
            total = (rows & 15).sum(1, dtype=np.int32) + (rows >> 4).sum(1, dtype=np.int32)
            sums[part] = total - np.int32(8 * 2 * values.shape[1])
        else:
            sums[part] = rows.sum(1, dtype=np.int32)
    return sums


def to_columns(values: np.ndarray, bits: int) -> np.ndarray:
    """Values ``[out, in]`` as a raw weight file of MediaPipe's converter has them: uint8 bytes of ``[in, out]``.

    Integers of 4 bits are packed along the flattened array, in two's complement; for the cpu 8 is added to them
    before, which ``as_unsigned`` does.
    """
    if bits != 4:
        return np.ascontiguousarray(values.T).view(np.uint8).reshape(-1)
    out, width = values.shape[0], 2 * values.shape[1]
    columns = np.empty((width, out), np.uint8)
    for part in row_chunks((out, width)):
        columns[0::2, part] = (values[part] & np.uint8(15)).T
        columns[1::2, part] = (values[part] >> np.uint8(4)).T
    flat = columns.reshape(-1)
    return flat[0::2] | flat[1::2] << np.uint8(4)


def from_columns(raw: np.ndarray, shape: Shape, bits: int) -> np.ndarray:
    """The inverse of ``to_columns``."""
    out, width = shape
    if bits != 4:
        return np.ascontiguousarray(raw.view(np.int8 if bits == 8 else "<f4").reshape(width, out).T)
    columns = np.stack([raw & np.uint8(15), raw >> np.uint8(4)], -1).reshape(width, out)
    values = _empty(shape, bits)
    for part in row_chunks((out, width)):
        values[part] = columns[0::2, part].T | columns[1::2, part].T << np.uint8(4)
    return values


def _empty(shape: Shape, bits: int) -> np.ndarray:
    out, width = shape
    if bits == 4:
        return aligned((out, width // 2), np.dtype(np.uint8))
    return aligned(shape, np.dtype(np.int8 if bits == 8 else np.float32))
