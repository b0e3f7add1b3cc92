"""The files that llama.cpp's ``llama-debug --save-logits`` writes of one prompt, and its scripts for PyTorch likewise.

``llamacpp-NAME.bin`` (``pytorch-NAME.bin``) has the logits of the last token, ``[V]`` float32;
``llamacpp-NAME-tokens.bin`` all token ids, ``[T]`` int32, as they were fed; ``llamacpp-NAME-prompt.txt`` the prompt and
the ids once more.  All numbers are little-endian.  With ``--embedding`` it writes ``-embeddings.bin`` instead.
Source: llama.cpp, ``examples/debug/debug.cpp`` and ``examples/model-conversion/scripts/utils/common.py``.
"""

import re
from pathlib import Path

import numpy as np

from llmjax.errors import RequestError
from llmjax.oracle.dump import Dump, Stored, Window

_RUNTIMES = {"llamacpp-": "llama.cpp", "pytorch-": "PyTorch"}


def inside(folder: Path) -> Path | None:
    """The file of logits in a directory; None where no such files are.

    Raises:
      RequestError: there are several, or embeddings alone.
    """
    files = sorted(f for start in _RUNTIMES for f in folder.glob(f"{start}*.bin") if not _is_tokens(f))
    logits = [f for f in files if not f.stem.endswith("-embeddings")] or files
    if len(logits) > 1:
        raise RequestError(f"{folder}: several files of logits: {', '.join(f.name for f in logits)}; give one of them")
    return logits[0] if logits else None


def read(file: Path) -> Dump:
    """The dump of one file of logits.

    Raises:
      RequestError: it is none, its ids are missing, or the files do not fit each other.
    """
    if _is_tokens(file):
        name = file.name.removesuffix("-tokens.bin")
        raise RequestError(f"{file}: the token ids; give the logits' file: {name}.bin")
    if file.stem.endswith("-embeddings"):
        raise RequestError(f"{file}: embeddings, not logits; run llama-debug --save-logits without --embedding")
    tokens = _beside(file, "-tokens.bin")
    if not tokens.is_file():
        raise RequestError(
            f"{file}: {tokens.name} is missing beside it, which llama-debug --save-logits writes with it: the token ids"
        )
    ids = _numbers(tokens, "<i4", "token ids")
    if (ids < 0).any():
        raise RequestError(f"{tokens}: expected token ids, found {ids.min()}")
    _as_in_prompt(_beside(file, "-prompt.txt"), tokens, ids)
    logits = _numbers(file, "<f4", "logits")
    last = len(ids) - 1
    start = next((start for start in _RUNTIMES if file.name.startswith(start)), "")
    return Dump(
        str(file),
        {"runtime": _RUNTIMES.get(start), "model": file.stem.removeprefix(start), "token_ids": ids.tolist()},
        ids,
        {"logits": Stored((1, len(logits)), "float32", lambda: logits[None])},
        {"logits": Window(np.array([last]), lambda x: x[last:])},
        f"of llama-debug --save-logits: the logits of the last of {len(ids)} tokens, and nothing else",
    )


def is_logits(file: Path) -> bool:
    """Whether a file is called as these are, or token ids lie beside it, as beside these."""
    return file.suffix == ".bin" and (file.name.startswith(tuple(_RUNTIMES)) or _beside(file, "-tokens.bin").exists())


def _beside(file: Path, ending: str) -> Path:
    return file.with_name(file.stem + ending)


def _is_tokens(file: Path) -> bool:
    return file.stem.endswith("-tokens") and not _beside(file, "-tokens.bin").exists()


def _numbers(file: Path, dtype: str, what: str) -> np.ndarray:
    try:
        size = file.stat().st_size
        if not size or size % 4:
            raise RequestError(f"{file}: expected {what} of 4 bytes each, found {size} bytes; it is cut off, or none")
        return np.fromfile(file, dtype).astype(dtype[1:], copy=False)
    except OSError as error:
        raise RequestError(f"{file}: cannot be read: {error.strerror}") from None


def _as_in_prompt(file: Path, tokens: Path, ids: np.ndarray) -> None:
    """The ids stand in two files: they are of one run if they agree."""
    if not file.is_file():
        return
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RequestError(f"{file}: cannot be read: {error.strerror}") from None
    found = re.search(r"\nn_tokens: ([0-9]+)\ntoken ids: ([0-9, ]*)\s*\Z", text)
    if found is None:
        return
    if found[1] != str(len(ids)):
        raise RequestError(f"{tokens}: {len(ids)} token ids, but {file.name} says {found[1][:20]}: not of one run")
    if re.split(r"[, ]+", found[2].strip(", ")) != [str(i) for i in ids]:
        raise RequestError(f"{tokens}: the token ids are not those of {file.name}: not of one run")
