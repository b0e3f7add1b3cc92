"""Which reader makes a ``Tokenizer`` of which files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmjax.text import gguf, huggingface, sentencepiece
from llmjax.text.tokenizer import Tokenizer, read_file


def from_huggingface(directory: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory: ``tokenizer.json``, else ``tokenizer.model``.

    Raises:
      TokenizerError: files are missing, damaged, or of an unknown kind.
    """
    return huggingface.read(Path(directory))


def from_gguf(metadata: Mapping[str, Any], path: str | Path) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata.

    Args:
      metadata: the file's keys and values; arrays as lists or NumPy arrays.
      path: the file, for messages.

    Raises:
      TokenizerError: entries are missing, of the wrong type or length, or of an unknown kind.
    """
    return gguf.read(metadata, Path(path))


def from_sentencepiece(
    model: bytes | str | Path,
    *,
    add_bos: bool = True,
    chat_template: str | None = None,
    where: str = "tokenizer.model",
) -> Tokenizer:
    """The tokenizer of a ``tokenizer.model`` file, or of its bytes (as bundles carry them).

    Args:
      model: the file or its bytes.
      add_bos: whether ``encode`` begins with BOS; the file itself does not say.
      chat_template: Jinja source.
      where: how messages call the bytes.

    Raises:
      TokenizerError: it is missing, damaged, or not a BPE model.
    """
    if not isinstance(model, bytes):
        where, model = str(model), read_file(Path(model))
    return sentencepiece.read(model, where, add_bos=add_bos, chat_template=chat_template)
