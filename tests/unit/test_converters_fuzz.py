"""Damaged files of every format: a CheckpointError or readable tensors, nothing else, and soon."""

import random
import re
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from gguf import GGMLQuantizationType, GGUFWriter

from converters.readers.gguf import GgufSource
from converters.readers.mapped import MappedFile
from converters.readers.safetensors import SafetensorsFile
from converters.readers.torch.archive import TorchFile
from llmjax.errors import CheckpointError

EDGES = (0, 1, 0x7F, 0x80, 0xFF)


def gguf_bytes(path):
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.name", "tiny")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokens", ["a", "bc", "d" * 30])
    writer.add_array("scores", [0.5, 1.5, 2.5])
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_custom_alignment(16)
    writer.add_tensor("f32", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("q8", np.arange(68, dtype=np.uint8).reshape(2, 34), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("q6", np.arange(210, dtype=np.uint8).reshape(1, 210), raw_dtype=GGMLQuantizationType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def safetensors_bytes(path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.float16)}
    safetensors.numpy.save_file(tensors, path, metadata={"format": "np"})


def torch_bytes(path):
    path.write_bytes((Path(__file__).parents[1] / "data/torchbin/tiny.bin").read_bytes())


FORMATS = {
    "gguf": (gguf_bytes, GgufSource),
    "safetensors": (safetensors_bytes, SafetensorsFile),
    "torch": (torch_bytes, TorchFile),
}


def damage(whole, rng):
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Headers lie in front, a zip file's directory at the end.
        at = rng.randrange(min(len(data), 1200) if rng.random() < 0.7 else len(data))
        kind = rng.random()
        if kind < 0.4:
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 0.7:
            data[at] = rng.choice(EDGES)
        elif kind < 0.85:  # a whole count, length or offset
            data[at : at + 8] = rng.choice((bytes(8), b"\xff" * 8, rng.randbytes(8), b"\0\0\0\0\1\0\0\0"))
        elif kind < 0.95:
            other = rng.randrange(len(data))
            data[at : at + 16] = data[other : other + 16]
        elif len(data) > 1:
            del data[rng.randrange(1, len(data)) :]
    return bytes(data)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(tmp_path, name):
    make, reader = FORMATS[name]
    path = tmp_path / "file"
    make(path)
    whole, rng = path.read_bytes(), random.Random(7)
    reader(path)  # imports
    outcomes = {"read": 0, "refused": 0}
    tracemalloc.start()
    try:
        for i in range(400):
            path.write_bytes(damage(whole, rng))
            tracemalloc.reset_peak()
            start, before = time.perf_counter(), tracemalloc.get_traced_memory()[0]
            try:
                file = reader(path)
                for tensor in file.names():
                    spec = file.spec(tensor)
                    assert spec.nbytes <= len(whole)
                    try:
                        assert file.read(tensor).shape == spec.shape
                    except CheckpointError:  # of a type that is listed only
                        continue
                    file.release(tensor)
                outcomes["read"] += 1
            except CheckpointError as error:
                assert str(path) in str(error), i
                outcomes["refused"] += 1
            assert time.perf_counter() - start < 5, i
            assert tracemalloc.get_traced_memory()[1] - before < 4 << 20, i
    finally:
        tracemalloc.stop()
    assert min(outcomes.values()) > 20, outcomes


@pytest.mark.parametrize("name", FORMATS)
def test_every_truncation(tmp_path, name):
    make, reader = FORMATS[name]
    path = tmp_path / "file"
    make(path)
    whole = path.read_bytes()
    last = len(whole)
    while name == "gguf" and not whole[last - 1]:  # the padding behind the last tensor is nobody's
        last -= 1
    for size in range(0, last, 3 if last < 2000 else 13):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            reader(path)


def test_safetensors_verdicts_are_the_official_ones(tmp_path):
    path = tmp_path / "file"
    safetensors_bytes(path)
    whole, rng = path.read_bytes(), random.Random(8)
    verdicts = []
    for i in range(400):
        path.write_bytes(damage(whole, rng))
        try:
            with safetensors.safe_open(path, framework="numpy"):
                official = True
        except (safetensors.SafetensorError, OSError, ValueError, OverflowError):
            official = False
        try:
            SafetensorsFile(path)
            ours, message = True, ""
        except CheckpointError as error:
            ours, message = False, str(error)
        assert ours == official or "there twice" in message, (i, ours, official, message)
        verdicts.append(ours)
    assert 20 < sum(verdicts) < 380


def resident(path):
    """Bytes of a mapped file that are in this process's memory."""
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    sizes = [re.search(r"^Rss:\s+(\d+) kB", b, re.MULTILINE) for b in blocks if str(path) in b]
    return sum(int(size[1]) for size in sizes if size) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_released_pages_leave_the_memory(tmp_path):
    path = tmp_path / "model.safetensors"
    size = 8 << 20
    safetensors.numpy.save_file({"a": np.ones(size // 4, np.float32), "b": np.ones(8, np.float32)}, path)
    file = SafetensorsFile(path)
    values = file.read("a")
    assert values.sum() == size // 4
    assert resident(path) >= size
    file.release("a")
    assert resident(path) < size // 8
    assert values.sum() == size // 4


def test_release_keeps_to_whole_pages_inside(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    mapped = MappedFile(path)
    mapped.release(0, 0)
    mapped.release(3, 50)
    assert len(mapped) == 100
