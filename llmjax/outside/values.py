"""One way to check a value from outside, of a row, an option or a configuration: by a rule, which a message can say."""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

from llmjax.errors import LlmjaxError, RequestError, shown

# What float32 holds: anything else would be 0 or infinite where it is computed with.
LEAST_FLOAT, MOST_FLOAT = 1e-38, 1e38
# Compiled programs count in 32 bits.
INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value may be.

    Attributes:
      what: as a message says it.
      holds: whether a value is so.
    """

    what: str
    holds: Callable[[Any], bool]

    def problem(self, value: Any) -> str:
        """What is wrong with a value; empty where nothing is."""
        return "" if self.holds(value) else f"expected {self.what}, found {shown(value)}"


def plain(value: Any) -> Any:
    """A value as Python has it: numbers of NumPy and JAX, and arrays as lists, which no rule of one value takes."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value


def settle(options: Any) -> None:
    """Makes every field of a dataclass ``plain``, whether or not it is frozen."""
    for field in dataclasses.fields(options):
        object.__setattr__(options, field.name, plain(getattr(options, field.name)))


def check(name: str, value: Any, rule: Rule, error: type[LlmjaxError] = RequestError) -> None:
    """Raises ``error`` where a value is not as its rule says."""
    if problem := rule.problem(value):
        raise error(f"{name}: {problem}")


def integer(least: int, most: int | None = None, what: str = "") -> Rule:
    """An integer of a range; true and false are none."""
    default = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    return Rule(what or default, lambda v: _is_integer(v) and least <= v and (most is None or v <= most))


def number(least: float, most: float, what: str = "") -> Rule:
    """An integer or a float of a range, neither infinite nor NaN."""
    return Rule(what or f"a number from {least:g} to {most:g}", lambda v: _is_number(v) and least <= v <= most)


def one_of(*allowed: Any) -> Rule:
    """One of these, and of its type."""
    return Rule(
        " or ".join(map(repr, allowed)), lambda v: any(v is a or (type(v) is type(a) and v == a) for a in allowed)
    )


def each(rule: Rule, what: str, *, least: int = 0, kinds: tuple[type[Collection[Any]], ...] = (tuple,)) -> Rule:
    """A sequence of at least ``least`` values that are all as ``rule`` says."""
    return Rule(what, lambda v: isinstance(v, kinds) and len(v) >= least and all(map(rule.holds, v)))


POSITIVE = integer(1, what="a positive integer")
COUNT = integer(0, what="a whole number, 0 or more")
POSITIVE_NUMBER = number(LEAST_FLOAT, MOST_FLOAT, "a positive number")
FLAG = Rule("true or false", lambda v: isinstance(v, bool))
STRING = Rule("a string", lambda v: isinstance(v, str))
LIST = Rule("a list", lambda v: isinstance(v, list))
TEXT = Rule("a non-empty string", lambda v: isinstance(v, str) and v != "")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))
