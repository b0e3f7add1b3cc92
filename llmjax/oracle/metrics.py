"""How far two arrays, and two models' logits, are apart."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from llmjax.oracle.dump import Window

# A flip is a tie where the drift of all logits explains it: its margin is at most this many standard deviations.
TIE = 6.0
# Values that are looked at together.
_TOGETHER = 1 << 21
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


def gap(x: np.ndarray, y: np.ndarray, token_axis: int = 0, dtype: Any = None) -> Gap:
    """See ``Gap``; sums in float64, and some tokens at a time.

    Args:
      x: an array.
      y: another of its shape.
      token_axis: which of its axes counts tokens.
      dtype: what both are rounded to first, and where one is not finite then, left out; None for as they are.
    """
    x, y = (np.moveaxis(a, token_axis, 0).reshape(a.shape[token_axis], -1) for a in (x, y))
    squares, sizes = np.zeros(len(x)), np.zeros(len(x))
    largest, token, channel = -1.0, 0, 0
    for some in blocks(x):
        a, b = (_floats(z[some]) for z in (x, y)) if dtype is None else _narrowed(x[some], y[some], dtype)
        difference = a - b
        squares[some], sizes[some] = _squares(difference), _squares(a) + _squares(b)
        np.abs(difference, out=difference)
        row, column = np.unravel_index(int(difference.argmax()), difference.shape)
        if difference[row, column] > largest:
            largest, token, channel = float(difference[row, column]), some.start + int(row), int(column)
    # A token far smaller than most holds what cancellation left of them: its error counts beside a hundredth of theirs.
    least = np.maximum(sizes, 1e-4 * np.median(sizes))
    by_token = np.sqrt(squares / np.where(least > 0, least, 1))
    total = sizes.sum()
    return Gap(
        error=float(np.sqrt(squares.sum() / total)) if total else 0.0,
        worst=float(by_token.max()),
        token=token,
        channel=channel,
        largest=largest,
        by_token=by_token,
    )


def blocks(x: np.ndarray) -> Iterator[slice]:
    """Rows of ``x [M, N]`` that are looked at together: a vocabulary is wide, and what is made of its values takes many
    times their room."""
    step = max(1, _TOGETHER // max(1, x.shape[1]))
    return (slice(at, min(at + step, len(x))) for at in range(0, len(x), step))


def _floats(x: np.ndarray) -> np.ndarray:
    """float64 stays."""
    return x if x.dtype == np.float64 else x.astype(np.float32, copy=False)


def _squares(x: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", x, x, dtype=np.float64)


def narrowed(x: np.ndarray, y: np.ndarray, token_axis: int = 0) -> float:
    """The error after both are rounded to the narrower of their dtypes."""
    dtype = min((x.dtype, y.dtype), key=lambda d: _MANTISSA.get(d.name, 23))
    return gap(x, y, token_axis, dtype).error


def _narrowed(x: np.ndarray, y: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):
        x, y = (a.astype(dtype).astype(np.float32) for a in (x, y))
    finite = np.isfinite(x) & np.isfinite(y)
    return np.where(finite, x, 0), np.where(finite, y, 0)


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
        squares = sum(_squares(_floats(z[some])).sum() for some in blocks(ours) for z in (ours, theirs))
        noise *= float(np.sqrt(squares / ours.size))
    probs = window is not None and window.log_probs

    def log_probs(rows: Any) -> tuple[np.ndarray, np.ndarray]:
        both = ours[rows], theirs[rows]
        return tuple(z.astype(np.float64) if probs else log_softmax(z) for z in both)  # type: ignore[return-value]

    followed = positions + 1 < len(ids)
    following = np.where(followed, ids[np.minimum(positions + 1, len(ids) - 1)], 0)
    kl, drifts, margin, largest, total = (np.zeros(len(ours)) for _ in range(5))
    flipped, losses = np.zeros(len(ours), bool), np.zeros((2, len(ours)))
    for some in blocks(ours):
        p, q = log_probs(some)
        losses[:, some] = [-np.take_along_axis(z, following[some, None], 1)[:, 0] for z in (p, q)]
        kl[some] = (np.exp(p) * (p - q)).sum(-1)
        apart = np.abs(p - q)
        largest[some], total[some] = apart.max(-1), apart.sum(-1)
        drift = theirs[some].astype(np.float64) - ours[some]
        drift -= drift.mean(-1, keepdims=True)
        drifts[some] = np.sqrt((drift**2).mean(-1))
        best, other = (z[some].argmax(-1, keepdims=True) for z in (ours, theirs))
        of_best, of_other = (np.take_along_axis(ours[some], at, 1)[:, 0] for at in (best, other))
        margin[some], flipped[some] = of_best - of_other, (best != other)[:, 0]
    beyond = flipped & (margin > TIE * (np.median(drifts) if noise is None else noise))

    def nll(side: int) -> float | None:
        return float(losses[side, followed].mean()) if followed.any() else None

    report = {
        "kl_mean": float(max(kl.mean(), 0.0)),
        "kl_max": float(max(kl.max(), 0.0)),
        "max_abs_logprob": float(largest.max()),
        "mean_abs_logprob": float(total.sum() / ours.size),
        "argmax_agreement": float(1 - flipped.mean()),
        "flips": int(flipped.sum()),
        "flips_beyond_margin": int(beyond.sum()),
        "nll": [nll(0), nll(1)],
    }
    worst = []
    for t in np.argsort(-kl, kind="stable")[:5]:
        p, q = (z[0] for z in log_probs(slice(t, t + 1)))
        worst.append(
            {
                "position": int(positions[t]),
                "kl": float(max(kl[t], 0.0)),
                "margin": float(margin[t]),
                "ours": [[int(i), float(p[i])] for i in np.argsort(-p, kind="stable")[:3]],
                "theirs": [[int(i), float(q[i])] for i in np.argsort(-q, kind="stable")[:3]],
            }
        )
    return report, worst
