"""A Hugging Face model directory: ``config.json`` and weights in one or several files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from converters.source import TensorSpec
from llmjax.errors import CheckpointError

# As transformers looks for them.
_PREFERENCE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class _File(Protocol):
    path: Path

    def names(self) -> list[str]: ...
    def spec(self, name: str) -> TensorSpec: ...
    def read(self, name: str) -> np.ndarray: ...
    def release(self, name: str) -> None: ...


class HuggingFaceSource:
    """A directory, or some weights files with ``config.json`` beside them, as a ``Source``.

    Args:
      directory: holds ``config.json``.
      files: the weights files; None looks for them by their usual names.
      path: what the user named, for messages.

    Raises:
      CheckpointError: no or bad ``config.json``, no weights, missing or contradictory shards; all at once.
    """

    format = "huggingface"

    def __init__(self, directory: Path, *, files: Sequence[Path] | None = None, path: Path | None = None):
        self.directory = directory
        self.path = path or directory
        self.metadata: dict[str, Any] = {}
        config = read_json(directory / "config.json")
        if config is None:
            raise CheckpointError(
                f"{self.path}: no config.json in {directory}; expected a Hugging Face model directory or a *.gguf file"
            )
        self.config = config
        self.generation_config = read_json(directory / "generation_config.json")
        weight_map: dict[str, str] | None = None
        if files is None:
            files, weight_map = self._find_files()
        self._files = [_open(file) for file in files]
        self._home: dict[str, _File] = {}
        problems = []
        for file in self._files:
            for name in file.names():
                if name in self._home:
                    problems.append(f"tensor {name} is in {self._home[name].path.name} and in {file.path.name}")
                self._home.setdefault(name, file)
        if weight_map is not None:
            problems += self._contradictions(weight_map)
        if problems:
            shown = [*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])]
            raise CheckpointError(f"{self.path}: " + "\n  ".join(["the shards do not fit together:", *shown]))

    def _find_files(self) -> tuple[list[Path], dict[str, str] | None]:
        found = next((self.directory / n for n in _PREFERENCE if (self.directory / n).exists()), None)
        if found is None:
            raise CheckpointError(f"{self.directory}: no weights; expected one of {', '.join(_PREFERENCE)}")
        if found.suffix != ".json":
            return [found], None
        index = read_json(found) or {}
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{found}: expected an object 'weight_map' from tensor names to file names")
        shards = sorted(set(weight_map.values()))
        problems = [f"{s!r} is not a plain file name" for s in shards if Path(s).name != s or s in (".", "..")]
        problems += [
            f"shard {s} is missing" for s in shards if Path(s).name == s and not (self.directory / s).is_file()
        ]
        if problems:
            raise CheckpointError(f"{found}: " + "\n  ".join(["shards cannot be read:", *problems]))
        return [self.directory / s for s in shards], weight_map

    def _contradictions(self, weight_map: dict[str, str]) -> list[str]:
        problems = []
        for name, shard in weight_map.items():
            if name not in self._home:
                problems.append(f"tensor {name} is missing; the index says it is in {shard}")
            elif self._home[name].path.name != shard:
                problems.append(f"tensor {name} is in {self._home[name].path.name}; the index says {shard}")
        problems += [
            f"tensor {name} in {file.path.name} is not in the index"
            for name, file in self._home.items()
            if name not in weight_map
        ]
        return problems

    def names(self) -> list[str]:
        """See ``Source``."""
        return list(self._home)

    def spec(self, name: str) -> TensorSpec:
        """See ``Source``."""
        return self._home[name].spec(name)

    def read(self, name: str) -> np.ndarray:
        """See ``Source``."""
        return self._home[name].read(name)

    def release(self, name: str) -> None:
        """See ``Source``."""
        self._home[name].release(name)

    def close(self) -> None:
        """See ``Source``.  Each map goes when the last array that views it does."""


def _open(path: Path) -> _File:
    if path.suffix == ".safetensors":
        from converters.safetensors import SafetensorsFile

        return SafetensorsFile(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        from converters.torchbin import TorchFile

        return TorchFile(path)
    raise CheckpointError(f"{path}: unknown kind of weights file; expected *.safetensors, *.bin or *.gguf")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is no such file.

    Raises:
      CheckpointError: it cannot be read, or is no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
