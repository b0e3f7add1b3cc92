"""Which format a candidate's path has."""

from collections.abc import Sequence
from pathlib import Path

from llmjax.errors import RequestError
from llmjax.model import Model
from llmjax.oracle.dump import Dump, open_dump
from llmjax.oracle.dumps import llama_debug, llama_perplexity
from llmjax.outside.paths import checked_path, path_problem


def opened(path: str | Path, model: Model | None) -> Sequence[Dump]:
    """A candidate's dumps: one, or one for each text of a file of several.

    Args:
      path: a dump's directory, a file of llama.cpp's, or a directory that holds one.
      model: ours, which knows what the file does not tell of its tokens.

    Raises:
      RequestError: it is none of them, or is malformed.
    """
    if path_problem(path):
        return [open_dump(path)]
    file = checked_path("compare", path, RequestError)
    if file.is_file():
        if llama_perplexity.is_base(file):
            return llama_perplexity.read(file, model)
        if file.suffix == ".bin":
            return [llama_debug.read(file)]
        raise RequestError(
            f"{file}: no dump: expected a directory with arrays and manifest.json, llamacpp-NAME.bin of llama-debug "
            "--save-logits (beside its -tokens.bin), or a file of llama-perplexity --kl-divergence-base"
        )
    if file.is_dir() and not (file / "manifest.json").exists() and (found := llama_debug.inside(file)):
        return [llama_debug.read(found)]
    return [open_dump(file)]
