"""The lines of a job's input, from a path, gzip or a pipe; what is no JSONL at all is told before anything runs."""

import contextlib
import gzip
import io
import json
import select
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from llmjax.batch.magic import binary_kind
from llmjax.batch.tables import SUFFIXES, TableLines, is_table
from llmjax.errors import RequestError, lfs_pointer, shown
from llmjax.outside.paths import checked_path
from llmjax.outside.urls import file_name, is_url, opened, shown_url

# Of the beginning, what is looked at to tell what an input is.
_SAMPLE = 1 << 16
# How long a quiet pipe is left alone before the job looks whether it was told to stop.
_SECONDS = 0.2
_EXPECTED = 'expected JSONL: UTF-8, an object such as {"prompt": "..."} on each line'
_TABLES = f" (the name of a table ends in {' or '.join(SUFFIXES)})"


class Lines:
    """The lines of an open file, gzip or not: from its beginning at each ``iter``, of a pipe only once.

    Bytes that are no UTF-8 must spoil their own row only: they pass as lone surrogates, which ``parse_object`` refuses.

    Attributes:
      repeatable: whether they can be read again.

    Raises:
      RequestError: the file is no JSONL, but of another kind.
    """

    def __init__(self, file: io.BufferedReader, path: str):
        self._file, self._path = file, path
        self.repeatable = file.seekable()
        self._begin = file.tell() if self.repeatable else 0
        begin = self._peek()
        # A pipe's name tells nothing, but no JSON begins with gzip's first byte.
        self._zipped = begin[:1] == b"\x1f" or file_name(path).endswith(".gz")
        if self._zipped:
            with contextlib.suppress(zlib.error):  # told where it is read
                begin = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(begin, _SAMPLE)
        if kind := _other_kind(begin):
            raise RequestError(f"{path}: this is {kind}; {_EXPECTED}{_TABLES}")

    def __iter__(self) -> Iterator[str]:
        """Raises RequestError where it cannot be read, or is damaged on the way."""
        try:
            if self.repeatable:
                self._file.seek(self._begin)
            data: Any = gzip.open(self._file) if self._zipped else self._file
            text = io.TextIOWrapper(data, encoding="utf-8", errors="surrogateescape", newline="\n")
            try:
                yield from _without_mark(text)
            finally:
                with contextlib.suppress(ValueError):  # the file may be closed by now
                    text.detach()  # or it would close the file
        except (EOFError, OSError, zlib.error) as error:
            message = f"{self._path}: cannot read on, the file is damaged or was cut short: {error}"
            raise RequestError(message) from None

    def count(self) -> int:
        """Those that are not blank."""
        return sum(1 for line in self if line.strip())

    def arriving(self, wait: Callable[[], bool]) -> Iterator[str | None]:
        """The lines as they come; None where a pipe has none at the moment and ``wait`` says that there is other work.

        Raises:
          RequestError: as ``iter``.
        """
        try:
            descriptor = -1 if self.repeatable or self._zipped else self._file.fileno()
        except OSError:  # not of the system's
            descriptor = -1
        return iter(self) if descriptor < 0 else _without_mark(self._from_pipe(descriptor, wait))

    def _from_pipe(self, descriptor: int, wait: Callable[[], bool]) -> Iterator[str | None]:
        data, begun = self._file.read1(_SAMPLE), [b""]  # what was looked at is in the buffer
        while data:
            *whole, rest = data.split(b"\n")
            for line in whole:
                yield b"".join([*begun, line, b"\n"]).decode("utf-8", "surrogateescape")
                begun = []
            begun.append(rest)
            while not select.select([descriptor], [], [], _SECONDS if wait() else 0)[0]:
                if not wait():
                    yield None
            try:
                data = self._file.read1(_SAMPLE)
            except OSError as error:
                raise RequestError(f"{self._path}: cannot read on: {error}") from None
        if last := b"".join(begun):
            yield last.decode("utf-8", "surrogateescape")

    def _peek(self) -> bytes:
        """The first bytes, which are still there to be read."""
        try:
            if not self.repeatable:
                return self._file.peek(1)
            begin = self._file.read(_SAMPLE)
            self._file.seek(self._begin)
        except OSError as error:
            raise RequestError(f"{self._path}: cannot read the input: {error.strerror or error}") from None
        return begin


def _without_mark(lines: Iterator[Any]) -> Iterator[Any]:
    """The lines without the byte order mark that some editors put at the beginning of a file."""
    for number, line in enumerate(lines):
        yield line.removeprefix("\ufeff") if number == 0 and line else line


def _other_kind(begin: bytes) -> str:
    """What a file is that does not begin as JSONL does; empty where it may be JSONL, if not in every line."""
    if kind := binary_kind(begin) or lfs_pointer(begin):
        return kind
    text = begin.decode("utf-8", "replace").removeprefix("\ufeff")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines or (len(lines) == 1 and len(begin) >= _SAMPLE):
        return ""
    first = _json(lines[0])
    if lines[0].startswith("["):
        objects = isinstance(first, list) and any(isinstance(row, dict) for row in first)
        return "one JSON array (jq -c '.[]' makes lines of it)" if objects or first is None else ""
    if lines[0] == "{":
        return "one JSON object over several lines (jq -c . makes one of it)"
    if first is not None or any(line.startswith("{") for line in lines[:5]):
        return ""
    for mark, kind in (("\t", "TSV"), (",", "CSV"), (";", "CSV")):
        if mark in lines[0]:
            return f"{kind}, whose first line is {shown(lines[0])}"
    return f"plain text or CSV, whose first line is {shown(lines[0])}"


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


AnyLines = Lines | TableLines


@contextlib.contextmanager
def open_lines(
    path: str, columns: Mapping[str, str] = MappingProxyType({}), keys: tuple[str, ...] = ()
) -> Iterator[AnyLines]:
    """The lines of a text file, a gzip one, a pipe, a URL, or stdin for ``-``; opened once: what was read of a pipe is
    gone.  Of a table, the lines that it stands for.

    Args:
      path: of the input.
      columns: see ``TableLines``.
      keys: see ``TableLines``.

    Raises:
      RequestError: it cannot be read, or is no JSONL.
    """
    if is_table(path):
        yield TableLines(path, columns, keys)
        return
    if columns:
        raise RequestError(
            f"{shown_url(path)}: columns are named, and it is no table: its name would end in {' or '.join(SUFFIXES)}"
        )
    if path == "-":
        if sys.stdin is None:
            raise RequestError("-: cannot read the input: stdin is closed")
        stdin: Any = getattr(sys.stdin, "buffer", None)
        if stdin is None:  # what stands for it, StringIO say, gives text alone
            stdin = io.BytesIO(sys.stdin.read().encode("utf-8", "surrogateescape"))
        yield Lines(stdin, path)
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(opened(path if is_url(path) else checked_path("input", path, RequestError)))
        except OSError as error:
            raise RequestError(f"{shown_url(path)}: cannot read the input: {error.strerror or error}") from None
        yield Lines(file, shown_url(path))
