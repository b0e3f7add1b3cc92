"""The safetensors reader against the official library: the same values, the same verdicts."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from converters.readers.safetensors import SafetensorsFile
from llmjax.errors import CheckpointError


def build(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def official(path):
    try:
        with safetensors.safe_open(path, framework="numpy"):
            return True
    except (safetensors.SafetensorError, OSError, ValueError, OverflowError):
        return False


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_values_and_headers(path):
    rng = np.random.default_rng(0)
    arrays = {
        "f32": rng.standard_normal((3, 5)).astype(np.float32),
        "f16": rng.standard_normal((3, 5)).astype(np.float16),
        "bf16": rng.standard_normal((7,)).astype(ml_dtypes.bfloat16),
        "f64": rng.standard_normal((2, 2)),
        "bool": np.array([True, False, True]),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float16),
        **{f"{k}{n}": np.arange(3).astype(f"{k}{n // 8}") for k in "iu" for n in (8, 16, 32, 64)},
    }
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    file = SafetensorsFile(path)
    loaded = safetensors.numpy.load_file(path)
    assert sorted(file.names()) == sorted(arrays) and file.metadata == {"format": "np"}
    for name, array in arrays.items():
        read, spec = file.read(name), file.spec(name)
        assert read.dtype == array.dtype and read.shape == spec.shape == array.shape and not read.flags.writeable
        assert read.tobytes() == loaded[name].tobytes() == array.tobytes()
        assert spec.dtype == name.upper().replace("SCALAR", "F32").replace("EMPTY", "F16")
        assert spec.nbytes == array.nbytes and spec.file == path
        file.release(name)
        assert file.read(name).tobytes() == array.tobytes()


def test_a_view_outlives_its_file_object(path):
    safetensors.numpy.save_file({"a": np.arange(4096, dtype=np.float32)}, path)
    read = SafetensorsFile(path).read("a")
    assert read.sum() == 4095 * 4096 / 2


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64"])
def test_types_that_are_listed_and_not_read(path, dtype):
    path.write_bytes(build({"a": tensor((16,), (0, 128 if dtype == "C64" else 8 if dtype == "F4" else 16), dtype)}))
    path.write_bytes(path.read_bytes() + bytes(128 if dtype == "C64" else 8 if dtype == "F4" else 16))
    assert official(path)
    file = SafetensorsFile(path)
    assert file.spec("a").dtype == dtype
    with pytest.raises(CheckpointError, match=f"tensor a: type {dtype} is not supported"):
        file.read("a")


# Content, and what the message says, or None where the file is good.
CASES = [
    (b"", "empty"),
    (b"\0" * 7, "expected 8 bytes for the header's length"),
    (struct.pack("<Q", 2) + b"{", "a header of 2 bytes in a file of 9"),
    (struct.pack("<Q", 2**63) + b"{}", "a header of 9223372036854775808 bytes"),
    (b"PK\x03\x04" + bytes(60), "not a safetensors file, or truncated"),
    (build(b""), "not valid JSON"),
    (build(b"\xff\xff"), "not valid JSON"),
    (build(b"{}x"), "not valid JSON"),
    (build(b"[]"), "expected the header to be a JSON object, found list"),
    (build(b"null"), "expected the header to be a JSON object"),
    (build(b"[" * 100_000), "not valid JSON"),
    (build(b'{"a":' * 100_000), "not valid JSON"),
    (build(b'{"__metadata__":{"a":NaN}}'), "NaN is no JSON value"),
    (build(b"{}"), None),
    (build(b"{}    "), None),
    (build({"__metadata__": {"a": "b"}}), None),
    (build({"__metadata__": {"a": 1}}), "__metadata__: expected an object of strings"),
    (build({"__metadata__": ["a"]}), "__metadata__: expected an object of strings"),
    (build({"a": tensor()}, bytes(8)), None),
    (build({"a": 1}, bytes(8)), "tensor a: expected an object with dtype"),
    (build({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "tensor a: expected an object with dtype"),
    (build({"a": tensor(dtype="F31")}, bytes(8)), "tensor a: unknown dtype F31"),
    (build({"a": tensor(dtype=5)}, bytes(8)), "tensor a: unknown dtype 5"),
    (build({"a": tensor(shape=(-2,))}, bytes(8)), "tensor a: shape: expected"),
    (build({"a": tensor(shape=(2.0,))}, bytes(8)), "tensor a: shape: expected"),
    (build({"a": tensor(shape=(True, 2))}, bytes(8)), "tensor a: shape: expected"),
    (build({"a": tensor(shape=("2",))}, bytes(8)), "tensor a: shape: expected"),
    (build({"a": tensor(shape=(2**64,))}, bytes(8)), "tensor a: shape: expected"),
    (build({"a": tensor(shape=(2**40, 2**40))}, bytes(8)), "tensor a: shape .* more values than any file"),
    (build({"a": tensor(shape=(2**63, 2, 2))}, bytes(8)), "tensor a: shape .* more values than any file"),
    (build({"a": tensor(shape=(2**63, 2, 0), offsets=(0, 0))}), "tensor a: shape .* more values than any file"),
    (build({"a": tensor(shape=(3,))}, bytes(8)), r"tensor a: F32 \[3\] takes 12 bytes, data_offsets give 8"),
    (build({"a": tensor((3,), (0, 2), "F4")}, bytes(2)), "takes 1.5 bytes, data_offsets give 2"),
    (build({"a": tensor(offsets=(8, 0))}, bytes(8)), r"tensor a: data_offsets: expected \[begin, end\]"),
    (build({"a": tensor(offsets=(-8, 0))}, bytes(8)), "tensor a: data_offsets"),
    (build({"a": tensor(offsets=(0,))}, bytes(8)), "tensor a: data_offsets"),
    (build({"a": tensor(offsets=(0, 8, 8))}, bytes(8)), "tensor a: data_offsets"),
    (build({"a": tensor(offsets=(8, 16))}, bytes(16)), "tensor a leaves a hole before it"),
    (build({"a": tensor(), "b": tensor()}, bytes(8)), "tensor b overlaps the one before"),
    (build({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12)), "expected it to begin at 8, found 4"),
    (build({"a": tensor(), "b": tensor((0,), (8, 8)), "c": tensor(offsets=(8, 16))}, bytes(16)), None),
    (build({"a": tensor(), "b": tensor((0,), (0, 0))}, bytes(8)), None),
    (build({"a": tensor()}, bytes(7)), "the tensors end at 8, the data in the file at 7"),
    (build({"a": tensor()}, bytes(9)), "the tensors end at 8, the data in the file at 9"),
    (
        build(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "a string holds half a surrogate pair",
    ),
    (build({"a": {**tensor(), "extra": 1}}, bytes(8)), None),
]


@pytest.mark.parametrize(("content", "message"), CASES)
def test_verdicts_are_the_official_ones(path, content, message):
    path.write_bytes(content)
    assert official(path) == (message is None)
    if message is None:
        file = SafetensorsFile(path)
        for name in file.names():
            assert file.read(name).nbytes == file.spec(name).nbytes
    else:
        with pytest.raises(CheckpointError, match=message) as caught:
            SafetensorsFile(path)
        assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value).splitlines()) == 1


def test_names_that_appear_twice(path):
    """The official library takes the last one."""
    entry = json.dumps(tensor())
    path.write_bytes(build(f'{{"a":{entry},"a":{entry}}}'.encode(), bytes(8)))
    with pytest.raises(CheckpointError, match="a is there twice"):
        SafetensorsFile(path)


def test_problems_come_together(path):
    path.write_bytes(build({"a": tensor((3,)), "b": tensor(dtype="X"), "__metadata__": 3}, bytes(8)))
    with pytest.raises(CheckpointError, match=r"(?s):\n  tensor a: .*\n  tensor b: .*\n  __metadata__"):
        SafetensorsFile(path)
    path.write_bytes(build({f"t{i}": tensor((3,)) for i in range(50)}))
    with pytest.raises(CheckpointError, match="and 45 more$"):
        SafetensorsFile(path)
