"""Which format a candidate's path has."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from converters.readers.opening import open_source
from converters.readers.source import FLOATS
from llmjax.errors import RequestError
from llmjax.litert.model import GraphModel
from llmjax.model import Model
from llmjax.oracle.dump import Dump, open_dump
from llmjax.oracle.dumps import llama_debug, llama_perplexity
from llmjax.outside.paths import checked_path, path_problem
from llmjax.quant.qtensor import QTensor, is_qtensor


def opened(path: str | Path, model: Model | None) -> Sequence[Dump]:
    """A candidate's dumps: one, or one for each text of a file of several, or of a directory of dumps.

    Args:
      path: a dump's directory, one of such directories, a file of llama.cpp's, or a directory that holds one.
      model: ours, which knows what the file does not tell of its tokens.

    Raises:
      RequestError: it is none of them, or is malformed.
    """
    if path_problem(path):
        return [open_dump(path)]
    file = checked_path("compare", path, RequestError)
    if file.is_file():
        if llama_perplexity.is_base(file):
            return _as_llama_cpp(llama_perplexity.read(file, model), model)
        if llama_debug.is_logits(file):
            return _as_llama_cpp([llama_debug.read(file)], model)
        raise RequestError(
            f"{file}: no dump: expected a directory with arrays and manifest.json, llamacpp-NAME.bin of llama-debug "
            "--save-logits (beside its -tokens.bin), or a file of llama-perplexity --kl-divergence-base; a model is "
            "compared by --candidate-model"
        )
    if file.is_dir() and not (file / "manifest.json").exists() and (found := llama_debug.inside(file)):
        return _as_llama_cpp([llama_debug.read(found)], model)
    return each(file)


def each(path: str | Path) -> Sequence[Dump]:
    """A dump's directory, or the directories of dumps in one that is none itself (``oracle.vectors``), by their names.

    Raises:
      RequestError: there is no dump, or one is malformed.
    """
    if path_problem(path):
        return [open_dump(path)]
    folder = Path(path)
    if folder.is_dir() and not (folder / "manifest.json").exists():
        inner = sorted(file.parent for file in folder.glob("[!.]*/manifest.json"))
        arrays = sorted(file for kind in ("safetensors", "npz", "npy") for file in folder.glob(f"[!.]*/*.{kind}"))
        if inner and (bare := [file.parent for file in arrays if file.parent not in inner]):
            open_dump(bare[0])  # which says what it lacks
        return [open_dump(one) for one in inner] or [open_dump(path)]
    return [open_dump(path)]


def refuse_reference(path: str | Path) -> None:
    """Raises for a file that only a candidate can be.

    Raises:
      RequestError: it is one.
    """
    file = Path(path)
    if file.is_file() and (llama_perplexity.is_base(file) or llama_debug.is_logits(file)):
        raise RequestError(f"{file}: a file of llama.cpp's is compared with a model: llmjax compare --model M {file}")


def _as_llama_cpp(dumps: Sequence[Dump], model: Model | None) -> Sequence[Dump]:
    """With what is known of llama.cpp's arithmetic where it runs our model's own weights: its cache in float16, and so
    its table of GELU for a model that has one; inputs of products as narrow as their weights are, and in blocks of
    8 bits where those are quantized."""
    if model is None or isinstance(model, GraphModel) or dumps[0].manifest["runtime"] != "llama.cpp":
        return dumps
    kinds = _kinds(model)
    if kinds & {"block_int8", "bfloat16"}:
        kinds.add("float16")  # what some devices multiply these in
    acts = (getattr(model.config, name, "") for name in ("hidden_act", "hidden_activation", "activation"))
    table = ["gelu16"] if any("gelu" in str(act) for act in acts) else []
    # Of one row by chance float16 may do more than it does to ours: then another cache is what explains it, and told.
    caches = ["cache_float16", "cache16"] if len(dumps[0].windows["logits"].positions) == 1 else ["cache_float16"]
    known = ", ".join([*table, *caches, *sorted(kinds - {"float32"})])
    facts = {"dtype": "float32", "numerics": f"llama.cpp: {known}"}
    return [dataclasses.replace(dump, manifest={**dump.manifest, **facts}) for dump in dumps]


def _kinds(model: Model) -> set[str]:
    """How the matrices of a model are stored, and those of a GGUF file in that, whatever ours were expanded to."""
    leaves = jax.tree.leaves(model.params, is_leaf=is_qtensor)
    kinds = {"block_int8" if isinstance(x, QTensor) else x.dtype.name for x in leaves if len(x.shape) > 1}
    if model.path.suffix == ".gguf" and model.path.is_file():
        source = open_source(model.path)
        specs = [source.spec(name) for name in source.names()]
        kinds |= {FLOATS.get(spec.dtype, "block_int8") for spec in specs if len(spec.shape) > 1}
        source.close()
    return kinds
