"""Which reader opens what a user names."""

import glob
import os
from pathlib import Path

from converters.readers.gguf import GgufSource, without_later_parts
from converters.readers.huggingface import WEIGHTS, HuggingFaceSource
from converters.readers.litert.tflite import has_operators, is_tflite
from converters.readers.llmjax_directory import LlmjaxSource, is_llmjax
from converters.readers.mediapipe.package import kind_of
from converters.readers.mediapipe.source import MediapipeSource
from converters.readers.source import Source, problems_error
from llmjax.errors import CheckpointError, lies_at, named


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
        found = lies_at(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it: {error.strerror}") from None
    if glob.has_magic(str(path)):
        found = "no file matches this pattern"
    wanted = "a model directory, a *.gguf file or weights files"
    if path.parts[:1] and path.parts[0].startswith("~"):
        wanted += "; '~' is for a shell to replace, which it does at the beginning of a word: write the folder out"
    elif len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists():  # a name on Hugging Face's hub?
        wanted += f"; llmjax downloads nothing, 'hf download {path} --local-dir FOLDER' does"
    raise CheckpointError(f"{path}: {found}; expected {wanted}")


def is_graph(path: Path) -> bool:
    """Whether a file is a bundle, or a TFLite file with operators (MediaPipe's ``.bin`` files have none)."""
    return path.is_file() and (kind_of(path) is not None or has_operators(path))


def _open_directory(path: Path) -> Source:
    if is_llmjax(path):
        return LlmjaxSource(path)
    ggufs = without_later_parts(sorted(path.glob("*.gguf")))
    if not ggufs or any(os.path.lexists(path / name) for name in WEIGHTS):
        return HuggingFaceSource(path)
    if len(ggufs) > 1:
        names = [named(p.name) for p in ggufs]
        raise problems_error(path, "holds several GGUF files, name one of them", names)
    return GgufSource(ggufs[0])


def _open_files(path: Path, files: list[Path]) -> Source:
    if len(files) == 1 and is_graph(files[0]):
        raise CheckpointError(
            f"{files[0]}: this file holds an op graph, which llmjax runs (generate, batch, score, trace), and "
            "no checkpoint for this; name the model's .bin or GGUF file, or Hugging Face directory"
        )
    if len(files) == 1 and is_tflite(files[0]):
        return MediapipeSource(files[0])
    files = without_later_parts(files)
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
