"""GGUF's block types that stay packed: their values exactly, in a QTensor of groups of 32 or 16.

A block of the simple types is 32 weights of one row, one of the K types 256 in groups with integer scales of their own,
whose product with the block's scale is exact in float32.  Six bits become eight.  Source: ``ggml-common.h`` and
``ggml-quants.c`` of llama.cpp.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llmjax.quant.arrays import aligned, row_chunks
from llmjax.quant.qtensor import QTensor, pack


class Unpacked(NamedTuple):
    """Blocks taken apart: stored integers uint8 or int8 ``[blocks, weights]``, scales and offsets ``[blocks,
    groups]``."""

    n: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None = None


class Type(NamedTuple):
    """A block type: bits a weight is kept in, the integer that means zero, and how its blocks are taken apart."""

    bits: int
    zero: int
    take_apart: Callable[[np.ndarray], Unpacked]


def unpack(raw: np.ndarray, dtype: str, shape: tuple[int, int]) -> QTensor:
    """A QTensor from a tensor's bytes.

    Args:
      raw: uint8, as the file holds them.
      dtype: one of ``TYPES``.
      shape: ``(out, in)``; in is a multiple of the block.
    """
    kind = TYPES[dtype]
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    out, width = shape
    blocks = raw.reshape(out, width // block, block_bytes)
    sample = kind.take_apart(blocks[0])
    groups = sample.scales.shape[1] * width // block
    u8 = np.dtype(np.uint8)
    values = aligned((out, width), np.dtype(np.int8)) if kind.bits == 8 else aligned((out, width // 2), u8)
    scales = aligned((out, groups), sample.scales.dtype)
    offsets = None if sample.offsets is None else aligned((out, groups), sample.offsets.dtype)
    fifth = aligned((out, width // 8), u8) if kind.bits == 5 else None
    for rows in row_chunks(shape):
        part = kind.take_apart(blocks[rows].reshape(-1, block_bytes))
        n = part.n.reshape(-1, width)
        values[rows] = n if kind.bits == 8 else pack(n & 15)
        scales[rows] = part.scales.reshape(-1, groups)
        if offsets is not None and part.offsets is not None:
            offsets[rows] = part.offsets.reshape(-1, groups)
        if fifth is not None:
            planes = np.concatenate([n[:, 0::2] >> 4, n[:, 1::2] >> 4], 1)
            fifth[rows] = np.packbits(planes, axis=-1, bitorder="little")
    return QTensor(values, scales, offsets, fifth, bits=kind.bits, zero=kind.zero)


def _floats(block: np.ndarray, at: int) -> np.ndarray:
    """float16 ``[blocks, 1]`` from two bytes of each block."""
    return block[:, at : at + 2].copy().view(np.float16)


def _nibbles(block: np.ndarray) -> np.ndarray:
    """``[blocks, 2 n]``: the low halves of n bytes, then the high ones."""
    return np.concatenate([block & 15, block >> 4], 1)


def _fifth(n: np.ndarray, block: np.ndarray) -> np.ndarray:
    return n | np.unpackbits(block, axis=1, bitorder="little") << 4


def _q4_0(b: np.ndarray) -> Unpacked:
    return Unpacked(_nibbles(b[:, 2:]), _floats(b, 0))


def _q4_1(b: np.ndarray) -> Unpacked:
    return Unpacked(_nibbles(b[:, 4:]), _floats(b, 0), _floats(b, 2))


def _q5_0(b: np.ndarray) -> Unpacked:
    return Unpacked(_fifth(_nibbles(b[:, 6:]), b[:, 2:6]), _floats(b, 0))


def _q5_1(b: np.ndarray) -> Unpacked:
    return Unpacked(_fifth(_nibbles(b[:, 8:]), b[:, 4:8]), _floats(b, 0), _floats(b, 2))


def _q8_0(b: np.ndarray) -> Unpacked:
    return Unpacked(b[:, 2:].view(np.int8), _floats(b, 0))


def _k_scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets float32 ``[blocks, 8]`` of Q4_K and Q5_K: six bits each in bytes 4 to 15."""
    first, second, third = (b[:, i : i + 4] for i in (4, 8, 12))
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], 1).astype(np.float32)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], 1).astype(np.float32)
    return _floats(b, 0).astype(np.float32) * scales, -(_floats(b, 2).astype(np.float32) * minima)


def _k_nibbles(b: np.ndarray) -> np.ndarray:
    """``[blocks, 256]``: each 32 bytes hold 32 weights in their low halves and the next 32 in their high ones."""
    return _nibbles(b.reshape(-1, 32)).reshape(len(b), -1)


def _q4_k(b: np.ndarray) -> Unpacked:
    return Unpacked(_k_nibbles(b[:, 16:]), *_k_scales(b))


def _q5_k(b: np.ndarray) -> Unpacked:
    # Bit g of the 32 bytes belongs to group g.
    fifth = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return Unpacked(_k_nibbles(b[:, 48:]) | fifth.reshape(len(b), -1) << 4, *_k_scales(b))


def _q6_k(b: np.ndarray) -> Unpacked:
    """Two halves of 128 weights: 64 bytes of low nibbles, 32 bytes of four pairs of high bits."""
    halves = b[:, :128].reshape(-1, 2, 64)
    low = np.concatenate([halves & 15, halves >> 4], 2).reshape(-1, 2, 4, 32)
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    n = (low | high << 4).reshape(len(b), -1).astype(np.int8) - np.int8(32)
    return Unpacked(n, _floats(b, 208).astype(np.float32) * b[:, 192:208].view(np.int8))


TYPES: dict[str, Type] = {
    "Q4_0": Type(4, 8, _q4_0),
    "Q4_1": Type(4, 0, _q4_1),
    "Q5_0": Type(5, 16, _q5_0),
    "Q5_1": Type(5, 0, _q5_1),
    "Q8_0": Type(8, 0, _q8_0),
    "Q4_K": Type(4, 0, _q4_k),
    "Q5_K": Type(5, 0, _q5_k),
    "Q6_K": Type(8, 0, _q6_k),
}
