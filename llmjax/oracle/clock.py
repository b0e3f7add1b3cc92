"""How long a search may take, and what a user hears meanwhile."""

import time
from collections.abc import Callable

# Seconds without a word at most, as far as a step of the work is shorter.
_SILENT = 15.0


class Clock:
    """How long there is for a search.

    Args:
      seconds: 0 for no end.
    """

    def __init__(self, seconds: float):
        self._until = time.monotonic() + seconds if seconds else float("inf")

    @property
    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self._until - time.monotonic())


class Pulse:
    """Tells now and then how far a long work is.

    Args:
      tell: is given a line.
    """

    def __init__(self, tell: Callable[[str], None] = lambda line: None):
        self.tell, self._last = tell, time.monotonic()

    def __call__(self, line: Callable[[], str]) -> None:
        """A step is done; ``line`` says where that is."""
        if time.monotonic() - self._last >= _SILENT:
            self.tell(line())
            self._last = time.monotonic()
