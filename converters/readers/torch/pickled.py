"""The pickle in a PyTorch file, interpreted without ``pickle``.

Unpickling would run whatever the file asks for, so the few opcodes that a dict of tensors needs are interpreted here:
classes and functions are names to compare with a list, never looked up, and the only values that come out are numbers,
strings, tuples, lists, dicts and tensor headers.
"""

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from converters.readers.torch.tensors import RESAVE, STORAGES, Storage, Tensor, is_number, type_of
from llmjax.errors import shown

# Some 30 for each tensor, in a few seconds at most; large models come in several files.
_MAX_OPCODES = 1_000_000
# Of a storage, in the names of the zip's entries: PyTorch numbers them.
_MOST_KEY = 64
_ORDERED_DICT = "collections.OrderedDict"
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
_GLOBALS = {_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, *STORAGES}
_OPCODES = {ord(op.code): op.name for op in pickletools.opcodes}


@dataclass(frozen=True)
class Global:
    """A class or function that the pickle names; nothing is looked up."""

    name: str


class OrderedDict(dict):
    """What ``collections.OrderedDict`` makes: a dict that BUILD may be used on."""


class Interpreter:
    """Runs a pickle of tensors.

    Every length is checked against the bytes that are left, nothing recurses, and no opcode copies values, so time and
    memory are in proportion to the length of the pickle.
    """

    def __init__(self, data: memoryview, storage: Callable[[str, str, int], Storage], fail: Callable[[str], NoReturn]):
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
                    self.fail(
                        f"expected two strings, found {type_of(module)} and {type_of(name)}; do not trust this file"
                    )
                push(self.find(module, name))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                push(self.call(function, arguments))
            case "BINPERSID":
                push(self.load(self.pop()))
            case "BUILD":
                # The state is _metadata: versions of modules.
                self.pop()
                self.top(OrderedDict)
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
            self.fail(f"expected a value of type {expected}, found {type_of(self.stack[-1])}; do not trust this file")
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
                self.fail(f"expected a string as the key of a dict, found {type_of(key)}; do not trust this file")
            if key in target:
                self.fail(f"the key {shown(key)} is there twice; do not trust this file")
            target[key] = value

    def find(self, module: str, name: str) -> Global:
        full = f"{module}.{name}"
        if full not in _GLOBALS:
            self.fail(f"{shown(full)} is none of the names that a dict of tensors needs; do not trust this file")
        return Global(full)

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or function.name in STORAGES:
            found = function.name if isinstance(function, Global) else type_of(function)
            self.fail(f"expected one of PyTorch's functions, found {found}; do not trust this file")
        if not isinstance(arguments, tuple):
            self.fail(f"expected a tuple of arguments, found {type_of(arguments)}; do not trust this file")
        match function.name, arguments:
            case "collections.OrderedDict", ():
                return OrderedDict()
            case "torch._utils._rebuild_parameter", (Tensor() as tensor, _, _):
                return tensor
            case (
                "torch._utils._rebuild_tensor_v2",
                (Storage() as storage, int(offset), tuple(shape), tuple(strides), _, _, *metadata),
            ) if len(metadata) <= 1:
                # It tells conjugated and negated views.
                if metadata and metadata[0] not in (None, {}):
                    self.fail("a tensor with metadata; save a copy made with .clone(), or as safetensors")
                return Tensor(storage, offset, shape, strides)
        kinds = ", ".join(type_of(argument) for argument in arguments[:8])
        self.fail(f"{function.name}: unexpected arguments ({kinds}); {RESAVE}")

    def load(self, persistent: Any) -> Storage:
        match persistent:
            case ("storage", Global(kind), str(key), str(), int(numel)) if kind in STORAGES:
                if len(key) > _MOST_KEY:
                    self.fail(f"storage {shown(key)}: expected a key of at most {_MOST_KEY} characters; {RESAVE}")
                if not is_number(numel):
                    self.fail(f"storage {shown(key)}: expected from 0 to 2^48 values; download it again")
                return self.storage(kind, key, numel)
        self.fail(f"expected ('storage', type, key, location, size), found another {type_of(persistent)}; {RESAVE}")
