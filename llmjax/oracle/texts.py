"""A candidate of several texts: each is compared alone, and what was found is told together."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmjax.oracle.comparison import Comparison
from llmjax.oracle.dump import Dump
from llmjax.oracle.floors import CLASSES

# Positions told of, as of one text.
_WORST = 5


def together(
    texts: Sequence[Dump],
    most: int | None,
    compare: Callable[[Dump, Sequence[str], bool], Comparison],
    progress: Callable[[str], None],
) -> Comparison:
    """Compares the first texts, one after the other: nothing of a text stays but its numbers.

    Faults are proven of the first text that differs; a text that is not comparable ends it.

    Args:
      texts: one or more.
      most: how many, None for all.
      compare: compares one: by which classes first, and whether faults are to be proven.
      progress: is told of each of several.
    """
    if len(texts) == 1:
        return compare(texts[0], (), True)
    found: list[Comparison] = []
    tried: set[str] = set()
    for text in texts[:most]:
        different = any(one.verdict == "different" for one in found)
        found.append(compare(text, sorted(tried), not different))
        last = found[-1]
        if last.verdict == "not_comparable":
            return last
        tried |= {last.explained_by} if last.explained_by else set()
        progress(f"text {len(found) - 1} of {len(texts)}: {last.verdict}" + _by(last))
    return _joined(found, len(texts))


def _by(one: Comparison) -> str:
    kl = f", mean KL {one.logits['kl_mean']:.1e}" if one.logits else ""
    return (f" (explained by {one.explained_by})" if one.explained_by else "") + kl


def _joined(found: Sequence[Comparison], of: int) -> Comparison:
    different = [i for i, one in enumerate(found) if one.verdict == "different"]
    widest = max(found, key=lambda one: list(CLASSES).index(one.explained_by) if one.explained_by else -1)
    first = found[different[0]] if different else widest
    if different:
        reason = f"{len(different)} of {len(found)} texts are different; text {different[0]}: {first.reason}"
    else:
        reason = f"of all {len(found)} texts, {first.reason}"
    weights = [one.coverage["positions"] for one in found]
    totals = {key: sum(one.coverage[key] for one in found) for key in ("tokens", "positions")}
    positions = [{"text": i, **p} for i, one in enumerate(found) for p in one.positions]
    return dataclasses.replace(
        first,
        reason=reason,
        coverage={**first.coverage, **totals, "texts": [len(found), of]},
        logits=_logits([one.logits for one in found if one.logits], weights),
        taps=[max(same, key=lambda t: t["error"] / t["floor"]) for same in zip(*(o.taps for o in found), strict=True)],
        positions=sorted(positions, key=lambda p: -p["kl"])[:_WORST],
        subject={**first.subject, "text": found.index(first)},
    )


def _logits(found: Sequence[Mapping[str, Any]], weights: Sequence[int]) -> dict[str, Any] | None:
    """Means by the texts' weights, sums of counts, and the largest of the rest."""
    if not found:
        return None

    def mean(values: Sequence[float]) -> float:
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    joined: dict[str, Any] = {}
    for name in found[0]:
        values = [one[name] for one in found]
        if name == "nll":
            joined[name] = [mean([v[side] for v in values]) for side in (0, 1)]
        elif name in ("flips", "flips_beyond_margin"):
            joined[name] = sum(values)
        else:
            joined[name] = max(values) if name in ("kl_max", "max_abs_logprob") else mean(values)
    return joined
