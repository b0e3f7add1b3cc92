"""A candidate of several texts, in one file or in folders: each is compared alone, what was found is told together."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmjax.oracle.comparison import Comparison
from llmjax.oracle.dump import Dump
from llmjax.oracle.floors import CLASSES
from llmjax.oracle.report import label

# Positions told of, as of one text.
_WORST = 5


def together(
    texts: Sequence[Dump],
    most: int | None,
    of: int,
    compare: Callable[[Dump, Sequence[str], bool], Comparison],
    progress: Callable[[str], None],
) -> Comparison:
    """Compares the first texts, one after the other: nothing of a text stays but its numbers.

    Faults are proven of the first text that differs; a text that is not comparable ends it.

    Args:
      texts: one or more.
      most: how many, None for all.
      of: how many there are, those that the candidate lacks among them.
      compare: compares one: by which classes first, and whether faults are to be proven.
      progress: is told of each of several.
    """
    if of == 1:
        return compare(texts[0], (), True)
    names = [Path(text.path).name for text in texts]
    # A folder for each, or all of one file.
    places: Sequence[str | int] = names if len({*names}) == len(names) else range(len(names))
    found: list[Comparison] = []
    tried: set[str] = set()
    for text in texts[:most]:
        different = any(one.verdict == "different" for one in found)
        found.append(compare(text, sorted(tried), not different))
        last = found[-1]
        if last.verdict == "not_comparable":
            return dataclasses.replace(last, reason=f"{label(places[len(found) - 1])}: {last.reason}")
        tried |= {last.explained_by} if last.explained_by else set()
        place, count = label(places[len(found) - 1]), f"{len(found)} of {of}"
        progress(f"{place} ({count}): {last.verdict}" + _by(last))
    return _joined(found, places, of)


def _by(one: Comparison) -> str:
    kl = f", mean KL {one.logits['kl_mean']:.1e}" if one.logits else ""
    return (f" (explained by {one.explained_by})" if one.explained_by else "") + kl


def _joined(found: Sequence[Comparison], places: Sequence[str | int], of: int) -> Comparison:
    different = [i for i, one in enumerate(found) if one.verdict == "different"]
    widest = max(found, key=lambda one: list(CLASSES).index(one.explained_by) if one.explained_by else -1)
    first = found[different[0]] if different else widest
    if different:
        reason = f"{len(different)} of {len(found)} texts are different; {label(places[different[0]])}: {first.reason}"
    else:
        reason = f"of all {len(found)} texts, {first.reason}"
    shown = [one.coverage.get("positions", one.coverage["tokens"]) for one in found]
    totals = {"tokens": sum(one.coverage["tokens"] for one in found), "positions": sum(shown)}
    positions = [{"text": place, **p} for place, one in zip(places, found, strict=False) for p in one.positions]
    # What follows the last token is not known, so it has no part in a mean of nll; a file holds none of it.
    with_logits = [
        (one.logits, weight, weight - ("positions" not in one.coverage))
        for one, weight in zip(found, shown, strict=True)
        if one.logits
    ]
    # Of the text that shows least; in the order of the one that shows most.
    least = min(found, key=lambda one: one.coverage["taps"])
    taps: dict[str, Mapping[str, Any]] = {}
    for tap in (tap for one in sorted(found, key=lambda one: -len(one.taps)) for tap in one.taps):
        worst = taps.setdefault(tap["name"], tap)
        if tap["error"] / tap["floor"] > worst["error"] / worst["floor"]:
            taps[tap["name"]] = tap
    verdicts = {label(place): one.verdict for place, one in zip(places, found, strict=False)}
    return dataclasses.replace(
        first,
        reason=reason,
        coverage={**least.coverage, **totals, "texts": [len(found), of]},
        logits=_logits(*zip(*with_logits, strict=True)) if with_logits else None,
        taps=list(taps.values()),
        positions=sorted(positions, key=lambda p: -p["kl"])[:_WORST],
        subject={**first.subject, "text": places[found.index(first)], "verdicts": verdicts},
    )


def _logits(found: Sequence[Mapping[str, Any]], weights: Sequence[int], followed: Sequence[int]) -> dict[str, Any]:
    """Means by the texts' weights (of nll by what is followed), sums of counts, and the largest of the rest."""

    def mean(values: Sequence[tuple[float, int]]) -> float | None:
        return sum(w * v for v, w in values) / sum(w for _, w in values) if values else None

    joined: dict[str, Any] = {}
    for name in found[0]:
        values = [one[name] for one in found]
        if name == "nll":  # a first token has none
            told = [(pair, weight) for pair, weight in zip(values, followed, strict=True) if pair[0] is not None]
            joined[name] = [mean([(pair[side], weight) for pair, weight in told]) for side in (0, 1)]
        elif name in ("flips", "flips_beyond_margin"):
            joined[name] = sum(values)
        else:
            largest = name in ("kl_max", "max_abs_logprob")
            joined[name] = max(values) if largest else mean(list(zip(values, weights, strict=True)))
    return joined
