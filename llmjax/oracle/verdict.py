"""Which class of arithmetic explains a candidate, and which steps it does not explain."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llmjax.oracle.declared import Allowed
from llmjax.oracle.dump import Dump
from llmjax.oracle.floors import CLASSES, FEW, FINER, MARGIN, TRACES
from llmjax.oracle.measure import Tap
from llmjax.oracle.steps import split

# The share of its steps that an undeclared class must have moved, for what is beyond it to be told: it moves all, but
# perhaps the head; where the run was another, it would hide mistakes.
_LIKELY = 0.75
# How much less than on the whole a class may have moved most tokens.
_UNEVEN = 2.0
# Layers that have a step, for one of them to be held against the others, and the share that most of them (and of
# tokens) are: where weights of more and of fewer bits are mixed, those of fewer are a quarter at least.
_SEVERAL, _MOST = 3, 0.75


@dataclasses.dataclass(frozen=True)
class Explained:
    """What the classes leave.

    Attributes:
      classes: the narrowest that hold, or those that hold the most.
      beyond: taps whose own error is above their floor, or holds a mistake beneath it, in the order of computation.
      looked: how many mistakes beneath floors were looked for, of how many; (0, 0) where floors are narrow.
    """

    classes: tuple[str, ...]
    beyond: tuple[Tap, ...]
    looked: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """The widest of the classes."""
        return max(self.classes, key=list(CLASSES).index)


def explain(taps: Sequence[Tap], allowed: Allowed) -> Explained:
    """The narrowest allowed classes that hold every step; where there are none, those that hold the most of them.

    A class that is not declared must have left its traces, too: where it does not hold, nearly everywhere.
    """
    off = [_everywhere(tap) for tap in taps]
    found = []
    for classes in allowed.together:
        if all(name in tap.ways for name in classes for tap in taps) and _traced(taps, off, classes, allowed):
            _alike(taps, classes)
            beyond = tuple(tap for tap in taps if tap.excess(classes) > 1)
            if not beyond:
                return Explained(classes, ())
            found.append(Explained(classes, beyond))
    likely = [one for one in found if _traced(taps, off, one.classes, allowed, _LIKELY)]
    return min(likely or found, key=lambda e: len(e.beyond))


def caveats(allowed: Allowed, theirs: Dump, proven: bool = False) -> str:
    """What of a dump's own doing may be why no class explains it, unless its causes are ``proven``."""
    found = ""
    if allowed.unread:
        found += f"; {allowed.unread} is no class of llmjax's (--class)"
    if "cache_float16" in allowed.singles and "cache16" not in allowed.singles and not proven:
        found += "; llama.cpp's cache is float16 unless it is told: --class cache16 if it was (-ctk bf16 -ctv bf16), "
        found += "cache_int8 (q8_0), cache_int4 (q4_0, q5_0)"
    if not allowed.declared and len(theirs.arrays) == 1:
        found += "; one array alone shows no weights of few bits: if it has them, declare its quantization (or --class)"
    kinds = {stored.dtype for stored in theirs.arrays.values()} & {"float16", "bfloat16"} - set(allowed.singles)
    if kinds:
        found += f"; arrays are stored as {' and '.join(sorted(kinds))}, which rounds them: dump float32, or declare it"
    return found


def of_the_cache(found: Explained, allowed: Allowed) -> str:
    """What is told where only another cache than llama.cpp's usual one explains its file."""
    if "cache16" not in found.classes or "cache_float16" not in allowed.singles:
        return ""
    return "; a bfloat16 cache (-ctk bf16 -ctv bf16) explains it, llama.cpp's usual float16 does not: was it told so?"


def of_few_bits(found: Explained, missing: Sequence[str]) -> str:
    """What weights of few bits leave open, and what would tell it; ``missing`` steps are a part of that."""
    if not {*FEW} & {*found.classes} - {"block_int8"}:
        return ""
    told = ""
    for name, times in [(tap.name, tap.unlike(found.classes)) for tap in found.beyond][:1]:
        if times is not None:
            told = f"; {name} is {times:.2g} times as far off as the same step of most layers: a scale, a zero "
            told += "point or an order of values is wrong there, or its weights have far fewer bits than the others'"
    more = ", and a dump of every step some of it" if missing else ""
    return (
        f"{told}; what such weights hide, the quantized model itself shows (its file as --model, or --quantize){more}"
    )


def _alike(taps: Sequence[Tap], classes: tuple[str, ...]) -> None:
    """Tells each step that the classes move how far the same steps of most layers are off."""
    same: dict[str, list[Tap]] = {}
    for tap in taps:
        layer, step = split(tap.name)
        if layer is not None and any(
            _differs(tap, name, way) for name in classes for way in range(len(tap.ways[name]))
        ):
            same.setdefault(step, []).append(tap)
    for several in (found for found in same.values() if len(found) >= _SEVERAL):
        for tap in several:
            tap.like.pop(classes, None)
        times = [MARGIN * _own(tap) / tap.floor(classes) for tap in several]
        like = np.quantile(times, _MOST, 0, method="lower")  # of three the second
        own = [tap.floor(classes, finest=True) / tap.floor(classes) for tap in several]
        for tap, finest in zip(several, own, strict=True):
            tap.like[classes] = like, finest


def _traced(
    taps: Sequence[Tap], off: Sequence[bool], classes: Sequence[str], allowed: Allowed, most: float = 0.0
) -> bool:
    """Whether at least one way of each class moved half of the steps that it would, and no token of these less than it
    must, more than ``most``, or need not have; ``off`` says which steps are off everywhere.

    Weights of few bits move any step far: what one alone shows of them is no trace.
    """
    return all(name == "float32" or allowed.declared or _moved(taps, off, name, most) for name in classes)


def _moved(taps: Sequence[Tap], off: Sequence[bool], name: str, most: float) -> bool:
    for way in range(len(taps[0].ways[name])):
        marks = [(tap, moved) for tap, moved in zip(taps, off, strict=True) if _differs(tap, name, way)]
        moved = sum(moved and (name, way) not in tap.spared for tap, moved in marks)
        far = sum(_as_far(tap, name, way) for tap, _ in marks)  # of mixed weights those of the fewest bits alone
        enough = moved >= TRACES * len(marks) and moved > most * len(marks)
        if len(marks) > (name in FEW) and enough and far >= TRACES / 2 * len(marks):
            return True
    return False


def _everywhere(tap: Tap) -> bool:
    """Whether a step is off, at most of its tokens if that is known: rounding leaves none as it is, but a mask, a slot
    or a position does."""
    if tap.excess(("float32",)) <= 1:
        return False
    return tap.own is None or bool(np.quantile(tap.own, 1 - _MOST) > tap.floor(("float32",))[1])


def _as_far(tap: Tap, name: str, way: int) -> bool:
    """Whether a class may have moved a step, and most of its tokens: one of more bits moves them less."""
    if name not in FINER:
        return True
    far = bool(_own(tap)[0] * FINER[name] > tap.ways[name][way][1][0])
    return far and tap.reach.get((name, way), 1.0) * _UNEVEN * FINER[name] > 1


def _own(tap: Tap) -> np.ndarray:
    """The step's own error."""
    assert tap.local is not None
    return tap.local


def _differs(tap: Tap, name: str, way: int) -> bool:
    """Whether a way's own error at a step would be seen above that of another order of sums."""
    return bool(np.any(tap.ways[name][way][1] > tap.floor(("float32",))))
