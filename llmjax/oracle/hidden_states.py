"""Activations of many texts, streamed to disk."""

import contextlib
import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import jax
import numpy as np

from llmjax.checkpoint.identity import model_facts, runtime_facts
from llmjax.errors import RequestError, shown
from llmjax.litert.model import GraphModel
from llmjax.model import Model, check_ids, filled_up, padded_width
from llmjax.models.context import Context
from llmjax.models.interventions import Interventions, tap_places
from llmjax.models.tree import named
from llmjax.models.watched import Program
from llmjax.oracle.steps import order
from llmjax.outside.paths import checked_path
from llmjax.outside.whole import whole_folder

# Tokens that are computed together, padding among them.
TOGETHER = 2048
# Bytes of a .npy file before its values: room for any shape, which is known at the end.
_HEADER = 256
_DTYPES = ("float32", "float16")


@dataclasses.dataclass(frozen=True)
class HiddenStates:
    """Activations on disk; nothing is read before it is asked for.

    Attributes:
      path: a folder with ``TAP.npy`` ``[tokens, ...]`` of all texts one after the other, ``token_ids.npy``
        ``[tokens]``, ``rows.npy`` ``[texts + 1]``, where each text begins, and ``manifest.json``.

    Raises:
      RequestError: no path; and, when something is asked for, a folder that ``hidden_states`` did not write.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", checked_path("path", self.path, RequestError))

    def _read(self, name: str, read: Callable[[Path], Any]) -> Any:
        path = self.path / name
        try:
            return read(path)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise RequestError(f"{path}: cannot be read, expected a folder of hidden_states: {why}") from None

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """int64 ``[texts + 1]``: text i is ``[rows[i] : rows[i + 1]]`` of every array."""
        return np.asarray(self._read("rows.npy", np.load))

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """What was computed, of what and on what."""
        found: dict[str, Any] = self._read("manifest.json", lambda path: json.loads(path.read_text(encoding="utf-8")))
        return found

    @property
    def taps(self) -> list[str]:
        """Their names, in the order of computation."""
        return list(self.manifest["taps"])

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, name: str) -> np.ndarray:
        """One tap's values of all texts ``[tokens, ...]``, or ``token_ids``, mapped into memory."""
        if name not in (*self.taps, "token_ids"):
            raise RequestError(f"{self.path}: holds no {shown(name)}; there are {', '.join(self.taps)}")
        return np.asarray(self._read(f"{name}.npy", functools.partial(np.load, mmap_mode="r")))

    def row(self, text: int) -> dict[str, np.ndarray]:
        """Each tap's values of one text ``[T, ...]``."""
        at = slice(*self.rows[range(len(self))[text] :][:2])
        return {name: self[name][at] for name in self.taps}


def hidden_states(
    model: Model,
    batch: Iterable[Sequence[int]],
    taps: str | Sequence[str] = "*.resid",
    *,
    output: str | Path,
    dtype: str = "float32",
    interventions: Interventions = MappingProxyType({}),
) -> HiddenStates:
    """Writes the activations of many texts into a new folder, which appears when it is whole.

    Texts of similar lengths are computed together, without a cache, padded on the right to a power of two; however many
    there are, memory holds those of one such group.

    Args:
      model: the model.
      batch: token id lists, taken one by one.
      taps: a glob (``*`` matches dots too) or several; probabilities, whose width is the text's length, are none.
      output: the folder.
      dtype: ``float32``, or ``float16`` for half the bytes.
      interventions: see ``Model.intervened``.

    Raises:
      RequestError: bad ids, globs that match nothing, a value that ``dtype`` does not hold, or a folder that cannot be
        written.
      OutputError: the disk is full; nothing is left behind.
    """
    if not isinstance(model, Model) or isinstance(model, GraphModel):
        raise RequestError(f"model: expected a checkpoint's, of llmjax.load, found {shown(model)}")
    if dtype not in _DTYPES:
        raise RequestError(f"dtype: expected {' or '.join(_DTYPES)}, found {shown(dtype)}")
    if isinstance(batch, str | bytes) or not isinstance(batch, Iterable):
        raise RequestError(f"batch: expected token id lists, found {shown(batch)}")
    place = checked_path("output", output, RequestError)
    names = _chosen(model, taps)
    model = model.intervened(interventions)
    program = Program(_collector(model, names, dtype), compiler_options=model.compiler_options)
    with whole_folder(place, RequestError) as folder, contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(_Array(folder / f"{name}.npy", dtype)) for name in names}
        ids_file = stack.enter_context(_Array(folder / "token_ids.npy", "int32"))
        rows, groups = [0], defaultdict[int, list[tuple[int, np.ndarray]]](list)

        def write(width: int) -> None:
            group = groups.pop(width)
            ids, length = np.zeros((_together(width), width), np.int32), np.ones(_together(width), np.int32)
            for i, (_, row) in enumerate(group):
                ids[i], length[i] = filled_up(row, width), len(row)
            for name, values in jax.device_get(program(model.params, ids, length)).items():
                for (at, row), value in zip(group, values, strict=False):
                    if not np.isfinite(value[: len(row)]).all():
                        raise RequestError(f"{name}: text {rows.index(at)}: values that {dtype} does not hold, or NaN")
                    files[name].write(at, value[: len(row)])

        for i, row in enumerate(batch):
            ids = check_ids(row, model, f"text {i}")
            width = padded_width(len(ids))
            groups[width].append((rows[-1], ids))
            ids_file.write(rows[-1], ids)
            rows.append(rows[-1] + len(ids))
            if len(groups[width]) == _together(width):
                write(width)
        for width in list(groups):
            write(width)
        if len(rows) == 1:
            raise RequestError("batch: empty, expected at least one text")
        np.save(folder / "rows.npy", np.array(rows, np.int64))
        facts = {
            **model_facts(model),
            **runtime_facts(model.params),
            "taps": names,
            "texts": len(rows) - 1,
            "tokens": rows[-1],
        }
        (folder / "manifest.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return HiddenStates(place)


def _together(width: int) -> int:
    return max(1, TOGETHER // width)


def _chosen(model: Model, taps: str | Sequence[str]) -> list[str]:
    globs: list[Any] = [taps] if isinstance(taps, str) else list(taps) if isinstance(taps, Sequence) else [taps]
    there = sorted((name for name in tap_places(model.config) if not name.endswith(".probs")), key=order)
    for glob in globs or [taps]:
        if not isinstance(glob, str) or not any(fnmatchcase(name, glob) for name in there):
            some = ", ".join(there[:8])
            raise RequestError(f"taps: {shown(glob)} matches none of {some}, ...; probabilities are not written")
    return [name for name in there if any(fnmatchcase(name, glob) for glob in globs)]


def _collector(model: Model, names: Sequence[str], dtype: str) -> Callable[..., dict[str, jax.Array]]:
    def collected(params: Any, ids: jax.Array, length: jax.Array) -> dict[str, jax.Array]:
        """Activations ``[B, T, ...]`` by name, of ids ``[B, T]`` of so many tokens ``[B]`` each."""
        ctx = Context.whole(ids, model.numerics, length=length)
        _, made = model.module.apply({"params": params}, ids, ctx, mutable=["taps"])
        found = dict(named(made["taps"]))
        return {name: found[name].astype(dtype) for name in names}

    return collected


class _Array:
    """A .npy file that grows: rows of values in any order.

    Args:
      path: of the file.
      dtype: of the values.
    """

    def __init__(self, path: Path, dtype: str):
        self._dtype, self._shape = np.dtype(dtype), (0,)
        self._file: BinaryIO = path.open("wb")

    def __enter__(self) -> "_Array":
        return self

    def write(self, row: int, values: np.ndarray) -> None:
        """Puts ``values [T, ...]`` at this row and those after it."""
        values = np.ascontiguousarray(values, self._dtype)
        self._shape = (max(self._shape[0], row + len(values)), *values.shape[1:])
        self._file.seek(_HEADER + row * values[:1].nbytes)
        self._file.write(values.data)

    def __exit__(self, *_: object) -> None:
        text = repr({"descr": self._dtype.str, "fortran_order": False, "shape": self._shape})
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little"))
        self._file.write(text.ljust(_HEADER - 11).encode() + b"\n")
        self._file.close()
