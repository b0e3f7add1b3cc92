"""A rope from the object that configs describe it by, in either dialect of transformers."""

import math
from collections.abc import Callable
from typing import Any

from llmjax.errors import named, shown
from llmjax.models.rope import Rope
from llmjax.models.scalings import Dynamic, Llama3Scaling, LongRope, Yarn
from llmjax.outside.values import INT32, POSITIVE_NUMBER, number

NUMBER = number(-1e6, 1e6)
# Of which transformers takes the context that was trained for from beside the object, too.
STRETCHED = ("longrope", "yarn", "llama3")
_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


class RopeSpec:
    """The entries of one rope, taken out one by one.

    Args:
      entries: a copy of the object.
      problem: reports what is wrong.
      context: the model's, in tokens.
      original: the context it was trained for, where the config says it beside the object.
      nested: the object is one of several, for each kind of layer.
    """

    def __init__(
        self,
        entries: dict[str, Any],
        problem: Callable[[str], None],
        context: int | None,
        original: Any = None,
        nested: bool = False,
    ):
        self.entries, self._problem, self._context, self._nested = entries, problem, context, nested
        if original is not None:
            entries["original_max_position_embeddings"] = original
        kind, other = (self._kind(entries.pop(key, None)) for key in ("rope_type", "type"))
        if kind is not None and other is not None and kind != other:
            problem(f"rope_type: {shown(kind)} contradicts type, which says {shown(other)}; keep the one that is meant")
        self.kind = kind if kind is not None else "default" if other is None else other

    def _kind(self, found: Any) -> Any:
        """By its name of today: ``su`` is how longrope began, yarn what some conversions of Phi-3 call it."""
        return "longrope" if found == "su" or (found == "yarn" and "short_factor" in self.entries) else found

    def rope(self, theta: float, dims: int, turning: int) -> Rope:
        """The rope.

        Args:
          theta: the base.
          dims: that rotate.
          turning: pairs that turn, of a proportional one.
        """
        if self.kind not in _KINDS:
            self._problem(f"rope_type: {shown(self.kind)} is not supported, expected {' or '.join(map(repr, _KINDS))}")
            return Rope(theta, dims)
        rope: Rope = getattr(self, f"_{self.kind}")(theta, dims, turning)
        for key in sorted((key for key, value in self.entries.items() if value is not None), key=str):
            what = f"rope parameter {named(str(key))}: {shown(self.entries[key])}"
            self._problem(f"{what} is not understood for rope_type {self.kind!r}")
        return rope

    def _number(self, key: str, default: float | None = None) -> float:
        value: Any = self.entries.pop(key, None)
        value = default if value is None else value
        if problem := POSITIVE_NUMBER.problem(value):
            self._problem(f"rope parameter {key}: {problem}")
            return 1.0
        return float(value)

    def _original(self) -> float:
        found = self._number("original_max_position_embeddings", self._context)
        if found > INT32:
            self._problem(
                f"rope parameter original_max_position_embeddings: expected at most {INT32:,}, found {found:g}"
            )
            return 1.0
        return found

    def _drop(self, *keys: str) -> None:
        """What transformers keeps there and does not use."""
        for key in keys:
            self.entries.pop(key, None)

    def _default(self, theta: float, dims: int, turning: int) -> Rope:
        self._drop("factor", "original_max_position_embeddings")
        return Rope(theta, dims)

    def _linear(self, theta: float, dims: int, turning: int) -> Rope:
        self._drop("original_max_position_embeddings")
        return Rope(theta, dims, linear=self._number("factor"))

    def _proportional(self, theta: float, dims: int, turning: int) -> Rope:
        return Rope(theta, dims, linear=self._number("factor", 1.0), turning=turning)

    def _llama3(self, theta: float, dims: int, turning: int) -> Rope:
        factor, low, high = (self._number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        if low >= high:
            self._problem(f"rope parameter high_freq_factor: expected above low_freq_factor {low:g}, found {high:g}")
        return Rope(theta, dims, llama3=Llama3Scaling(factor, low, high, int(self._original())))

    def _dynamic(self, theta: float, dims: int, turning: int) -> Rope:
        self._drop("original_max_position_embeddings")
        if dims <= 2:
            self._problem(f"rotary width: {dims}, expected more than 2 for rope_type 'dynamic'")
        return Rope(theta, dims, scaling=Dynamic(self._number("factor"), self._context or 1))

    def _yarn(self, theta: float, dims: int, turning: int) -> Rope:
        original = self._original()
        factor = self._number("factor", (self._context or original) / original)
        self._drop("max_position_embeddings", "finetuned")  # the latter in the paper's own models
        if self.entries.pop("attn_factor", None) is not None:
            self._problem(
                "rope parameter attn_factor: transformers leaves it out, vLLM multiplies cosines and sines by it and "
                "by what follows from the factor; take it out, or say their product as attention_factor"
            )
        truncate = self.entries.pop("truncate", True)
        if truncate is not None and not isinstance(truncate, bool):
            self._problem(f"rope parameter truncate: expected true or false, found {shown(truncate)}")
        scales = self.entries.pop("mscale", None), self.entries.pop("mscale_all_dim", None)
        if any(s is not None and NUMBER.problem(s) for s in scales):
            self._problem(f"rope parameters mscale, mscale_all_dim: expected numbers, found {shown(scales)}")
            scales = None, None
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):  # 0 is the default, too
            self.entries[key] = default if (found := self.entries.pop(key, None)) in (None, 0) else found
        if theta == 1:
            self._problem("rope_theta: 1.0, expected another base for rope_type 'yarn'")
            theta = 2.0
        scaling = Yarn(
            factor,
            original,
            attention=None if self.entries.get("attention_factor") is None else self._number("attention_factor"),
            fast=self._number("beta_fast"),
            slow=self._number("beta_slow"),
            # Null is false; transformers looks for it beside the kinds of layers, where it is not.
            truncate=bool(truncate) or self._nested,
            scales=(float(scales[0]), float(scales[1])) if scales[0] and scales[1] else None,
        )
        self._drop("attention_factor")
        return Rope(theta, dims, scaling=scaling)

    def _longrope(self, theta: float, dims: int, turning: int) -> Rope:
        original = self._original()
        short, long = (self._factors(key, dims // 2) for key in ("short_factor", "long_factor"))
        factor = self._number("factor", (self._context or original) / original)
        default = 1.0
        if factor > 1 and original > 1:
            default = (1 + math.log(factor) / math.log(original)) ** 0.5
        return Rope(
            theta,
            dims,
            scaling=LongRope(short, long, int(original), self._number("attention_factor", default)),
        )

    def _factors(self, key: str, count: int) -> tuple[float, ...]:
        found = self.entries.pop(key, None)
        good = isinstance(found, list) and not any(map(POSITIVE_NUMBER.problem, found))
        if not good or len(found) != count:
            self._problem(f"rope parameter {key}: expected {count} positive numbers, found {shown(found)}")
            return (1.0,) * count
        return tuple(map(float, found))
