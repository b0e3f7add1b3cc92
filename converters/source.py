"""What a checkpoint on disk looks like to the rest of llmjax, whatever its format."""

import glob
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


class Source(Protocol):
    """A checkpoint: lazy and memory-mapped, never the whole file in memory.

    Attributes:
      path: what the user named.
      format: ``huggingface`` or ``gguf``.
      config: ``config.json`` of a Hugging Face directory; empty for other formats.
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

    Raises:
      CheckpointError: nothing is there, or it is no checkpoint.
    """
    from converters.gguf import GgufSource
    from converters.huggingface import HuggingFaceSource

    path = Path(path)
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not (path / "config.json").exists():
            if len(ggufs) > 1:
                names = ", ".join(p.name for p in ggufs)
                raise CheckpointError(f"{path}: holds several GGUF files ({names}); name one of them")
            return GgufSource(ggufs[0])
        return HuggingFaceSource(path)
    if path.is_file():
        with open(path, "rb") as file:
            magic = file.read(4)
        if path.suffix == ".gguf" or magic == b"GGUF":
            return GgufSource(path)
        return HuggingFaceSource(path.parent, files=[path], path=path)
    matches = [Path(p) for p in sorted(glob.glob(str(path)))] if glob.has_magic(str(path)) else []
    if matches:
        return HuggingFaceSource(path.parent, files=matches, path=path)
    if path.exists():
        raise CheckpointError(f"{path}: neither a file nor a directory")
    raise CheckpointError(f"{path}: no such file or directory; expected a model directory or a *.gguf file")
