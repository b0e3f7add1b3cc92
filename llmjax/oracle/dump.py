"""Dumps: directories of arrays that a runtime computed for one prompt, and ``manifest.json``.

Arrays ``[T, ...]`` or ``[1, T, ...]`` lie in ``*.safetensors``, ``*.npz`` and ``*.npy`` files (a ``.npy`` file's array
has the file's name).  Nothing is read before it is asked for.  bfloat16 and float16 stay what they are; NumPy's files
have no name for bfloat16 and hold it as ``V2``.
"""

import dataclasses
import difflib
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.readers.jsonfile import read_json
from converters.readers.safetensors import SafetensorsFile
from converters.readers.source import FLOATS
from llmjax.errors import CheckpointError, LlmjaxError, RequestError, lies_at, shown
from llmjax.outside.paths import checked_path

_FLOATS = ("float64", "float32", "float16", "bfloat16")
# Where the record at the end of a zip archive begins at most, a comment behind it.
_END = 22 + 0xFFFF
# What readers of damaged or hostile files raise.
_DAMAGED = (
    OSError, ValueError, TypeError, EOFError, MemoryError, OverflowError, RuntimeError, SyntaxError,
    zipfile.BadZipFile, zlib.error, LlmjaxError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of a dump.

    Attributes:
      shape: as it is stored.
      dtype: ``float32``, ``bfloat16``, ...
      read: reads it.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Window:
    """What an array shows of a tap where that is not all of it.

    Attributes:
      positions: int ``[R]``, of the tokens whose rows it has.
      show: makes of a tap ``[T, ...]`` what the array would show of it, ``[R, ...]``, before rounding.
      rounding: of values ``[R, ...]``, the most by which storing may have moved each; None for not at all.
      log_probs: it shows log-probabilities of logits.
    """

    positions: np.ndarray
    show: Callable[[np.ndarray], np.ndarray]
    rounding: Callable[[np.ndarray], np.ndarray] | None = None
    log_probs: bool = False


@dataclasses.dataclass(frozen=True)
class Dump:
    """What a runtime computed.

    Attributes:
      path: for messages.
      manifest: see ``llmjax compare``'s contract: ``token_ids``, and what it declares of itself.
      token_ids: int32 ``[T]``.
      arrays: by the runtime's own names.
      windows: of the arrays that show a part of a tap alone; nothing can be computed from those.
      kind: which program's file it is, and what that holds; empty for a dump's directory.
    """

    path: str
    manifest: Mapping[str, Any]
    token_ids: np.ndarray
    arrays: Mapping[str, Stored]
    windows: Mapping[str, Window] = dataclasses.field(default_factory=dict)
    kind: str = ""

    def read(self, name: str) -> np.ndarray:
        """One array, every value finite.

        Raises:
          RequestError: it cannot be read, or holds NaN or infinity.
        """
        try:
            value = self.arrays[name].read()
        except _DAMAGED as error:
            raise RequestError(f"{self.path}: {name}: cannot be read, the file is damaged: {_line(error)}") from None
        if not np.isfinite(value).all():
            bad = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
            raise RequestError(
                f"{self.path}: {name}: NaN or infinity at {list(bad)}; a step before it overflows or divides by zero"
            )
        if np.abs(value).max() > np.finfo(np.float32).max:
            raise RequestError(f"{self.path}: {name}: beyond float32's range, up to {np.abs(value).max():.1e}")
        return value


def open_dump(path: str | Path) -> Dump:
    """Opens a dump's directory and checks all that its headers say.

    Raises:
      RequestError: it is none, or is malformed; all problems of its arrays in one line.
    """
    if not isinstance(path, str | os.PathLike):
        raise RequestError(f"compare: expected a dump's directory, a Dump, a Trace or a Model, found {shown(path)}")
    folder = checked_path("compare", path, RequestError)
    if not os.path.isdir(folder):
        raise RequestError(
            f"{folder}: {lies_at(folder)}; expected a dump, a directory with arrays and manifest.json, or a file of "
            "llama.cpp's: of llama-debug --save-logits, or of llama-perplexity --kl-divergence-base"
        )
    manifest = _manifest(folder)
    ids = _token_ids(str(folder / "manifest.json"), manifest)
    arrays: dict[str, Stored] = {}
    names: Counter[str] = Counter()
    for file in sorted(folder.iterdir()):
        if file.suffix in _READERS and not file.name.startswith("."):
            try:
                for name, stored in _READERS[file.suffix](file):
                    names[name] += 1
                    arrays[name] = stored
            except _DAMAGED as error:
                text = error.strerror if isinstance(error, OSError) and error.strerror else _line(error)
                raise RequestError(
                    text if str(file) in text else f"{file}: not a readable array file: {text}"
                ) from None
    twice = [f"{name} is there {count} times" for name, count in names.items() if count > 1]
    expected = "expected *.safetensors, *.npz or *.npy beside manifest.json"
    return Dump(str(folder), manifest, ids, _activations(str(folder), manifest, arrays, twice, expected))


def _activations(
    path: str, manifest: Mapping[str, Any], arrays: Mapping[str, Stored], problems: list[str], expected: str
) -> Mapping[str, Stored]:
    """The arrays, each of floats ``[T, ...]``; all ``problems`` in one line."""
    if "modules" in manifest:  # of an op graph, whose whole numbers are no steps of a model
        arrays = {name: stored for name, stored in arrays.items() if stored.dtype in _FLOATS}
    for name, stored in arrays.items():
        if stored.dtype not in _FLOATS:
            problems.append(f"{name}: expected floats ({', '.join(_FLOATS)}), found {stored.dtype}")
        elif 0 in stored.shape or not stored.shape:
            problems.append(f"{name}: holds no values [T, ...], its shape is {list(stored.shape)}")
    if not arrays:
        problems.append(f"no arrays: {expected}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise RequestError(f"{path}: {'; '.join(problems[:3])}{more}")
    return arrays


def in_memory(path: str, manifest: Any, arrays: Any) -> Dump:
    """A dump whose arrays (NumPy's, JAX's, or lists of numbers) and manifest somebody made, checked as a directory is.

    Raises:
      RequestError: it is malformed.
    """
    for what, value in (("manifest", manifest), ("activations", arrays)):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise RequestError(f"{path}: {what}: expected a mapping by names, found {shown(value)}")
    where = f"{path}: manifest"
    _check_manifest(where, manifest)
    ids = _token_ids(where, manifest)
    made = {}
    for name, value in arrays.items():
        try:
            made[name] = np.asarray(value)
        except _DAMAGED as error:
            raise RequestError(f"{path}: {shown(name)}: expected an array: {_line(error)}") from None
    found = from_arrays(path, manifest, ids, {name: _typed(array) for name, array in made.items()})
    expected = "expected activations by their names"
    return dataclasses.replace(found, arrays=_activations(path, manifest, found.arrays, [], expected))


def from_arrays(path: str, manifest: Mapping[str, Any], ids: np.ndarray, arrays: Mapping[str, np.ndarray]) -> Dump:
    """A dump of arrays in memory, a trace's say."""
    stored = {n: Stored(a.shape, a.dtype.name, lambda a=a: a) for n, a in arrays.items()}  # type: ignore[misc]
    return Dump(path, manifest, ids, stored)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_json(folder / "manifest.json")
    except CheckpointError as error:
        raise RequestError(_line(error)) from None
    if manifest is None:
        is_model = (folder / "config.json").exists()
        raise RequestError(
            f"{folder}: manifest.json is missing; a dump names at least the token ids that it was made of: "
            f'{{"token_ids": [...]}}{"; a model is compared by --candidate-model" if is_model else ""}'
        )
    _check_manifest(str(folder / "manifest.json"), manifest)
    return manifest


def _check_manifest(where: str, manifest: Mapping[str, Any]) -> None:
    for key, kind in {"dtype": str, "numerics": str, "runtime": str, "names": dict}.items():
        if manifest.get(key) is not None and not isinstance(manifest[key], kind):
            found = shown(manifest[key])
            raise RequestError(f"{where}: {key}: expected {_KINDS[kind]}, found {found}")
    for key in manifest.keys() - {*_READ}:  # other facts are the dump's own affair
        known = {_letters(name): name for name in _READ if name not in manifest}
        for near in difflib.get_close_matches(_letters(key), known, 1, 0.9):
            raise RequestError(f"{where}: {shown(key)} is not read; {known[near]} would be")


def _letters(key: str) -> str:
    return key.lower().replace("_", "").replace("-", "").replace(" ", "")


# What a manifest's author writes that changes what is made of its arrays.
_READ = ("token_ids", "dtype", "numerics", "quantization", "kv_cache", "runtime", "names")
_KINDS: dict[type, str] = {str: "a text", dict: "an object of names"}


def _token_ids(where: str, manifest: Mapping[str, Any]) -> np.ndarray:
    ids = manifest.get("token_ids")
    if ids is None:
        raise RequestError(f"{where}: token_ids is missing: the ids as they were fed, BOS included if it was")
    ids = ids.tolist() if hasattr(ids, "tolist") else ids  # an array in memory
    if isinstance(ids, list) and len(ids) == 1 and isinstance(ids[0], list):
        ids = ids[0]  # a batch of one
    whole = isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < 1 << 31 for i in ids)
    if not whole:
        raise RequestError(f"{where}: token_ids: expected a list of token ids, found {shown(manifest['token_ids'])}")
    return np.array(ids, np.int32)


def _safetensors(file: Path) -> Iterator[tuple[str, Stored]]:
    source = SafetensorsFile(file)
    kinds = {"F64": "float64", **FLOATS}
    for name in source.names():
        spec = source.spec(name)

        def read(name: str = name) -> np.ndarray:
            return source.read(name)

        yield name, Stored(spec.shape, kinds.get(spec.dtype, spec.dtype), read)


def _npy(file: Path) -> Iterator[tuple[str, Stored]]:
    with np.errstate(over="ignore"):  # of a shape that no file has
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("it is an archive of several arrays, expected its name to end in .npz")
    yield file.stem, Stored(array.shape, _kind(array.dtype), lambda: _typed(np.array(array)))


def _npz(file: Path) -> Iterator[tuple[str, Stored]]:
    with zipfile.ZipFile(file) as archive:
        for member in _members(file, archive):
            with archive.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(stream)

            def read(member: str = member) -> np.ndarray:
                with zipfile.ZipFile(file) as archive, archive.open(member) as stream:
                    return _typed(np.lib.format.read_array(stream, allow_pickle=False))

            yield member.removesuffix(".npy"), Stored(shape, _kind(dtype), read)


def _members(file: Path, archive: zipfile.ZipFile) -> list[str]:
    """The arrays of an archive.  Each of its entries is one: what a damaged directory hides would be missing in
    silence."""
    with open(file, "rb") as stream:
        stream.seek(max(0, os.path.getsize(file) - _END))
        end = stream.read()
    count = int.from_bytes(end[end.rfind(b"PK\5\6") :][10:12], "little")
    names = [name for name in archive.namelist() if not name.endswith("/")]
    if count not in (len(archive.namelist()), 0xFFFF):
        raise ValueError(f"its directory shows {len(archive.namelist())} of {count} entries")
    if others := [name for name in names if not name.endswith(".npy")]:
        raise ValueError(f"{shown(others[0])} is no array, expected a name that ends in .npy")
    return names


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Stored]]]] = {
    ".safetensors": _safetensors,
    ".npy": _npy,
    ".npz": _npz,
}


def _kind(dtype: np.dtype) -> str:
    return "bfloat16" if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None else dtype.name


def _typed(array: np.ndarray) -> np.ndarray:
    """In this machine's byte order, bfloat16 by its name."""
    if _kind(array.dtype) == "bfloat16":
        return array.view(ml_dtypes.bfloat16)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
