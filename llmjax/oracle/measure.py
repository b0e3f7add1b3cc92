"""What there is to know of each tap: how far the candidate is from the reference, how far from what our step makes of
the candidate's own input, and how far each way to compute would be.

A stage of the model is in memory at a time, and of the dumps one tap.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llmjax.errors import RequestError
from llmjax.oracle.floors import CLASSES, floor
from llmjax.oracle.metrics import Gap, gap, narrowed
from llmjax.oracle.names import Named, layouts
from llmjax.oracle.stages import PLAIN, Edit, Stages
from llmjax.oracle.steps import OUTER

Read = Callable[[str], np.ndarray | None]


class MismatchError(RequestError):
    """The two dumps are of different things."""


@dataclasses.dataclass
class Tap:
    """One tap of the candidate.

    Attributes:
      name: ours.
      gap: to the reference, inherited or not.
      narrowed: the error after both are rounded to the narrower dtype.
      equal: in every bit.
      local: ``[whole, worst token]`` errors to what our step makes of the candidate's input; None without a model.
      ways: by class, for each of its ways what it does to the whole run and to this step alone, both as ``local``.
    """

    name: str
    gap: Gap
    narrowed: float
    equal: bool
    local: np.ndarray | None = None
    ways: dict[str, list[tuple[np.ndarray, np.ndarray]]] = dataclasses.field(default_factory=dict)

    def floor(self, classes: Sequence[str], way: int | None = None, whole: bool = False) -> np.ndarray:
        """The most that the step's own error, or the ``whole`` run's, may be under classes together."""
        at = 0 if whole else 1
        total = np.zeros(2)
        for name in classes:
            ways = self.ways[name] if way is None else self.ways[name][way : way + 1]
            total = np.hypot(total, np.max([w[at] for w in ways], 0))
        return floor(total, self.ways["float32"][0][at])

    def excess(self, classes: Sequence[str], way: int | None = None) -> float:
        """The step's own error over its floor; above 1 the classes do not explain it."""
        assert self.local is not None
        return float(np.max(self.local / self.floor(classes, way)))


def token_axis(tap: str) -> int:
    """Which axis of a tap counts tokens."""
    return 1 if tap.endswith(".probs") else 0


def fitted(named: Named, tap: str, shape: tuple[int, ...], near: np.ndarray | None) -> np.ndarray:
    """A tap's values in our shape; of two that are possible the one nearer to ``near``.

    Raises:
      MismatchError: they do not fit.
    """
    array = named.read(tap)
    found = layouts(array, shape)
    if not found:
        raise MismatchError(
            f"{named.dump.path}: {named.taps[tap].name}: shape {list(array.shape)}, expected {list(shape)} for {tap}"
        )
    if len(found) > 1 and near is not None:
        return min(found, key=lambda x: gap(x, near, token_axis(tap)).error)
    return found[0]


def compared(tap: str, ours: np.ndarray, theirs: np.ndarray) -> Tap:
    """A tap of two dumps."""
    axis = token_axis(tap)
    return Tap(tap, gap(ours, theirs, axis), narrowed(ours, theirs, axis), bool(np.array_equal(ours, theirs)))


def pair(x: np.ndarray, y: np.ndarray, tap: str) -> np.ndarray:
    """``[whole, worst token]`` errors; of a way that overflows nothing."""
    if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return np.zeros(2)
    found = gap(x, y, token_axis(tap))
    return np.array([found.error, found.worst])


def inner(tap: str) -> str:
    """The last step of the module whose output the tap is; the tap itself if it is a step."""
    head, _, last = tap.rpartition(".")
    return f"{head}.{OUTER[last]}" if last in OUTER else tap


def stage_values(stages: Stages, named: Named, stage: int, ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The candidate's values of one stage, by tap."""
    taps = [tap for tap in named.taps if stages.stage_of(tap) == stage]
    return {tap: fitted(named, tap, stages.shapes[inner(tap)], ours.get(inner(tap))) for tap in taps}


def patches(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What goes on from each step: a module's output where it differs from its last step's."""
    steps = {tap: value for tap, value in values.items() if inner(tap) == tap}
    return steps | {inner(tap): value for tap, value in values.items() if inner(tap) != tap}


def measure(stages: Stages, named: Named, reference: Read, classes: Sequence[str]) -> Iterator[tuple[Tap, np.ndarray]]:
    """Measures every tap of a dump, in the order of computation.

    Args:
      stages: our model for the dump's tokens.
      named: the dump under our names.
      reference: the reference's own value of a tap, where it is known.
      classes: to measure; float32 among them.

    Yields:
      a tap, and the reference's values.
    """
    ways: list[tuple[str, Edit]] = [("", PLAIN), *((name, edit) for name in classes for edit in CLASSES[name]())]
    xs: list[Any] = [None] * len(ways)
    locals_: list[Any] = [None] * len(ways)
    for stage in range(-1, stages.layers + 1):
        whole, apart = [], []
        for i, (_, edit) in enumerate(ways):
            xs[i], values = stages.run(stage, xs[i], {}, edit)
            whole.append(values)
        theirs = stage_values(stages, named, stage, whole[0])
        patch = patches(theirs)
        for i, (_, edit) in enumerate(ways):
            locals_[i], values = stages.run(stage, locals_[i], patch, edit)
            apart.append(values)
        for tap, value in theirs.items():
            step = inner(tap)
            known = reference(step)
            ours = whole[0][step] if known is None else known
            found = compared(tap, ours, value)
            if step != tap and step in theirs:
                if np.array_equal(value, theirs[step]):
                    continue
                found.local = pair(value, theirs[step], tap)
                found.ways = {name: [(np.zeros(2), np.zeros(2))] * 3 for name in classes}
            else:
                found.local = pair(value, apart[0][step], tap)
                for (name, _), w, a in zip(ways[1:], whole[1:], apart[1:], strict=True):
                    both = pair(w[step], whole[0][step], tap), pair(a[step], apart[0][step], tap)
                    found.ways.setdefault(name, []).append(both)
            yield found, ours
