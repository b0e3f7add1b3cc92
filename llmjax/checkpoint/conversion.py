"""A checkpoint into llmjax's or Hugging Face's form, tensor by tensor, whole or not at all."""

import contextlib
import json
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.readers import digest
from converters.readers.llmjax_directory import PARTS, VERSION, WEIGHTS, LlmjaxSource
from converters.readers.mediapipe.source import MediapipeSource
from converters.readers.source import Source
from llmjax import __version__
from llmjax.checkpoint.ends import end_tokens
from llmjax.checkpoint.graph_source import GraphSource
from llmjax.checkpoint.loading import check_dtype, read_tokenizer
from llmjax.checkpoint.opened import opened
from llmjax.checkpoint.parameters import OnParameter, Parameter, read_all
from llmjax.checkpoint.plan import Override, Plan, describe
from llmjax.checkpoint.safetensors_writer import SafetensorsWriter
from llmjax.errors import ConfigError
from llmjax.lora import merge as merging
from llmjax.lora.adapter import Adapter, AnyLora
from llmjax.models.names import sources_of
from llmjax.models.registry import read_config
from llmjax.outside.whole import whole_folder
from llmjax.quant.qtensor import QTensor, dequantize
from llmjax.quant.schemes import Recipe
from llmjax.text import export
from llmjax.text.mediapipe import MediapipeTokenizer, for_transformers
from llmjax.text.tokenizer import Tokenizer

FORMATS: tuple[str, ...] = ("llmjax", "hf")


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "llmjax",
    quantize: str | Path | Mapping[str, Any] | None = None,
    dtype: str | None = None,
    check_finite: bool = False,
    config: str | Path | Mapping[str, Any] | None = None,
    lora: AnyLora | None = None,
    report: OnParameter = lambda done, total: None,
) -> Path:
    """Writes a checkpoint as ``llmjax`` or ``hf``: see ``llmjax.convert``, whose arguments these are.

    Returns:
      the destination.

    Raises:
      LlmjaxError: see there.
    """
    if to not in FORMATS:
        raise ConfigError(f"to: unknown {to!r}; expected one of {', '.join(FORMATS)}")
    if to == "hf" and quantize is not None:
        raise ConfigError(
            "quantize: a checkpoint in Hugging Face's form holds floats; leave it out, or use --to llmjax"
        )
    check_dtype(dtype)
    with opened(source, quantize, config, lora) as checkpoint:
        found, plan, recipe, override = checkpoint.source, checkpoint.plan, checkpoint.recipe, checkpoint.override
        facts, where = describe(found, override)
        if read_config(facts, where)[1] != plan.config:
            names = ", ".join(spec.name for spec in plan.configuring)
            raise ConfigError(f"{where}: {names}: the files to be written have no place for it; use the source itself")
        tokenizer = read_tokenizer(found, override)  # what could not be loaded is not written either
        with whole_folder(Path(destination)) as folder:
            merge, made_from = checkpoint.merge(), _made_from(found, checkpoint.adapter)
            parameters = read_all(found, plan, dtype, recipe, check_finite, merge)
            if to == "llmjax":
                block = _write_packed(folder, parameters, len(plan.assignments), report, made_from)
                block["recipe"] = _recipe(found, recipe)
                facts = {**facts, "quantization": block}
            else:
                stored = _write_hf(folder, parameters, plan, report, made_from)
                facts = {k: v for k, v in facts.items() if k not in ("dtype", "torch_dtype")} | {"dtype": stored}
                if found.format != "huggingface":  # what transformers takes for it may be beyond the vocabulary
                    facts.setdefault("pad_token_id", None)
            _write_json(folder / "config.json", facts)
            _write_tokenizer(found, tokenizer, folder, override)
        if merge.survivals:
            warnings.warn(f"{destination}: {merging.describe(merge.survivals)}", stacklevel=2)
    return Path(destination)


def _made_from(source: Source, adapter: Adapter | None) -> str:
    """For the metadata of the weights file, as JSON: SHA-256 of the source's files (``digest.sha256``) and of the
    adapter's, and the version that wrote it."""
    facts: dict[str, Any] = {"sha256": digest.sha256(source.files), "llmjax": __version__}
    if adapter is not None:
        facts["adapter"] = {"sha256": digest.sha256(adapter.files), **adapter.options}
    return json.dumps(facts)


def _recipe(source: Source, recipe: Recipe | None) -> dict[str, Any] | None:
    if recipe is None:
        return source.recipe if isinstance(source, LlmjaxSource) else None
    return recipe.to_dict()


def _write_packed(
    folder: Path, parameters: Iterator[tuple[str, Parameter]], count: int, report: OnParameter, made_from: str
) -> dict[str, Any]:
    """The weights file of an llmjax directory; returns the ``quantization`` block of its configuration."""
    schemes: dict[str, dict[str, int]] = {}
    with _writer(folder / WEIGHTS, count * len(PARTS)) as (write, metadata):
        for done, (name, value) in enumerate(parameters, 1):
            if isinstance(value, QTensor):
                schemes[name] = {"bits": value.bits, "zero": value.zero, "group": value.group}
                for part in PARTS:
                    if (leaf := getattr(value, part)) is not None:
                        write(f"{name}.{part}", leaf)
            else:
                write(name, value)
            report(done, count)
        metadata |= {"format": "llmjax", "quantization": json.dumps(schemes, separators=(",", ":"))}
        metadata["made_from"] = made_from
    return {"format": "llmjax", "version": VERSION}


@contextlib.contextmanager
def _writer(path: Path, tensors: int) -> Iterator[tuple[Callable[[str, np.ndarray], None], dict[str, str]]]:
    file = SafetensorsWriter(path, tensors)
    metadata: dict[str, str] = {}
    try:
        yield file.write, metadata
        file.close(metadata)
    finally:
        file.abandon()


def _write_hf(
    folder: Path, parameters: Iterator[tuple[str, Parameter]], plan: Plan, report: OnParameter, made_from: str
) -> str:
    """The weights file of a Hugging Face directory; returns the dtype of its embedding."""
    names = plan.architecture.hf_names(plan.config)
    files = {a.parameter: tuple(sources_of(a.parameter, names)[1]) for a in plan.assignments}
    sharing = Counter(files.values())
    shared: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
    stored = ""
    with _writer(folder / "model.safetensors", 2 * sum(map(len, files.values()))) as (write, metadata):
        metadata |= {"format": "pt", "made_from": made_from}  # transformers asks for the format
        for done, (parameter, value) in enumerate(parameters, 1):
            array = dequantize(value) if isinstance(value, QTensor) else value
            stored = stored or array.dtype.name
            sources = files[parameter]
            parts = shared.setdefault(sources, {})
            parts[parameter] = array
            if len(parts) == sharing[sources]:
                for name, tensor in _joined(shared.pop(sources), sources, names):
                    write(name, tensor)
            report(done, len(files))
    return stored


def _joined(parts: dict[str, np.ndarray], files: tuple[str, ...], names: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The source tensors that parameters were made from: what ``make`` does to row numbers is undone to the rows."""
    shapes = {p: sources_of(p, names)[0].source_shape(value.shape) for p, value in parts.items()}
    shape = next(iter(shapes.values()))
    lead = shape[:-1] or shape  # of a stack of weights, each one's rows
    row, each = shape[len(lead) :], math.prod(lead)
    numbers = np.arange(len(files) * each).reshape(len(files), *lead, *(1 for _ in row))
    rows = np.empty((len(files) * each, *row), next(iter(parts.values())).dtype)
    for parameter, value in parts.items():
        made = sources_of(parameter, names)[0].make(list(numbers))
        rows[made.reshape(-1)] = value.reshape(-1, *row)
    for i, name in enumerate(files):
        yield name, rows[i * each : (i + 1) * each].reshape(shape)


def _write_tokenizer(source: Source, tokenizer: Tokenizer | None, folder: Path, override: Override) -> None:
    vocabulary = source.vocabulary if isinstance(source, MediapipeSource | GraphSource) else None
    if vocabulary:
        (folder / "tokenizer.model").write_bytes(vocabulary)
    elif source.format not in ("gguf", "graph"):
        for name in export.FILES:
            if (source.directory / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source.directory / name, folder / name)
        own = source.generation_config  # without it config.json counts, all of it
        if own is not None and override and "eos_token_id" in override:  # it wins over the file that was copied
            ids = list(end_tokens(source, None, override))
            _write_json(folder / "generation_config.json", {**own, "eos_token_id": ids})
        return
    if tokenizer is not None:
        if isinstance(tokenizer, MediapipeTokenizer) and vocabulary:
            tokenizer = for_transformers(tokenizer, vocabulary)
        export.save(tokenizer, folder)
        ends: dict[str, Any] = {"eos_token_id": list(tokenizer.eos_ids)}
        if tokenizer.stop:  # texts, which no tokenizer's file of transformers has
            ends["stop_strings"] = list(tokenizer.stop)
        _write_json(folder / "generation_config.json", (source.generation_config or {}) | ends)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
