"""Reading an adapter and fitting it to a model: which factors change which projection, and by what scale."""

import dataclasses
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.readers.digest import Stamp, stamp
from converters.readers.litert.tflite import is_tflite
from converters.readers.mediapipe import lora as mediapipe
from converters.readers.peft import CONFIG, MAGNITUDE, NAMES, AdapterFile, open_adapter
from llmjax.errors import CheckpointError, LoraError, named
from llmjax.lora.config import LoraConfig
from llmjax.models.architecture import Architecture
from llmjax.models.config import DecoderConfig
from llmjax.models.names import From, sources_of, stem
from llmjax.models.tree import get_at, parameter_shapes, path_of
from llmjax.outside.paths import checked_path
from llmjax.outside.values import POSITIVE, POSITIVE_NUMBER, check
from llmjax.quant.qtensor import QTensor
from llmjax.quant.schemes import role_of

_LOG = logging.getLogger(__name__)
_DTYPES = ("F64", "F32", "F16", "BF16")
_MOST = 20
# A tied head's weight.
TABLE = "embed.weight"

# A model's parameter by its name, packed or not; None where there is none.
Values = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class LoraSource:
    """Where an adapter is, and what its files leave open.

    Attributes:
      path: a PEFT directory, a weights file, or a MediaPipe LoRA file.
      alpha: for weights without ``adapter_config.json``: ``scale = alpha / r``.  None is r for a MediaPipe file, whose
        runtime knows no scale.
      rank: r, to be checked against such weights; None takes what they have.
      rslora: ``scale = alpha / sqrt(r)`` for such weights.
      restore_o: for a MediaPipe file: put o's factors in order, which MediaPipe's converter scrambles; False takes them
        as they are, which is what MediaPipe's runtime computes.
    """

    path: str | Path
    alpha: float | None = None
    rank: int | None = None
    rslora: bool = False
    restore_o: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """All but the path, where it says anything."""
        return {f.name: v for f in dataclasses.fields(self)[1:] if (v := getattr(self, f.name)) not in (None, False)}


AnyLora = str | Path | LoraSource


@dataclasses.dataclass(frozen=True)
class Delta:
    """What is added to one projection's weight ``W [out, in]``: ``scale * B . A``.

    With magnitudes (DoRA), what makes ``m / |V| * V`` of it, ``V = W + scale * B . A``, a length ``|V|`` for each row.

    Attributes:
      a: A, float32 ``[r, in]``.
      b: B, float32 ``[out, r]``.
      scale: alpha / r, or alpha / sqrt(r).
      magnitude: m, float32 ``[out]``, of any sign; None for none.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def is_zero(self) -> bool:
        """Whether ``B . A`` changes nothing."""
        return not (self.a.any() and self.b.any())

    def rows(self, rows: slice, base: np.ndarray, parameter: str) -> np.ndarray:
        """Some rows of what is added to a weight, float32.

        Args:
          rows: which, from the first of them on.
          base: those of the weight, float32.
          parameter: its name, for messages.

        Raises:
          LoraError: a row has no direction for its magnitude to go with.
        """
        added: np.ndarray = np.float32(self.scale) * (self.b[rows] @ self.a)
        if self.magnitude is None:
            return added
        norms = np.linalg.norm(base + added, axis=1)
        check_norms(norms, parameter, rows.start)
        factor = (self.magnitude[rows] / norms)[:, None]
        return (factor - 1) * base + factor * added


def check_norms(norms: np.ndarray, parameter: str, first: int = 0) -> None:
    """Raises LoraError where a row, ``first`` being the first one's number, is of no length, or of none that is finite:
    a magnitude has no direction to go with then, and PEFT computes NaN."""
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        raise LoraError(
            f"{parameter}: row {first + bad[0]} with scale * B . A has the length {norms[bad[0]]:g}, so there is no "
            "direction for its magnitude (DoRA); leave the module out, or train it without magnitudes"
        )


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model.

    Attributes:
      path: where it was read from.
      files: its weights and configuration, as they were when they were opened.
      options: what its files left open, as the ``LoraSource`` says it.
      deltas: by the parameter they change (``layers.0.attn.q.weight``); those of a module that the checkpoint has
        fused share their A.
    """

    path: Path
    files: tuple[Stamp, ...]
    options: Mapping[str, Any]
    deltas: Mapping[str, Delta]

    def __repr__(self) -> str:
        ranks = sorted({delta.rank for delta in self.deltas.values()})
        return f"Adapter({str(self.path)!r}: {len(self.deltas)} projections of rank {', '.join(map(str, ranks))})"


@dataclasses.dataclass(frozen=True)
class Part:
    """A parameter that a module of the base model fills, alone or with others.

    Attributes:
      module: the module's name, as transformers has it.
      parameter: the parameter's.
      shape: of the parameter.
      entry: how it is made from the module's weight.
    """

    module: str
    parameter: str
    shape: tuple[int, ...]
    entry: From


def checked_lora(lora: AnyLora) -> LoraSource:
    """What a user gives for an adapter, as its source.

    Raises:
      LoraError: it is none, or its path is none that a file can have.
    """
    source = lora if isinstance(lora, LoraSource) else LoraSource(lora)
    checked_path("lora", source.path, LoraError)
    return source


def values_of(params: Mapping[str, Any]) -> Values:
    """Of a model that is loaded."""
    return lambda name: get_at(params, path_of(name))


def read_adapter(
    lora: AnyLora | Adapter, architecture: Architecture, config: DecoderConfig, values: Values = lambda name: None
) -> Adapter:
    """Reads an adapter whole and fits it to a model; one that was read for the same model is taken as it is.

    Warns where modules would not be changed at all.

    Args:
      lora: the adapter.
      architecture: of the model.
      config: of the model.
      values: its parameters, for a file that holds some of its base's.

    Raises:
      LoraError: it is missing, damaged, of a kind that is not supported, or made for another model; all such problems
        at once.
    """
    if isinstance(lora, Adapter):
        return lora
    source = checked_lora(lora)
    path = Path(source.path)
    if is_tflite(path):
        return _from_mediapipe(source, config)
    try:
        file = open_adapter(path)
    except CheckpointError as error:
        raise LoraError(str(error)) from None
    settings = _settings(source, file)
    modules = modules_of(architecture, config)
    problems = [*file.problems, *strange_bases(file, modules, values)]
    deltas: dict[str, Delta] = {}
    prefix = ""
    dropped = []
    for module, factors in file.factors.items():
        short = stem(module)
        if architecture.drops(f"{module}.weight", config) and short not in modules:
            dropped.append(module)
            continue
        if short not in modules:
            problems.append(_unknown(module, modules, config))
            continue
        prefix = module.removesuffix(short)
        try:
            deltas |= _deltas(file, module, factors, modules[short], settings)
        except LoraError as error:
            problems.append(str(error))
    found = {stem(module) for module in file.factors}
    for short in modules:
        if short not in found and settings.targets(prefix + short):
            module = named(prefix + short)
            problems.append(f"module {module}: target_modules names it, but the file has no factors of it")
    if not file.factors and not problems:
        problems.append("no factors (*.lora_A.weight, *.lora_B.weight) in it")
    if problems:
        raise _error(file.path, problems)
    if dropped:
        warnings.warn(
            f"{file.path}: factors of {len(dropped)} modules that the text model does not have are left out "
            f"({named(dropped[0])} ...)",
            stacklevel=3,
        )
    _warn_of_zeros(file.path, deltas)
    return Adapter(file.path, file.files, source.options, deltas)


def _from_mediapipe(source: LoraSource, config: DecoderConfig) -> Adapter:
    path = Path(source.path)
    _check_positive(source)
    shapes = parameter_shapes(config)
    files = (stamp(path),)
    try:
        factors = mediapipe.read(path, shapes)
    except CheckpointError as error:
        raise LoraError(str(error)) from None
    (rank,) = {found.a.shape[0] for found in factors.values()}
    if source.rank not in (None, rank):
        raise LoraError(f"{path}: expected rank {source.rank}, found {rank}")
    if source.alpha is None and source.rslora:
        raise LoraError(f"{path}: rslora: scale = alpha / sqrt(rank): give alpha")
    scale = 1.0 if source.alpha is None else source.alpha / (rank**0.5 if source.rslora else rank)
    deltas = {}
    for (layer, module), found in factors.items():
        restored = mediapipe.restored(found) if module == "o" and source.restore_o else found
        deltas[f"layers.{layer}.attn.{module}.weight"] = Delta(restored.a, restored.b, scale)
    why = "the file has none, and its runtime adds B.A as it is" if source.alpha is None else "as asked for"
    order = "put in order, as asked for" if source.restore_o else "as its runtime reads them"
    _LOG.info(f"{path}: MediaPipe's LoRA of rank {rank}: scale {scale:g}: {why}; o's factors {order}")
    _warn_of_zeros(path, deltas)
    return Adapter(path, files, source.options, deltas)


def _settings(source: LoraSource, file: AdapterFile) -> LoraConfig:
    if file.config is not None:
        if source.alpha is not None or source.rank is not None or source.rslora:
            raise LoraError(f"{file.path}: {CONFIG} lies beside it and says rank and alpha; leave them out")
        return LoraConfig.from_peft(file.config, str(file.path.parent / CONFIG))
    if source.alpha is None:
        raise LoraError(
            f"{file.path}: no {CONFIG} beside it, so the scale is not known: give alpha (scale = alpha / rank)"
        )
    _check_positive(source)
    return LoraConfig(source.rank, source.alpha, source.rslora, any(MAGNITUDE in f for f in file.factors.values()))


def _check_positive(source: LoraSource) -> None:
    for name, value, rule in (("alpha", source.alpha, POSITIVE_NUMBER), ("rank", source.rank, POSITIVE)):
        if value is not None:
            check(name, value, rule, LoraError)


# Linear modules that are never quantized: they decide where a token goes, or how long it is remembered.
_DECIDES = re.compile(r"\.(altup\.(router|prediction|correction)|router|router\.project|delta\.(beta|decay))\.weight$")


def modules_of(architecture: Architecture, config: DecoderConfig) -> dict[str, list[Part]]:
    """What each linear module of the base model fills, by its stem."""
    names = architecture.hf_names(config)
    modules: dict[str, list[Part]] = {}
    for parameter, shape in parameter_shapes(config).items():
        linear = role_of(parameter) in ("attention", "feed_forward", "head") or _DECIDES.search(parameter)
        if linear and len(shape) == 2:  # no stacks of experts
            entry, (tensor,) = sources_of(parameter, names)
            short = stem(module := tensor.removesuffix(".weight"))
            within = "" if role_of(parameter) == "head" else architecture.modules  # a head stands outside
            name = module if architecture.modules is None else f"{within}{short}"
            modules.setdefault(short, []).append(Part(name, parameter, shape, entry))
        if parameter == TABLE and config.tie_word_embeddings:  # transformers has a head all the same
            entry, (tensor,) = sources_of("head.weight", names)
            head = stem(tensor.removesuffix(".weight"))
            modules[head] = [Part(head, TABLE, shape, entry)]
    return modules


def strange_bases(file: AdapterFile, modules: Mapping[str, list[Part]], values: Values) -> list[str]:
    """What a file holds of its base that is not the model's own: PEFT saves a head's weight beside its factors, and
    loads it in the place of the model's."""
    problems = []
    for module, tensors in file.bases.items():
        for leaf, tensor in tensors.items():
            parameters = {part.parameter for part in modules.get(stem(module), ())}
            parameters = {"head.bias" if leaf == "bias" else name for name in parameters & {TABLE, "head.weight"}}
            ours = values(parameters.pop()) if parameters else None
            if isinstance(ours, QTensor):
                found = f"while the model has it in {ours.bits} bits, so whether it is the same is not known"
            elif ours is None:
                found = "and the model has none to compare it with"
            else:
                theirs, ours = file.read(tensor), np.asarray(ours)
                if theirs.shape == ours.shape and np.array_equal(theirs.astype(ours.dtype), ours):
                    continue
                found = "which is not the model's own"
            problems.append(
                f"tensor {named(tensor)}: the {leaf} of a base, {found}; was it trained on this model? An adapter "
                "saved with save_embedding_layers=False has factors alone"
            )
    return problems


def _unknown(module: str, modules: Mapping[str, list[Part]], config: DecoderConfig) -> str:
    layer = re.search(r"\.(\d+)\.", module)
    if layer and stem(module).replace(layer[0], ".0.", 1) in modules:
        return f"module {named(module)}: the model has layers 0 to {config.num_hidden_layers - 1}"
    endings = sorted({name.rsplit(".", 1)[-1] for name in modules})
    return f"module {named(module)} is no projection of this model; expected {', '.join(endings)}"


def _deltas(
    file: AdapterFile, module: str, factors: Mapping[str, str], parts: list[Part], settings: LoraConfig
) -> dict[str, Delta]:
    """One module's deltas, by parameter: B's rows, and magnitudes, are cut as the weight's are."""
    what, called = f"module {named(module)}", {side: name.removesuffix(".weight") for side, name in NAMES.items()}
    sides = ("A", "B", MAGNITUDE) if settings.dora else ("A", "B")
    for side in sides:
        if side not in factors:
            raise LoraError(f"{what}: {called[side]} is missing{' (use_dora)' * (side == MAGNITUDE)}")
    if MAGNITUDE in factors and not settings.dora:
        raise LoraError(f"{what}: the file has a magnitude of it (DoRA), but use_dora is false")
    if settings.targets(module) is False:
        raise LoraError(f"{what}: the file has factors of it, but target_modules does not name it")
    specs = {side: file.spec(factors[side]) for side in sides}
    rank = settings.rank_of(module) or specs["A"].shape[0]
    out, width = parts[0].entry.source_shape(parts[0].shape)
    shapes: dict[str, tuple[int, ...]] = {"A": (rank, width), "B": (out, rank), MAGNITUDE: (out,)}
    for side, spec in specs.items():
        if spec.shape != shapes[side]:
            raise LoraError(
                f"{what}: {called[side]}: expected shape {list(shapes[side])} at rank {rank}, found {list(spec.shape)}"
            )
    a, b, *m = (factor_values(file, factors[side], f"{what}: {called[side]}") for side in sides)
    scale = settings.scale_of(module, rank)

    def rows(part: Part, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(part.entry.make([values]))

    return {p.parameter: Delta(a, rows(p, b), scale, *(rows(p, v[:, None])[:, 0] for v in m)) for p in parts}


def factor_values(file: AdapterFile, tensor: str, what: str) -> np.ndarray:
    """A factor, float32; LoraError where it is of another type than floats, or not finite."""
    if (dtype := file.spec(tensor).dtype) not in _DTYPES:
        raise LoraError(f"{what}: expected {', '.join(_DTYPES)}, found {dtype}")
    values: np.ndarray = file.read(tensor).astype(np.float32)
    if not np.isfinite(values).all():
        raise LoraError(f"{what}: NaN or infinite values")
    return values


def _error(path: Path, problems: list[str]) -> LoraError:
    if len(problems) == 1:
        return LoraError(f"{path}: {problems[0]}")
    more = [f"and {len(problems) - _MOST} more"] if len(problems) > _MOST else []
    return LoraError("\n  ".join([f"{path}: this adapter does not fit:", *problems[:_MOST], *more]))


def _warn_of_zeros(path: Path, deltas: Mapping[str, Delta]) -> None:
    zero = sorted(name for name, delta in deltas.items() if delta.is_zero)
    if zero:
        which = "all deltas are" if len(zero) == len(deltas) else f"{len(zero)} of {len(deltas)} deltas are"
        but = "" if deltas[zero[0]].magnitude is None else " but by magnitudes"
        warnings.warn(f"{path}: {which} zero and change nothing{but} ({zero[0]} ...); was it trained?", stacklevel=4)
