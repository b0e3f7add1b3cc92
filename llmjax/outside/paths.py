"""One way to check a path from outside, before anything is done with it."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

from llmjax.errors import LlmjaxError, shown


def path_problem(path: Any) -> str:
    """Why no file can have this path, whether or not there is one, or what is there cannot be looked at; empty where
    neither is so."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or not os.fspath(path):
        return f"expected a path, found {shown(path)}"
    try:
        if stat.S_ISDIR(os.stat(path).st_mode) and not os.access(path, os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (FileNotFoundError, NotADirectoryError):  # told where it is opened, or made
        pass
    except PermissionError as error:  # of a folder; a file that may not be read can be looked at
        return f"{shown(os.fspath(path))} cannot be looked at: {error.strerror}"
    except (OSError, ValueError) as error:  # too long, in a circle; ValueError: NUL, or half a surrogate pair
        reason = getattr(error, "strerror", None) or error
        return f"no file can have the path {shown(os.fspath(path))}: {reason}"
    return ""


def checked_path(what: str, path: Any, error: type[LlmjaxError]) -> Path:
    """A path that a file may have.

    Args:
      what: takes it, for messages.
      path: from outside.
      error: to raise.

    Raises:
      LlmjaxError: as ``error`` says, see ``path_problem``.
    """
    if problem := path_problem(path):
        raise error(f"{what}: {problem}")
    return Path(path)
