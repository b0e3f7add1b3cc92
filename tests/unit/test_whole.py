"""Files and folders appear whole or not at all, whatever lies at the names they pass through."""

import contextlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from llmjax.batch.index import Index
from llmjax.batch.journal import Journal
from llmjax.errors import CheckpointError, RequestError, ResumeError
from llmjax.oracle.trace import Trace
from llmjax.outside.whole import locked, whole_file, whole_files, whole_folder, workspace, write_text, write_whole

# A writer that is killed in the middle: without a chance to clean up, as when a container goes.
KILLED = """
import os, signal, sys
from pathlib import Path
from llmjax.outside.whole import whole_folder
with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(b"x" * 100)
    print("writing", flush=True)
    {end}
"""


def killed(path, end="os.kill(os.getpid(), signal.SIGKILL)"):
    return subprocess.Popen([sys.executable, "-c", KILLED.format(end=end), path], stdout=subprocess.PIPE)


def names(folder):
    return sorted(os.listdir(folder))


def test_a_file_and_a_folder(tmp_path):
    with whole_file(tmp_path / "a" / "b" / "f") as place:
        place.write_bytes(b"new")
        assert not (tmp_path / "a" / "b" / "f").exists()
    with whole_folder(tmp_path / "d") as folder:
        (folder / "x").write_bytes(b"1")
        assert names(tmp_path / "a" / "b") == ["f"] and not (tmp_path / "d").exists()
    write_whole(tmp_path / "w", [b"one", b"two"])
    with whole_files(tmp_path / "d") as place:
        (place / "y").write_bytes(b"2")
    assert names(tmp_path) == ["a", "d", "w"] and names(tmp_path / "d") == ["x", "y"]
    assert (tmp_path / "w").read_bytes() == b"onetwo"
    mask = os.umask(0o022)
    os.umask(mask)
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "w").stat().st_mode & 0o777 == 0o666 & ~mask


def test_nothing_is_left_of_what_fails(tmp_path):
    for make in (whole_file, whole_folder, whole_files):
        with pytest.raises(KeyError), make(tmp_path / "new" / "parents" / "x"):
            raise KeyError
        with pytest.raises(CheckpointError, match=r"x: cannot write it: out of paper; nothing is left behind"):
            with make(tmp_path / "new" / "parents" / "x"):
                raise OSError(1, "out of paper")
    with pytest.raises(OSError, match="out of paper"):
        write_whole(tmp_path / "x", (_ for _ in [1] if _fail()))
    assert not names(tmp_path)


def _fail():
    raise OSError(1, "out of paper")


def test_what_is_there_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "full" / "of").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    for name, found in (("file", "exists"), ("full", "exists"), ("link", "exists as a"), ("dangling", "exists as a")):
        with pytest.raises(RequestError, match=f"{name}: {found}"), whole_folder(tmp_path / name, RequestError):
            raise AssertionError
    for name, found in (("full", "a directory"), ("pipe", "a device or a pipe")):
        with pytest.raises(CheckpointError, match=f"expected a file to write to, found {found}"):
            with whole_file(tmp_path / name):
                raise AssertionError
    with pytest.raises(CheckpointError, match="a path that ends in a name"), whole_file(tmp_path.__class__("/")):
        raise AssertionError
    with whole_folder(tmp_path / "empty") as folder:
        (folder / "x").touch()
    assert names(tmp_path / "empty") == ["x"] and (tmp_path / "file").read_bytes() == b"precious"
    with pytest.raises(RequestError, match="file: exists"):
        Trace({"x": np.zeros(1)}, {}).save(tmp_path / "file")


def test_a_link_is_replaced_and_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    for make in (lambda p: write_whole(p, [b"new"]), _write):
        (tmp_path / "out").symlink_to(precious)
        make(tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == b"new" and not (tmp_path / "out").is_symlink()
        assert precious.read_bytes() == b"precious"
        (tmp_path / "out").unlink()


def _write(path):
    with whole_file(path) as place:
        place.write_bytes(b"new")


def test_what_dead_writers_left_goes_and_what_living_ones_have_stays(tmp_path):
    dead = killed(tmp_path / "a")
    dead.communicate()
    assert dead.returncode == -signal.SIGKILL and len(names(tmp_path)) == 1
    living = killed(tmp_path / "b", "signal.pause()")
    living.stdout.readline()
    assert len(names(tmp_path)) == 1  # the dead one's is gone
    with workspace(tmp_path) as mine:
        write_whole(tmp_path / "c", [b"new"])
        assert mine.exists() and len(names(tmp_path)) == 3
    living.kill()
    living.communicate()
    (tmp_path / f".llmjax-{'0' * 16}.partial").mkdir()  # of one killed before it had a lock
    (tmp_path / f".llmjax-{'1' * 16}.partial").symlink_to(tmp_path / "user")
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "file").touch()
    (tmp_path / ".llmjax-mine.partial").mkdir()
    write_whole(tmp_path / "c", [b"newer"])
    assert names(tmp_path) == [f".llmjax-{'1' * 16}.partial", ".llmjax-mine.partial", "c", "user"]
    assert names(tmp_path / "user") == ["file"]


def test_a_file_system_without_locks_loses_nothing(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("llmjax.outside.whole.fcntl.flock", none)
    with workspace(tmp_path) as first, workspace(tmp_path) as second:
        assert first.exists() and second.exists()
    assert not names(tmp_path)


@pytest.mark.parametrize("kind", ["link", "dangling", "file", "pipe"])
def test_a_lock_is_never_made_of_what_is_there(tmp_path, kind):
    lock, precious = tmp_path / "out.lock", tmp_path / "precious"
    if kind in ("link", "dangling"):
        lock.symlink_to(precious)
    elif kind == "pipe":
        os.mkfifo(lock)
    if kind != "dangling":
        (lock if kind == "file" else precious).write_bytes(b"precious")
    with pytest.raises(ResumeError, match=r"out\.lock: a (link|file that is no lock), where"), locked(tmp_path / "out"):
        raise AssertionError
    assert os.path.lexists(lock) and precious.exists() == (kind in ("link", "pipe"))
    if kind in ("link", "file"):
        assert lock.read_bytes() == b"precious"


def test_a_lock_of_the_dead_is_taken_and_one_of_the_living_is_not(tmp_path):
    (tmp_path / "out.lock").write_bytes(b"12345")
    with locked(tmp_path / "out"):
        assert (tmp_path / "out.lock").read_text() == str(os.getpid())
        with pytest.raises(ResumeError, match=f"process {os.getpid()}"), locked(tmp_path / "out"):
            raise AssertionError
    assert not names(tmp_path)


def test_an_unfinished_gzip_is_not_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "out.gz.partial").symlink_to(tmp_path / "precious")
    with contextlib.closing(Index()) as index, pytest.raises(OSError, match="symbolic links"):
        Journal(tmp_path / "out.gz", index, lambda row: None, fresh=True)
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_text_that_names_a_path_of_other_bytes_than_utf_8(tmp_path):
    """A report of it, say."""
    write_text(tmp_path / "page", "é dump\udce4", RequestError)
    assert (tmp_path / "page").read_bytes() == "é dump\\udce4".encode()
