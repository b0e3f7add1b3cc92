"""Files of a job: JSONL read from a path, gzip or stdin; the place that rows are written to."""

import contextlib
import gzip
import io
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llmjax.errors import RequestError
from llmjax.outside.whole import locked, workspace


class Lines:
    """The lines of an open file, gzip or not: from its beginning at each ``iter``, of a pipe only once.

    Bytes that are no UTF-8 must spoil their own row only: they pass as lone surrogates, which ``parse_object`` refuses.

    Attributes:
      repeatable: whether they can be read again.
    """

    def __init__(self, file: io.BufferedReader, path: str):
        self._file, self._path = file, path
        self.repeatable = file.seekable()
        self._begin = file.tell() if self.repeatable else 0

    def __iter__(self) -> Iterator[str]:
        """Raises RequestError where it cannot be read, or is damaged on the way."""
        try:
            # A pipe's name tells nothing, but no JSON begins with gzip's first byte.
            zipped = self._first() == b"\x1f" or self._path.endswith(".gz")
            data: Any = gzip.open(self._file) if zipped else self._file
            text = io.TextIOWrapper(data, encoding="utf-8", errors="surrogateescape", newline="\n")
            try:
                yield from text
            finally:
                with contextlib.suppress(ValueError):  # the file may be closed by now
                    text.detach()  # or it would close the file
        except (EOFError, OSError, zlib.error) as error:
            message = f"{self._path}: cannot read on, the file is damaged or was cut short: {error}"
            raise RequestError(message) from None

    def _first(self) -> bytes:
        """The first byte, which is still there to be read."""
        if not self.repeatable:
            return self._file.peek(1)[:1]
        self._file.seek(self._begin)
        first = self._file.read(1)
        self._file.seek(self._begin)
        return first


@contextlib.contextmanager
def open_lines(path: str) -> Iterator[Lines]:
    """The lines of a text file, a gzip one, a pipe, or stdin for ``-``; opened once: what was read of a pipe is gone.

    Raises:
      RequestError: it cannot be read.
    """
    if path == "-":
        if sys.stdin is None:
            raise RequestError("-: cannot read the input: stdin is closed")
        yield Lines(sys.stdin.buffer, path)  # type: ignore[arg-type]
        return
    try:
        file = open(path, "rb")
    except OSError as error:
        raise RequestError(f"{path}: cannot read the input: {error.strerror}") from None
    with file:
        yield Lines(file, path)


def send(stream: IO[bytes], data: bytes) -> None:
    """Writes all of ``data`` to a stream at once; one without a buffer may take less of it at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]
    stream.flush()


@contextlib.contextmanager
def claimed(output: str, source: str) -> Iterator[tuple[Path, IO[bytes] | None]]:
    """The path rows are written to, this job's alone, and the stream they are passed on to if the output is one.

    Raises:
      RequestError: it cannot be written to.
      ResumeError: another job does.
    """
    path = Path(output)
    with contextlib.ExitStack() as stack:
        try:
            if output == "-" or (path.exists() and not path.is_file() and not path.is_dir()):
                stream = sys.stdout.buffer if output == "-" else stack.enter_context(open(path, "wb", buffering=0))
                folder = stack.enter_context(workspace(Path(tempfile.gettempdir())))
                path = Path(folder, "rows.jsonl")
            else:
                stream = None
                if source != "-" and path.exists() and os.path.samefile(path, source):
                    raise RequestError(f"{path}: the output is the input file")
                if path.exists():
                    open(path, "ab").close()  # a directory, or no permission
                stack.enter_context(locked(path))
        except OSError as error:
            raise RequestError(f"{path}: cannot write the output: {error.strerror}") from None
        yield path, stream
