"""Which pages of the cache hold which slot's tokens; rows that begin alike share the pages they have in common."""

import numpy as np


class Pages:
    """Page 0 is nobody's: it stays zero, and stands where a slot has none.

    Args:
      slots: how many.
      page: positions in one.

    Attributes:
      table: int32 ``[slots, N]``, each slot's pages in the order of its positions.
      total: pages there are.
    """

    def __init__(self, slots: int, page: int):
        self._page = page
        self.table = np.zeros((slots, 0), np.int32)
        self.total = 1
        self._uses = np.ones(1, np.int32)
        self._free: list[int] = []
        self._counts = np.zeros(slots, np.int32)

    def grow(self, pages: int, length: int) -> None:
        """To so many pages, and slots of up to ``length`` positions."""
        if (pages, self.needed(length)) == (self.total, self.table.shape[1]):
            return
        self._free += range(self.total, pages)
        self.total = pages
        self._uses = np.pad(self._uses, (0, pages - len(self._uses)))
        self.table = np.pad(self.table, ((0, 0), (0, self.needed(length) - self.table.shape[1])))

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self._page)

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    def held(self, slot: int) -> int:
        """Pages that a slot has."""
        return int(self._counts[slot])

    def give(self, slot: int, count: int) -> None:
        """Makes it ``count`` pages, if it has fewer; so many must be free."""
        for place in range(self.held(slot), count):
            self.table[slot, place] = number = self._free.pop()
            self._uses[number] = 1
            self._counts[slot] = place + 1

    def keep(self, slot: int, count: int) -> None:
        """Takes the pages behind the first ``count``."""
        for place in range(count, self.held(slot)):
            number = int(self.table[slot, place])
            self.table[slot, place] = 0
            self._uses[number] -= 1
            if not self._uses[number]:
                self._free.append(number)
        self._counts[slot] = min(count, self.held(slot))

    def lend(self, source: int, slot: int, tokens: int) -> tuple[int, int]:
        """Leaves a slot with the first ``tokens`` of another's, or of its own; one page must be free.

        Returns:
          the page to copy, and where to: a page that the slot will write to must be its own.  (0, 0) for none.
        """
        whole, part = divmod(tokens, self._page)
        numbers = self.table[source, : whole + 1].tolist()
        if slot != source:
            self.keep(slot, 0)
            self.table[slot, :whole] = numbers[:whole]
            self._uses[numbers[:whole]] += 1
            self._counts[slot] = whole
        elif part and self._uses[numbers[whole]] == 1:
            self.keep(slot, whole + 1)
            return 0, 0
        else:
            self.keep(slot, whole)
        if not part:
            return 0, 0
        self.give(slot, whole + 1)
        return numbers[whole], int(self.table[slot, whole])
