"""Adapters in training: which modules of a model get factors, what these begin as, and their place beside the weights.

Factors are kept by module of the base model, as PEFT does, not by parameter: where a module is fused (Phi-3, Falcon),
the parameters cut from it share its A, and B's rows are cut as the weight's are.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.readers.peft import MAGNITUDE
from llmjax.errors import LoraError
from llmjax.lora.adapter import Part, modules_of
from llmjax.lora.apply import Lora, settled, with_loras
from llmjax.lora.config import LoraConfig, is_named
from llmjax.model import Model
from llmjax.models.tree import get_at, parameter_shapes, path_of
from llmjax.quant.schemes import role_of

# By module ``model.layers.0.self_attn.q_proj``: ``A`` float32 [r, in], ``B`` float32 [out, r]; in DoRA ``magnitude``
# float32 [out], too.
Factors = dict[str, dict[str, Any]]

ALL_LINEAR, MEDIAPIPE = "all-linear", "mediapipe"
_MEDIAPIPE_ROLES = ("q", "k", "v", "o")
# Of a length, relative: a few last places of float32, and far less than what a step of training changes.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Target:
    """A linear module that gets factors.

    Attributes:
      module: its name, as Hugging Face has it.
      rank: r.
      scale: what multiplies ``B . A``.
      shape: ``(out, in)`` of its weight.
      parts: the parameters it fills, each with the rows of the weight it is made of; None for all, in order.
    """

    module: str
    rank: int
    scale: float
    shape: tuple[int, int]
    parts: tuple[tuple[str, np.ndarray | None], ...]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in training: a plain value, of which ``train_step`` makes the next.

    Attributes:
      settings: rank, scale and choice of modules.
      targets: the modules.
      factors: by module.
      names: what ``target_modules`` of a PEFT configuration must be to mean these modules and no other.
    """

    settings: LoraConfig
    targets: tuple[Target, ...]
    factors: Factors
    names: tuple[str, ...]

    def replace(self, factors: Factors) -> "Adapter":
        """The same adapter with other values."""
        return dataclasses.replace(self, factors=factors)

    @property
    def count(self) -> int:
        """Numbers that are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.factors))


def new_adapter(model: Model, settings: LoraConfig, *, seed: int = 0) -> Adapter:
    """An adapter that changes nothing yet, begun as PEFT begins one: A uniform within ``1 / sqrt(in)``, B zero, and
    magnitudes the lengths of the weight's rows.

    Args:
      model: what it is for.
      settings: ``target_modules`` may be ``all-linear``, or ``mediapipe`` for the modules of q, k, v and o, which is
        what MediaPipe's LoRA files hold.
      seed: of A.  A module's draws follow from it and the module's name.

    Raises:
      LoraError: a target matches no module of the model, a row of its weight has no length for a magnitude, or memory
        ends.
    """
    modules, found = modules_of(model.architecture, model.config), targets_of(model, settings)
    factors = {target.module: _begun(target, seed) for target in found}
    if settings.dora:
        for target in found:
            factors[target.module][MAGNITUDE] = _lengths(target, factors[target.module], model)
    return Adapter(settings, found, factors, _names([t.module for t in found], modules, model))


def targets_of(model: Model, settings: LoraConfig) -> tuple[Target, ...]:
    """The modules that an adapter of these settings has, in the model's order.

    Raises:
      LoraError: a target matches no module of the model.
    """
    if settings.rank is None:
        raise LoraError("rank: missing, expected a positive integer")
    chosen = _chosen(modules_of(model.architecture, model.config), settings)
    return tuple(_target(parts, settings) for parts in chosen.values())


def adapted(
    params: Mapping[str, Any],
    targets: tuple[Target, ...],
    factors: Factors,
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """A model's parameters with the factors beside its weights: a pure function, to differentiate.

    Args:
      params: the model's.
      targets: the modules.
      factors: by module.
      dropout: share of the inputs that A does not see; goes with ``key``.
      key: which, for this call; each module's part of it follows from its name, for what it is fused of has one input.
    """
    return with_loras(params, _loras(targets, factors, dropout, key))


def settled_beside(params: Mapping[str, Any], targets: tuple[Target, ...], factors: Factors) -> dict[str, Any]:
    """As ``adapted``, of factors that change no more: what only they decide is computed here.

    Raises:
      LoraError: a row of a weight has no direction for a magnitude.
    """
    loras = _loras(targets, factors).items()
    return with_loras(params, {name: settled(lora, get_at(params, path_of(name)), name) for name, lora in loras})


def _loras(
    targets: tuple[Target, ...], factors: Factors, dropout: float = 0.0, key: jax.Array | None = None
) -> dict[str, Lora]:
    """By parameter."""
    loras = {}
    for target in targets:
        own = factors[target.module]
        for parameter, rows in target.parts:
            cut = own if rows is None else own | {s: jnp.take(v, rows, axis=0) for s, v in own.items() if s != "A"}
            lora = Lora(cut["A"], cut["B"], jnp.float32(target.scale), cut.get(MAGNITUDE))
            if key is not None and dropout:
                lora = lora.replace(key=jax.random.fold_in(key, zlib.crc32(target.module.encode())), dropout=dropout)
            loras[parameter] = lora
    return loras


def _chosen(modules: Mapping[str, list[Part]], settings: LoraConfig) -> dict[str, list[Part]]:
    """The modules that the settings target, in the model's order."""
    wanted = settings.target_modules
    if wanted == MEDIAPIPE:
        chosen = {
            name: parts
            for name, parts in modules.items()
            if any(part.parameter.split(".")[-2] in _MEDIAPIPE_ROLES for part in parts)
        }
        settings = dataclasses.replace(settings, target_modules=tuple(parts[0].module for parts in chosen.values()))
    chosen = {name: parts for name, parts in modules.items() if settings.targets(parts[0].module)}
    names = [parts[0].module for parts in modules.values()]
    endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
    for name in wanted if isinstance(wanted, tuple) else ():
        if not any(is_named(module, name) for module in names):
            raise LoraError(f"targets: {name!r} matches no module of this model; expected some of {endings}")
    if not chosen:
        left = f" but what exclude leaves out ({settings.exclude_modules!r})" if settings.exclude_modules else ""
        raise LoraError(f"targets: {wanted!r} matches no module of this model{left}, which has {endings}")
    return chosen


def _target(parts: list[Part], settings: LoraConfig) -> Target:
    module, entry = parts[0].module, parts[0].entry
    out, width = entry.source_shape(parts[0].shape)
    rank = settings.rank_of(module)
    assert rank is not None
    everything = np.arange(out)
    rows = [np.ascontiguousarray(part.entry.make([everything[:, None]])[:, 0]) for part in parts]
    cut = tuple(
        (part.parameter, None if np.array_equal(r, everything) else r) for part, r in zip(parts, rows, strict=True)
    )
    return Target(module, rank, settings.scale_of(module, rank), (out, width), cut)


def _begun(target: Target, seed: int) -> dict[str, Any]:
    out, width = target.shape
    rng = np.random.default_rng([seed, zlib.crc32(target.module.encode())])
    bound = width**-0.5
    try:
        a = rng.uniform(-bound, bound, (target.rank, width)).astype(np.float32)
        return {"A": jnp.asarray(a), "B": jnp.zeros((out, target.rank), jnp.float32)}
    except MemoryError:
        raise LoraError(f"module {target.module}: factors of rank {target.rank} do not fit into memory") from None


def _lengths(target: Target, factors: dict[str, Any], model: Model) -> jax.Array:
    """``|W|``, B being zero, of each row of a module's weight."""
    found = np.zeros(target.shape[0], np.float32)
    loras = _loras((target,), {target.module: factors | {MAGNITUDE: jnp.zeros(len(found))}})
    for (parameter, lora), (_, rows) in zip(loras.items(), target.parts, strict=True):
        norm = settled(lora, get_at(model.params, path_of(parameter)), parameter).norm
        found[slice(None) if rows is None else rows] = norm
    return jnp.asarray(found)


def stacks_of(model: Model) -> list[str]:
    """Parameters that hold all experts of a layer, on which adapters do not go (peft's all-linear does, of some)."""
    shapes = parameter_shapes(model.config).items()
    return [name for name, shape in shapes if role_of(name) == "feed_forward" and len(shape) > 2]


def idle_excludes(model: Model, names: str | tuple[str, ...]) -> list[str]:
    """Of names of modules to leave out, or one regular expression, those that no module of the model has."""
    modules = [parts[0].module for parts in modules_of(model.architecture, model.config).values()]
    one_by_one: list[str | tuple[str, ...]] = [names] if names and isinstance(names, str) else [(n,) for n in names]
    settings = [LoraConfig(1, 1.0, target_modules=".*", exclude_modules=one) for one in one_by_one]
    idle = (s.exclude_modules for s in settings if all(map(s.targets, modules)))
    return [one if isinstance(one, str) else one[0] for one in idle]


def changes(model: Model, targets: tuple[Target, ...], factors: Factors) -> bool:
    """Whether an adapter may change anything: not where each B is 0, and each magnitude its row's length, to the
    rounding of who added that up: PEFT does in another order."""
    if any(np.any(own["B"]) for own in factors.values()):
        return True
    scaled = [target for target in targets if MAGNITUDE in factors[target.module]]
    lengths = {target.module: np.asarray(_lengths(target, factors[target.module], model)) for target in scaled}
    return any(np.any(np.abs(factors[name][MAGNITUDE] - found) > _ROUNDING * found) for name, found in lengths.items())


def _names(chosen: list[str], modules: Mapping[str, list[Part]], model: Model) -> tuple[str, ...]:
    """The modules' last names, where no other module has one of them; else their whole names."""
    endings = {_ending(name) for name in chosen}
    meant = {parts[0].module for parts in modules.values() if _ending(parts[0].module) in endings}
    others = any("tower" in pattern for pattern in model.architecture.dropped)  # parts that llmjax leaves out
    return tuple(sorted(endings)) if meant == set(chosen) and not others else tuple(chosen)


def _ending(module: str) -> str:
    """Its last name; of one in a list, which has a number for a name as layers have, the list's before it."""
    *_, before, last = f".{module}".rsplit(".", 2)
    return f"{before}.{last}" if last.isdecimal() else last
