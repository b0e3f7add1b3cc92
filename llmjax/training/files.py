"""Adapters of PEFT's form: written so that peft loads them, read to train on from."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from converters.readers.peft import CONFIG, MAGNITUDE, NAMES, WEIGHTS, AdapterFile, open_adapter
from llmjax.checkpoint.safetensors_writer import SafetensorsWriter
from llmjax.errors import CheckpointError, LoraError, OutputError, named
from llmjax.lora.adapter import factor_values, modules_of, strange_bases, values_of
from llmjax.lora.config import LoraConfig, is_named
from llmjax.model import Model
from llmjax.models.names import stem
from llmjax.outside.paths import checked_path
from llmjax.outside.whole import whole_files
from llmjax.training.adapter import Adapter, Factors, new_adapter

_PREFIX = "base_model.model."


def save_adapter(adapter: Adapter, folder: str | Path, base: str = "") -> Path:
    """Writes a directory that peft, and ``llmjax.load(lora=...)``, load.  A reader finds the files that were there
    before, or the new ones, never a part of one.

    Args:
      adapter: its factors as they are.
      folder: made where it is missing.
      base: what the configuration says of the base model.
    """
    folder = Path(folder)
    text = json.dumps(dict(sorted(_peft_config(adapter, base).items())), indent=2)  # patterns keep their order
    with whole_files(folder, OutputError) as place:
        _write_factors(place / WEIGHTS[0], adapter.factors)
        (place / CONFIG).write_text(f"{text}\n", encoding="utf-8")
    return folder


def _write_factors(path: Path, factors: Factors) -> None:
    writer = SafetensorsWriter(path, sum(map(len, factors.values())))
    for module in sorted(factors):
        for side in factors[module]:
            writer.write(f"{_PREFIX}{module}.{NAMES[side]}", np.asarray(factors[module][side]))
    writer.close({"format": "pt"})


def read_trained(path: str | Path, model: Model) -> Adapter:
    """An adapter of PEFT's form, to train on.  Its modules keep the names they have there: those of a text model's
    class, say, where the base is a whole one's.

    Raises:
      LoraError: it is missing, damaged, of a kind that is not supported, or made for another model.
    """
    try:
        file = open_adapter(checked_path("start", path, LoraError))
    except CheckpointError as error:
        raise LoraError(str(error)) from None
    if file.config is None:
        raise LoraError(f"{file.path}: no {CONFIG} beside it, so its rank and scale are not known")
    where = file.path.parent / CONFIG
    settings = LoraConfig.from_peft(file.config, str(where))  # what it refuses says more than the tensors of it do
    if file.config.get("init_lora_weights") == "mica":
        raise LoraError(f"{where}: init_lora_weights: 'mica' trains A alone, while here A and B are; merge it first")
    model = _named_as(file, model)
    modules = modules_of(model.architecture, model.config)
    if problems := [*file.problems, *strange_bases(file, modules, values_of(model.params))]:
        raise LoraError("\n  ".join([f"{file.path}: this adapter cannot be trained on:", *problems]))
    ours = {part.module for parts in modules.values() for part in parts}
    if settings.target_modules is None:
        settings = dataclasses.replace(settings, target_modules=tuple(sorted(file.factors)))
    elif isinstance(settings.target_modules, tuple):  # PEFT passes over names of other models' modules
        known = tuple(name for name in settings.target_modules if any(is_named(module, name) for module in ours))
        settings = dataclasses.replace(settings, target_modules=known or settings.target_modules)
    try:
        begun = new_adapter(model, settings)
    except LoraError as error:
        raise LoraError(f"{where}: {error}") from None
    if set(file.factors) != set(begun.factors):
        odd = min(set(file.factors) ^ set(begun.factors))
        which = "target_modules does not name it" if odd in ours else "this model has no projection of that name"
        which = which if odd in file.factors else "the file has no factors of it"
        raise LoraError(f"{file.path}: module {named(odd)}: {which}")
    factors: Factors = {}
    for target in begun.targets:
        (out, width), names = target.shape, file.factors[target.module]
        factors[target.module] = {}
        shapes: dict[str, tuple[int, ...]] = {"A": (target.rank, width), "B": (out, target.rank), MAGNITUDE: (out,)}
        for side in {**begun.factors[target.module], **names}:
            what = f"{file.path}: module {named(target.module)}: {NAMES[side].removesuffix('.weight')}"
            expected = shapes[side] if side in begun.factors[target.module] else None
            found = file.spec(names[side]).shape if side in names else None
            if found != expected:
                shown = [list(shape) if shape else "none" for shape in (expected, found)]
                raise LoraError(f"{what}: expected shape {shown[0]}, found {shown[1]}")
            values = factor_values(file, names[side], what)
            factors[target.module][side] = jnp.asarray(values)
    return begun.replace(factors)


def _named_as(file: AdapterFile, model: Model) -> Model:
    """The model with its layers' modules called as in a file, if that has one name for what is before them."""
    modules = modules_of(model.architecture, model.config)
    begin = {name.removesuffix(stem(name)) for name in file.factors if stem(name) in modules and name != stem(name)}
    if len(begin) != 1:
        return model
    return dataclasses.replace(model, architecture=dataclasses.replace(model.architecture, modules=begin.pop()))


def _peft_config(adapter: Adapter, base: str) -> Mapping[str, Any]:
    settings = adapter.settings
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.rank,
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
        "target_modules": list(adapter.names),
        "task_type": "CAUSAL_LM",
        "use_dora": bool(settings.dora),
        "use_rslora": settings.rslora,
    }
