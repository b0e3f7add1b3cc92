"""Text as it grows token by token, never half a UTF-8 character."""

from collections.abc import Callable, Sequence

# An unfinished character is at most three bytes; byte-fallback pieces are one byte a token.  A longer run of replacement
# characters is damage, not something still to come.
_MAX_PENDING = 4


class IncrementalDetokenizer:
    """Decodes a growing list of ids; what it has given out never changes.

    Only the ids since the last settled point are decoded again, with the settled ones before them as context (a
    SentencePiece decoder strips the first space of what it is given).

    Args:
      decode: ids to text, special tokens skipped.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # where decoding begins
        self._settled = 0  # ids whose text has been given out

    def push(self, token: int) -> str:
        """Takes the next id and returns the text that is now certain."""
        self._ids.append(token)
        before, now = self._texts()
        if now.endswith("\ufffd") and len(self._ids) - self._settled < _MAX_PENDING:
            return ""
        if len(now) <= len(before):
            return ""
        self._context, self._settled = self._settled, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """The text of what is left, complete or not."""
        before, now = self._texts()
        self._context = self._settled = len(self._ids)
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        window = self._ids[self._context :]
        return self._decode(window[: self._settled - self._context]), self._decode(window)
