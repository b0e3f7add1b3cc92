"""Which reader makes a ``Tokenizer`` of which files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmjax.text import gguf, huggingface
from llmjax.text.tokenizer import Tokenizer


def is_in(directory: Path) -> bool:
    """Whether a Hugging Face directory has a tokenizer."""
    return any(os.path.lexists(directory / name) for name in huggingface.VOCABULARIES)


def from_huggingface(directory: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory: ``tokenizer.json``, else ``tokenizer.model``.

    Raises:
      TokenizerError: files are missing, damaged, or of an unknown kind.
    """
    return huggingface.read(Path(directory)).told()


def from_gguf(metadata: Mapping[str, Any], path: str | Path) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata.

    Args:
      metadata: the file's keys and values; arrays as lists or NumPy arrays.
      path: the file, for messages.

    Raises:
      TokenizerError: entries are missing, of the wrong type or length, or of an unknown kind.
    """
    return gguf.read(metadata, Path(path)).told()
