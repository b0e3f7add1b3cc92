"""Regular expressions that an adapter's or a dump's file brings along: matched as ``re`` would, but not for ever."""

import re
import time
import warnings

import regex  # type: ignore[import-untyped]

from llmjax.errors import LlmjaxError, LoraError, shown

# For all names together; honest ones take milliseconds.
_SECONDS = 1.0
_MOST_CHARACTERS = 10_000


def is_regex(text: object) -> bool:
    """Whether a value is a regular expression, of a length that one may have."""
    if not isinstance(text, str) or len(text) > _MOST_CHARACTERS:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(text)  # PEFT's
            regex.compile(text)
    except Exception:  # re.error, and RecursionError, OverflowError, ... of others that are none
        return False
    return True


class Matcher:
    """Matches names, and gives up where an expression backtracks for ever.

    Args:
      error: to raise.
    """

    def __init__(self, error: type[LlmjaxError] = LoraError) -> None:
        self._left, self._error = _SECONDS, error

    def match(self, pattern: str, name: str, *, whole: bool = False) -> "regex.Match[str] | None":
        """See ``re.match`` and, for the ``whole`` name, ``re.fullmatch``.

        Raises:
          LlmjaxError: as ``error`` says: it takes too long, or means nothing where it stands.
        """
        began = time.monotonic()
        try:
            if self._left <= 0:
                raise TimeoutError
            return (regex.fullmatch if whole else regex.match)(pattern, name, timeout=self._left)
        except regex.error as error:
            raise self._error(f"the regular expression {shown(pattern)} cannot be used: {error}") from None
        except TimeoutError:
            raise self._error(
                f"the regular expression {shown(pattern)} takes too long to match names; write it without "
                "repetitions inside of repetitions"
            ) from None
        finally:
            self._left -= time.monotonic() - began
