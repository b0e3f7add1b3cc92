"""The lines of a file of training data, as objects."""

import gzip
import zlib
from pathlib import Path
from typing import Any

from converters.readers.jsonfile import parse_json
from llmjax.errors import RequestError, lfs_pointer
from llmjax.outside.paths import checked_path

BLANK = object()  # a line without a row: rows are known by the numbers of their lines


def read_rows(path: str | Path) -> list[Any]:
    """The lines of a JSONL file, packed by gzip or not; one that is no JSON becomes the error that says so.

    Raises:
      RequestError: the file cannot be read.
    """
    path = checked_path("rows", path, RequestError)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path}: cannot read the file: {getattr(error, 'strerror', None) or error}") from None
    if pointer := lfs_pointer(data):
        raise RequestError(f"{path}: {pointer}")
    return [_parsed(line) if line.strip() else BLANK for line in text.split("\n")]


def _parsed(line: str) -> Any:
    try:
        return parse_json(line)
    except (ValueError, RecursionError) as error:
        return RequestError(f"not valid JSON: {error}")
