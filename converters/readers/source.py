"""What a checkpoint on disk looks like to the rest of llmjax, whatever its format."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from converters.readers.digest import Stamp
from llmjax.errors import CheckpointError

# How headers call floats, and how NumPy and JAX do.
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
      format: ``huggingface``, ``gguf``, ``llmjax`` or ``mediapipe``; ``graph`` of an op graph's weights.
      config: ``config.json`` of a directory; empty for GGUF.
      generation_config: ``generation_config.json`` beside it, or None.
      metadata: key-value pairs of a GGUF file; empty for other formats.
      directory: where files that belong to the checkpoint lie.
      files: those that hold its weights, and their index, as they were when they were opened.
    """

    path: Path
    format: str
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    metadata: dict[str, Any]
    directory: Path
    files: tuple[Stamp, ...]

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
