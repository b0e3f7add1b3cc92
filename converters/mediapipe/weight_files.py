"""The weight files of MediaPipe's converter: one raw file per tensor, and ``layer_info.txt`` that lists them.

A weight is a file of ``[in, out]``, some are ``[out, in]`` (``is_transposed``); 4 bits are packed along the flattened
array, as two's complement for the gpu and with 8 added for the cpu.  Scales lie beside it, and so do zero points, of
the weight's scale: ``w = scale * q - zero``; of 4 bits for the cpu there is one number for the whole tensor.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from converters.mediapipe.writer import Item
from converters.readers.mediapipe import layout
from converters.readers.mediapipe.source import SCALE, ZERO
from converters.readers.source import problems_error
from llmjax.checkpoint.mediapipe_config import ModelType
from llmjax.errors import CheckpointError, named
from llmjax.quant.qtensor import QTensor

INFO = "layer_info.txt"


def is_transposed(place: str, kind: ModelType, backend: str) -> bool:
    """Whether a weight's file is ``[out, in]``."""
    module = place.removesuffix(".weight").rsplit(".", 1)[-1]
    if kind.model_type.startswith("gemma"):
        return module == "o"
    return backend == "cpu" and module in ("o", "embed")


class Folder:
    """Writes weight files.

    Args:
      path: an existing folder.
      kind: the model type.
      backend: ``cpu`` or ``gpu``.
    """

    def __init__(self, path: Path, kind: ModelType, backend: str):
        self._path, self._kind, self._backend = path, kind, backend
        self._lines: list[str] = []

    def add(self, item: Item, value: "np.ndarray | QTensor") -> None:
        """Writes one item, with its scales and zero points."""
        transposed = is_transposed(item.place, self._kind, self._backend)
        if not isinstance(value, QTensor):
            value = value.astype(np.float32, copy=False)
            flat = value if transposed or len(item.shape) == 1 else layout.to_columns(value, 32)
            self.add_floats(item.name, flat, item.shape if transposed else item.shape[::-1])
            return
        shape = value.shape if transposed else value.shape[::-1]
        flat = value.values if transposed else layout.to_columns(value.values, value.bits)
        if value.bits == 4:
            if self._backend == "gpu":
                flat = flat ^ np.uint8(0x88)
            shape = (flat.size, 1)
        self._write(item.name, flat, "int8", shape)
        scales = value.scales[:, 0].astype(np.float32, copy=False)
        self._write(item.name + SCALE, scales, "float32", scales.shape)
        zeros = None if value.offsets is None else -value.offsets[:, 0]
        if self._backend == "cpu" and value.bits == 4:
            zero = 8 if zeros is None else int(np.mean(zeros / (scales + np.finfo(np.float32).eps)).astype(np.int8)) + 8
            self._write(item.name + ZERO, np.array([zero], np.int32), "int32", ())
        elif zeros is not None:
            self._write(item.name + ZERO, zeros, "float32", zeros.shape)

    def add_floats(self, name: str, data: np.ndarray, shape: Sequence[int]) -> None:
        """Writes one file of float32 numbers, listed with a shape."""
        self._write(name, data.astype(np.float32, copy=False), "float32", shape)

    def _write(self, name: str, data: np.ndarray, dtype: str, shape: Sequence[int]) -> None:
        with open(self._path / name, "wb") as file:
            file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        self._lines.append(f"mdl_vars.{name}.{dtype}.{'_'.join(map(str, shape))}")

    def close(self) -> None:
        """Writes the list."""
        text = "".join(f"{line}\n\n" for line in sorted(self._lines))
        (self._path / INFO).write_text(text, encoding="utf-8")


class Weights:
    """Weight files that were written before, checked against the dimensions they must have.

    Args:
      path: the folder.
      places: what must be there: MediaPipe's name, the parameter and its shape.
      kind: the model type.
      backend: ``cpu`` or ``gpu``.

    Raises:
      CheckpointError: files or lines are missing, or of a size that does not fit; all at once.
    """

    def __init__(self, path: Path, places: Sequence[Item], kind: ModelType, backend: str):
        self._path, self._kind, self._backend = path, kind, backend
        self._info = _read_info(path / INFO)
        self._problems: list[str] = []
        self.items = [self._item(place) for place in places]
        if self._problems:
            raise problems_error(path, "weight files that do not fit the model", self._problems)

    def _item(self, place: Item) -> Item:
        dtype, shape = self._info.get(place.name, ("", ()))
        own = place.shape if is_transposed(place.place, self._kind, self._backend) else place.shape[::-1]
        count = int(np.prod(place.shape))
        if (dtype, shape) == ("float32", own):
            bits = 32
        elif (dtype, shape) == ("int8", own) and len(own) == 2:
            bits = 8
        elif (dtype, shape) == ("int8", (count // 2, 1)) and len(own) == 2 and place.shape[1] % 2 == 0:
            bits = 4
        else:
            found = f"{dtype} {list(shape)}" if dtype else f"no line in {INFO}"
            self._problems.append(f"{place.name}: expected float32 or int8 {list(own)}, or 4 bits of it, found {found}")
            return place
        self._check(place.name, count * bits // 8)
        has_zero = False
        if bits != 32:
            self._check(place.name + SCALE, 4 * place.shape[0])
            has_zero = self._info.get(place.name + ZERO, ("",))[0] == "float32"
            if has_zero:
                self._check(place.name + ZERO, 4 * place.shape[0])
        return dataclasses.replace(place, bits=bits, has_zero=has_zero)

    def _check(self, name: str, expected: int) -> None:
        try:
            found = (self._path / name).stat().st_size
        except OSError as error:
            self._problems.append(f"{name}: {error.strerror}")
            return
        if found != expected:
            self._problems.append(f"{name}: expected {expected} bytes, found {found}")

    def read(self) -> Iterator[tuple[str, "np.ndarray | QTensor"]]:
        """Every parameter by its canonical name, one in memory at a time.

        Raises:
          CheckpointError: a tied head that differs from the embedding.
        """
        seen: dict[str, Item] = {}
        for item in self.items:
            first = seen.setdefault(item.parameter, item)
            if first is item:
                yield item.parameter, self._value(item)
            elif not _same(self._value(first), self._value(item)):
                raise CheckpointError(
                    f"{self._path}: {item.name} differs from {first.name}, but the configuration ties them; set "
                    "tie_word_embeddings to false if the head is its own"
                )

    def _value(self, item: Item) -> "np.ndarray | QTensor":
        raw = np.fromfile(self._path / item.name, np.uint8)
        if len(item.shape) == 1:
            return raw.view("<f4")
        shape = (item.shape[0], item.shape[1])
        if item.bits == 4 and self._backend == "gpu":
            raw ^= np.uint8(0x88)
        read = layout.from_rows if is_transposed(item.place, self._kind, self._backend) else layout.from_columns
        values = read(raw, shape, item.bits)
        if item.bits == 32:
            return values
        scales = np.fromfile(self._path / (item.name + SCALE), "<f4")[:, None]
        offsets = -np.fromfile(self._path / (item.name + ZERO), "<f4")[:, None] if item.has_zero else None
        return QTensor(values, scales, offsets, bits=item.bits, zero=8 if item.bits == 4 else 0)


def _same(one: "np.ndarray | QTensor", other: "np.ndarray | QTensor") -> bool:
    parts = [(x.values, x.scales, x.offsets) if isinstance(x, QTensor) else (x,) for x in (one, other)]
    return len(parts[0]) == len(parts[1]) and all(map(np.array_equal, *parts))


def _read_info(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of each file."""
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise CheckpointError(
            f"{path}: cannot read the list of weight files: {reason}; convert without combine_file_only first"
        ) from None
    found = {}
    for line in lines:
        name, _, rest = line.removeprefix("mdl_vars.").rpartition(".")
        name, _, dtype = name.rpartition(".")
        with contextlib.suppress(ValueError):
            found[name] = (dtype, tuple(int(n) for n in rest.split("_") if n))
            continue
        raise CheckpointError(f"{path}: expected lines mdl_vars.NAME.DTYPE.SHAPE, found {named(line)}")
    return found
