"""One file of tensors, by its ending: safetensors, or PyTorch's."""

from pathlib import Path
from typing import Protocol

import numpy as np

from converters.readers.digest import Stamp
from converters.readers.safetensors import SafetensorsFile
from converters.readers.source import TensorSpec
from llmjax.errors import CheckpointError

TORCH = (".bin", ".pt", ".pth")
ENDINGS = (".safetensors", *TORCH)


class WeightsFile(Protocol):
    """What ``Source`` says of a checkpoint, of one file.

    Attributes:
      path: of the file.
      stamp: what it was when it was opened.
    """

    path: Path
    stamp: Stamp

    def names(self) -> list[str]:
        """See ``Source``."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """See ``Source``."""
        ...

    def read(self, name: str) -> np.ndarray:
        """See ``Source``."""
        ...

    def release(self, name: str) -> None:
        """See ``Source``."""
        ...


def open_weights(path: Path, unknown: str) -> WeightsFile:
    """Opens a file.

    Args:
      path: of it.
      unknown: what to say of one with another ending.

    Raises:
      CheckpointError: it has another ending, or is damaged.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in TORCH:
        from converters.readers.torch.archive import TorchFile  # which few need

        return TorchFile(path)
    raise CheckpointError(f"{path}: {unknown}")
