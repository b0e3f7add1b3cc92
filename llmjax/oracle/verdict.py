"""Which class of arithmetic explains a candidate, and which steps it does not explain."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llmjax.oracle.dump import Dump
from llmjax.oracle.floors import CLASSES, FINER, TRACES, Allowed
from llmjax.oracle.measure import Tap


@dataclasses.dataclass(frozen=True)
class Explained:
    """What the classes leave.

    Attributes:
      classes: the narrowest that hold, or those that hold the most.
      beyond: taps whose own error is above their floor, in the order of computation.
    """

    classes: tuple[str, ...]
    beyond: tuple[Tap, ...]

    @property
    def name(self) -> str:
        """The widest of the classes."""
        return max(self.classes, key=list(CLASSES).index)


def explain(taps: Sequence[Tap], allowed: Allowed) -> Explained:
    """The narrowest allowed classes that hold every step; where there are none, those that hold the most of them.

    A class that is not declared must have left its traces, too.
    """
    found = []
    for classes in allowed.together:
        if all(name in tap.ways for name in classes for tap in taps) and _traced(taps, classes, allowed):
            beyond = tuple(tap for tap in taps if tap.excess(classes) > 1)
            if not beyond:
                return Explained(classes, ())
            found.append(Explained(classes, beyond))
    return min(found, key=lambda e: len(e.beyond))


def caveats(allowed: Allowed, theirs: Dump) -> str:
    """What of a dump's own doing may be why no class explains it."""
    found = ""
    if allowed.unread:
        found += f"; {allowed.unread} is no class of llmjax's (--class)"
    if not allowed.declared and len(theirs.arrays) == 1:
        found += "; one array alone shows no weights of few bits: if it has them, declare its quantization (or --class)"
    kinds = {stored.dtype for stored in theirs.arrays.values()} & {"float16", "bfloat16"} - set(allowed.singles)
    if kinds:
        found += f"; arrays are stored as {' and '.join(sorted(kinds))}, which rounds them: dump float32, or declare it"
    return found


def _traced(taps: Sequence[Tap], classes: Sequence[str], allowed: Allowed) -> bool:
    """Whether at least one way of each class moved most of the steps that it would, or need not have.

    Weights of few bits move any step far: what one alone shows of them is no trace.
    """
    return all(name == "float32" or allowed.declared or _moved(taps, name) for name in classes)


def _moved(taps: Sequence[Tap], name: str) -> bool:
    for way in range(len(taps[0].ways[name])):
        marks = [tap for tap in taps if _differs(tap, name, way)]
        moved = sum(tap.excess(("float32",)) > 1 for tap in marks)
        far = sum(_as_far(tap, name, way) for tap in marks)  # of mixed weights those of the fewest bits alone
        if len(marks) > ("int" in name) and moved >= TRACES * len(marks) and far >= TRACES / 2 * len(marks):
            return True
    return False


def _as_far(tap: Tap, name: str, way: int) -> bool:
    """Whether weights of few bits may have moved a step: those of more bits move it less."""
    assert tap.local is not None
    return "int" not in name or bool(tap.local[0] * FINER > tap.ways[name][way][1][0])


def _differs(tap: Tap, name: str, way: int) -> bool:
    """Whether a way's own error at a step would be seen above that of another order of sums."""
    return bool(np.any(tap.ways[name][way][1] > tap.floor(("float32",))))
