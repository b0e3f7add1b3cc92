"""JSON objects from files that nobody vouches for."""

import collections
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmjax.errors import CheckpointError, lfs_pointer, lies_at, named

# Half a pair, or the escape of one.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
# Far above any model's: a hostile file must not cost minutes, or many times its size in memory.
_MOST_BYTES, _MOST_VALUES = 1 << 25, 1 << 21


def parse_json(data: str | bytes, constant: Callable[[str], Any] | None = None) -> Any:
    """A JSON value.

    Args:
      data: text, or its bytes.
      constant: what to make of NaN and Infinity, which are no JSON; None for floats.

    Raises:
      ValueError: it is none, holds more values than any model's files or half a surrogate pair, or an object names a
        key twice.
      RecursionError: it is nested too deeply.
    """
    text = data if isinstance(data, str) else data.decode(json.detect_encoding(data), "surrogatepass")
    count = sum(map(text.count, ",{["))
    if count > _MOST_VALUES:
        raise ValueError(f"expected at most {_MOST_VALUES:,} values, found {count:,}")
    value = json.loads(text, object_pairs_hook=unique_keys, parse_constant=constant)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string holds half a surrogate pair, which no UTF-8 text has") from None
    return value


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is no such file.

    Raises:
      CheckpointError: it cannot be read, is no JSON object, or names a key twice.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, expected at most {_MOST_BYTES:,}")
        data = path.read_bytes()
        if pointer := lfs_pointer(data):
            raise CheckpointError(f"{path}: {pointer}")
        value = parse_json(data)
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path}: {lies_at(path)}; download it again") from None
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
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{named(twice)} is there twice")
    return result
