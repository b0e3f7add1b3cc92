"""What a traced function does on a device, equation by equation, and what becomes of its weights there."""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Var

Equation = Any


def bodies(eqn: Equation, platform: str) -> Iterator[tuple[Jaxpr, list[Any]]]:
    """The functions within an equation that a platform runs, each with the operands it is given."""
    p, operands = eqn.params, list(eqn.invars)
    if eqn.primitive.name == "cond":
        platforms = p.get("branches_platforms") or [None] * len(p["branches"])
        own = [branch for branch, names in zip(p["branches"], platforms, strict=True) if names and platform in names]
        rest = [branch for branch, names in zip(p["branches"], platforms, strict=True) if names is None]
        for branch in own or rest:
            yield branch.jaxpr, operands[1:]
    elif eqn.primitive.name == "while":
        first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        yield p["cond_jaxpr"].jaxpr, operands[:first] + operands[second:]
        yield p["body_jaxpr"].jaxpr, operands[first:]
    else:
        for value in p.values():
            inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
            if isinstance(inner, Jaxpr) and len(inner.invars) == len(operands):
                yield inner, operands


def walk(jaxpr: Jaxpr, marked: set[Any], platform: str) -> Iterator[tuple[Equation, list[Any]]]:
    """Every equation, and which of its operands are marked values of the outermost function that nothing was done to
    yet; of one with functions within none."""
    for eqn in jaxpr.eqns:
        inner = list(bodies(eqn, platform))
        yield eqn, [] if inner else [v for v in eqn.invars if isinstance(v, Var) and v in marked]
        for body, operands in inner:
            pairs = zip(body.invars, operands, strict=True)
            yield from walk(body, {own for own, v in pairs if isinstance(v, Var) and v in marked}, platform)


def equations(closed: ClosedJaxpr, weights: int = 0, platform: str = "cuda") -> list[tuple[Equation, list[Any]]]:
    """Those of a traced function whose first arguments are so many weights: the marked ones, but for vectors."""
    marked = {v for v in closed.jaxpr.invars[:weights] if v.aval.ndim >= 2}
    assert not [c for c in closed.consts if getattr(c, "size", 0) > 1000], "weights are arguments, never constants"
    return list(walk(closed.jaxpr, marked, platform))
