"""A Hugging Face model directory: ``config.json`` and weights in one or several files."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from converters.readers import float8
from converters.readers.digest import Stamp, stamp
from converters.readers.float8 import Float8
from converters.readers.jsonfile import read_json
from converters.readers.safetensors import SafetensorsFile
from converters.readers.source import TensorSpec, problems_error
from converters.readers.weights_file import ENDINGS, WeightsFile, open_weights
from llmjax.errors import CheckpointError, named

# As transformers looks for them, the first one found.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_T = TypeVar("_T")


class HuggingFaceSource:
    """A directory, or some weights files with ``config.json`` beside them, as a ``Source``.

    Args:
      directory: holds ``config.json``.
      files: the weights files, or one index; None looks for them by their usual names.
      path: what the user named, for messages.
      config: what stands for ``config.json`` where there is none.

    Attributes:
      absent: tensors that the index has and no file does, by name the file that should: tools that make safetensors of
        other files leave a head that repeats the embedding out of them, and in the index.

    Raises:
      CheckpointError: no or bad ``config.json``, no weights, damaged, missing or contradictory files; all at once.
    """

    format = "huggingface"

    def __init__(
        self,
        directory: Path,
        *,
        files: Sequence[Path] | None = None,
        path: Path | None = None,
        config: dict[str, Any] | None = None,
    ):
        self.directory = directory
        self.path = path or directory
        self.metadata: dict[str, Any] = {}
        self._home: dict[str, WeightsFile] = {}
        problems: list[str] = []
        of_config: list[str] = []
        has_config = (directory / "config.json").exists()
        if config is None or has_config:
            config = self._read_config(of_config)
        self.config, eights = float8.settings(config)
        self.generation_config = _collect(problems, read_json, directory / "generation_config.json")
        self._index: list[Stamp] = []
        index, files = self._find_files(files, problems)
        shards = {path.name: _collect(problems, _open, path) for path in files}
        opened = [file for file in shards.values() if file is not None]
        if opened or has_config or self.path == directory:  # what is no weights file wants no config.json beside it
            problems = of_config + problems
        self.files = (*self._index, *(file.stamp for file in opened))
        for file in opened:
            for name in file.names():
                if name in self._home:
                    other = self._home[name].path.name
                    problems.append(f"{file.path}: tensor {named(name)} is in {other}, too")
                self._home.setdefault(name, file)
        read = {name for name, file in shards.items() if file is not None}
        self.absent = {n: shard for n, shard in index.items() if n not in self._home and shard in read}
        problems += self._contradictions(index)
        specs = {name: file.spec(name) for name, file in self._home.items()} if eights else {}
        self._eights = Float8(eights or {}, specs, directory, problems)
        if len(problems) == 1:
            raise CheckpointError(problems[0])
        if problems:
            raise problems_error(self.path, "cannot read the checkpoint", problems)

    def _read_config(self, problems: list[str]) -> dict[str, Any]:
        path = self.directory / "config.json"
        before = len(problems)
        config = _collect(problems, read_json, path)
        if config is None:
            if len(problems) == before:
                problems.append(
                    f"{path}: no such file; expected a Hugging Face model directory (weights with config.json beside "
                    "them) or a *.gguf file"
                )
            return {}
        if not isinstance(config.get("model_type"), str):
            problems.append(f"{path}: expected model_type, a string; copy config.json from the model's own repository")
        return config

    def _find_files(self, files: Sequence[Path] | None, problems: list[str]) -> tuple[dict[str, str], list[Path]]:
        """The index (empty where there is none) and the weights files."""
        if files is None:
            found = next((self.directory / n for n in WEIGHTS if os.path.lexists(self.directory / n)), None)
            if found is None:
                problems.append(f"{self.directory}: no weights; looked for {', '.join(WEIGHTS)}{self._others()}")
                return {}, []
            files = [found]
        if len(files) != 1 or files[0].suffix != ".json":
            return {}, list(files)
        with contextlib.suppress(OSError):  # the reading says so
            self._index.append(stamp(files[0]))
        index = _collect(problems, _read_index, files[0])
        if index is None:
            return {}, []
        return index, [self.directory / shard for shard in sorted(set(index.values()))]

    def _others(self) -> str:
        others = sorted(p.name for p in self.directory.iterdir() if p.suffix in ENDINGS)
        if not others:
            return ""
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        return f"; found {', '.join(map(named, others[:5]))}{more}: name the file, or a pattern, to read them"

    def _contradictions(self, index: dict[str, str]) -> list[str]:
        """Where the index and the shards disagree of a tensor that is there."""
        problems = []
        for name, shard in index.items():
            if name in self._home and self._home[name].path.name != shard:
                found = self._home[name].path.name
                problems.append(f"tensor {named(name)} is in {named(found)}; the index says {named(shard)}")
        if index:
            problems += [
                f"tensor {named(name)} in {named(file.path.name)} is not in the index"
                for name, file in self._home.items()
                if name not in index
            ]
        return [f"{self.directory}: {problem}" for problem in problems]

    def names(self) -> list[str]:
        """See ``Source``."""
        return [name for name in self._home if name not in self._eights.others]

    def spec(self, name: str) -> TensorSpec:
        """See ``Source``."""
        return self._home[name].spec(name)

    def read(self, name: str) -> np.ndarray:
        """See ``Source``."""
        file = self._home[name]
        if name in self._eights.scales and isinstance(file, SafetensorsFile):
            return self._eights.read(name, file.raw(name), file.spec(name).shape, self.read)
        return file.read(name)

    def release(self, name: str) -> None:
        """See ``Source``."""
        self._home[name].release(name)

    def close(self) -> None:
        """See ``Source``.  Each map goes when the last array that views it does."""


def _open(path: Path) -> WeightsFile:
    kinds = "*.safetensors, *.bin, *.gguf, *.litertlm, *.task or *.tflite"
    return open_weights(path, f"unknown kind of weights file; expected {kinds}")


def _collect(problems: list[str], read: Callable[[Path], _T], path: Path) -> _T | None:
    """What ``read`` returns, or None and its error among the problems."""
    try:
        return read(path)
    except CheckpointError as error:
        problems.append(str(error))
        return None


def _read_index(path: Path) -> dict[str, str]:
    """Tensor names to names of files beside the index."""
    index = read_json(path) or {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        advice = "" if path.name.endswith(".index.json") else "; it is no index of weights: name the model's directory"
        raise CheckpointError(
            f"{path}: expected a non-empty object 'weight_map' from tensor names to file names{advice}"
        )
    tricks = [s for s in sorted(set(weight_map.values())) if s in ("", ".", "..") or any(c in s for c in "/\\:\0")]
    if tricks:
        raise problems_error(
            path, "expected names of files beside the index, found", [f"'{named(s)}'" for s in tricks], most=5
        )
    return weight_map
