"""Better scales than the largest weight's for the same bits: from a fixed list of candidates, by a weighted error.

Rounding to nearest under ``max|w| / hi`` never uses the integer ``-hi - 1``.  A scale of either sign does: it puts the
largest weight on ``-hi - 1``, so in 4 bits there are eight steps to it and not seven (GGUF's Q4_0 is made that way).
Around that scale the one of least ``sum w^2 (w' - w)^2`` is taken.  Weighting by ``w^2`` matters: the least plain
squared error cuts off the largest weights, on which models depend most, and is worse than rounding to nearest in
perplexity although its error is smaller by a third.  What it gains: ``scripts/quality.py``.
"""

import numpy as np

# Of the scale that puts the largest weight on -hi - 1.
FACTORS: tuple[float, ...] = tuple(i / 64 for i in range(72, 31, -1))

# Values worked on at a time: the temporaries stay in the cache.
_CHUNK = 1 << 16


def mse_scales(groups: np.ndarray, hi: int) -> np.ndarray:
    """For each group the scale whose integers have the least squared error weighted by the squared weights.

    The integers are ``clip(round_half_even(w / scale), -hi - 1, hi)``.  The candidates, of which the first of equals is
    taken: ``max|w| / hi``, so that the error is never more than that of rounding to nearest; then ``r * p / (-hi - 1)``
    with ``p`` the first largest weight in magnitude and ``r`` = 72/64, 71/64, ..., 32/64.  Errors are summed in
    float64, so that the choice does not hang on the order of summation.

    Args:
      groups: float32 ``[rows, G, g]``.
      hi: the largest integer, 7 or 127.

    Returns:
      float32 ``[rows, G]``, of either sign; 0 for a group of zeros.
    """
    scales = np.abs(groups).max(-1) / np.float32(hi)
    step = max(1, _CHUNK // max(1, groups[0].size)) if len(groups) else 1
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        scales[part] = _search(groups[part], scales[part], hi)
    return scales


def _search(w: np.ndarray, nearest: np.ndarray, hi: int) -> np.ndarray:
    peak = np.take_along_axis(w, np.abs(w).argmax(-1)[..., None], -1)[..., 0] / np.float32(-hi - 1)
    best, least = nearest, np.full(nearest.shape, np.inf)
    rounded = np.empty_like(w)
    for scales in (nearest, *(peak * np.float32(factor) for factor in FACTORS)):
        divisor = np.where(scales == 0, np.float32(1), scales)[..., None]
        np.divide(w, divisor, out=rounded)
        np.rint(rounded, out=rounded)
        np.clip(rounded, -hi - 1, hi, out=rounded)
        rounded *= divisor
        rounded -= w
        error = np.square(np.multiply(rounded, w, dtype=np.float64)).sum(-1)
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
    return best
