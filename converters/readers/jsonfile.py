"""JSON objects from files that nobody vouches for."""

import json
from pathlib import Path
from typing import Any

from llmjax.errors import CheckpointError, named


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is no such file.

    Raises:
      CheckpointError: it cannot be read, is no JSON object, or names a key twice.
    """
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``: an object whose keys differ.

    Raises:
      ValueError: a key is there twice.
    """
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{named(key)} is there twice")
        result[key] = value
    return result
