"""Which weights get how many bits: schemes by name, and recipes that give roles their schemes."""

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from llmjax import configs
from llmjax.errors import ConfigError, named, shown
from llmjax.outside.paths import checked_path

ROLES: tuple[str, ...] = ("attention", "feed_forward", "embedding", "head", "per_layer_embedding")
GROUPS: tuple[int, ...] = (32, 64, 128)
_NAME = re.compile(r"int(?P<bits>4|8)(-g(?P<group>\d{1,9}))?(?P<asym>-asym)?(?P<mse>-mse)?")
_EXPECTED = "int8 or int4, then -g32, -g64 or -g128 for a scale per group, -asym, -mse"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one weight is quantized.

    Attributes:
      bits: 4 or 8.
      group: inputs that share a scale; None for one scale per output channel.
      symmetric: zero is an integer of its own; else the range is what the weights span.
      mse: search the scale of least squared error instead of taking the largest weight's.
    """

    bits: int
    group: int | None = None
    symmetric: bool = True
    mse: bool = False

    @classmethod
    def parse(cls, name: str, where: str = "quantize") -> "Scheme":
        """From a name such as ``int8``, ``int4-g32`` or ``int4-g128-asym``; ``where`` is for messages.

        Raises:
          ConfigError: no such scheme.
        """
        found = _NAME.fullmatch(name)
        if not found:
            raise ConfigError(f"{where}: unknown scheme {shown(name)}; expected {_EXPECTED}")
        group = int(found["group"]) if found["group"] else None
        if group is not None and group not in GROUPS:
            raise ConfigError(f"{where}: {name!r}: expected a group of 32, 64 or 128, found {group}")
        if found["mse"] and found["asym"]:
            raise ConfigError(f"{where}: {name!r}: the search for scales knows symmetric schemes alone")
        return cls(int(found["bits"]), group, not found["asym"], bool(found["mse"]))

    def __str__(self) -> str:
        group = f"-g{self.group}" if self.group else ""
        return f"int{self.bits}{group}{'' if self.symmetric else '-asym'}{'-mse' if self.mse else ''}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Schemes by role; a role without one stays float.

    Attributes:
      roles: of the whole model.
      layers: exceptions: first and last layer (inclusive) and the schemes there; later ones win.
    """

    roles: Mapping[str, Scheme | None]
    layers: tuple[tuple[int, int, Mapping[str, Scheme | None]], ...] = ()

    def scheme(self, parameter: str) -> Scheme | None:
        """What becomes of the parameter of this canonical name; None for norms, biases and roles left float."""
        role = role_of(parameter)
        if role is None:
            return None
        scheme = self.roles.get(role)
        layer = re.match(r"layers\.(\d+)\.", parameter)
        for first, last, roles in self.layers:
            if layer and first <= int(layer[1]) <= last and role in roles:
                scheme = roles[role]
        return scheme

    def check_layers(self, count: int) -> None:
        """Raises ConfigError for an exception to layers that a model of ``count`` does not have."""
        for first, last, _ in self.layers:
            if last >= count:
                span = f"{first}-{last}" if last > first else str(first)
                raise ConfigError(f"quantize: layers {span!r}: the model's are 0 to {count - 1}")

    def to_dict(self) -> dict[str, Any]:
        """As ``parse`` would read it."""
        values: dict[str, Any] = {role: _text(self.roles.get(role)) for role in ROLES}
        if self.layers:
            values["layers"] = {f"{a}-{b}": {r: _text(s) for r, s in roles.items()} for a, b, roles in self.layers}
        return values


def role_of(parameter: str) -> str | None:
    """``attention``, ``feed_forward``, ``embedding``, ``head`` or ``per_layer_embedding``; None for what is never
    quantized: norms, biases, and the small weights that decide where a token goes."""
    if not parameter.endswith(".weight"):
        return None
    *_, block, module, _ = ["", *parameter.split(".")]
    if (block == "attn" and module in ("q", "k", "v", "o")) or (block == "delta" and module in ("qkv", "gate", "o")):
        return "attention"
    if (
        block in ("mlp", "experts")
        or f"{block}.{module}" in _FEED_FORWARD
        or re.fullmatch(r"(enter|leave)_\d+", module)
    ):
        return "feed_forward"
    if block == "per_layer":
        return "per_layer_embedding" if module == "embed" else None
    return {"embed": "embedding", "head": "head"}.get(module)


# Beside MLPs and experts: low-rank branches, and what lets a layer's own input in.
_FEED_FORWARD = ("laurel.left", "laurel.right", "per_layer.gate", "per_layer.project", "conv.enter", "conv.leave")


def parse(quantize: str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe from what a user says.

    Args:
      quantize: a scheme for all roles (``int4-g32``), a recipe of ``configs/quantization`` by name
        (``mixed-8-4-8``), a TOML file, or the like as a mapping: ``{"attention": "int8", "feed_forward": "int4",
        "layers": {"0-1": {"feed_forward": "int8"}}}``.  A head and a table of per-layer embeddings without a scheme
        of their own have the embedding's.

    Raises:
      ConfigError: unknown scheme, role or recipe, or layers that are no range.
    """
    if isinstance(quantize, Mapping):
        return _from_mapping(quantize, "quantize")
    if not isinstance(quantize, str | os.PathLike):
        raise ConfigError(f"quantize: expected a scheme, a recipe or a mapping, found {shown(quantize)}")
    text = str(quantize)
    if _NAME.fullmatch(text):
        return Recipe(dict.fromkeys(ROLES, Scheme.parse(text)))
    file: Traversable | Path
    if text in recipe_names():
        file = configs.folder() / "quantization" / f"{text}.toml"
    elif not text.endswith(".toml"):
        raise ConfigError(
            f"quantize: unknown {text!r}; expected a scheme ({_EXPECTED}), a recipe ({', '.join(recipe_names())}) or a "
            "*.toml file"
        )
    else:
        file = checked_path("quantize", quantize, ConfigError)
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{text}: cannot read the recipe: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOML that is none, no UTF-8, too many digits
        raise ConfigError(f"{text}: not a TOML file: {error}") from None
    return _from_mapping(values, text)


def recipe_names() -> list[str]:
    """The recipes that come with llmjax."""
    return sorted(f.name.removesuffix(".toml") for f in (configs.folder() / "quantization").iterdir())


def _from_mapping(values: Mapping[str, Any], where: str) -> Recipe:
    values = dict(values)
    layers = values.pop("layers", {})
    roles = _roles(values, where)
    for role in ("head", "per_layer_embedding"):
        if role not in roles and "embedding" in roles:
            roles[role] = roles["embedding"]
    if not isinstance(layers, Mapping):
        raise ConfigError(f"{where}: layers: expected a table of ranges such as '0-3', found {shown(layers)}")
    exceptions = []
    for span, entry in layers.items():
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", str(span))
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ConfigError(f"{where}: layers: expected a layer or a range such as '0-3', found {shown(span)}")
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where}: layers {span}: expected schemes by role, found {shown(entry)}")
        own = _roles(entry, f"{where}: layers {span}", ("attention", "feed_forward"))
        exceptions.append((int(found[1]), int(found[2] or found[1]), own))
    return Recipe(roles, tuple(exceptions))


def _roles(values: Mapping[str, Any], where: str, known: tuple[str, ...] = ROLES) -> dict[str, Scheme | None]:
    unknown = sorted(named(str(key)) for key in set(values) - set(known))
    if unknown:
        raise ConfigError(f"{where}: unknown role {', '.join(unknown)}; expected {', '.join(known)}")
    for role, name in values.items():
        if not isinstance(name, str):
            raise ConfigError(f"{where}: {role}: expected a scheme's name or 'float', found {shown(name)}")
    return {role: None if name == "float" else Scheme.parse(name, f"{where}: {role}") for role, name in values.items()}


def _text(scheme: Scheme | None) -> str:
    return "float" if scheme is None else str(scheme)
