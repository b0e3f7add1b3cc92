"""Which prompts the slots' caches hold, so that what prompts have in common is computed once."""

import dataclasses
from collections.abc import Collection, Hashable, Sequence

import numpy as np

_SIZE = 4  # bytes of a token


@dataclasses.dataclass
class Held:
    """What one slot's cache holds: prompt tokens, from the first position on.

    Attributes:
      ids: int32, as bytes, which are compared at once; whole chunks of a prompt, or all of it.
      is_followed: whether the state knows what follows them (``State.after``).
      used: when the slot was last taken.
      kind: what else than the tokens decides what they are: the LoRA adapter they went through, ...
    """

    ids: bytes = b""
    is_followed: bool = False
    used: int = 0
    kind: Hashable = 0


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a prompt goes, and what of it need not be computed.

    Attributes:
      slot: the one it gets.
      source: a slot that holds its beginning; may be the same.
      length: tokens of that beginning: whole chunks, or the whole prompt.
      is_whole: whether it is all, and what follows is known.
    """

    slot: int
    source: int
    length: int
    is_whole: bool


class Prefixes:
    """Looks only at prompts: the decode program computes other bits than prefill.  A slot keeps its prompt when its row
    ends, until another takes the slot.

    Args:
      slots: how many.
      chunk: tokens a prefill call takes.
      enabled: False finds nothing in common.
    """

    def __init__(self, slots: int, chunk: int, enabled: bool = True):
        self._chunk, self._enabled = _SIZE * chunk, enabled
        self._held = [Held() for _ in range(slots)]
        self._clock = 0

    def find(self, ids: Sequence[int] | np.ndarray, free: Collection[int], kind: Hashable = 0) -> Place:
        """Picks a free slot for a prompt: one that holds its beginning, or the one that rested longest.

        Args:
          ids: ``[T]``.
          free: slots without a row; not empty.
          kind: see ``Held``.
        """
        wanted = _bytes(ids)
        shared = [self._shared(held, wanted) if held.kind == kind else 0 for held in self._held]
        source = max(range(len(shared)), key=lambda s: (shared[s], s in free))
        slot = source if source in free and shared[source] else min(free, key=lambda s: self._held[s].used)
        return Place(slot, source, shared[source] // _SIZE, shared[source] == len(wanted))

    def take(self, place: Place, ids: Sequence[int] | np.ndarray, kind: Hashable = 0) -> None:
        """Notes that the slot found for a prompt now holds as much of it as need not be computed."""
        self._clock += 1
        self._held[place.slot] = Held(_bytes(ids[: place.length]), place.is_whole, self._clock, kind)

    def tokens(self, slot: int) -> int:
        """How many a slot holds."""
        return len(self._held[slot].ids) // _SIZE if self._enabled else 0

    def used(self, slot: int) -> int:
        """When a slot was last taken: the more, the later."""
        return self._held[slot].used

    def forget(self, slot: int) -> None:
        """A slot no longer holds its prompt."""
        self._held[slot] = Held(used=self.used(slot))

    def _shared(self, held: Held, ids: bytes) -> int:
        """How many bytes."""
        if not self._enabled:
            return 0
        if held.is_followed and held.ids == ids:
            return len(ids)
        # The prompt's last token must be computed: its logits are wanted.
        most, same, chunk = min(len(held.ids), len(ids) - _SIZE) // self._chunk * self._chunk, 0, self._chunk
        while same < most and held.ids[same : same + chunk] == ids[same : same + chunk]:
            same += chunk
        return same

    def add(self, slot: int, ids: Sequence[int] | np.ndarray) -> None:
        """Notes that a slot now holds these tokens, and the state what follows; only whole chunks, or a whole
        prompt."""
        held = self._held[slot]
        held.ids, held.is_followed = _bytes(ids), True


def _bytes(ids: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(ids, np.int32).tobytes()
