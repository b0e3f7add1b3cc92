"""What there is to know of each tap: how far the candidate is from the reference, how far from what our step makes of
the candidate's own input, and how far each way to compute would be.

A stage of the model is in memory at a time, and of the dumps one tap.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from llmjax.errors import RequestError, amount
from llmjax.oracle.clock import Pulse
from llmjax.oracle.dump import Window
from llmjax.oracle.floors import CLASSES, FEW, LEAST, LIKE, MARGIN, NO_FACTOR, OWN, floor
from llmjax.oracle.metrics import Gap, gap, narrowed
from llmjax.oracle.names import Named, layouts
from llmjax.oracle.stages import PLAIN, Edit, Stages
from llmjax.oracle.steps import OUTER

# What a scale of 16 bits is not off by, the share of an error that one factor leaves where it is all there is, and
# values that can tell it.
_FACTOR, _PURE, _SEVERAL = 0.01, 0.02, 16
# The share of tokens that a way of a class may move far more than the candidate's are off.
_MANY = 0.25
# How many times as far off as another order of sums makes it a token is that is right, and one that is clearly moved.
_RIGHT, _CLEARLY = 2.0, 10.0

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
      rounding: the most that a lossy file may have moved it by, as ``local``.
      scaled: the step's own error is one factor, which no rounding to few bits is.
      own: the step's own error by token; None where it is not known.
      spared: those ways, by class and number, that clearly move a token which is right here.
      reach: by those ways, how many times as far as they move them three of four tokens are at least.
      like: by classes, how many times as far as their ways the same step of most layers is, and how far their narrowest
        ones are, both as ``local``; filled by ``verdict.explain`` for what has its like.
    """

    name: str
    gap: Gap
    narrowed: float
    equal: bool
    local: np.ndarray | None = None
    ways: dict[str, list[tuple[np.ndarray, np.ndarray]]] = dataclasses.field(default_factory=dict)
    rounding: np.ndarray = dataclasses.field(default_factory=partial(np.zeros, 2))
    scaled: bool = False
    own: np.ndarray | None = None
    spared: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    reach: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)
    like: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)

    def margin(self, classes: Sequence[str]) -> np.ndarray:
        """How many times as far as the classes' ways the step may be, as ``local``."""
        if tuple(classes) not in self.like:
            return np.full(2, MARGIN)
        like, own = self.like[tuple(classes)]
        return np.clip(LIKE * like, OWN * own, MARGIN)

    def unlike(self, classes: Sequence[str]) -> float | None:
        """How many times as far off the step is as the same one of most layers, where that alone tells against it."""
        if tuple(classes) not in self.like or self.local is None:
            return None
        like, _ = self.like[tuple(classes)]
        over = self.local / self.floor(classes)
        at = int(np.argmax(over))
        times = self.margin(classes)[at] * over[at]
        return float(times / max(like[at], 1e-3)) if over[at] > 1 and times <= MARGIN else None

    def floor(self, classes: Sequence[str], whole: bool = False, finest: bool = False) -> np.ndarray:
        """The most that the step's own error, or the ``whole`` run's, may be under classes together; of weights of few
        bits by the ``finest`` of their ways."""
        at = 0 if whole else 1
        if self.scaled and not whole:
            classes = tuple(name for name in classes if name not in NO_FACTOR) or ("float32",)
        total = np.zeros(2)
        for name in classes:
            ways = self.ways[name]
            fits = [w[at] for w in ways if w[at].any()] if finest and name in FEW else []  # a scheme may not
            total = np.hypot(total, np.min(fits, 0) if fits else np.max([w[at] for w in ways], 0))
        margin = MARGIN if whole else self.margin(classes)
        return np.hypot(floor(total, self.ways["float32"][0][at], margin), self.rounding)

    def excess(self, classes: Sequence[str]) -> float:
        """The step's own error over its floor; above 1 the classes do not explain it."""
        assert self.local is not None
        return float(np.max(self.local / self.floor(classes)))


def token_axis(tap: str) -> int:
    """Which axis of a tap counts tokens."""
    return 1 if tap.endswith(".probs") else 0


def fitted(named: Named, tap: str, shape: tuple[int, ...], near: np.ndarray | None) -> np.ndarray:
    """A tap's values in our shape; of two that are possible the one nearer to ``near``.

    Raises:
      MismatchError: they do not fit.
    """
    array = named.read(tap)
    window = named.window(tap)
    if window is not None and not token_axis(tap):
        shape = (len(window.positions), *shape[1:])
    found = layouts(array, shape)
    if not found:
        what = f"{named.dump.path}: {named.taps[tap].name}: shape {list(array.shape)}, expected {list(shape)} for {tap}"
        raise MismatchError(what + _misfit(tap, array.size, shape))
    if len(found) > 1 and near is not None:
        return min(found, key=lambda x: gap(x, near, token_axis(tap)).error)
    return found[0]


def _misfit(tap: str, size: int, shape: tuple[int, ...]) -> str:
    """Why so many values may not fit a tap."""
    rows, over = divmod(size, max(1, int(np.prod(shape[1:]))))
    if tap == "logits" and size == shape[-1]:
        return "; of the last token alone they are read as llama-debug writes them, X.bin beside X-tokens.bin"
    if over or token_axis(tap):
        return ""
    if rows == shape[0]:
        return "; its axes are in another order, which a map tells (--names: transpose)"
    return f"; {amount(rows, 'token')} for {shape[0]} of token_ids: give one text, all ids as they were fed, no padding"


def compared(tap: str, ours: np.ndarray, theirs: np.ndarray, window: Window | None = None) -> Tap:
    """A tap of two dumps; of a window both as it shows them."""
    axis = token_axis(tap)
    found = Tap(tap, gap(ours, theirs, axis), narrowed(ours, theirs, axis), bool(np.array_equal(ours, theirs)))
    if window is not None:
        found.gap = dataclasses.replace(found.gap, token=int(window.positions[found.gap.token]))
        if window.rounding is not None:
            found.rounding = pair(theirs, theirs + window.rounding(theirs), tap)
    return found


def pair(x: np.ndarray, y: np.ndarray, tap: str) -> np.ndarray:
    """``[whole, worst token]`` errors; of a way that overflows nothing."""
    return _pair(x, y, tap)[0]


def _pair(x: np.ndarray, y: np.ndarray, tap: str) -> tuple[np.ndarray, np.ndarray | None]:
    """See ``pair``; and the error of each token."""
    if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return np.zeros(2), None
    found = gap(x, y, token_axis(tap))
    return np.array([found.error, found.worst]), found.by_token


def inner(tap: str) -> str:
    """The last step of the module whose output the tap is; the tap itself if it is a step."""
    head, _, last = tap.rpartition(".")
    return f"{head}.{OUTER[last]}" if last in OUTER else tap


def stage_values(stages: Stages, named: Named, stage: int, ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The candidate's values of one stage, by tap."""
    taps = [tap for tap in named.taps if stages.stage_of(tap) == stage]
    return {tap: fitted(named, tap, stages.shapes[inner(tap)], ours.get(inner(tap))) for tap in taps}


def patches(named: Named, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What goes on from each step: a module's output where it differs from its last step's; nothing from a window."""
    values = {tap: value for tap, value in values.items() if named.window(tap) is None}
    steps = {tap: value for tap, value in values.items() if inner(tap) == tap}
    return steps | {inner(tap): value for tap, value in values.items() if inner(tap) != tap}


def measure(
    stages: Stages, named: Named, reference: Read, classes: Sequence[str], pulse: Pulse
) -> Iterator[tuple[Tap, np.ndarray]]:
    """Measures every tap of a dump, in the order of computation.

    Args:
      stages: our model for the dump's tokens.
      named: the dump under our names.
      reference: the reference's own value of a tap, where it is known.
      classes: to measure; float32 among them.
      pulse: is told of each way of each stage.

    Yields:
      a tap, and the reference's values.
    """
    ways: list[tuple[str, Edit]] = [("", PLAIN), *((name, edit) for name in classes for edit in CLASSES[name]())]
    xs: list[Any] = [None] * len(ways)
    locals_: list[Any] = [None] * len(ways)
    patched, wanted = False, {inner(tap) for tap in named.taps}
    for stage in range(-1, stages.layers + 1):
        moved: dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]] = {}
        tokens: dict[str, dict[str, list[np.ndarray | None]]] = {}
        for i, (name, edit) in enumerate(ways):
            pulse(lambda stage=stage, i=i: _where(stages, stage, i, len(ways)))  # type: ignore[misc]
            flow, values = stages.run(stage, xs[i], {}, edit, wanted)
            if i == 0:
                theirs = stage_values(stages, named, stage, values)
                patch = patches(named, theirs)
                patched = patched or bool(patch)
            values = whole = apart = named.shown(values)  # logits of all tokens are large: no two ways' at a time
            own = flow
            if patched:  # until then the candidate's own input is ours
                own, values = stages.run(stage, locals_[i], patch, edit, wanted)
                values = apart = named.shown(values)
            xs[i], locals_[i] = flow, own
            if i == 0:
                plain = whole, apart
                errors = {tap: _pair(value, apart[inner(tap)], tap) for tap, value in theirs.items()}
                continue
            for tap in theirs:
                step = inner(tap)
                run, own = _pair(whole[step], plain[0][step], tap)
                alone, own = _pair(apart[step], plain[1][step], tap) if patched else (run, own)
                moved.setdefault(tap, {}).setdefault(name, []).append((run, alone))
                tokens.setdefault(tap, {}).setdefault(name, []).append(own)
        for tap, value in theirs.items():
            step = inner(tap)
            known = reference(step)
            ours = plain[0][step] if known is None else named.shown({step: known})[step]
            found = compared(tap, ours, value, named.window(tap))
            if step != tap and step in theirs:
                if np.array_equal(value, theirs[step]):
                    continue
                found.local = pair(value, theirs[step], tap)
                inside = named.window(step)
                if inside is not None and inside.rounding is not None:
                    rounded = theirs[step] + inside.rounding(theirs[step])
                    found.rounding = np.hypot(found.rounding, pair(theirs[step], rounded, tap))
                found.ways = {name: [(np.zeros(2), np.zeros(2))] * 3 for name in classes}
            else:
                found.local, found.own = errors[tap]
                found.ways, found.spared = moved[tap], _spared(found.own, tokens[tap], moved[tap])
                found.reach = _reach(found.own, tokens[tap])
                found.scaled = _is_factor(plain[1][step], value)
            yield found, ours


def _spared(
    own: np.ndarray | None,
    tokens: Mapping[str, Sequence[np.ndarray | None]],
    ways: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]],
) -> set[tuple[str, int]]:
    """The ways that clearly move a token which is as right as another order of sums has it: rounding moves the first
    token as any other, but that one attends to itself alone, and is right whatever is wrong with attention.

    Args:
      own: the step's own error by token.
      tokens: by class, what each of its ways does to each token.
      ways: what they do to the whole, as ``Tap.ways``.
    """
    both = zip(tokens["float32"], ways["float32"], strict=True)
    noises = [np.maximum(moved, max(alone[0], LEAST)) for moved, (_, alone) in both if moved is not None]
    if own is None or not noises:
        return set()
    noise = np.max(noises, 0)
    right = own <= _RIGHT * noise
    return {
        (name, way)
        for name, several in tokens.items()
        for way, moved in enumerate(several)
        if moved is not None and np.any(right & (moved > _CLEARLY * noise))
    }


def _reach(own: np.ndarray | None, tokens: Mapping[str, Sequence[np.ndarray | None]]) -> dict[tuple[str, int], float]:
    """See ``Tap.reach``; of what ``_spared`` is made of, and of the tokens that a way moves at all."""
    return {
        (name, way): float(np.quantile(own[some] / moved[some], _MANY))
        for name, several in tokens.items()
        for way, moved in enumerate(several)
        if own is not None and moved is not None and (some := moved > LEAST).any()
    }


def _is_factor(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether all that they are apart is one factor, and more than a scale in 16 bits is."""
    if ours.shape != theirs.shape or ours.size < _SEVERAL:
        return False
    x, y = (np.ravel(a).astype(np.float32, copy=False) for a in (ours, theirs))
    xx, xy, yy = (float(np.einsum("i,i->", *both, dtype=np.float64)) for both in ((x, x), (x, y), (y, y)))
    factor = xy / max(xx, 1e-300)
    left, apart = yy - factor * xy, yy - 2 * xy + xx
    return abs(factor - 1) > _FACTOR and left < _PURE**2 * apart


def _where(stages: Stages, stage: int, way: int, ways: int) -> str:
    at = f"layer {stage} of {stages.layers}" if 0 <= stage < stages.layers else "embedding" if stage < 0 else "head"
    return f"measuring: {at}, way {way + 1} of {ways} to compute it"


def row(tap: Tap, floor: float) -> dict[str, Any]:
    """As the contract has a tap."""
    return {
        "name": tap.name,
        "error": tap.gap.error,
        "error_narrowed": tap.narrowed,
        "floor": float(floor),
        "token": tap.gap.token,
        "channel": tap.gap.channel,
        "largest": tap.gap.largest,
        "local_error": None if tap.local is None else float(tap.local[0]),
    }


def leaving(taps: Sequence[Tap]) -> dict[str, list[float]]:
    """Errors by token of what leaves each layer, for the HTML report."""
    ends = [t for t in taps if t.name.endswith(".resid") or t.name in ("embed", "logits")]
    return {tap.name: tap.gap.by_token.tolist() for tap in ends}
