"""Hashes of files: those of sha256sum, read once, and never those of a file that has changed."""

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from converters.readers import digest
from converters.readers.digest import sha256, stamp


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "_TICK", -1)  # files of this very moment are remembered, too
    return tmp_path / "cache" / "llmjax" / "sha256.json"


@pytest.fixture
def read(monkeypatch):
    """Names of the files that are read from here on."""
    names, original = [], digest._read
    monkeypatch.setattr(digest, "_read", lambda file: names.append(Path(file.path).name) or original(file))
    return names


def write(path, data=b"abc"):
    path.write_bytes(data)
    return path


def of(data):
    return hashlib.sha256(data).hexdigest()


def test_what_sha256sum_says(cache, tmp_path):
    b, a = write(tmp_path / "b.bin", b"b" * 300_000), write(tmp_path / "a.json", b"{}")
    assert sha256([stamp(b)]) == of(b"b" * 300_000)
    # sha256sum a.json b.bin | sha256sum
    lines = f"{of(b'{}')}  a.json\n{of(b'b' * 300_000)}  b.bin\n"
    assert sha256([stamp(b), stamp(a)]) == sha256([stamp(a), stamp(b)]) == of(lines.encode())


def test_a_file_is_read_once(cache, read, tmp_path):
    files = [stamp(write(tmp_path / name)) for name in ("a", "b")]
    first = sha256(files)
    assert sorted(read) == ["a", "b"]
    assert sha256(files) == first and len(read) == 2
    write(tmp_path / "b", b"abd")
    assert sha256([stamp(tmp_path / "a"), stamp(tmp_path / "b")]) != first and read[2:] == ["b"]


def test_a_file_that_changed_since_it_was_opened(cache, tmp_path):
    path = write(tmp_path / "a")
    opened = stamp(path)
    os.utime(path, ns=(opened.mtime_ns + 10**9,) * 2)
    assert sha256([opened]) is None
    path.unlink()
    assert sha256([opened]) is None


def test_the_time_set_back_is_seen(cache, tmp_path):
    """As ``rsync --inplace --times`` does it: the same path, size, inode and time of change."""
    path = write(tmp_path / "a")
    before = stamp(path)
    assert sha256([before]) == of(b"abc")
    with open(path, "r+b") as file:
        file.write(b"xyz")
    os.utime(path, ns=(before.mtime_ns,) * 2)
    after = stamp(path)
    assert after[:3] == before[:3] and after.inode == before.inode
    assert sha256([after]) == of(b"xyz")


def test_a_file_of_this_moment_is_not_remembered(cache, read, tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "_TICK", 60)
    file = stamp(write(tmp_path / "a"))
    assert sha256([file]) == sha256([file]) == of(b"abc") and read == ["a", "a"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{}",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'["a", 1, [], [1, 2, 3, 4, 5, 6, 7], {"a": 1}]',
        b"[" + b'"x",' * 400_000 + b'"x"]',
    ],
)
def test_a_cache_file_of_anybodys(cache, tmp_path, content):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    file = stamp(write(tmp_path / "a"))
    assert sha256([file]) == of(b"abc")
    assert json.loads(cache.read_bytes()) == [[*file, of(b"abc")]]


def test_entries_that_are_no_hashes(cache, tmp_path):
    file = stamp(write(tmp_path / "a"))
    cache.parent.mkdir(parents=True)
    for wrong in ("x" * 64, "0" * 63, "0" * 64 + "\n", None, 5, ["0" * 64]):
        cache.write_text(json.dumps([[*file, wrong]]))
        assert sha256([file]) == of(b"abc")
    cache.write_text(json.dumps([[*map(float, file[1:]), "0" * 64], [*file[:-1], True, "0" * 64]]))
    assert sha256([file]) == of(b"abc")


def test_a_cache_that_cannot_be_used(tmp_path, monkeypatch):
    file = stamp(write(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file")))
    assert sha256([file]) == of(b"abc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "folder"))
    (tmp_path / "folder" / "llmjax" / "sha256.json").mkdir(parents=True)
    assert sha256([file]) == of(b"abc")
    (tmp_path / "folder" / "llmjax" / "sha256.json").rmdir()
    os.mkfifo(tmp_path / "folder" / "llmjax" / "sha256.json")  # opening it would wait for ever
    assert sha256([file]) == of(b"abc")


def test_many_at_once_and_no_more_than_it_holds(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "_MOST_ENTRIES", 20)
    files = [stamp(write(tmp_path / f"{i}", b"%d" % i)) for i in range(40)]
    wrong = []

    def work(start):
        for i in range(start, 40, 4):
            if sha256([files[i]]) != of(b"%d" % i):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = json.loads(cache.read_bytes())
    assert not wrong and 0 < len(entries) <= 20
    assert all(sha == of(Path(path).name.encode()) for path, *_, sha in entries)
    assert [p.name for p in cache.parent.iterdir()] == ["sha256.json"]
