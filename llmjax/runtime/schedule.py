"""Which rows are under way, which are next, and what becomes of them where memory ends."""

import dataclasses
from collections import deque
from collections.abc import Generator

import numpy as np

from llmjax.errors import NoRoomError
from llmjax.runtime.memory import size
from llmjax.runtime.prefixes import Place
from llmjax.runtime.row import Row
from llmjax.runtime.store import Store


@dataclasses.dataclass
class Filling:
    """A row whose prompt is on its way into a slot, a part at every ``next`` of ``parts``."""

    slot: int
    row: Row
    parts: Generator[None, None, None]


class Schedule:
    """The rows of a run.

    The cache grows with the tokens in use.  Where the budget ends, rows that have not begun wait, and then the newest
    that have are put off: they begin again when others have ended, and get the same bits.  So the oldest goes on in any
    case, and a row fails only if it does not fit alone.

    Args:
      store: what the slots hold.
      slots: how many.
      chunk: prompt tokens a prefill call takes.

    Attributes:
      rows: those that decode, by slot, the oldest first.
      waiting: those that are next.
      filling: the one in between.
    """

    def __init__(self, store: Store, slots: int, chunk: int):
        self._store, self._slots, self._chunk = store, slots, chunk
        self.rows: dict[int, Row] = {}
        self.waiting: deque[Row] = deque()
        self.filling: Filling | None = None

    def admit(self) -> tuple[Row, Place, tuple[int, int]] | None:
        """Takes the first of the rows that wait, if there is memory for it now.

        Returns:
          the row, its place, and which page is to be copied where (see ``Pages.lend``).
        """
        row, store = self.waiting[0], self._store
        ids, needed = np.asarray(row.ids, np.int32), store.pages.needed
        kind = row.adapter, store.length_kind(len(ids))
        store.ensure(len(ids))
        prompt = padded(len(ids), self._chunk)
        scored = prompt if row.is_unscored else 0
        free = set(range(self._slots)) - set(self.rows)
        place = store.prefixes.find(ids, free, kind)
        # As much as a row had when it was put off must be free for each of the others, too, or it soon were so again.
        ahead = max(row.again, store.tokens)
        count = needed(max(prompt, row.reach(row.again + ahead))) - place.length // store.tokens + needed(scored)
        count += sum(max(0, needed(r.reach(ahead)) - store.pages.held(slot)) for slot, r in self.rows.items())
        if not store.room(count, {*self.rows, *([place.source] if place.length else [])}):
            if self.rows or not store.restart(max(prompt + scored, len(ids) + row.again + 1)):
                return None
            place = store.prefixes.find(ids, free, kind)  # nothing is held any longer
        store.prefixes.take(place, ids, kind)
        copied = store.pages.lend(place.source, place.slot, place.length)
        store.pages.give(place.slot, needed(prompt))
        store.pages.give(store.aside, needed(scored))
        return self.waiting.popleft(), place, copied

    def refuse(self) -> Row:
        """Ends the first of the rows that wait, which does not fit alone."""
        row = self.waiting.popleft()
        size = len(row.ids)
        row.fail(no_room(self._store, size + row.again + 1 + (size if row.is_unscored else 0)))
        return row

    def make_room(self, steps: int) -> int:
        """Gets the rows memory for so many tokens more; where there is none, the newest are put off.

        Returns:
          how many tokens there is room for before a row must be computed anew, 0 if no row is left.
        """
        store = self._store
        for slot, row in list(self.rows.items()):
            if (left := row.until_renewal) is not None:
                if left > 0:
                    steps = min(steps, left)
                else:
                    self._renew(slot)
            while slot in self.rows and not store.hold(slot, row.reach(steps), self._busy()):
                left = store.pages.held(slot) * store.tokens - row.reach(0)
                if left > 0:
                    steps = min(steps, left)
                else:
                    self._put_off()
        return steps if self.rows else 0

    def _renew(self, slot: int) -> None:
        """Has a row's text computed anew, before it goes on."""
        row = self.rows.pop(slot)
        row.renew()
        self._store.prefixes.forget(slot)
        self._store.release(slot)
        self.waiting.appendleft(row)

    def _busy(self) -> set[int]:
        return {*self.rows, *([] if self.filling is None else [self.filling.slot])}

    def _put_off(self) -> None:
        """Has the newest row begin again later."""
        if self.filling is not None:
            slot, row = self.filling.slot, self.filling.row
            self.filling.parts.close()
            self.filling = None
            self._store.release(self._store.aside)
        else:
            slot, row = self.rows.popitem()
        row.put_off()
        self._store.release(slot)
        self.waiting.appendleft(row)


def padded(tokens: int, chunk: int) -> int:
    """In whole chunks."""
    return -(-tokens // chunk) * chunk


def no_room(store: Store, tokens: int) -> NoRoomError:
    """What there is to say of a row of so many tokens that does not fit alone."""
    memory = store.memory
    return NoRoomError(
        f"memory: {tokens:,} tokens of one row take {size(tokens * memory.page // memory.tokens)} of cache, and the "
        f"budget of {size(memory.budget)} leaves room for {memory.most_tokens:,}; give more (memory, --memory), or ask "
        "for fewer tokens"
    )
