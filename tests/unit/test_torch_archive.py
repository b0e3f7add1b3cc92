"""A file that torch 2.13 wrote, read where torch is not installed.

``base`` is ``torch.arange(24.).reshape(4, 6) / 8``; ``transposed``, ``slice`` and ``row`` are views of it.
"""

import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from converters.readers.torch.archive import TorchFile
from llmjax.errors import CheckpointError

PATH = Path(__file__).parents[1] / "data/torchbin/tiny.bin"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6) / 8
EXPECTED = {
    "base": BASE,
    "transposed": BASE.T,
    "slice": BASE[1:4:2, 2:5],
    "row": BASE[2],
    "bf16": BASE[:2].astype(ml_dtypes.bfloat16),
    "f16": BASE[:2].astype(np.float16),
    "i64": np.arange(5),
    "flag": np.array([True, False]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": BASE[0],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_tensors_of_a_file_written_by_torch(name):
    file = TorchFile(PATH)
    assert file.names() == list(EXPECTED)
    expected, read, spec = EXPECTED[name], file.read(name), file.spec(name)
    assert read.dtype == expected.dtype and read.shape == expected.shape == spec.shape
    np.testing.assert_array_equal(read, expected)
    assert spec.nbytes == expected.nbytes and spec.file == PATH
    file.release(name)
    np.testing.assert_array_equal(file.read(name), expected)


def test_values_without_their_checksum(tmp_path):
    """Torch itself loads them, as wrong as they are; and it writes 0 where it was told to compute none."""
    data, path = PATH.read_bytes(), tmp_path / "x.bin"
    with zipfile.ZipFile(PATH) as archive:
        crc = next(info.CRC for info in archive.infolist() if archive.read(info) == BASE.tobytes())
    wrong = bytearray(data)
    wrong[data.index(BASE.tobytes()) + 5] ^= 1
    path.write_bytes(wrong)
    file = TorchFile(path)
    with pytest.raises(CheckpointError, match=r"x.bin: entry '\S+/data/0' does not have the checksum .*; download it"):
        file.read("row")  # a view of it
    np.testing.assert_array_equal(file.read("i64"), np.arange(5))
    path.write_bytes(bytes(wrong).replace(struct.pack("<I", crc), bytes(4)))
    assert (TorchFile(path).read("base") != BASE).sum() == 1
    path.write_bytes(data.replace(b"transposed", b"transpozed"))  # in the pickle
    with pytest.raises(CheckpointError, match=r"/data.pkl' does not have the checksum"):
        TorchFile(path)
