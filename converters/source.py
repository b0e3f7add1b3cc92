"""What a checkpoint on disk looks like to the rest of llmjax, whatever its format."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmjax.errors import CheckpointError


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of a tensor.

    Attributes:
      name: as the file spells it.
      shape: in NumPy's order; a weight is ``[out, in]``.
      dtype: the format's own name in upper case: ``F32``, ``F16``, ``BF16``, ``Q4_1``, ...
      nbytes: size in the file.
      file: which holds it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path


def shown(name: str) -> str:
    """A name from a file as a message may show it: at most 100 characters, and none that controls a terminal."""
    text = name if len(name) <= 100 else name[:100] + "..."
    return text.encode("unicode_escape").decode("ascii")


def problems_error(where: str | Path, what: str, problems: Sequence[str], most: int = 20) -> CheckpointError:
    """One error for all problems of a file: on the same line if there is one, else one per line, ``most`` at most."""
    if len(problems) == 1:
        return CheckpointError(f"{where}: {what}: {problems[0]}")
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return CheckpointError("\n  ".join([f"{where}: {what}:", *problems[:most], *more]))


class Source(Protocol):
    """A checkpoint: lazy and memory-mapped, never the whole file in memory.

    Attributes:
      path: what the user named.
      format: ``huggingface``, ``gguf``, ``llmjax`` or ``mediapipe``.
      config: ``config.json`` of a directory; empty for GGUF.
      generation_config: ``generation_config.json`` beside it, or None.
      metadata: key-value pairs of a GGUF file; empty for other formats.
      directory: where files that belong to the checkpoint lie.
    """

    path: Path
    format: str
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    metadata: dict[str, Any]
    directory: Path

    def names(self) -> list[str]:
        """All tensors, in the order of the file."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """From the header alone."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor: a read-only view of the mapped file, or a fresh array; block-quantized types as float32."""
        ...

    def release(self, name: str) -> None:
        """Gives the mapped pages of a tensor back, so that loading never holds the file twice."""
        ...

    def close(self) -> None:
        """Closes the files; arrays read before stay valid."""
        ...


def open_source(path: str | Path) -> Source:
    """Opens a checkpoint by what its path is: a directory, a ``*.gguf`` file, a weights file, or a pattern of them.

    A directory is Hugging Face's if it has weights by one of Hugging Face's names; else its single GGUF file is meant.

    Raises:
      CheckpointError: nothing is there, or it is no checkpoint.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_directory(path)
        if path.is_file():
            return _open_files(path, [path])
        matches = sorted(Path(p) for p in glob.glob(str(path))) if glob.has_magic(str(path)) else []
        if len(matches) == 1 and matches[0].is_dir():
            return _open_directory(matches[0])
        if matches:
            return _open_files(path, matches)
        found = "neither a file nor a directory" if path.exists() else "no such file or directory"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it: {error.strerror}") from None
    if glob.has_magic(str(path)):
        found = "no file matches this pattern"
    raise CheckpointError(f"{path}: {found}; expected a model directory, a *.gguf file or weights files")


def _open_directory(path: Path) -> Source:
    from converters.gguf import GgufSource
    from converters.huggingface import WEIGHTS, HuggingFaceSource
    from converters.llmjax import LlmjaxSource, is_llmjax

    if is_llmjax(path):
        return LlmjaxSource(path)
    ggufs = sorted(path.glob("*.gguf"))
    if not ggufs or any((path / name).exists() for name in WEIGHTS):
        return HuggingFaceSource(path)
    if len(ggufs) > 1:
        names = [shown(p.name) for p in ggufs]
        raise problems_error(path, "holds several GGUF files, name one of them", names)
    return GgufSource(ggufs[0])


def _open_files(path: Path, files: list[Path]) -> Source:
    from converters.gguf import GgufSource
    from converters.huggingface import HuggingFaceSource
    from converters.mediapipe.container import is_container
    from converters.mediapipe.package import kind_of
    from converters.mediapipe.source import MediapipeSource

    if len(files) == 1 and is_container(files[0]):
        return MediapipeSource(files[0])
    if len(files) == 1 and (kind := kind_of(files[0])):
        raise CheckpointError(
            f"{files[0]}: a .{kind} bundle: llmjax does not run its TFLite graph yet, it shows what is inside "
            "(llmjax inspect); load the model's .bin file, GGUF file or Hugging Face directory"
        )
    ggufs = [file for file in files if _is_gguf(file)]
    if len(files) == 1 and ggufs:
        return GgufSource(files[0])
    directories = sorted({str(file.parent) for file in files})
    if ggufs or len(directories) > 1:
        where = f"lie in {len(directories)} directories" if len(directories) > 1 else f"include {ggufs[0].name}"
        raise CheckpointError(
            f"{path}: expected one *.gguf file, or weights files in one directory; the {len(files)} matches {where}"
        )
    return HuggingFaceSource(files[0].parent, files=files, path=path)


def _is_gguf(path: Path) -> bool:
    if path.suffix == ".gguf" or not path.is_file():
        return path.suffix == ".gguf"
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"
