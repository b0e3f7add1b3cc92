"""Which source tensor fills which parameter, as data.

A table maps a canonical module (``layers.{}.attn.q``) to the module's name in the source
(``model.layers.{}.self_attn.q_proj``); the ending (``.weight``, ``.bias``) is the same on both sides.  Where a
parameter is a part or a rearrangement of source tensors, the table holds a ``From`` instead of a name.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

Shape = tuple[int, ...]


def _only(arrays: list[np.ndarray]) -> np.ndarray:
    (array,) = arrays
    return array


class TornError(Exception):
    """What makes a parameter would move a part of a packed weight's group, or of its byte: it must be expanded."""


class DamagedError(Exception):
    """A tensor's values are none that its parameter can be made from."""


@dataclasses.dataclass(frozen=True)
class From:
    """How one module's parameters are made from source tensors.

    Attributes:
      modules: source modules, ``{}`` standing for the layer's number.
      make: builds the parameter from the source tensors, in order.
      source_shape: the shape each source tensor must have, given the parameter's.
      endings: what the source calls ``weight`` and ``bias``, where it does not call them so.
      otherwise: how in files that have none of these tensors, and those.
    """

    modules: tuple[str, ...]
    make: Callable[[list[np.ndarray]], np.ndarray] = _only
    source_shape: Callable[[Shape], Shape] = lambda shape: shape
    endings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    otherwise: "From | None" = None


def fused(module: str, rows: Mapping[str, int]) -> dict[str, str | From]:
    """Roles whose weights lie one after the other in one source tensor, each with its number of rows."""
    total = sum(rows.values())
    table: dict[str, str | From] = {}
    start = 0
    for role, count in rows.items():

        def make(arrays: list[np.ndarray], start: int = start, count: int = count) -> np.ndarray:
            return _only(arrays)[start : start + count]

        table[role] = From((module,), make, source_shape=lambda shape: (total, *shape[1:]))
        start += count
    return table


def stacked_experts(
    module: str, width: int, gate_up: str = "gate_up_proj", down: str = "down_proj"
) -> dict[str, str | From]:
    """The table of experts that lie in two tensors: ``gate_up_proj [E, 2 F, D]``, gate first, and ``down_proj [E, D,
    F]``.

    Args:
      module: of both.
      width: F.
      gate_up: the end of the first one's name.
      down: and of the other's.
    """

    def part(start: int) -> From:
        def make(arrays: list[np.ndarray]) -> np.ndarray:
            return _only(arrays)[:, start : start + width]

        def whole(shape: Shape) -> Shape:
            return (shape[0], 2 * shape[1], *shape[2:])

        return From((module,), make, source_shape=whole, endings={"weight": gate_up})

    return {
        "layers.{}.experts.gate": part(0),
        "layers.{}.experts.up": part(width),
        "layers.{}.experts.down": From((module,), endings={"weight": down}),
    }


def depthwise(module: str) -> From:
    """A convolution of each channel by itself, ``[D, k]``, which torch has as ``[D, 1, k]``."""

    def make(arrays: list[np.ndarray]) -> np.ndarray:
        array = _only(arrays)
        return array[:, 0] if array.ndim == 3 else array

    def with_middle(shape: Shape) -> Shape:
        return (shape[0], 1, *shape[1:]) if len(shape) == 2 else shape

    return From((module,), make, with_middle)


Names = Mapping[str, str | From]


class SameNames(dict[str, str]):
    """The table of a source that has llmjax's own names."""

    def __missing__(self, module: str) -> str:
        return module


def hf_names(
    *,
    embed: str = "model.embed_tokens",
    layer: str = "model.layers.{}.",
    final_norm: str = "model.norm",
    head: str = "lm_head",
    **roles: str | From,
) -> dict[str, str | From]:
    """A table in Hugging Face's names.

    Args:
      embed: the token embedding.
      layer: what every layer's names begin with.
      final_norm: the norm before the head.
      head: the head, where it is not tied.
      **roles: per layer, ``q="self_attn.q_proj"`` and so on; the role's place in our tree is ``ROLES[role]``.
    """
    table: dict[str, str | From] = {"embed": embed, "final_norm": final_norm, "head": head}
    for role, name in roles.items():
        if isinstance(name, From):
            name = dataclasses.replace(name, modules=tuple(layer + m for m in name.modules))
        else:
            name = layer + name
        table["layers.{}." + ROLES[role]] = name
    return table


ROLES: dict[str, str] = {
    "attn_norm": "attn_norm",
    "post_attn_norm": "post_attn_norm",
    "mlp_norm": "mlp_norm",
    "post_mlp_norm": "post_mlp_norm",
    **{r: f"attn.{r}" for r in ("q", "k", "v", "o", "q_norm", "k_norm")},
    **{r: f"mlp.{r}" for r in ("gate", "up", "down")},
}


def stem(name: str) -> str:
    """A name of Hugging Face's without the classes around the decoder: a base model is saved without its ``model.``,
    the parts of multimodal models have moved about between versions of transformers, and state dicts keep the wrappers
    of torch.compile and of data parallel training."""
    return re.sub(r"^((_orig_mod|module|model|language_model|transformer)\.)*", "", name)


def sources_of(parameter: str, names: Names, has: Callable[[str], bool] = lambda name: True) -> tuple[From, list[str]]:
    """How a parameter is made, and the names of the tensors it is made from, of a source that ``has`` tensors."""
    module, ending = parameter.rsplit(".", 1)
    layer = re.match(r"layers\.(\d+)", module)
    place = re.sub(r"^layers\.\d+", "layers.{}", module)
    entry = names.get(f"{place}.{ending}") or names[place]  # of this parameter alone, or of all its module's
    if isinstance(entry, str):
        entry = From((entry,))

    def tensors(entry: From) -> list[str]:
        end = entry.endings.get(ending, ending)
        return [f"{m.format(layer[1] if layer else '')}.{end}" for m in entry.modules]

    other = entry.otherwise
    if other is not None and not any(map(has, tensors(entry))) and any(map(has, tensors(other))):
        entry = other
    return entry, tensors(entry)
