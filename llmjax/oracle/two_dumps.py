"""Two dumps without a model: by what they hold alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.oracle.comparison import Comparison, of_file
from llmjax.oracle.declared import Allowed
from llmjax.oracle.dump import Dump
from llmjax.oracle.floors import CLASSES, FEW
from llmjax.oracle.measure import MismatchError, Tap, compared, leaving, row
from llmjax.oracle.metrics import logits_report
from llmjax.oracle.names import Named, named
from llmjax.oracle.verdict import caveats

# The largest error of a pair that a class may leave where no model measures floors: rough, and said to be so.
_WITHOUT_MODEL = {
    "float32": 1e-4,
    "tf32": 1e-2,
    "float16": 1e-2,
    "bfloat16": 6e-2,
    "static_int16": 6e-2,
    "static_int8": 2e-1,
    "cache_int8": 6e-2,
    "cache_float8": 1.5e-1,
    "cache_int4": 3e-1,
    "int8": 1.5e-1,
    "dynamic_int8": 2e-1,
    "float8": 2e-1,
    "int4": 5e-1,
    "int3": 7e-1,
    "int2": 9e-1,
}
assert set(_WITHOUT_MODEL) <= set(CLASSES)


def two_dumps(
    ours: Dump, theirs: Dump, permitted: Allowed, note: str, names: str | Path | None, subject: Mapping[str, Any]
) -> Comparison:
    """Without a model: taps of the same names, against what classes leave at most by experience."""
    left, right = named(ours, {}, None), named(theirs, {}, None, names)
    shared = [tap for tap in left.taps if tap in right.taps]
    if not shared:
        raise MismatchError(f"{ours.path} and {theirs.path} have no array in common; map the names (--names)")
    taps: list[Tap] = []
    logits: dict[str, Any] | None = None
    positions: Sequence[Mapping[str, Any]] = ()
    for name in shared:
        window = right.window(name)
        a, b = _unbatched(left, name), right.read(name) if window else _unbatched(right, name)
        if (a.shape[1:] if window else a.shape) != b.shape[bool(window) :]:
            raise MismatchError(f"{theirs.path}: {name}: shape {list(b.shape)}, the reference's is {list(a.shape)}")
        a = window.show(a) if window else a
        taps.append(compared(name, a, b, window))
        if name == "logits":
            a, b, most = a.astype(np.float32), b.astype(np.float32), int(theirs.token_ids.max())
            if a.ndim != 2 or most >= a.shape[1]:
                raise MismatchError(
                    f"{theirs.path}: logits: expected [tokens, vocabulary] with token id {most}, found {list(a.shape)}"
                )
            logits, positions = logits_report(a, b, theirs.token_ids, None, window)
    worst, flips = max(tap.gap.error for tap in taps), logits["flips_beyond_margin"] if logits else 0
    few = permitted.declared or len(taps) > 1  # one array alone shows no weights of few bits
    known = [c for c in permitted.singles if c in _WITHOUT_MODEL and (few or c not in FEW)]
    holds = [c for c in known if worst <= _WITHOUT_MODEL[c] and not flips]
    limit = _WITHOUT_MODEL[(holds[:1] or known[-1:] or ["float32"])[0]]
    verdict = "identical" if all(tap.equal for tap in taps) else "equivalent" if holds else "different"
    first = next((t for t in taps if t.gap.error > limit), None)
    reason = {
        "identical": "every value is the same in every bit",
        "equivalent": f"the largest error is {worst:.1e}, about what {''.join(holds[:1])} arithmetic leaves; {note}",
        "different": f"the largest error is {worst:.1e}, with {flips} best tokens beyond their margin; {note}"
        + caveats(permitted, theirs),
    }[verdict]
    missing = [tap for tap in left.taps if tap not in right.taps]
    coverage = {
        "taps": len(taps), "of": len(left.taps), "tokens": len(theirs.token_ids), "missing": missing,
        "unknown": sorted(set(right.taps) - set(left.taps)), "unmatched": list(right.unmatched), **of_file(theirs),
        "note": note,
    }  # fmt: skip
    divergence = None
    if first is not None and verdict == "different":
        divergence = {"tap": first.name, "token": first.gap.token, "error": first.gap.error, "floor": limit}
    return Comparison(
        verdict=verdict,
        explained_by=holds[0] if verdict == "equivalent" else None,
        reason=reason,
        coverage=coverage,
        logits=logits,
        taps=[row(tap, limit) for tap in taps],
        first_divergence=divergence,
        positions=positions,
        subject=subject,
        map={} if theirs.kind else leaving(taps),
    )


def _unbatched(named: Named, tap: str) -> np.ndarray:
    array, tokens = named.read(tap), len(named.dump.token_ids)
    while array.ndim > 2 and array.shape[0] == 1 and tokens in array.shape[1:3]:
        array = array[0]
    if tokens not in array.shape[:2]:
        raise MismatchError(f"{named.dump.path}: {tap}: shape {list(array.shape)}, expected {tokens} tokens first")
    return array
