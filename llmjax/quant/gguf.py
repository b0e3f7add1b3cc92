"""GGUF's block types that stay packed: their values exactly, in a QTensor of groups of 32.

A block is 32 weights of one row.  Its nibbles hold the first half of the weights in their low bits and the second half
in their high ones; a QTensor has neighbours together.  Source: ``ggml-common.h`` and ``ggml-quants.c`` of llama.cpp.
"""

import numpy as np

from llmjax.arrays import aligned
from llmjax.quant.qtensor import QTensor, pack

BLOCK = 32
_CHUNK = 1 << 22

# type -> (bits, zero, has minima); a block is scale, minimum, fifth bits, integers, each where the type has it.
TYPES: dict[str, tuple[int, int, bool]] = {
    "Q4_0": (4, 8, False),
    "Q4_1": (4, 0, True),
    "Q5_0": (5, 16, False),
    "Q5_1": (5, 0, True),
    "Q8_0": (8, 0, False),
}


def unpack(raw: np.ndarray, dtype: str, shape: tuple[int, int]) -> QTensor:
    """A QTensor from a tensor's bytes.

    Args:
      raw: uint8, as the file holds them.
      dtype: one of ``TYPES``.
      shape: ``(out, in)``; in is a multiple of 32.
    """
    bits, zero, has_minima = TYPES[dtype]
    out, width = shape
    groups = width // BLOCK
    f16, u8 = np.dtype(np.float16), np.dtype(np.uint8)
    values = aligned((out, width), np.dtype(np.int8)) if bits == 8 else aligned((out, width // 2), u8)
    scales = aligned((out, groups), f16)
    offsets = aligned((out, groups), f16) if has_minima else None
    fifth = aligned((out, width // 8), u8) if bits == 5 else None
    blocks = raw.reshape(out, groups, -1)
    step = max(1, _CHUNK // width)
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        block = blocks[rows]
        scales[rows] = block[..., :2].copy().view(np.float16)[..., 0]
        at = 2
        if offsets is not None:
            offsets[rows] = block[..., 2:4].copy().view(np.float16)[..., 0]
            at = 4
        if fifth is not None:
            bit = np.unpackbits(block[..., at : at + 4], axis=-1, bitorder="little").reshape(-1, width)
            planes = np.concatenate([bit[:, 0::2], bit[:, 1::2]], 1)
            fifth[rows] = np.packbits(planes, axis=-1, bitorder="little")
            at += 4
        if bits == 8:
            values[rows] = block[..., at:].view(np.int8).reshape(-1, width)
        else:
            nibbles = block[..., at:]
            values[rows] = pack(np.concatenate([nibbles & 15, nibbles >> 4], -1).reshape(-1, width))
    return QTensor(values, scales, offsets, fifth, bits=bits, zero=zero)
