"""SHA-256 of files, all bytes, each read once: what a file was is remembered in the user's cache folder."""

import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

# Of the cache file: it is one of the user's, but nobody vouches for it.
_MOST_ENTRIES, _MOST_BYTES = 1000, 1 << 20
# A file written twice within a tick of the file system's clock shows no change: so young a one is not remembered.
_TICK = 0.1


class Stamp(NamedTuple):
    """A file as it was: what changes when its bytes do."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int


def stamp(path: Path, file: int | None = None) -> Stamp:
    """A file as it is.

    Args:
      path: of the file.
      file: its descriptor, where it is open.

    Raises:
      OSError: there is none.
    """
    s = os.stat(path if file is None else file)
    return Stamp(os.path.abspath(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev)


def sha256(files: Sequence[Stamp]) -> str | None:
    """Of one file its SHA-256 in hex; of several that of the lines ``sha256sum`` prints of their names, in the order of
    names: what ``sha256sum *.safetensors *.index.json | sha256sum`` says.  None where a file has changed or is gone.
    """
    known = _remembered()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda file: known.get(file) or _read(file), files))
    if None in found:
        return None
    fresh = {file: str(sha) for file, sha in zip(files, found, strict=True) if file not in known}
    if fresh:
        _remember(fresh)
    if len(found) == 1:
        return found[0]
    lines = sorted((os.path.basename(file.path), sha) for file, sha in zip(files, found, strict=True))
    return hashlib.sha256("".join(f"{sha}  {name}\n" for name, sha in lines).encode("utf-8", "replace")).hexdigest()


def _read(file: Stamp) -> str | None:
    try:
        with open(file.path, "rb") as opened:
            if stamp(Path(file.path), opened.fileno()) != file:
                return None
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            return digest if stamp(Path(file.path), opened.fileno()) == file else None
    except OSError:
        return None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmjax" / "sha256.json"


def _remembered() -> dict[Stamp, str]:
    """What the cache file says, and is what this module writes: anything else is passed over, and read anew.

    A stamp of a file that has changed since is never asked for.
    """
    try:
        path = _cache()
        info = path.stat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > _MOST_BYTES:
            return {}
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError, RuntimeError):  # RuntimeError: a user without a home
        return {}
    return {Stamp(*e[:-1]): e[-1] for e in entries if _is_entry(e)} if isinstance(entries, list) else {}


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and [type(value) for value in entry] == [str, int, int, int, int, int, str]
        and re.fullmatch("[0-9a-f]{64}", entry[-1]) is not None
    )


def _remember(fresh: dict[Stamp, str]) -> None:
    """Adds to the cache file, in one go; what another process adds at the same moment may be lost, and is read anew."""
    now = time.time_ns()
    kept = _remembered() | {file: sha for file, sha in fresh.items() if now - file.ctime_ns > _TICK * 1e9}
    entries = [[*file, sha] for file, sha in kept.items()][-_MOST_ENTRIES:]
    with contextlib.suppress(OSError, RuntimeError):
        path = _cache()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".sha256.")
        try:
            with open(handle, "w", encoding="ascii") as file:
                json.dump(entries, file, separators=(",", ":"))
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
