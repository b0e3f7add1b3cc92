"""Files and folders that appear under their names when they are whole, and are gone when not; and the lock of a file.

All of it is written inside a private folder beside its place, ``.llmjax-*.partial``, whose name nobody can know before:
no link that lies there is followed, no file of the user's is met.  A writer holds a lock in its folder for as long as
it lives, whatever ends it, so the next one that writes beside it knows which folders are left of dead ones and removes
them.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmjax.errors import CheckpointError, LlmjaxError, OutputError, ResumeError, lies_at
from llmjax.outside.paths import checked_path

try:
    import fcntl
except ImportError:  # on Windows nothing tells the dead from the living, so nothing is removed
    fcntl = None  # type: ignore[assignment]

_NAME = re.compile(r"\.llmjax-[0-9a-f]{16}\.partial")
_LOCK = ".lock-of-llmjax"
# What a lock file of ours holds: the number of a process, or nothing yet.
_OWNER = re.compile(rb"\d{0,20}\s*")
# What the system says of a disk that is full, or broken: nothing is wrong with the place that was named.
_FAILED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
# Flags that open no link, and wait for no pipe.
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def blamed(raised: OSError, error: type[LlmjaxError]) -> type[LlmjaxError]:
    """``error``, which says that an output's path is wrong; but OutputError where the path is not to blame."""
    return OutputError if raised.errno in _FAILED else error


def make_folder(folder: Path, error: type[LlmjaxError]) -> None:
    """Makes a folder where there is none.

    Raises:
      LlmjaxError: as ``error`` says, it cannot be made, or is something else.
      OutputError: the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as raised:
        found = f"expected a directory, found {lies_at(folder)}"
        why = found if folder.exists() else f"cannot be made: {raised.strerror}"
        raise blamed(raised, error)(f"{folder}: {why}") from None


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Makes a folder where there is none, and removes it at the end where nothing came into it.

    Raises:
      OSError: it cannot be made, or is something else.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # it is there, and no folder
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()


@contextlib.contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A new private folder inside ``folder``, which is made where there is none; it is removed at the end.

    Raises:
      OSError: ``folder`` cannot be written to.
    """
    with made(folder):
        _remove_dead(folder)
        space, lock = _begin(folder)
        try:
            yield space
        finally:
            with contextlib.suppress(OSError):
                _remove(space)
            os.close(lock)


def _begin(folder: Path) -> tuple[Path, int]:
    """A new private folder, and its lock, which is held while the file is open."""
    while True:
        space = folder / f".llmjax-{secrets.token_hex(8)}.partial"
        space.mkdir(0o700)
        try:
            lock = os.open(space / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK, 0o600)
        except FileNotFoundError:
            continue  # another took it for a dead one's before it had a lock
        try:
            _lock(lock)
            os.stat(space / _LOCK)
            return space, lock
        except (BlockingIOError, FileNotFoundError):
            os.close(lock)
        except OSError:  # a file system without locks: then none is taken for dead
            return space, lock


def _lock(file: int) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_dead(folder: Path) -> None:
    if fcntl is None:
        return
    for entry in list(os.scandir(folder)):
        if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(OSError):  # it lives, or is another user's
                _remove_one_dead(folder / entry.name)


def _remove_one_dead(space: Path) -> None:
    try:
        lock = os.open(space / _LOCK, os.O_RDWR | NO_LINK)
    except FileNotFoundError:
        space.rmdir()  # which an empty folder alone allows
        return
    try:
        _lock(lock)
        _remove(space)
    finally:
        os.close(lock)


def _remove(space: Path) -> None:
    """The lock goes last: where this is interrupted, the rest is still known for a dead one's."""
    for entry in list(os.scandir(space)):
        if entry.name == _LOCK:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)
    (space / _LOCK).unlink(missing_ok=True)
    space.rmdir()


@contextlib.contextmanager
def whole_file(path: Path, error: type[LlmjaxError] = CheckpointError, *, new: bool = False) -> Iterator[Path]:
    """Where to write a file that then takes the name ``path``; one that is there is replaced, and so is a link.

    Args:
      path: of the file.
      error: to raise.
      new: refuse one that is there by then: another process may have been quicker.

    Raises:
      LlmjaxError: as ``error`` says: it cannot be written; what was at ``path`` is still there.
      OutputError: the disk is full; likewise.
    """
    with _told(path, error):
        target = _absolute(path)
        expect_file(target, error)
        with _replacing(target) as place:
            yield place
            if new:
                expect_new(path)


@contextlib.contextmanager
def whole_folder(path: Path, error: type[LlmjaxError] = CheckpointError) -> Iterator[Path]:
    """A folder that takes the name ``path`` when all has been written.

    Args:
      path: new, or an empty folder.
      error: to raise.

    Raises:
      LlmjaxError: as ``error`` says: it exists, or cannot be written; nothing is left behind.
      OutputError: the disk is full; likewise.
    """
    with _told(path, error):
        path = _absolute(path)
        expect_room(path, error)
        with _replacing(path) as place:
            place.mkdir()
            yield place


@contextlib.contextmanager
def whole_files(folder: Path, error: type[LlmjaxError] = CheckpointError) -> Iterator[Path]:
    """Where to write files that then move into ``folder``, beside what is there.

    Args:
      folder: which is made where there is none.
      error: to raise.

    Raises:
      LlmjaxError: as ``error`` says: they cannot be written; nothing is left behind.
      OutputError: the disk is full; likewise.
    """
    with _told(folder, error), workspace(_absolute(folder)) as space:
        place = space / "files"
        place.mkdir()
        yield place
        _to_disk(place)
        for file in sorted(place.iterdir()):
            os.replace(file, folder / file.name)
        sync_folder(folder)


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file from its parts.

    Raises:
      OSError: what was at ``path`` is still there.
    """
    with _replacing(_absolute(path)) as place, open(place, "xb") as file:
        for part in parts:
            file.write(part)


def write_text(path: str | Path, text: str, error: type[LlmjaxError]) -> None:
    """Writes a text to a file, which appears when it is whole, or to a device or a pipe.  Half a surrogate pair, as a
    path has it for a byte that is no UTF-8, is written as an escape.

    Raises:
      LlmjaxError: as ``error`` says: it cannot be written.
      OutputError: the disk is full.
    """
    place = checked_path("output", path, error)
    if place.exists() and not place.is_file() and not place.is_dir():
        with _told(place, error):
            place.write_text(text, encoding="utf-8", errors="backslashreplace")
        return
    with whole_file(place, error) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def expect_file(path: Path, error: type[LlmjaxError]) -> None:
    """Raises ``error`` where ``path`` is something that no file can take the place of: to be told before long work."""
    if path.exists() and not path.is_file():
        raise error(f"{path}: expected a file to write to, found {_kind(path)}")


def expect_room(path: Path, error: type[LlmjaxError]) -> None:
    """Raises ``error`` where ``path`` is not that of a new folder, or an empty one: to be told before long work."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        link = " as a link" if path.is_symlink() else ""
        raise error(f"{path}: exists{link}; expected a new directory, or an empty one")


def expect_new(path: Path) -> None:
    """Raises CheckpointError where there is something at ``path``, be it a link to nothing."""
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: exists; expected a new file")


@contextlib.contextmanager
def _told(path: Path, error: type[LlmjaxError]) -> Iterator[None]:
    checked_path("output", path, error)
    try:
        yield
    except OSError as raised:
        reason = raised.strerror or str(raised)
        raise blamed(raised, error)(f"{path}: cannot write it: {reason}; nothing is left behind") from None


def _absolute(path: Path) -> Path:
    found = Path(os.path.abspath(path))
    if not found.name:
        raise OSError(f"expected a path that ends in a name, found {str(path)!r}")
    return found


def _kind(path: Path) -> str:
    return "a directory" if path.is_dir() else "a device or a pipe"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    with workspace(path.parent) as space:
        place = space / path.name
        yield place
        _to_disk(place)
        os.replace(place, path)
        sync_folder(path.parent)


def _to_disk(path: Path) -> None:
    """Has a file, or a folder and all in it, on the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            _to_disk(inner)
        sync_folder(path)
        return
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Has the names of new files in it on the disk, too."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other jobs off ``path`` by ``path.lock``, which the system releases however this process ends.

    Raises:
      ResumeError: another job is writing there, or the lock's name is taken by something that is none.
      OSError: the folder cannot be written to.
    """
    lock = path.with_name(f"{path.name}.lock")
    while True:
        if lock.is_symlink():
            raise ResumeError(f"{lock}: a link, where a lock is to be made; remove it, or name another output")
        file = os.open(lock, os.O_RDWR | os.O_CREAT | NO_LINK, 0o644)
        try:
            _lock(file)
            if not stat.S_ISREG(os.fstat(file).st_mode) or not _OWNER.fullmatch(os.pread(file, 32, 0)):
                raise ResumeError(
                    f"{lock}: a file that is no lock, where one is to be made; move it away, or name another output"
                )
            with contextlib.suppress(FileNotFoundError):
                if os.stat(lock).st_ino == os.fstat(file).st_ino:
                    break
        except BlockingIOError:
            owner = os.read(file, 32).decode(errors="replace").strip()
            os.close(file)
            raise ResumeError(f"{path}: another job is writing to it (process {owner or 'unknown'})") from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its owner ended, and removed it, between our two calls
    try:
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)
