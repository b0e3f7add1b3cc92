"""From floats to few bits, in NumPy: MediaPipe's formulas, bit for bit.

Not in XLA: XLA:CPU turns a division by a broadcast scale into a multiplication by its reciprocal (jaxlib 0.10.1 and
later), which moves some values by one.  Source: ``quantization_util.py`` of MediaPipe's converter.

Symmetric, the default::

    scale = max |w| / hi,  1 where that is 0          hi = 127 or 7, lo = -128 or -8
    n     = clip(round_half_even(w / scale), lo, hi)

Asymmetric::

    scale = (max w - min w) / (hi - lo),  1 where that is 0;     z = lo - min w / scale
    n     = clip(round_half_even(w / scale + z), lo, hi);        w ~ n * scale - scale * z

The maximum is taken over the inputs of each output channel, or of each group of them.
"""

from collections.abc import Callable

import numpy as np

from llmjax.errors import CheckpointError, ConfigError
from llmjax.quant.arrays import aligned, row_chunks
from llmjax.quant.qtensor import QTensor, pack
from llmjax.quant.schemes import Scheme
from llmjax.quant.search import mse_scales

Rows = Callable[[int, int], np.ndarray]


def quantize(rows: Rows, shape: tuple[int, int], scheme: Scheme, name: str = "weight") -> QTensor:
    """Quantizes a weight some rows at a time.

    Args:
      rows: ``rows(start, stop)`` returns these rows of the weight, any float dtype.
      shape: ``(out, in)``.
      scheme: how.
      name: for messages.

    Returns:
      a QTensor of NumPy arrays.

    Raises:
      ConfigError: the group does not divide the inputs, or 4 bits and an odd number of inputs.
      CheckpointError: NaN or infinite weights.
    """
    out, width = shape
    group = scheme.group or width
    if width % group:
        raise ConfigError(f"{name}: {scheme}: {width} inputs are not a multiple of the group {group}")
    if scheme.bits == 4 and group % 2:
        raise ConfigError(f"{name}: {scheme}: expected an even number of inputs, found {width}")
    packed = width // 2 if scheme.bits == 4 else width
    values = aligned((out, packed), np.dtype(np.uint8 if scheme.bits == 4 else np.int8))
    scales = aligned((out, width // group), np.dtype(np.float32))
    offsets = None if scheme.symmetric else aligned(scales.shape, scales.dtype)
    for part in row_chunks(shape):
        with np.errstate(over="ignore"):  # it is looked for
            w = rows(part.start, part.stop).astype(np.float32).reshape(-1, width // group, group)
        if not np.isfinite(w).all():
            raise CheckpointError(f"{name}: NaN or infinite weights cannot be quantized; the checkpoint is damaged")
        with np.errstate(over="ignore", invalid="ignore"):  # it is looked for below
            n, scales[part], shift = _symmetric(w, scheme) if scheme.symmetric else _asymmetric(w, scheme.bits)
        if not np.isfinite(scales[part]).all():
            raise CheckpointError(f"{name}: {scheme}: weights of a range that float32 does not hold; they are damaged")
        if offsets is not None:
            offsets[part] = shift
        n = n.reshape(-1, width)
        values[part] = pack(n.astype(np.int8) + np.int8(8)) if scheme.bits == 4 else n
    return QTensor(values, scales, offsets, bits=scheme.bits, zero=8 if scheme.bits == 4 else 0)


def _range(bits: int) -> tuple[int, int]:
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _symmetric(w: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """``w [rows, G, g]`` to integers as float32, scales ``[rows, G]``, no offsets."""
    lo, hi = _range(scheme.bits)
    scales = mse_scales(w, hi) if scheme.mse else np.abs(w).max(-1) / np.float32(hi)
    scales[scales == 0] = 1
    return np.clip(np.round(w / scales[..., None]), lo, hi), scales, None


def _asymmetric(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lo, hi = _range(bits)
    least = w.min(-1)
    scales = (w.max(-1) - least) / np.float32(hi - lo)
    scales[scales == 0] = 1
    zero = np.float32(lo) - least / scales
    n = np.clip(np.round(w / scales[..., None] + zero[..., None]), lo, hi)
    return n, scales, -(scales * zero)
