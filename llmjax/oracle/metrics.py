"""How far two arrays, and two models' logits, are apart."""

import dataclasses
from typing import Any

import numpy as np

from llmjax.oracle.dump import Window

# A flip is a tie where the drift of all logits explains it: its margin is at most this many standard deviations.
TIE = 6.0
_MANTISSA = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far two arrays of one shape are apart.

    Attributes:
      error: ``sqrt(sum((x - y)^2) / sum(x^2 + y^2))``: 0 for equal, 1 for unrelated ones; symmetric, and sees scale.
      worst: the same of the token where it is largest.
      token: where the largest difference is.
      channel: its place among that token's values.
      largest: that difference.
      by_token: the error of each token.
    """

    error: float
    worst: float
    token: int
    channel: int
    largest: float
    by_token: np.ndarray = dataclasses.field(repr=False, compare=False)


def gap(x: np.ndarray, y: np.ndarray, token_axis: int = 0) -> Gap:
    """See ``Gap``; sums in float64."""
    x, y = (_rows(a, token_axis) for a in (x, y))
    difference = x - y
    squares, sizes = _squares(difference), _squares(x) + _squares(y)
    # A token far smaller than most holds what cancellation left of them: its error counts beside a hundredth of theirs.
    least = np.maximum(sizes, 1e-4 * np.median(sizes))
    by_token = np.sqrt(squares / np.where(least > 0, least, 1))
    total = sizes.sum()
    np.abs(difference, out=difference)
    token, channel = np.unravel_index(int(difference.argmax()), difference.shape)
    return Gap(
        error=float(np.sqrt(squares.sum() / total)) if total else 0.0,
        worst=float(by_token.max()),
        token=int(token),
        channel=int(channel),
        largest=float(difference[token, channel]),
        by_token=by_token,
    )


def _rows(x: np.ndarray, token_axis: int) -> np.ndarray:
    """A row of floats for each token; float64 stays."""
    x = np.moveaxis(x, token_axis, 0).reshape(x.shape[token_axis], -1)
    return x if x.dtype == np.float64 else x.astype(np.float32, copy=False)


def _squares(x: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", x, x, dtype=np.float64)


def narrowed(x: np.ndarray, y: np.ndarray, token_axis: int = 0) -> float:
    """The error after both are rounded to the narrower of their dtypes."""
    dtype = min((x.dtype, y.dtype), key=lambda d: _MANTISSA.get(d.name, 23))
    with np.errstate(over="ignore"):
        x, y = (a.astype(dtype).astype(np.float32) for a in (x, y))
    finite = np.isfinite(x) & np.isfinite(y)
    return gap(np.where(finite, x, 0), np.where(finite, y, 0), token_axis).error


def log_softmax(z: np.ndarray) -> np.ndarray:
    """float64 ``[T, V]``."""
    z = z.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def logits_report(
    ours: np.ndarray, theirs: np.ndarray, ids: np.ndarray, noise: float | None, window: Window | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Logits ``[T, V]``, or a window of them, position by position: the contract's numbers, and the positions of the
    largest KL.

    A flip whose margin (of the reference's best token over the candidate's) is at most ``TIE`` of the drift that
    arithmetic explains is a tie.

    Args:
      ours: the reference's.
      theirs: the candidate's.
      ids: int32 ``[T]``.
      noise: the error of a pair that arithmetic explains; None takes the candidate's own usual drift for it.
      window: what both show, if not all.
    """
    positions = np.arange(len(ids)) if window is None else window.positions
    if noise is not None:
        noise *= float(
            np.sqrt(np.mean(np.square(ours, dtype=np.float64)) + np.mean(np.square(theirs, dtype=np.float64)))
        )
    if window is not None and window.log_probs:
        p, q = ours.astype(np.float64), theirs.astype(np.float64)
    else:
        p, q = log_softmax(ours), log_softmax(theirs)
    kl = (np.exp(p) * (p - q)).sum(-1)
    apart = np.abs(p - q)
    drift = theirs.astype(np.float64) - ours
    drift -= drift.mean(-1, keepdims=True)
    best, other = ours.argmax(-1), theirs.argmax(-1)
    rows = np.arange(len(ours))
    margin = (ours[rows, best] - ours[rows, other]).astype(np.float64)
    flipped = best != other
    beyond = flipped & (margin > TIE * (np.median(np.sqrt((drift**2).mean(-1))) if noise is None else noise))
    followed = positions + 1 < len(ids)
    following = ids[positions[followed] + 1]

    def nll(x: np.ndarray) -> float | None:
        return float(-x[rows[followed], following].mean()) if len(following) else None

    report = {
        "kl_mean": float(max(kl.mean(), 0.0)),
        "kl_max": float(max(kl.max(), 0.0)),
        "max_abs_logprob": float(apart.max()),
        "mean_abs_logprob": float(apart.mean()),
        "argmax_agreement": float(1 - flipped.mean()),
        "flips": int(flipped.sum()),
        "flips_beyond_margin": int(beyond.sum()),
        "nll": [nll(p), nll(q)],
    }
    worst = [
        {
            "position": int(positions[t]),
            "kl": float(max(kl[t], 0.0)),
            "margin": float(margin[t]),
            "ours": [[int(i), float(p[t, i])] for i in np.argsort(-p[t], kind="stable")[:3]],
            "theirs": [[int(i), float(q[t, i])] for i in np.argsort(-q[t], kind="stable")[:3]],
        }
        for t in np.argsort(-kl, kind="stable")[:5]
    ]
    return report, worst
