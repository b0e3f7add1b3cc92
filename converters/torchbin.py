"""One PyTorch weights file in ``torch.save``'s zip form, memory-mapped, read without torch and without ``pickle``.

The form: https://docs.pytorch.org/docs/stable/notes/serialization.html.  ``<prefix>/data.pkl`` is a pickle that tells
how to build the objects, ``<prefix>/data/<key>`` are the storages.  Unpickling would run whatever the file asks for, so
the few opcodes that a dict of tensors needs are interpreted here: classes and functions are names to compare with a
list, never looked up, and the only values that come out are numbers, strings, tuples, lists, dicts and tensor headers.
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from converters.mapped import MappedFile
from converters.source import TensorSpec
from llmjax.errors import CheckpointError

_MAX_PICKLE = 64 << 20
# Some 30 for each tensor, in a few seconds.
_MAX_OPCODES = 4_000_000
_MAX_DIMS = 32
# Bounds every number of a tensor header, so that no product of a few of them leaves 64 bits.
_MAX_NUMBER = 1 << 48
_LEGACY_MAGIC = b"\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_LOCAL_HEADER = struct.Struct("<4s2xHH16xHH")
_RESAVE = "save it again with torch.save's default settings, or as safetensors"

_STORAGES = {
    "torch.DoubleStorage": ("F64", "<f8"),
    "torch.FloatStorage": ("F32", "<f4"),
    "torch.HalfStorage": ("F16", "<f2"),
    "torch.BFloat16Storage": ("BF16", ""),
    "torch.LongStorage": ("I64", "<i8"),
    "torch.IntStorage": ("I32", "<i4"),
    "torch.ShortStorage": ("I16", "<i2"),
    "torch.CharStorage": ("I8", "<i1"),
    "torch.ByteStorage": ("U8", "<u1"),
    "torch.BoolStorage": ("BOOL", "?"),
}
_ORDERED_DICT = "collections.OrderedDict"
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
_GLOBALS = {_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, *_STORAGES}
_OPCODES = {ord(op.code): op.name for op in pickletools.opcodes}


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
        self._check_magic()
        self._entries = self._read_directory()
        pickles = [name for name in self._entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            self._fail(f"expected one entry */data.pkl, found {len(pickles)}; {_RESAVE}")
        self._prefix = pickles[0].removesuffix("data.pkl")
        self._starts: dict[str, int] = {}
        self._check_byteorder()
        if self._entries[pickles[0]].file_size > _MAX_PICKLE:
            self._fail(
                f"entry {_short(pickles[0])} has {self._entries[pickles[0]].file_size} bytes, expected at most "
                f"{_MAX_PICKLE}; save the tensors alone, or as safetensors"
            )
        root = _Interpreter(self._bytes(pickles[0]), self._storage, self._fail).run()
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
            self._fail(f"written in PyTorch's form from before 1.6, expected the zip form; {_RESAVE}")
        if head[257:262] == b"ustar":
            self._fail(f"a tar file, PyTorch's form from before 0.1.10; expected the zip form; {_RESAVE}")
        self._fail(f"not a PyTorch weights file: expected a zip file, found {head[:16]!r}; download it again")

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
                self._fail(f"entry {_short(name)}: expected a relative path without '..'; do not trust this file")
            if name in entries:
                self._fail(f"entry {_short(name)} is there twice; do not trust this file")
            entries[name] = info
        return entries

    def _check_byteorder(self) -> None:
        name = self._prefix + "byteorder"
        order = bytes(self._bytes(name)[:16]) if name in self._entries else b"little"
        if order != b"little":
            self._fail(f"entry {_short(name)}: expected byte order b'little', found {order!r}; save it as safetensors")

    def _start(self, name: str) -> int:
        """Where the data of an entry begin, once it is known that they are plain and inside the file."""
        if name in self._starts:
            return self._starts[name]
        info, data = self._entries[name], self._file.bytes
        where = f"entry {_short(name)}"
        at = info.header_offset
        if not 0 <= at <= len(data) - _LOCAL_HEADER.size:
            self._fail(f"{where}: its header at {at} is outside the {len(data)} bytes of the file; download it again")
        signature, flags, method, name_length, extra_length = _LOCAL_HEADER.unpack_from(data.data, at)
        if signature != b"PK\x03\x04":
            self._fail(f"{where}: expected a zip header at offset {at}, found {signature!r}; download it again")
        if (flags | info.flag_bits) & 1:
            self._fail(f"{where} is encrypted, expected plain data; {_RESAVE}")
        if method != zipfile.ZIP_STORED or info.compress_type != zipfile.ZIP_STORED:
            found = info.compress_type or method
            self._fail(f"{where}: expected stored (uncompressed) data, found zip method {found}; {_RESAVE}")
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

    def _bytes(self, name: str) -> memoryview:
        start = self._start(name)
        return self._file.bytes.data[start : start + self._entries[name].file_size]

    def _storage(self, kind: str, key: str, numel: int) -> "_Storage":
        dtype, code = _STORAGES[kind]
        itemsize = np.dtype(code).itemsize if code else 2
        name = f"{self._prefix}data/{key}"
        if name not in self._entries:
            self._fail(f"entry {_short(name)}: expected a {kind} of {numel} values, found no such entry; {_RESAVE}")
        start, size = self._start(name), self._entries[name].file_size
        if numel * itemsize != size:
            self._fail(
                f"entry {_short(name)}: expected {numel * itemsize} bytes for {numel} values of {dtype}, found {size}; "
                "download it again"
            )
        return _Storage(key, dtype, code, itemsize, numel, start)

    def _select(self, root: Any) -> dict[str, "_Tensor"]:
        """The tensors by name: of the dict itself, or of the one dict in a training checkpoint that has them."""
        what = "the pickle"
        if not isinstance(root, dict):
            self._fail(f"{what}: expected a dict of tensors, found {_kind(root)}; save model.state_dict()")
        for key in ("state_dict", "model"):
            if isinstance(root.get(key), dict):
                others = [name for name, value in root.items() if name != key and _holds_tensors(value)]
                if others:
                    self._fail(
                        f"{what}: expected tensors in {key!r} alone, found some in {_list(others)}, too; "
                        "save model.state_dict() alone"
                    )
                what, root = f"{what}'s {key!r}", root[key]
                break
        wrong = [f"{_short(n)} ({_kind(v)})" for n, v in root.items() if not isinstance(v, _Tensor)]
        if wrong:
            self._fail(f"{what}: expected tensors only, found {_list(wrong)}; save model.state_dict() alone")
        unnamed = [n for n in root if not isinstance(n, str)]
        if unnamed:
            self._fail(f"{what}: expected names of tensors, found {_list(unnamed)}; save model.state_dict()")
        for name, tensor in root.items():
            problem = tensor.problem()
            if problem:
                self._fail(f"tensor {_short(name)}: {problem}")
        return root


@dataclass(frozen=True)
class _Global:
    """A class or function that the pickle names; nothing is looked up."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    code: str
    itemsize: int
    numel: int
    start: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def span(self) -> int:
        """How many values of the storage lie between the first and the last of the tensor, both counted."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    def problem(self) -> str:
        """What is wrong with the header; empty where it describes a part of the storage."""
        dims, numel, strides = len(self.shape), self.storage.numel, self.strides
        if dims != len(strides) or dims > _MAX_DIMS:
            return (
                f"{dims} sizes and {len(strides)} strides, expected as many of both, at most {_MAX_DIMS}; "
                "download it again"
            )
        if not all(_is_number(n) for n in (self.offset, *self.shape, *strides)):
            return "offset, size and stride: expected integers from 0 to 2^48; download it again"
        header = f"offset {self.offset}, size {list(self.shape)}, stride {list(strides)}"
        # NumPy cannot make an empty array either whose other lengths multiply to too much.
        if math.prod(n or 1 for n in self.shape) >= _MAX_NUMBER:
            return f"{header}: expected fewer than 2^48 values; download it again"
        if self.offset + self.span() > numel:
            return (
                f"{header}: needs {self.offset + self.span()} values, storage {_short(self.storage.key)} has {numel}; "
                "download it again"
            )
        # A tensor that repeats values of its storage could be of any size, whatever the size of the file.
        if math.prod(self.shape) > numel:
            return (
                f"{header}: expected at most the {numel} values of its storage, found an expanded tensor; "
                "call .contiguous() before saving"
            )
        return ""


class _OrderedDict(dict):
    """What ``collections.OrderedDict`` makes: a dict that BUILD may be used on."""


class _Interpreter:
    """Runs a pickle of tensors.

    Every length is checked against the bytes that are left, nothing recurses, and no opcode copies values, so time and
    memory are in proportion to the length of the pickle.
    """

    def __init__(self, data: memoryview, storage: Callable[[str, str, int], _Storage], fail: Callable[[str], NoReturn]):
        self.data, self.storage, self._fail = data, storage, fail
        self.at = 0
        self.opcode = "PROTO"
        self.opcode_at = 0
        self.stack: list[Any] = []
        # The stacks below each open mark.
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object that the pickle describes."""
        for _ in range(_MAX_OPCODES):
            self.opcode_at = self.at
            code = self.take(1)[0]
            self.opcode = _OPCODES.get(code, f"0x{code:02x}")
            if self.opcode == "STOP":
                return self.pop()
            self.step()
        self.fail(f"more than {_MAX_OPCODES} opcodes; save the tensors alone, or as safetensors")

    def step(self) -> None:
        push = self.stack.append
        match self.opcode:
            case "BINGET":
                push(self.recall(self.number("<B")))
            case "LONG_BINGET":
                push(self.recall(self.number("<I")))
            case "BINPUT":
                self.memo[self.number("<B")] = self.top()
            case "LONG_BINPUT":
                self.memo[self.number("<I")] = self.top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "BININT":
                push(self.number("<i"))
            case "BININT1":
                push(self.number("<B"))
            case "BININT2":
                push(self.number("<H"))
            case "LONG1":
                push(int.from_bytes(self.take(self.number("<B")), "little", signed=True))
            case "BINFLOAT":
                push(self.number(">d"))
            case "NONE":
                push(None)
            case "NEWTRUE":
                push(True)
            case "NEWFALSE":
                push(False)
            case "SHORT_BINUNICODE":
                push(self.text(self.number("<B")))
            case "BINUNICODE":
                push(self.text(self.number("<I")))
            case "BINUNICODE8":
                push(self.text(self.number("<Q")))
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_LIST":
                push([])
            case "EMPTY_DICT":
                push({})
            case "TUPLE":
                items = self.pop_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(int(self.opcode[-1]))]
                push(tuple(reversed(items)))
            case "LIST":
                items = self.pop_mark()
                self.stack.append(items)
            case "DICT":
                items = self.pop_mark()
                self.stack.append({})
                self.set_items(items)
            case "APPEND":
                item = self.pop()
                self.top(list).append(item)
            case "APPENDS":
                items = self.pop_mark()
                self.top(list).extend(items)
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_mark())
            case "GLOBAL":
                module = self.line()
                push(self.find(module, self.line()))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                if not isinstance(name, str) or not isinstance(module, str):
                    self.fail(f"expected two strings, found {_kind(module)} and {_kind(name)}; do not trust this file")
                push(self.find(module, name))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                push(self.call(function, arguments))
            case "BINPERSID":
                push(self.load(self.pop()))
            case "BUILD":
                # The state is _metadata: versions of modules.
                self.pop()
                self.top(_OrderedDict)
            case "PROTO":
                if self.number("<B") > 5:
                    self.fail("a pickle protocol above 5; save it again as safetensors")
            case "FRAME":
                size, left = self.number("<Q"), len(self.data) - self.at
                if size > left:
                    self.fail(f"a frame of {size} bytes, {left} are left; download it again")
            case _:
                self.fail("an opcode that a dict of tensors does not need; do not trust this file")

    def fail(self, problem: str) -> NoReturn:
        self._fail(f"data.pkl: {self.opcode} at byte {self.opcode_at}: {problem}")

    def take(self, size: int) -> memoryview:
        left = len(self.data) - self.at
        if size > left:
            self.fail(f"truncated: needs {size} bytes, {left} are left; download it again")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self, size: int) -> str:
        try:
            return str(self.take(size), "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"a string that is not UTF-8: {error.reason}; download it again")

    def line(self) -> str:
        rest = bytes(self.data[self.at : self.at + 256])
        size = rest.find(b"\n")
        if size < 0:
            self.fail("truncated: expected the end of a name within 256 bytes; download it again")
        name = self.text(size)
        self.at += 1
        return name

    def top(self, kind: type = object) -> Any:
        if not self.stack:
            self.fail("expected a value on the stack, found none; download it again")
        if not isinstance(self.stack[-1], kind):
            expected = kind.__name__.removeprefix("_")
            self.fail(f"expected a value of type {expected}, found {_kind(self.stack[-1])}; do not trust this file")
        return self.stack[-1]

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """The values above the mark; what was below it becomes the stack."""
        if not self.below:
            self.fail("expected a mark on the stack, found none; download it again")
        items, self.stack = self.stack, self.below.pop()
        return items

    def recall(self, index: int) -> Any:
        if index not in self.memo:
            self.fail(f"expected something stored as {index}, found nothing; download it again")
        return self.memo[index]

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            self.fail(f"expected pairs, found {len(items)} values; download it again")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Small integers, for the keys of an optimizer's state; larger ones can be made to collide.
            if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 1 << 31):
                self.fail(f"expected a string as the key of a dict, found {_kind(key)}; do not trust this file")
            if key in target:
                self.fail(f"the key {_short(key)} is there twice; do not trust this file")
            target[key] = value

    def find(self, module: str, name: str) -> _Global:
        full = f"{module}.{name}"
        if full not in _GLOBALS:
            self.fail(f"{_short(full)} is none of the names that a dict of tensors needs; do not trust this file")
        return _Global(full)

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or function.name in _STORAGES:
            found = function.name if isinstance(function, _Global) else _kind(function)
            self.fail(f"expected one of PyTorch's functions, found {found}; do not trust this file")
        if not isinstance(arguments, tuple):
            self.fail(f"expected a tuple of arguments, found {_kind(arguments)}; do not trust this file")
        match function.name, arguments:
            case "collections.OrderedDict", ():
                return _OrderedDict()
            case "torch._utils._rebuild_parameter", (_Tensor() as tensor, _, _):
                return tensor
            case (
                "torch._utils._rebuild_tensor_v2",
                (_Storage() as storage, int(offset), tuple(shape), tuple(strides), _, _, *metadata),
            ) if len(metadata) <= 1:
                # It tells conjugated and negated views.
                if metadata and metadata[0] not in (None, {}):
                    self.fail("a tensor with metadata; save a copy made with .clone(), or as safetensors")
                return _Tensor(storage, offset, shape, strides)
        kinds = ", ".join(_kind(argument) for argument in arguments[:8])
        self.fail(f"{function.name}: unexpected arguments ({kinds}); {_RESAVE}")

    def load(self, persistent: Any) -> _Storage:
        match persistent:
            case ("storage", _Global(kind), str(key), str(), int(numel)) if kind in _STORAGES:
                if not _is_number(numel):
                    self.fail(f"storage {_short(key)}: expected from 0 to 2^48 values; download it again")
                return self.storage(kind, key, numel)
        self.fail(f"expected ('storage', type, key, location, size), found another {_kind(persistent)}; {_RESAVE}")


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER


def _holds_tensors(value: Any) -> bool:
    seen: set[int] = set()
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, _Tensor | _Storage):
            return True
        if isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(value.values() if isinstance(value, dict) else value)
    return False


def _kind(value: Any) -> str:
    """Of what type a value is; never the value, which may be nested without end."""
    return type(value).__name__.removeprefix("_")


def _short(name: Any) -> str:
    text = repr(name[:100] if isinstance(name, str) else name)
    return f"{text}..." if isinstance(name, str) and len(name) > 100 else text


def _list(names: list[Any]) -> str:
    shown = [n if isinstance(n, str) else _short(n) for n in names[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
