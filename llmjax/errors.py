"""Every error llmjax raises for a user's mistake or a bad file.

A message names the file, the thing, what was expected, what was found and the likely fix.  The command line prints the
message alone and exits with 2 (bad input) or 1 (the work failed); a traceback means a bug in llmjax.
"""

import os
import stat
from typing import Any

# Of a message, whatever names and values of a file are in it.
_MOST_LINES, _MOST_CHARACTERS = 100, 2000
# What is left of a longer line: what it is about, and what is wrong.
_BEGIN, _END = 1500, 500


def shown(value: Any) -> str:
    """A value in a message: its beginning, whatever it is."""
    if isinstance(value, str | bytes | list | tuple):
        value = value[:100]
    elif hasattr(value, "tolist"):  # NumPy's
        value = value[:100].tolist() if getattr(value, "ndim", 0) else value.tolist()
    try:
        text = repr(value)
    except Exception:  # an integer of too many digits, lists nested too deeply
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def amount(count: int, what: str) -> str:
    """So many of a thing in a message: ``1 row``, ``2,000 rows``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def named(name: str) -> str:
    """A name from outside in a message or a table: one line, at most 100 characters, none that controls a terminal."""
    return _escaped(name if len(name) <= 100 else f"{name[:100]}...")


def printable(text: str) -> str:
    """A text of several lines in which what controls a terminal, or reorders a line, is written as an escape."""
    return "\n".join(map(_escaped, text.split("\n")))


def _escaped(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def lfs_pointer(begin: bytes) -> str:
    """What is to be said of a file that holds where git-lfs keeps it instead of what it should; empty for any other."""
    if not begin.startswith(b"version https://git-lfs.github.com/spec/"):
        return ""
    return "a git-lfs pointer, not the file itself; fetch that with git lfs pull"


def lies_at(path: str | os.PathLike[str]) -> str:
    """What is to be said of what lies at a path where something else was expected."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        is_link = os.path.islink(path)
        return f"a link to {shown(os.readlink(path))}, which is not there" if is_link else "no such file or directory"
    except (OSError, ValueError) as error:
        return f"cannot be looked at: {getattr(error, 'strerror', None) or error}"
    if stat.S_ISFIFO(mode):
        return "a pipe, which is read but once, from its beginning to its end; write what comes from it to a file first"
    kinds = ((stat.S_ISREG, "a file"), (stat.S_ISDIR, "a directory"), (stat.S_ISSOCK, "a socket"))
    return next((text for is_it, text in kinds if is_it(mode)), "a device")


class LlmjaxError(Exception):
    """Base class: catch this to catch everything llmjax reports on purpose.

    Whatever a file or a row puts into a message, the message can be printed, and is no longer than one can read.

    Args:
      message: what the error says.
    """

    def __init__(self, message: str = ""):
        lines = message.split("\n")
        short = [line if len(line) <= _MOST_CHARACTERS else f"{line[:_BEGIN]} ... {line[-_END:]}" for line in lines]
        more = [f"  ... and {len(lines) - _MOST_LINES} lines more"] if len(lines) > _MOST_LINES else []
        super().__init__(printable("\n".join(short[:_MOST_LINES] + more)))


class CheckpointError(LlmjaxError):
    """A model file is missing, damaged, or holds something llmjax does not read."""


class ConfigError(LlmjaxError):
    """A model configuration asks for something llmjax does not do, or contradicts its tensors."""


class TokenizerError(LlmjaxError):
    """Tokenizer or chat-template files are missing, damaged, or of an unknown kind."""


class LoraError(LlmjaxError):
    """A LoRA adapter is damaged or does not fit the model."""


class RequestError(LlmjaxError):
    """A prompt or a sampling parameter is invalid."""


class TooLongError(RequestError):
    """A prompt does not fit the model's context."""


class OutputError(LlmjaxError):
    """Results could not be written, or not all of them."""


class NoRoomError(RequestError):
    """A prompt and its answer do not fit the memory that may be used."""


class ResumeError(LlmjaxError):
    """A batch job cannot go on from what its output holds."""


class TrainingError(LlmjaxError):
    """Training cannot go on: a loss or a gradient is not finite, or there is nothing to learn from."""
