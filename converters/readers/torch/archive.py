"""One PyTorch weights file in ``torch.save``'s zip form, memory-mapped, read without torch and without ``pickle``.

The form: https://docs.pytorch.org/docs/stable/notes/serialization.html.  ``<prefix>/data.pkl`` is a pickle that tells
how to build the objects, ``<prefix>/data/<key>`` are the storages.  ``pickled``
interprets the former.
"""

import math
import struct
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from converters.readers.mapped import MappedFile
from converters.readers.source import TensorSpec
from converters.readers.torch.pickled import Interpreter
from converters.readers.torch.tensors import RESAVE, STORAGES, Storage, Tensor, holds_tensors, listed, type_of
from llmjax.errors import CheckpointError, shown

_MAX_PICKLE = 64 << 20
# Of an entry: each tensor's is built anew, and PyTorch's begin with a file's name.
_MOST_NAME = 1024
_LEGACY_MAGIC = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_LOCAL_HEADER = struct.Struct("<4s2xHH16xHH")


class TorchFile:
    """Names, headers and values of one file.

    Args:
      path: of the file.

    Raises:
      CheckpointError: truncated, not in zip form, holding anything but tensors, or contradicting itself.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = MappedFile(path)
        self.stamp = self._file.stamp
        self._check_magic()
        self._entries = self._read_directory()
        pickles = [name for name in self._entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            self._fail(f"expected one entry */data.pkl, found {len(pickles)}; {RESAVE}")
        self._prefix = pickles[0].removesuffix("data.pkl")
        self._starts: dict[str, int] = {}
        self._whole: set[str] = set()
        self._check_byteorder()
        if self._entries[pickles[0]].file_size > _MAX_PICKLE:
            self._fail(
                f"entry {shown(pickles[0])} has {self._entries[pickles[0]].file_size} bytes, expected at most "
                f"{_MAX_PICKLE}; save the tensors alone, or as safetensors"
            )
        self._expect_whole(pickles[0])
        root = Interpreter(self._bytes(pickles[0]), self._storage, self._fail).run()
        self._tensors = self._select(root)
        self._specs = {
            name: TensorSpec(name, t.shape, t.storage.dtype, math.prod(t.shape) * t.storage.itemsize, path)
            for name, t in self._tensors.items()
        }

    def names(self) -> list[str]:
        """See ``Source``."""
        return list(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """See ``Source``."""
        return self._specs[name]

    def read(self, name: str) -> np.ndarray:
        """See ``Source``."""
        import ml_dtypes

        tensor = self._tensors[name]
        storage = tensor.storage
        dtype = np.dtype(ml_dtypes.bfloat16 if storage.dtype == "BF16" else storage.code)
        if not math.prod(tensor.shape):
            return np.empty(tensor.shape, dtype)
        self._expect_whole(f"{self._prefix}data/{storage.key}")
        strides = [stride * storage.itemsize for stride in tensor.strides]
        offset = storage.start + tensor.offset * storage.itemsize
        value: np.ndarray = np.ndarray(tensor.shape, dtype, self._file.bytes.data, offset, strides)
        return value if value.flags.c_contiguous else value.copy()

    def release(self, name: str) -> None:
        """See ``Source``."""
        tensor = self._tensors[name]
        itemsize = tensor.storage.itemsize
        self._file.release(tensor.storage.start + tensor.offset * itemsize, tensor.span() * itemsize)

    def _fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {problem}") from None

    def _check_magic(self) -> None:
        head = self._file.bytes[:512].tobytes()
        if head.startswith(b"PK\x03\x04"):
            return
        if head[2:14] == _LEGACY_MAGIC:
            self._fail(f"written in PyTorch's form from before 1.6, expected the zip form; {RESAVE}")
        if head[257:262] == b"ustar":
            self._fail(f"a tar file, PyTorch's form from before 0.1.10; expected the zip form; {RESAVE}")
        self._fail(
            "not a PyTorch weights file, nor one of MediaPipe's: expected a zip file, or b'TFL3' at byte 4, found "
            f"{head[:16]!r}; download it again"
        )

    def _read_directory(self) -> dict[str, zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, OverflowError, struct.error) as error:
            self._fail(f"damaged or truncated zip file: {error}; download it again")
        entries: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            # zipfile cuts the name at a zero byte.
            name = info.orig_filename
            if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
                self._fail(f"entry {shown(name)}: expected a relative path without '..'; do not trust this file")
            if len(name) > _MOST_NAME:
                self._fail(f"entry {shown(name)}: expected a name of at most {_MOST_NAME} characters; {RESAVE}")
            if name in entries:
                self._fail(f"entry {shown(name)} is there twice; do not trust this file")
            entries[name] = info
        return entries

    def _check_byteorder(self) -> None:
        name = self._prefix + "byteorder"
        order = bytes(self._bytes(name)[:16]) if name in self._entries else b"little"
        if order != b"little":
            self._fail(f"entry {shown(name)}: expected byte order b'little', found {order!r}; save it as safetensors")

    def _start(self, name: str) -> int:
        """Where the data of an entry begin, once it is known that they are plain and inside the file."""
        if name in self._starts:
            return self._starts[name]
        info, data = self._entries[name], self._file.bytes
        where = f"entry {shown(name)}"
        at = info.header_offset
        if not 0 <= at <= len(data) - _LOCAL_HEADER.size:
            self._fail(f"{where}: its header at {at} is outside the {len(data)} bytes of the file; download it again")
        signature, flags, method, name_length, extra_length = _LOCAL_HEADER.unpack_from(data.data, at)
        if signature != b"PK\x03\x04":
            self._fail(f"{where}: expected a zip header at offset {at}, found {signature!r}; download it again")
        if (flags | info.flag_bits) & 1:
            self._fail(f"{where} is encrypted, expected plain data; {RESAVE}")
        if method != zipfile.ZIP_STORED or info.compress_type != zipfile.ZIP_STORED:
            found = info.compress_type or method
            self._fail(f"{where}: expected stored (uncompressed) data, found zip method {found}; {RESAVE}")
        if info.compress_size != info.file_size:
            self._fail(
                f"{where}: stored, but {info.compress_size} bytes in the file for {info.file_size}; download it again"
            )
        start = at + _LOCAL_HEADER.size + name_length + extra_length
        if start + info.file_size > len(data):
            self._fail(
                f"{where}: its {info.file_size} bytes at {start} run past the end of the file at {len(data)}; "
                "download it again"
            )
        self._starts[name] = start
        return start

    def _expect_whole(self, name: str) -> None:
        """Of the checksum that an entry has; torch, which does not look at it, may be told to write 0 for it."""
        wanted = self._entries[name].CRC
        if name in self._whole or not wanted:
            return
        if self._file.crc32(self._start(name), self._entries[name].file_size) != wanted:
            self._fail(f"entry {shown(name)} does not have the checksum the file gives for it; download it again")
        self._whole.add(name)

    def _bytes(self, name: str) -> memoryview:
        start = self._start(name)
        return self._file.bytes.data[start : start + self._entries[name].file_size]

    def _storage(self, kind: str, key: str, numel: int) -> Storage:
        dtype, code = STORAGES[kind]
        itemsize = np.dtype(code).itemsize if code else 2
        name = f"{self._prefix}data/{key}"
        if name not in self._entries:
            self._fail(f"entry {shown(name)}: expected a {kind} of {numel} values, found no such entry; {RESAVE}")
        start, size = self._start(name), self._entries[name].file_size
        if numel * itemsize != size:
            self._fail(
                f"entry {shown(name)}: expected {numel * itemsize} bytes for {numel} values of {dtype}, found {size}; "
                "download it again"
            )
        return Storage(key, dtype, code, itemsize, numel, start)

    def _select(self, root: Any) -> dict[str, Tensor]:
        """The tensors by name: of the dict itself, or of the one dict in a training checkpoint that has them."""
        what = "the pickle"
        if not isinstance(root, dict):
            self._fail(f"{what}: expected a dict of tensors, found {type_of(root)}; save model.state_dict()")
        for key in ("state_dict", "model"):
            if isinstance(root.get(key), dict):
                seen: set[int] = set()
                others = [name for name, value in root.items() if name != key and holds_tensors(value, seen)]
                if others:
                    self._fail(
                        f"{what}: expected tensors in {key!r} alone, found some in {listed(others)}, too; "
                        "save model.state_dict() alone"
                    )
                what, root = f"{what}'s {key!r}", root[key]
                break
        wrong = [f"{shown(n)} ({type_of(v)})" for n, v in root.items() if not isinstance(v, Tensor)]
        if wrong:
            self._fail(f"{what}: expected tensors only, found {listed(wrong)}; save model.state_dict() alone")
        unnamed = [n for n in root if not isinstance(n, str)]
        if unnamed:
            self._fail(f"{what}: expected names of tensors, found {listed(unnamed)}; save model.state_dict()")
        for name, tensor in root.items():
            problem = tensor.problem()
            if problem:
                self._fail(f"tensor {shown(name)}: {problem}")
        return root
