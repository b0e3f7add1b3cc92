"""The keys of a GGUF file's architecture, and what most architectures read alike: the rotation and the windows."""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from llmjax.errors import ConfigError, named, shown
from llmjax.models.config import FULL, SLIDING
from llmjax.outside.values import COUNT, POSITIVE, POSITIVE_NUMBER, Rule, integer

T = TypeVar("T")
Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

# Bookkeeping, and what only some scalings need.
_IRRELEVANT = ("rope.scaling.finetuned", "rope.scaling.original_context_length")


class Keys:
    """The keys of one architecture, taken out with their types checked; problems are collected.

    Args:
      metadata: the file's key-value pairs.
      tensors: shapes by name.
      architecture: the prefix of the keys.
    """

    def __init__(self, metadata: Mapping[str, Any], tensors: Shapes, architecture: str):
        self._prefix = f"{architecture}."
        self._values = {k.removeprefix(self._prefix): v for k, v in metadata.items() if k.startswith(self._prefix)}
        self._seen: set[str] = set()
        self._tensors = tensors
        self.problems: list[str] = []

    def has(self, *tensors: str) -> bool:
        """Whether the file, or its first layer, has any of these."""
        return any(t in self._tensors or f"blk.0.{t}" in self._tensors for t in tensors)

    def rows(self, tensor: str) -> int:
        """The first dimension of a tensor."""
        if not self._tensors.get(tensor):
            self.problems.append(f"tensor {tensor}: missing, expected a table of rows")
            return 1
        return self._tensors[tensor][0]

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands."""
        self._seen.add(key)
        return self._values.get(key, default)

    def read(self, key: str) -> bool:
        """Whether something has asked for this key."""
        return key in self._seen

    def each(self, key: str, layers: int, default: int | None = None, least: int = 1) -> list[int]:
        """A whole number for each layer, of which the file may have one for all."""
        value, rule = self.get(key, default), integer(least)
        values = value.tolist() if isinstance(value, np.ndarray) else [value] * layers
        if len(values) != layers or not all(map(rule.holds, values)):
            self.problem(key, f"expected a whole number, {least} or more, or {layers} of them, found {shown(value)}")
            return [1] * layers
        return values

    def problem(self, key: str, text: str) -> None:
        """Adds a line to the error that ``finish`` raises."""
        self.problems.append(f"{self._prefix}{named(key)}: {text}")

    def _checked(self, key: str, default: T | None, rule: Rule, instead: T) -> T:
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
            value = value.flat[0].item()  # one value a layer, all the same
        if value is None:
            self.problem(key, f"missing, expected {rule.what}")
        elif rule.holds(value):
            return value
        else:
            differs = "values that differ by layer: " if isinstance(value, np.ndarray) else ""
            self.problem(key, f"expected {rule.what}, found {differs}{shown(value)}")
        return instead  # lets the reading go on to collect the other problems

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        return self._checked(key, default, POSITIVE, 1)

    def count(self, key: str) -> int:
        """A number that may be 0, which stands for absence as well."""
        return self._checked(key, 0, COUNT, 0)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number: the shortest decimal that the stored float32 stands for."""
        value = float(self._checked(key, default, POSITIVE_NUMBER, 1.0))
        return float(str(np.float32(value))) if np.float32(value) == value else value

    def optional(self, key: str) -> float | None:
        """A positive number, or None where the key is absent or 0."""
        value = self.get(key, 0)
        return None if type(value) in (int, float) and value == 0 else self.number(key)

    def expect(self, key: str, *allowed: Any) -> None:
        """A value, where there is one, that llmjax knows nothing else for."""
        value = self.get(key, allowed[0])
        if isinstance(value, np.ndarray) or value not in allowed:
            wanted = " or ".join(repr(a) for a in dict.fromkeys(allowed))
            self.problem(key, f"{shown(value)} is not supported, expected {wanted}")

    def expect_no_experts(self) -> None:
        """What mixtures say, where a file that is none has it."""
        for key in ("expert_count", "expert_used_count"):
            self.expect(key, 0)

    def finish(self, where: str) -> None:
        """Raises for everything that was wrong or left over.

        Raises:
          ConfigError: one line per problem.
        """
        for key in sorted(set(self._values) - self._seen - set(_IRRELEVANT)):
            self.problem(
                key,
                f"llmjax does not know this key (value {shown(self._values[key])}) and will not guess what it changes",
            )
        if len(self.problems) == 1:
            raise ConfigError(f"{where}: {self.problems[0]}")
        if self.problems:
            raise ConfigError(f"{where}: " + "\n  ".join(["unsupported metadata:", *self.problems]))


def rope(e: Keys, c: Config, *, partial: bool = False, also: str = "linear") -> None:
    """The base, the scaling, and (where ``partial``) how much of a head rotates.

    Args:
      e: the file's keys.
      c: what is read so far, to which it is added.
      partial: whether a part of a head may rotate.
      also: a scaling that llama.cpp has for the architecture as transformers has it.
    """
    c["rope_theta"] = e.number("rope.freq_base", 10000.0)
    factor = e.optional("rope.scaling.factor") or e.optional("rope.scale_linear")
    kind = e.get("rope.scaling.type", "linear")
    kinds = tuple(dict.fromkeys(("none", "linear", also)))
    if not isinstance(kind, str) or kind not in kinds:
        e.problem("rope.scaling.type", f"{shown(kind)} is not supported, expected {' or '.join(map(repr, kinds))}")
    elif kind == "yarn":
        c["rope_scaling"] = _yarn(e, c, factor or 1.0)
    elif kind == "linear" and factor not in (None, 1.0):
        c["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if not e.read("rope.scaling.attn_factor"):
        e.expect("rope.scaling.attn_factor", 1.0)
    if not partial:
        e.expect("rope.dimension_count", c["head_dim"])
        return
    dims, width = e.size("rope.dimension_count", c["head_dim"]), c["head_dim"]
    if dims > width or dims % 2:
        e.problem("rope.dimension_count", f"expected an even number up to the head width {width}, found {dims}")
    # Hugging Face keeps a fraction and cuts H * fraction down to an integer: half a dimension more is safe.
    c["partial_rotary_factor"] = dims / width if int(width * (dims / width)) == dims else (dims + 0.5) / width


def _yarn(e: Keys, c: Config, factor: float) -> Config:
    """The factor of cosines and sines follows from that of the context, unless the file says otherwise."""
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": e.size(
            "rope.scaling.original_context_length", c["max_position_embeddings"]
        ),
        "beta_fast": e.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": e.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    e.expect("rope.scaling.yarn_ext_factor", 1.0)
    attention, all_dims = e.optional("rope.scaling.yarn_attn_factor"), e.optional("rope.scaling.yarn_log_multiplier")
    if attention is not None:
        scaling["attention_factor"] = attention
    elif all_dims is not None:
        scaling |= {"mscale": 1.0, "mscale_all_dim": all_dims}
    return scaling


def sliding(e: Keys, c: Config, window: int, period: int) -> None:
    """Sliding layers: all but the last of every ``period``, unless the file says otherwise."""
    layers = c["num_hidden_layers"]
    pattern = e.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, np.ndarray) and pattern.dtype == bool and len(pattern) == layers:
        slides = pattern.tolist()
    elif type(pattern) is int and pattern >= 0:
        slides = [pattern == 0 or i % pattern < pattern - 1 for i in range(layers)]
    else:
        e.problem(
            "attention.sliding_window_pattern",
            f"expected a whole number, or {layers} booleans, found {shown(pattern)}",
        )
        return
    c["sliding_window"] = window or None
    c["layer_types"] = [SLIDING if s and window else FULL for s in slides]
