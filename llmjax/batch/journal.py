"""The output of a job: rows are only ever appended, so that whatever ends the job leaves whole rows behind."""

import contextlib
import gzip
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmjax.batch.index import Index, Written
from llmjax.errors import ResumeError
from llmjax.outside.whole import NO_LINK, sync_folder, write_whole

# Rows reach the system at once, so killing the process loses none; power loss costs the rows of this many seconds.
SYNC_SECONDS = 1.0
_PIECE = 1 << 20


class Journal:
    """The rows of an output file, open for more.

    A row that answers a changed line is appended like any other and supersedes the earlier one; ``finish`` removes what
    was superseded.  A gzip output is written as plain text, ``OUT.gz.partial``, until it is finished.

    Args:
      path: the output.
      index: filled with the rows that are there.
      describe: an output row's place in the index; None for JSON that no job wrote.
      fresh: start over.

    Attributes:
      lines: in the file, superseded and damaged ones included.

    Raises:
      ResumeError: a gzip output is damaged.
      OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, index: Index, describe: Callable[[Any], Written | None], *, fresh: bool = False):
        self.path, self._index = path, index
        self._place = Path(os.path.realpath(path))  # rows go through a link, so what is made of them at the end does
        self._zipped = path.suffix == ".gz"
        self.partial = path.with_name(f"{path.name}.partial") if self._zipped else path
        if self._zipped and path.exists() and not fresh and not self.partial.exists():
            write_whole(self.partial, _expanded(path))
        # An output that is a link is as the user named it; the name beside it is ours.
        flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0) | (NO_LINK if self._zipped else 0)
        self._file = os.open(self.partial, flags, 0o644)
        sync_folder(self.partial.parent)
        self.lines = self._end = 0
        self._lock = threading.Lock()
        self._unsynced, self._synced = False, time.monotonic()
        self._broken: OSError | None = None
        self._recover(describe)
        self._safe = self._end  # on the disk is what comes before

    def _recover(self, describe: Callable[[Any], Written | None]) -> None:
        """Reads what is there; an unfinished last line goes, and a damaged one is passed over."""
        with open(self._file, "rb", closefd=False) as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    row = describe(json.loads(line))
                except (ValueError, RecursionError):  # power loss can leave zeros
                    row = None
                if row is not None:
                    self._index.put(row, self._end, len(line))
                self.lines += 1
                self._end += len(line)
        if os.fstat(self._file).st_size > self._end:
            os.ftruncate(self._file, self._end)

    def append(self, row: Written, text: bytes, line: int) -> None:
        """Writes a row, an answer to this line of the input.

        Raises:
          OSError: it could not be written, and nothing of it was.
        """
        self.sync(SYNC_SECONDS)
        try:
            done = 0
            while done < len(text):
                done += os.pwrite(self._file, text[done:], self._end + done)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._index.put(row, self._end, len(text), line)
        self._end += len(text)
        self.lines += 1
        self._unsynced = True

    def sync(self, seconds: float = 0.0) -> None:
        """Has the rows on the disk, if the last time was at least this long ago.

        Raises:
          OSError: it failed, now or before: the system tells but once, and to whichever thread asks.
        """
        with self._lock:
            if self._broken is not None:
                raise self._broken
            if self._unsynced and time.monotonic() - self._synced >= seconds:
                self._unsynced, end = False, self._end
                try:
                    os.fsync(self._file)
                except OSError as error:
                    self._broken = error
                    raise
                self._safe, self._synced = end, time.monotonic()

    def finish(self, *, ordered: bool) -> bool:
        """Leaves the file with one row for each of the input, in its order if asked for.

        Returns:
          whether rows were removed; the file with them is then kept as ``OUT.previous``.

        Raises:
          OSError: the rows are still where they were.
        """
        self.sync()
        kept = self._index.totals(everything=False).rows
        order = "line" if ordered else "start"
        if kept < self.lines:
            previous = self.path.with_name(f"{self.path.name}.previous")
            previous.unlink(missing_ok=True)
            try:
                os.link(self.partial if self._zipped else self._place, previous)
            except OSError:  # not every file system has links
                write_whole(previous, _pieces(self.partial))
        if self._zipped:
            write_whole(self._place, _compressed(self._read(order)))
            self.partial.unlink()
        elif kept < self.lines or not self._is_sorted(order):
            write_whole(self._place, self._read(order))
        return kept < self.lines

    def rows(self, *, ordered: bool) -> Iterator[bytes]:
        """The rows that are kept."""
        return self._read("line" if ordered else "start")

    def failed(self, count: int) -> list[bytes]:
        """The first rows of the input that failed."""
        return [os.pread(self._file, size, start) for start, size in self._index.failed(count)]

    def _is_sorted(self, order: str) -> bool:
        before = -1
        for start, _ in self._index.places(order):
            if start < before:
                return False
            before = start
        return True

    def _read(self, order: str) -> Iterator[bytes]:
        for start, size in self._index.places(order):
            yield os.pread(self._file, size, start)

    def close(self) -> None:
        """Has the rows on the disk and lets go of the file.

        Raises:
          OSError: the rows that may not be there are in neither the file nor the index.
        """
        try:
            self.sync()
        except OSError:
            self._index.forget(self._safe)
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._safe)
            raise
        finally:
            os.close(self._file)


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from iter(lambda: file.read(_PIECE), b"")


def _expanded(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as file:
            yield from iter(lambda: file.read(_PIECE), b"")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ResumeError(f"{path}: damaged: {error}; remove it, or start over with --force") from None


def _compressed(parts: Iterator[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)  # gzip with no time in its header
    for part in parts:
        yield packer.compress(part)
    yield packer.flush()
