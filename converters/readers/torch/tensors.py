"""Headers of tensors and of the storages they lie in, checked against each other."""

import math
from dataclasses import dataclass
from typing import Any

from llmjax.errors import named, shown

_MAX_DIMS = 32
# Bounds every number of a tensor header, so that no product of a few of them leaves 64 bits.
_MAX_NUMBER = 1 << 48
RESAVE = "save it again with torch.save's default settings, or as safetensors"

STORAGES = {
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


@dataclass(frozen=True)
class Storage:
    """Where a storage lies in the file, and of what type its values are."""

    key: str
    dtype: str
    code: str
    itemsize: int
    numel: int
    start: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage."""

    storage: Storage
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
        if not all(is_number(n) for n in (self.offset, *self.shape, *strides)):
            return "offset, size and stride: expected integers from 0 to 2^48; download it again"
        header = f"offset {self.offset}, size {list(self.shape)}, stride {list(strides)}"
        # NumPy cannot make an empty array either whose other lengths multiply to too much.
        if math.prod(n or 1 for n in self.shape) >= _MAX_NUMBER:
            return f"{header}: expected fewer than 2^48 values; download it again"
        if self.offset + self.span() > numel:
            return (
                f"{header}: needs {self.offset + self.span()} values, storage {shown(self.storage.key)} has {numel}; "
                "download it again"
            )
        # A tensor that repeats values of its storage could be of any size, whatever the size of the file.
        if math.prod(self.shape) > numel:
            return (
                f"{header}: expected at most the {numel} values of its storage, found an expanded tensor; "
                "call .contiguous() before saving"
            )
        return ""


def is_number(value: Any) -> bool:
    """Whether a value may stand in a header."""
    return type(value) is int and 0 <= value < _MAX_NUMBER


def holds_tensors(value: Any, seen: set[int]) -> bool:
    """Whether there are tensors anywhere in a value.

    Args:
      value: whatever the pickle makes.
      seen: ids of what was looked into before, and is passed over: many values may share their parts.
    """
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor | Storage):
            return True
        if isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(value.values() if isinstance(value, dict) else value)
    return False


def type_of(value: Any) -> str:
    """Of what type a value is; never the value, which may be nested without end."""
    return type(value).__name__.removeprefix("_")


def listed(names: list[Any]) -> str:
    """The first five names, and how many more there are."""
    first = [named(n) if isinstance(n, str) else shown(n) for n in names[:5]]
    return ", ".join(first) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
