"""Files of a job: whole ones written at once; the lock of an output."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from llmjax.errors import RequestError, ResumeError


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file under another name, has it on the disk, and only then puts it in its place.

    Raises:
      OSError: what was at ``path`` is still there.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path)


def sync_folder(path: Path) -> None:
    """Has the name of a new file on the disk, too."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def send(stream: IO[bytes], data: bytes) -> None:
    """Writes all of ``data`` to a stream at once; one without a buffer may take less of it at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]
    stream.flush()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other jobs off ``path`` by ``path.lock``, which the system releases however this process ends.

    Raises:
      ResumeError: another job is writing there.
      OSError: the folder cannot be written to.
    """
    import fcntl  # not on Windows, where other verbs run

    lock = path.with_name(f"{path.name}.lock")
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(file, 32).decode(errors="replace").strip()
            os.close(file)
            raise ResumeError(f"{path}: another job is writing to it (process {owner or 'unknown'})") from None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(lock).st_ino == os.fstat(file).st_ino:
                break
        os.close(file)  # its owner ended, and removed it, between our two calls
    try:
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


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
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="llmjax-"))
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
