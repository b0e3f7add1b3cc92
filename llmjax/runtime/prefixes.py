"""Which prompts the slots' caches hold, so that what prompts have in common is computed once."""

import dataclasses
from collections.abc import Collection, Hashable, Sequence

import jax
import numpy as np


@dataclasses.dataclass
class Held:
    """What one slot's cache holds: prompt tokens, from the first position on.

    Attributes:
      ids: int32 ``[T]``; whole chunks of a prompt, or all of it.
      logits: float32 ``[V]``, what follows if ``ids`` are a whole prompt.
      used: when the slot was last taken.
      kind: what else than the tokens decides what they are: the LoRA adapter they went through, ...
    """

    ids: np.ndarray
    logits: jax.Array | None = None
    used: int = 0
    kind: Hashable = 0


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a prompt goes, and what of it need not be computed.

    Attributes:
      slot: the one it gets.
      source: a slot that holds its beginning; may be the same.
      length: tokens of that beginning: whole chunks, or the whole prompt.
      logits: float32 ``[V]``, what follows where the beginning is all.
    """

    slot: int
    source: int
    length: int
    logits: jax.Array | None


class Prefixes:
    """Looks only at prompts: the decode program computes other bits than prefill.  A slot keeps its prompt when its row
    ends, until another takes the slot.

    Args:
      slots: how many.
      chunk: tokens a prefill call takes.
      enabled: False finds nothing in common.
    """

    def __init__(self, slots: int, chunk: int, enabled: bool = True):
        self._chunk, self._enabled = chunk, enabled
        self._held = [Held(np.zeros(0, np.int32)) for _ in range(slots)]
        self._clock = 0

    def find(self, ids: np.ndarray, free: Collection[int], kind: Hashable = 0) -> Place:
        """Picks a free slot for a prompt: one that holds its beginning, or the one that rested longest.

        Args:
          ids: int32 ``[T]``.
          free: slots without a row; not empty.
          kind: see ``Held``.
        """
        shared = [self._shared(held, ids) if held.kind == kind else 0 for held in self._held]
        source = max(range(len(shared)), key=lambda s: (shared[s], s in free))
        slot = source if source in free and shared[source] else min(free, key=lambda s: self._held[s].used)
        length = shared[source]
        logits = self._held[source].logits if length == len(ids) else None
        return Place(slot, source, length, logits)

    def take(self, place: Place, ids: np.ndarray, kind: Hashable = 0) -> None:
        """Notes that the slot found for a prompt now holds as much of it as need not be computed."""
        self._clock += 1
        self._held[place.slot] = Held(ids[: place.length], place.logits, self._clock, kind)

    def tokens(self, slot: int) -> int:
        """How many a slot holds."""
        return len(self._held[slot].ids) if self._enabled else 0

    def used(self, slot: int) -> int:
        """When a slot was last taken: the more, the later."""
        return self._held[slot].used

    def forget(self, slot: int) -> None:
        """A slot no longer holds its prompt."""
        self._held[slot] = Held(np.zeros(0, np.int32), used=self.used(slot))

    def _shared(self, held: Held, ids: np.ndarray) -> int:
        n = min(len(held.ids), len(ids)) if self._enabled else 0
        if n < self._chunk and len(held.ids) != len(ids):
            return 0  # as below, without looking: the slots of short prompts are many, and are looked at for each
        differ = np.flatnonzero(held.ids[:n] != ids[:n])
        same = int(differ[0]) if len(differ) else n
        if same == len(ids) == len(held.ids) and held.logits is not None:
            return same
        # The prompt's last token must be computed: its logits are wanted.
        return min(same, len(ids) - 1) // self._chunk * self._chunk

    def add(self, slot: int, ids: Sequence[int] | np.ndarray, logits: jax.Array) -> None:
        """Notes that a slot now holds these tokens, the last ``logits`` of which follow; only whole chunks, or a whole
        prompt."""
        held = self._held[slot]
        held.ids, held.logits = np.asarray(ids, np.int32), logits
