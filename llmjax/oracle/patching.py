"""Where it begins, proven: the candidate's own input through our module, against the candidate's output.

What is only inherited vanishes there; what remains is the module's own.  Then each cause of the catalogue is made in
our module: one that is right takes the error away.
"""

import dataclasses
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
from flax.errors import FlaxError

from llmjax.oracle.causes.base import Cause, Scene
from llmjax.oracle.causes.catalogue import EVERYWHERE, catalogue
from llmjax.oracle.floors import MARGIN, Allowed
from llmjax.oracle.measure import Tap, inner, pair, patches, stage_values
from llmjax.oracle.names import Named
from llmjax.oracle.stages import PLAIN, Edit, Stages
from llmjax.oracle.steps import common, segment, split
from llmjax.oracle.verdict import Explained

# A cause that explains this much is taken for proven, and what it heals elsewhere for the same fault.
PROVEN = 0.9
# A mistake that explains this much is likelier than an arithmetic that nobody declared; these words are no mistakes.
_SURE = 0.99
_ARITHMETIC = ("precision", "cache_precision", "quantization")
# A cause that explains less is not worth a word.
_WORTH = 0.3
# What a mistake raises that this model's shapes, or what its layers hand on, leave no room for.
_NO_ROOM = (TypeError, ValueError, AttributeError, FlaxError)
# Stages that may lie between two dumped taps for a cause to be tried in each of them.
_FEW = 2


@dataclasses.dataclass(frozen=True)
class _Tried:
    cause: Cause
    explains: float
    healed: tuple[Tap, ...]
    stage: int | None


def judged(
    stages: Stages, named: Named, taps: Sequence[Tap], found: Explained, permitted: Allowed
) -> tuple[Explained, list[dict[str, Any]]]:
    """What explains a candidate, and its faults.

    A wide class that nobody declared holds nearly anything where little was dumped: where known mistakes in float32
    take the whole error away, they are what explains it.
    """
    if found.beyond or permitted.declared or found.classes == ("float32",):
        return found, faults(stages, named, taps, found)
    narrow = Explained(("float32",), tuple(tap for tap in taps if tap.excess(("float32",)) > 1))
    proven = faults(stages, named, taps, narrow, mistakes=True)
    return (narrow, proven) if proven else (found, [])


def faults(
    stages: Stages, named: Named, taps: Sequence[Tap], found: Explained, mistakes: bool = False
) -> list[dict[str, Any]]:
    """The faults of a candidate, in the order of computation.

    Args:
      stages: our model.
      named: the candidate's dump.
      taps: as measured.
      found: the classes of arithmetic, and the taps beyond them.
      mistakes: all or nothing: none where one is not a mistake for sure, but another arithmetic or unknown.
    """
    bench = _Bench(stages, named, taps, found)
    left = list(found.beyond)
    faults = []
    proven: list[tuple[str, str]] = []
    while left:
        first = left[0]
        if mistakes and len(bench.places(first)) > _FEW + 1:
            return []  # of a whole model no one cause is worth a run, unless it must be
        tried = bench.try_causes(first, left, proven)
        best = tried[0] if tried and tried[0].explains >= PROVEN else None
        if mistakes and not _surely(tried):
            return []
        healed = [first, *(tap for tap in left[1:] if best and tap in best.healed)]
        if best:
            proven.insert(0, (best.cause.cause, best.cause.detail))
        faults.append(bench.fault(first, healed, tried, best))
        left = [tap for tap in left if tap not in healed]
    return faults


def _surely(tried: Sequence[_Tried]) -> bool:
    """Whether a mistake takes the error away, and no other arithmetic does."""
    best = [one.cause.cause for one in tried if one.explains >= _SURE]
    return bool(best) and not any(cause in _ARITHMETIC for cause in best)


class _Bench:
    def __init__(self, stages: Stages, named: Named, taps: Sequence[Tap], found: Explained):
        self.stages, self.named, self.found = stages, named, found
        self.taps = {tap.name: tap for tap in taps}
        self.dumped = {inner(tap) for tap in named.taps if named.window(tap) is None}
        self._values: dict[int, dict[str, np.ndarray]] = {}
        self._flows: list[Any] = [None]

    def segment(self, tap: str) -> list[str]:
        """The steps that may be at fault for a tap."""
        if inner(tap) != tap:
            return [tap]
        return segment(tap, self.stages.shapes, self.dumped, self.stages.layers)

    def places(self, tap: Tap) -> range:
        """The stages that may be at fault for a tap."""
        last = self.stages.stage_of(tap.name)
        return range(min(self.stages.stage_of(step) for step in self.segment(tap.name)), last + 1)

    def values(self, stage: int) -> dict[str, np.ndarray]:
        """The candidate's, of one stage."""
        if stage not in self._values:
            if len(self._values) > 4:
                self._values.clear()
            _, ours = self.stages.run(stage, self.flow(stage), {})  # tells of two possible shapes the nearer
            self._values[stage] = stage_values(self.stages, self.named, stage, ours)
        return self._values[stage]

    def flow(self, stage: int) -> Any:
        """The candidate's, into a stage: ours, with its values in the place of ours wherever it has some."""
        while len(self._flows) < stage + 2:
            last = len(self._flows) - 2
            self._flows.append(self.stages.run(last, self._flows[-1], patches(self.named, self.values(last)))[0])
        return self._flows[stage + 1]

    def run(self, first: int, last: int, x: Any, edit: Edit, at: int | None) -> dict[str, np.ndarray]:
        """Our values of these stages from the candidate's inputs, one stage edited, or all."""
        ours: dict[str, np.ndarray] = {}
        for stage in range(first, last + 1):
            changed = edit if at is None or at == stage else PLAIN
            x, values = self.stages.run(stage, x, patches(self.named, self.values(stage)), changed)
            ours |= self.named.shown(values)
        return ours

    def under(self, tap: str, first: int, last: int, x: Any, at: int | None, edit: Edit) -> np.ndarray | None:
        """Our value of a tap of the last of these stages, with an edit; None for a mistake that this model's shapes
        leave no room for."""
        try:
            return self.run(first, last, x, edit, at).get(tap)
        except _NO_ROOM:
            return None

    def try_causes(self, tap: Tap, left: Sequence[Tap], proven: Sequence[tuple[str, str]]) -> list[_Tried]:
        """What each cause explains of a tap's own error, the best first."""
        steps = self.segment(tap.name)
        few = self.places(tap)
        first, last = few[0], few[-1]
        plain = self.run(first, last, self.flow(first), PLAIN, None)
        if inner(tap.name) != tap.name:
            return []
        theirs = self.values(last)[tap.name]
        tried = []
        # A stage of the segment alone (of many only the model's ends), or a mistake that is made in all of them.
        ends = {-1, self.stages.layers}
        places: list[int | None] = [*few] if len(few) <= _FEW + 1 else [None, *(at for at in few if at in ends)]
        if last > first and None not in places:
            places.append(None)
        for at in places:
            stage = last if at is None else at
            mine = {split(step)[1] for step in steps if at is None or self.stages.stage_of(step) == at}
            step = split(tap.name)[1] if stage == last else ""
            begin = first if at is None else at
            where = (begin, last, self.flow(begin), at)
            under = partial(self.under, tap.name, *where)
            scene = Scene(self.stages, stage, step, plain[tap.name], theirs, under)
            causes = catalogue(scene, mine) if at is not None else self.everywhere(scene, first, last, mine)
            for cause in sorted(causes, key=lambda c: (c.cause, c.detail) not in proven):
                if cause.cause != "layer_order" or self.several(tap, left, steps):
                    one = self.try_cause(tap, left, cause, where, plain, theirs)
                    if one is not None and one.explains > _WORTH:
                        tried.append(one)
                        if one.explains > 0.97 and (cause.cause, cause.detail) in proven:
                            return tried
        # What heals more taps is the better of two that explain as much.
        return sorted(tried, key=lambda t: (-round(t.explains, 4), -len(t.healed)))

    def everywhere(self, scene: Scene, first: int, last: int, steps: Collection[str]) -> list[Cause]:
        """Mistakes made in all of these stages, each once."""
        found: dict[tuple[str, str], Cause] = {}
        for stage in {first, (first + last) // 2, last}:
            for cause in catalogue(dataclasses.replace(scene, stage=stage, step=""), steps):
                if cause.cause in EVERYWHERE:
                    found.setdefault((cause.cause, cause.detail), cause)
        return list(found.values())

    def several(self, tap: Tap, left: Sequence[Tap], steps: Sequence[str]) -> bool:
        """Whether a whole layer may be at fault: several of its taps are, or little of it was dumped."""
        stage = self.stages.stage_of(tap.name)
        return len(steps) > 4 or sum(self.stages.stage_of(t.name) == stage for t in left) > 3

    def try_cause(
        self,
        tap: Tap,
        left: Sequence[Tap],
        cause: Cause,
        where: tuple[int, int, Any, int | None],
        plain: Any,
        theirs: Any,
    ) -> _Tried | None:
        first, last, x, at = where
        if cause.post is not None:
            ours = {**plain, tap.name: cause.post(plain[tap.name])}
        else:
            try:
                ours = self.run(first, last, x, cause.edit, at)
            except _NO_ROOM:
                return None  # a mistake that this model's shapes leave no room for
        if tap.name not in ours:
            return None
        errors = {}
        for stage in range(first, last + 1):
            for name, value in self.values(stage).items():
                if name in ours and name in self.taps:
                    errors[name] = pair(ours[name], value, name)
        wrong = {t.name for t in left}
        for name, error in errors.items():
            other = self.taps[name]
            if name not in wrong and np.max(error / other.floor(self.found.classes)) > max(
                1, other.excess(self.found.classes)
            ):
                return None  # it would break what is right
        healed = tuple(t for t in left if t.name in errors and self.heals(t, errors[t.name]))
        return _Tried(cause, self.share(tap, errors[tap.name]), healed, at)

    def heals(self, tap: Tap, error: np.ndarray) -> bool:
        return self.share(tap, error) >= PROVEN

    def share(self, tap: Tap, error: np.ndarray) -> float:
        """How much of a tap's own error an edit takes away, beyond what arithmetic leaves."""
        assert tap.local is not None
        floor = tap.floor(self.found.classes)
        at = int(np.argmax(tap.local / floor))
        noise = floor[at] / MARGIN
        return float(np.clip(1 - max(0.0, error[at] - noise) / (tap.local[at] - noise), 0, 1))

    def fault(self, tap: Tap, healed: Sequence[Tap], tried: Sequence[_Tried], best: _Tried | None) -> dict[str, Any]:
        """As the contract has it."""
        assert tap.local is not None
        steps = self.segment(tap.name)
        floor = tap.floor(self.found.classes)
        at = int(np.argmax(tap.local / floor))
        module = common([t.name for t in healed]) if len(steps) == 1 else common(steps)
        if best and (len(steps) > 1 or best.cause.cause == "layer_order"):
            mine = [
                s for s in steps if split(s)[1] in best.cause.steps and best.stage in (None, self.stages.stage_of(s))
            ]
            module = common(mine) or module
            if best.cause.cause == "layer_order":
                module = f"layers.{self.stages.stage_of(tap.name)}"
        causes = [
            {"cause": t.cause.cause, "detail": t.cause.detail, "explains": round(t.explains, 4)}
            for t in _distinct(tried)
        ]
        what = "the step" if len(steps) == 1 else f"{len(steps)} steps ({steps[0]} to {steps[-1]})"
        return {
            "module": module or tap.name,
            "tap": tap.name,
            "local_error": float(tap.local[at]),
            "local_floor": float(floor[at]),
            "proof": f"the candidate's own input through {what} of ours ends {tap.local[at]:.1e} from the candidate's "
            f"{tap.name}; {self.found.name} arithmetic explains {floor[at]:.1e}",
            "also": [t.name for t in healed[1:]],
            "causes": causes or [{"cause": "unknown", "detail": _unknown(len(steps)), "explains": 0.0}],
        }


def _unknown(steps: int) -> str:
    return "no known mistake explains it" + ("" if steps == 1 else f"; {steps} steps lie between the dumped taps")


def _distinct(tried: Sequence[_Tried]) -> list[_Tried]:
    """The best of each word, three at most."""
    best: dict[str, _Tried] = {}
    for one in tried:
        best.setdefault(one.cause.cause, one)
    return list(best.values())[:3]
