"""Mistakes that the wide floor of few bits would hide, looked for in the candidate's own error.

Rounding knows nothing of a mistake: of what the mistake would change, its error holds next to nothing, however large it
is; where the mistake was made, that is in the error once.  Measured on weights rounded to 3 to 8 bits, of random layers
and of a trained model's first four: cosines between the two of up to 0.35, but of at most 0.15 where the one was in the
other 0.6 to 1.6 times; of a mask, a window, an activation or swapped weights that was wrong in one layer 0.42 to 0.93.
"""

import dataclasses

import numpy as np

from llmjax.oracle.causes.base import Cause
from llmjax.oracle.causes.catalogue import EVERYWHERE
from llmjax.oracle.floors import NO_FACTOR, SMALL_CACHES

# Classes that hide something; llama.cpp's blocks of 8 bits are fine enough.
WIDE = {*NO_FACTOR, *SMALL_CACHES} - {"block_int8"}
# How often a mistake's change is in the error, the least cosine, how many times that of a rounding of ours, and the
# fewest tokens that can tell.
_ONCE, _COSINE, _TIMES, TOKENS = (0.75, 1.33), 0.3, 3.0, 8
# Of what is wrong everywhere, what changes no more than a rounding does.
_SMALL = ("norm_eps", "cache_precision", "embedding_scale")


@dataclasses.dataclass(frozen=True)
class Held:
    """What of a mistake's change is in an error.

    Attributes:
      times: how often.
      cosine: between the two.
    """

    times: float
    cosine: float

    def proves(self, rounding: float) -> bool:
        """Whether it was made, where a rounding of ours has such a cosine at most."""
        return _ONCE[0] < self.times < _ONCE[1] and self.cosine > max(_COSINE, _TIMES * rounding)


def held(error: np.ndarray, change: np.ndarray, axis: int = 0) -> Held:
    """Of two differences whose ``axis`` counts tokens; each weighs by how far off it is, so that none drowns others."""
    e, d = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (error, change))
    ee, ed, dd = (np.einsum("ij,ij->i", *both, dtype=np.float64) for both in ((e, e), (e, d), (d, d)))
    weight = 1 / np.maximum(ee, max(1e-6 * float(np.median(ee)), 1e-60))
    own, both, changed = (float((weight * x).sum()) for x in (ee, ed, dd))
    return Held(both / changed, both / (own * changed) ** 0.5) if own and changed else Held(0.0, 0.0)


def worth(cause: Cause) -> bool:
    """Whether a mistake is one of a program, of a size of its own: not one of a tensor's values, or a rounding."""
    both = cause.cause == "weight_swapped" and (len(cause.steps) == 2 or cause.steps == ("experts",))
    return cause.post is None and (both or cause.cause in EVERYWHERE) and cause.cause not in _SMALL
