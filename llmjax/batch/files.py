"""Files of a job: the place that rows are written to, and its lock."""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from llmjax.errors import RequestError
from llmjax.outside.paths import checked_path
from llmjax.outside.urls import is_url
from llmjax.outside.whole import blamed, locked, made, workspace


def send(stream: IO[bytes], data: bytes) -> None:
    """Writes all of ``data`` to a stream at once; one without a buffer may take less of it at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]
    stream.flush()


class _Text(io.RawIOBase):
    """What stands for stdout and takes text alone, StringIO say, as a stream of UTF-8's bytes."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, data: Any) -> int:
        self._stream.write(bytes(data).decode())
        return len(data)

    def flush(self) -> None:
        self._stream.flush()


def _stdout() -> IO[bytes]:
    return getattr(sys.stdout, "buffer", None) or cast(IO[bytes], _Text(sys.stdout))


def check_apart(path: Path, source: str) -> None:
    """Raises RequestError where the output's path is the input's file."""
    if source != "-" and not is_url(source) and path.exists() and os.path.samefile(path, source):
        raise RequestError(f"{path}: the output is the input file")


@contextlib.contextmanager
def claimed(output: str, source: str) -> Iterator[tuple[Path, IO[bytes] | None]]:
    """The path rows are written to, this job's alone, and the stream they are passed on to if the output is one.

    Raises:
      RequestError: it cannot be written to.
      OutputError: the disk is full.
      ResumeError: another job does.
    """
    path = checked_path("output", output, RequestError)
    with contextlib.ExitStack() as stack:
        try:
            if output == "-" or (path.exists() and not path.is_file() and not path.is_dir()):
                stream = _stdout() if output == "-" else stack.enter_context(open(path, "wb", buffering=0))
                folder = stack.enter_context(workspace(Path(tempfile.gettempdir())))
                path = Path(folder, "rows.jsonl")
            else:
                stream = None
                check_apart(path, source)
                if path.exists():
                    open(path, "ab").close()  # a directory, or no permission
                stack.enter_context(made(path.absolute().parent))
                stack.enter_context(locked(path))
        except OSError as error:
            raise blamed(error, RequestError)(f"{path}: cannot write the output: {error.strerror}") from None
        yield path, stream
