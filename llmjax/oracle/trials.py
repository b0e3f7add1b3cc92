"""Mistakes made in our own code, several side by side: what becomes of a candidate's error under each.

A layer's weights are made floats once for all of them, and what does nothing in the layers is not computed in all of
them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError

from llmjax.oracle.measure import inner, patches, stage_values
from llmjax.oracle.names import Named
from llmjax.oracle.stages import PLAIN, Edit, Stages

# What a mistake raises that this model's shapes, or what its layers hand on, leave no room for.
_NO_ROOM = (TypeError, ValueError, AttributeError, FlaxError)
# Mistakes side by side at most, and bytes of what they hand from stage to stage.
_TOGETHER, _ROOM = 16, 1 << 28
# Stages whose values, and whose inputs, are kept.
_KEPT = 4


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a mistake is made.

    Attributes:
      first: of the stages that are computed, from the candidate's own input.
      last: of them.
      at: the one that is changed; None for all.
    """

    first: int
    last: int
    at: int | None


class Bench:
    """A candidate's values, stage by stage, and what our stages make of them.

    Args:
      stages: our model.
      named: the candidate's dump.
    """

    def __init__(self, stages: Stages, named: Named):
        self.stages, self.named = stages, named
        self._steps = {inner(tap) for tap in named.taps}
        self._values: dict[int, dict[str, np.ndarray]] = {}
        self._flows: dict[int, Any] = {-1: None}
        self._held: set[int] = set()

    def hold(self, place: Place) -> None:
        """Keeps what goes into those stages of a place that are computed again and again."""
        self._held = {place.first, place.last, self._decisive(place) + 1}

    def values(self, stage: int) -> dict[str, np.ndarray]:
        """The candidate's, of one stage."""
        if not any(self.stages.stage_of(tap) == stage for tap in self.named.taps):
            return {}
        if stage not in self._values:
            if len(self._values) >= _KEPT:
                self._values.clear()
            # Ours tell of two possible shapes the nearer.
            ours = self.stages.run(stage, self.flow(stage), {}, wanted=self._steps)[1]
            self._values[stage] = stage_values(self.stages, self.named, stage, ours)
        return self._values[stage]

    def flow(self, stage: int) -> Any:
        """The candidate's, into a stage: ours, with its values in the place of ours wherever it has some."""
        for before in range(max(at for at in self._flows if at <= stage), stage):
            given = patches(self.named, self.values(before))
            self._flows[before + 1] = self.stages.run(before, self._flows[before], given, wanted=())[0]
            for old in [at for at in self._flows if at >= 0 and at not in self._held][:-_KEPT]:
                del self._flows[old]
        return self._flows[stage]

    def ours(self, stage: int) -> dict[str, np.ndarray]:
        """What our stage makes of the candidate's input, at its dumped taps."""
        given = patches(self.named, self.values(stage))
        return self.named.shown(self.stages.run(stage, self.flow(stage), given, wanted=self._steps)[1])

    def under(self, tap: str, place: Place, edit: Edit) -> np.ndarray | None:
        """Our value of a tap of the last stage, with an edit; None where this model leaves no room for it."""
        found: dict[str, np.ndarray] = {}
        self.race(place, [edit], lambda number, stage, ours: found.update(ours) is None)
        return found.get(tap)

    def together(self, place: Place) -> int:
        """How many edits may go side by side; in one stage alone nothing is won by it."""
        if place.first == place.last:
            return 1
        size = sum(x.nbytes for x in jax.tree.leaves(self.flow(max(place.first, 0))))
        return int(np.clip(_ROOM // max(size, 1), 1, _TOGETHER))

    def race(
        self, place: Place, edits: Sequence[Edit], look: Callable[[int, int, Mapping[str, np.ndarray]], bool]
    ) -> None:
        """Computes the stages with each of these edits, side by side.

        What layers are computed by is repeated (``DecoderConfig.period``): an edit that changes nothing in the first of
        them changes nothing in the others, and comes to the last stage as the candidate does.

        Args:
          place: the stages.
          edits: by number.
          look: is given a number, a stage, and what that edit makes of it at its dumped taps; where it returns False,
            the edit goes no further.
        """
        first, last, at, decisive = place.first, place.last, place.at, self._decisive(place)
        flows = dict.fromkeys(range(len(edits)), self.flow(first))
        for stage in range(first, last + 1):
            given = patches(self.named, self.values(stage))
            for i in [i for i, x in flows.items() if x is not _IDLE or stage == last]:
                flow = self.flow(stage) if flows[i] is _IDLE else flows[i]
                edit = edits[i] if at in (None, stage) else PLAIN
                try:
                    flows[i], ours = self.stages.run(stage, flow, given, edit, self._steps)
                except _NO_ROOM:
                    del flows[i]
                    continue
                if not look(i, stage, self.named.shown(ours)):
                    del flows[i]
                elif stage == decisive < last and _same(flows[i], self.flow(stage + 1)):
                    flows[i] = _IDLE

    def _decisive(self, place: Place) -> int:
        """The stage behind which it shows whether an edit changes anything."""
        return max(place.first, 0) + self.stages.model.config.period - 1 if place.at is None else place.at


_IDLE = object()


def _same(x: Any, y: Any) -> bool:
    ours, theirs = jax.tree.leaves(x), jax.tree.leaves(y)
    return len(ours) == len(theirs) and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
