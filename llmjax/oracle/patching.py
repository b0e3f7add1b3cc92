"""Where it begins, proven: the candidate's own input through our module, against the candidate's output.

What is only inherited vanishes there; what remains is the module's own.  Then each cause of the catalogue is made in
our module: one that is right takes the error away.
"""

import dataclasses
import itertools
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from llmjax.oracle.beneath import TOKENS, WIDE, Held, held, worth
from llmjax.oracle.causes.base import Cause, Scene
from llmjax.oracle.causes.catalogue import catalogue, everywhere
from llmjax.oracle.clock import Clock, Pulse
from llmjax.oracle.declared import Allowed
from llmjax.oracle.floors import CLASSES
from llmjax.oracle.measure import Tap, inner, pair, token_axis
from llmjax.oracle.names import Named
from llmjax.oracle.stages import Stages
from llmjax.oracle.steps import common, segment, split
from llmjax.oracle.trials import Bench, Place
from llmjax.oracle.verdict import Explained

# A cause that explains this much is taken for proven, and what it heals elsewhere for the same fault.
PROVEN = 0.9
# One that was proven before and explains this much is it again.
_AGAIN = 0.97
# A mistake that explains this much is likelier than an arithmetic that nobody declared, and is told without its share:
# of a base or an epsilon that is nearly the right one more is left.  These words are no mistakes.
SURE = 0.99
_ARITHMETIC = ("precision", "cache_precision", "quantization")
# A cause that explains less is not worth a word.
_WORTH = 0.3
# Stages that may lie between two dumped taps for a cause to be tried in each of them.
_FEW = 2
# Seconds for which causes are looked for, unless it is told otherwise.
SEARCH = 300.0


@dataclasses.dataclass(frozen=True, eq=False)
class _Trial:
    """A cause, to be tried at a place; of two that do as much the one of the lower number is named."""

    number: int
    cause: Cause
    place: Place

    @property
    def words(self) -> tuple[str, str]:
        return self.cause.cause, self.cause.detail


@dataclasses.dataclass(frozen=True)
class _Tried:
    trial: _Trial
    explains: float
    healed: tuple[Tap, ...]


@dataclasses.dataclass(frozen=True)
class _Search:
    """What was found, the best first, by how many trials of how many."""

    tried: Sequence[_Tried]
    count: int
    of: int

    @property
    def best(self) -> _Tried | None:
        return self.tried[0] if self.tried and self.tried[0].explains >= PROVEN else None


def judged(
    stages: Stages,
    named: Named,
    taps: Sequence[Tap],
    found: Explained,
    permitted: Allowed,
    seconds: float,
    texts: int,
    pulse: Pulse,
) -> tuple[Explained, list[dict[str, Any]]]:
    """What explains a candidate, and its faults; causes are looked for as long as there is time.

    A wide class that nobody declared holds nearly anything where little was dumped: where known mistakes in float32,
    or in place of few bits in bfloat16, take the whole error away, they are what explains it.  Weights of few bits are
    wide where they are declared, too: mistakes beneath their floor are looked for.  A verdict hangs on all of these, so
    how many were looked for is told; the time is shared between ``texts``, and of each between the searches.
    """
    if found.beyond or found.classes == ("float32",):
        return found, faults(_Finder(stages, named, taps, found, Clock(seconds), pulse))
    clock, count, of = Clock(seconds / texts), 0, 0
    wide = not WIDE.isdisjoint(found.classes)
    narrower = ("float32", "bfloat16") if wide and "bfloat16" in taps[0].ways else ("float32",)
    for name in () if permitted.declared else narrower:
        narrow = Explained((name,), tuple(tap for tap in taps if tap.excess((name,)) > 1))
        finder = _Finder(stages, named, taps, narrow, Clock(seconds / texts / (len(narrower) + 1)), pulse)
        if proven := faults(finder, mistakes=True):
            return narrow, proven
        count, of = count + finder.count, of + finder.of
    hidden: list[dict[str, Any]] = []
    if wide:
        finder = _Finder(stages, named, taps, found, clock, pulse)
        hidden = [one for tap in taps if (one := finder.hidden(tap)) is not None]
        count, of = count + finder.count, of + finder.of
    beyond = tuple(tap for tap in taps if tap.name in {fault["tap"] for fault in hidden})
    return dataclasses.replace(found, beyond=beyond, looked=(count, of)), hidden


def faults(finder: "_Finder", mistakes: bool = False) -> list[dict[str, Any]]:
    """The faults of a candidate, in the order of computation.

    Args:
      finder: looks for them, at the taps beyond the classes of arithmetic.
      mistakes: all or nothing: none where one is not a mistake for sure, but another arithmetic or unknown.
    """
    left = list(finder.found.beyond)
    faults = []
    proven: list[tuple[str, str]] = []
    while left:
        first = left[0]
        if mistakes and len(finder.places(first)) > _FEW + 1:
            return []  # of a whole model no one cause is worth a run, unless it must be
        search = finder.search(first, left, proven)
        finder.count, finder.of = finder.count + search.count, finder.of + search.of
        if mistakes and not _surely(search.tried):
            return []
        healed = [first, *(tap for tap in left[1:] if search.best and tap in search.best.healed)]
        if search.best:
            proven.insert(0, search.best.trial.words)
        faults.append(finder.fault(first, healed, search))
        left = [tap for tap in left if tap not in healed]
    return faults


def _surely(tried: Sequence[_Tried]) -> bool:
    """Whether a mistake takes the error away, and no other arithmetic does."""
    best = [one.trial.cause.cause for one in tried if one.explains >= SURE]
    return bool(best) and not any(cause in _ARITHMETIC for cause in best)


class _Finder:
    def __init__(self, stages: Stages, named: Named, taps: Sequence[Tap], found: Explained, clock: Clock, pulse: Pulse):
        self.stages, self.named, self.found, self.clock, self.pulse = stages, named, found, clock, pulse
        self.bench = Bench(stages, named)
        self.taps = {tap.name: tap for tap in taps}
        self.dumped = {inner(tap) for tap in named.taps if named.window(tap) is None}
        self.count = self.of = 0  # mistakes that were looked for, and how many there are
        self.fits: dict[str, list[float]] = {}  # see ``Scene``

    def segment(self, tap: str) -> list[str]:
        """The steps that may be at fault for a tap."""
        if inner(tap) != tap:
            return [tap]
        return segment(tap, self.stages.shapes, self.dumped, self.stages.layers)

    def places(self, tap: Tap) -> range:
        """The stages that may be at fault for a tap."""
        last = self.stages.stage_of(tap.name)
        return range(min(self.stages.stage_of(step) for step in self.segment(tap.name)), last + 1)

    def search(self, tap: Tap, left: Sequence[Tap], proven: Sequence[tuple[str, str]]) -> _Search:
        """What each cause explains of a tap's own error; what was proven before is tried first, and always."""
        if inner(tap.name) != tap.name:
            return _Search((), 0, 0)
        ours = self.bench.ours(self.stages.stage_of(tap.name))[tap.name]
        trials = self.trials(tap, left, ours)
        tried: list[_Tried] = []
        again = [trial for trial in trials if trial.words in proven]
        for batch in self.batches(again, Clock(0)):
            tried += self.tried(tap, left, ours, batch)
        count = len(again)
        if any(one.explains > _AGAIN for one in tried):
            return _Search(_sorted(tried), count, count)
        new = sorted((trial for trial in trials if trial.words not in proven), key=_cost)
        for batch in self.batches(new, self.clock):
            tried += self.tried(tap, left, ours, batch)
            count += len(batch)
            beyond = f"causes tried; {len(left)} taps are beyond the floor"
            self.pulse(partial(_so_far, tap, count, len(trials), beyond, self.clock))
        return _Search(_sorted(tried), count, len(trials))

    def trials(self, tap: Tap, left: Sequence[Tap], ours: np.ndarray, fit: bool = True) -> list[_Trial]:
        """The causes: in a stage of the segment alone (of many only the model's ends), or made in all of them.

        Numbers are fitted in one stage alone, which costs little; where an error is rounding's there is always a number
        that fits best, so not beneath floors.
        """
        steps, few = self.segment(tap.name), self.places(tap)
        first, last = few[0], few[-1]
        theirs = self.bench.values(last)[tap.name]
        ends = {-1, self.stages.layers}
        places: list[int | None] = [*few] if len(few) <= _FEW + 1 else [None, *(at for at in few if at in ends)]
        if last > first and None not in places:
            places.append(None)
        found: list[_Trial] = []
        for at in places:
            stage = last if at is None else at
            mine = {split(step)[1] for step in steps if at is None or self.stages.stage_of(step) == at}
            step = split(tap.name)[1] if stage == last else ""
            place = Place(first if at is None else at, last, at)
            under = partial(self.bench.under, tap.name, place)
            fits = self.fits if fit and at is not None and place.last - place.first < _FEW else None
            scene = Scene(self.stages, stage, step, ours, theirs, under, fits)
            causes = catalogue(scene, mine) if at is not None else self.everywhere(scene, first, last, mine)
            for cause in causes:
                if cause.cause != "layer_order" or self.several(tap, left, steps):
                    found.append(_Trial(len(found), cause, place))
        return found

    def everywhere(self, scene: Scene, first: int, last: int, steps: Collection[str]) -> list[Cause]:
        """Mistakes made in all of these stages, each once."""
        found: dict[tuple[str, str], Cause] = {}
        for stage in {first, (first + last) // 2, last}:
            for cause in catalogue(dataclasses.replace(scene, stage=stage, step=""), steps):
                if everywhere(cause):
                    found.setdefault((cause.cause, cause.detail), cause)
        return list(found.values())

    def several(self, tap: Tap, left: Sequence[Tap], steps: Sequence[str]) -> bool:
        """Whether a whole layer may be at fault: several of its taps are, or little of it was dumped."""
        stage = self.stages.stage_of(tap.name)
        return len(steps) > 4 or sum(self.stages.stage_of(t.name) == stage for t in left) > 3

    def batches(self, trials: Sequence[_Trial], clock: Clock) -> Iterator[list[_Trial]]:
        """Trials to be made side by side, as many as there is time for."""
        for place, some in itertools.groupby(trials, key=lambda trial: trial.place):
            self.bench.hold(place)
            rest, most = list(some), self.bench.together(place)
            size = min(2, most)
            while rest and clock.left:
                began = time.monotonic()
                batch, rest = rest[:size], rest[size:]
                yield batch
                each = (time.monotonic() - began) / len(batch)
                size = int(np.clip(clock.left / max(each, 1e-9), 1, most))

    def tried(self, tap: Tap, left: Sequence[Tap], ours: np.ndarray, trials: Sequence[_Trial]) -> list[_Tried]:
        """Those trials of one place that explain something, and break nothing that is right."""
        place = trials[0].place
        wrong = {t.name for t in left}
        errors: dict[_Trial, dict[str, np.ndarray]] = {}
        edited = [trial for trial in trials if trial.cause.post is None]

        def look(number: int, stage: int, values: Mapping[str, np.ndarray]) -> bool:
            theirs = self.bench.values(stage)
            for name in values.keys() & theirs.keys() & self.taps.keys():
                if name != tap.name and values[name].shape != theirs[name].shape:
                    continue
                error, other = _apart(values[name], theirs[name], name), self.taps[name]
                limit = max(1, other.excess(self.found.classes))
                if name not in wrong and np.max(error / other.floor(self.found.classes)) > limit:
                    errors.pop(edited[number], None)
                    return False
                errors.setdefault(edited[number], {})[name] = error
            return True

        self.bench.race(place, [trial.cause.edit for trial in edited], look)
        for trial in trials:
            if trial.cause.post is not None:
                value = trial.cause.post(ours)
                errors[trial] = {tap.name: _apart(value, self.bench.values(place.last)[tap.name], tap.name)}
        found = []
        for trial, each in errors.items():
            if tap.name in each and (explains := self.share(tap, each[tap.name])) > _WORTH:
                healed = tuple(t for t in left if t.name in each and self.share(t, each[t.name]) >= PROVEN)
                found.append(_Tried(trial, explains, healed))
        return found

    def share(self, tap: Tap, error: np.ndarray) -> float:
        """How much of a tap's own error an edit takes away, beyond what arithmetic leaves."""
        assert tap.local is not None
        floor = tap.floor(self.found.classes)
        at = int(np.argmax(tap.local / floor))
        noise = floor[at] / tap.margin(self.found.classes)[at]
        return float(np.clip(1 - max(0.0, error[at] - noise) / (tap.local[at] - noise), 0, 1))

    def hidden(self, tap: Tap) -> dict[str, Any] | None:
        """The fault beneath a tap's floor; None for none.  A step alone, or what is exact, hides nothing; beneath more
        layers than two, all of them rounded, nothing is found."""
        places = self.places(tap)
        within = inner(tap.name) == tap.name and len(self.segment(tap.name)) > 1 and len(places) <= 2
        if not within or tap.excess(("float32",)) <= 1:
            return None
        last = places[-1]
        ours, axis = self.bench.ours(last)[tap.name], token_axis(tap.name)
        if ours.shape[axis] < TOKENS:
            return None
        trials = [trial for trial in self.trials(tap, [], ours, fit=False) if worth(trial.cause)]
        error, proven = self.bench.values(last)[tap.name] - ours, list[tuple[Held, _Trial]]()
        ways = [edit for name in self.found.classes for edit in CLASSES[name]()]
        changes: dict[Place, list[np.ndarray]] = {}
        self.of += len(trials)
        what = "mistakes looked for beneath the floor"
        for trial in trials:
            if not self.clock.left:
                break
            self.count += 1
            self.bench.hold(trial.place)
            under = self.bench.under(tap.name, trial.place, trial.cause.edit)
            self.pulse(partial(_so_far, tap, self.count, self.of, what, self.clock))
            if under is None or under.shape != ours.shape or not np.isfinite(under).all():
                continue
            found = held(error, under - ours, axis)
            if not found.proves(0.0):
                continue
            if trial.place not in changes:
                runs = (self.bench.under(tap.name, trial.place, edit) for edit in ways)
                changes[trial.place] = [run - ours for run in runs if run is not None]
            cosines = (abs(held(way, under - ours, axis).cosine) for way in changes[trial.place])
            rounding = max(cosines, default=0.0)  # none of ours may reach this place
            if found.proves(rounding):
                proven.append((found, trial))
        if not proven:
            return None
        found, trial = max(proven, key=lambda both: both[0].cosine)
        explains = min(found.times, 1 / found.times)
        fault = self.fault(tap, [tap], _Search([_Tried(trial, explains, (tap,))], len(trials), len(trials)))
        return fault | {
            "proof": f"what that mistake changes is {found.times:.2f} times in the error of {tap.name} "
            f"(cosine {found.cosine:.2f}), though it is within the floor: of a rounding next to nothing is"
        }

    def fault(self, tap: Tap, healed: Sequence[Tap], search: _Search) -> dict[str, Any]:
        """As the contract has it."""
        assert tap.local is not None
        steps, best = self.segment(tap.name), search.best
        floor = tap.floor(self.found.classes)
        at = int(np.argmax(tap.local / floor))
        module = common([t.name for t in healed]) if len(steps) == 1 else common(steps)
        if best and len(steps) == 1 and best.trial.cause.steps == (split(tap.name)[1],):
            module = tap.name  # whatever that mistake did to others
        if best and (len(steps) > 1 or best.trial.cause.cause == "layer_order"):
            cause, where = best.trial.cause, best.trial.place.at
            mine = [s for s in steps if split(s)[1] in cause.steps and where in (None, self.stages.stage_of(s))]
            module = common(mine) or module
            if cause.cause == "layer_order":
                module = f"layers.{self.stages.stage_of(tap.name)}"
        causes = [
            {"cause": t.trial.cause.cause, "detail": t.trial.cause.detail, "explains": round(t.explains, 4)}
            for t in _distinct(search.tried)
        ]
        times = tap.unlike(self.found.classes)
        going = "" if times is None else f", going by the same step of most layers, which is {times:.2g} times nearer"
        what = "the step" if len(steps) == 1 else f"{len(steps)} steps ({steps[0]} to {steps[-1]})"
        return {
            "module": module or tap.name,
            "tap": tap.name,
            "local_error": float(tap.local[at]),
            "local_floor": float(floor[at]),
            "proof": f"the candidate's own input through {what} of ours ends {tap.local[at]:.1e} from the candidate's "
            f"{tap.name}; {self.found.name} arithmetic explains {floor[at]:.1e}{going}",
            "also": [t.name for t in healed[1:]],
            "tried": [search.count, search.of],
            "causes": causes or [{"cause": "unknown", "detail": _unknown(len(steps), search), "explains": 0.0}],
        }


def _cost(trial: _Trial) -> tuple[int, bool]:
    """Of a trial, where there may not be time for all: one stage is cheap, but not to round a head's weight; weights of
    other layers are tried last, of which a deep model has hundreds."""
    word, several = trial.cause.cause, trial.place.first < trial.place.last
    return 2 if word == "quantization" else int(several), word == "weight_swapped"


def _apart(ours: np.ndarray, theirs: np.ndarray, tap: str) -> np.ndarray:
    """As ``measure.pair``; what overflows, or has another shape, is as far away as can be."""
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return np.full(2, np.inf)
    return pair(ours, theirs, tap)


def _sorted(tried: Sequence[_Tried]) -> list[_Tried]:
    """What heals more taps is the better of two that explain as much."""
    return sorted(tried, key=lambda t: (-round(t.explains, 4), -len(t.healed), t.trial.number))


def _so_far(tap: Tap, count: int, of: int, what: str, clock: Clock) -> str:
    more = f"{clock.left:.0f} s are left" if clock.left < float("inf") else "all are tried"
    return f"{tap.name}: {count} of {of} {what}; {more}"


def _unknown(steps: int, search: _Search) -> str:
    some = "no known mistake" if search.count == search.of else f"none of the {search.count} mistakes that were tried"
    late = search.count == 0 < search.of
    some = "no time was left to try known mistakes" if late else f"{some} explains it"
    return some + ("" if steps == 1 else f"; {steps} steps lie between the dumped taps")


def _distinct(tried: Sequence[_Tried]) -> list[_Tried]:
    """The best of each word, three at most."""
    best: dict[str, _Tried] = {}
    for one in tried:
        best.setdefault(one.trial.cause.cause, one)
    return list(best.values())[:3]
