"""From a traced function to a graph.

What is computed of constants alone is a constant.  What stands in a named function that LiteRT has an operator for
(``NAMED``) becomes that one.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from converters.litert.builder import Builder, Value
from converters.litert.operators import NAMED, RULES
from llmjax.errors import ConfigError
from llmjax.models.stack import layer_of

_THROUGH = ("copy", "copy_p", "optimization_barrier", "stop_gradient")


def resid(layer: int) -> str:
    """The name of the stream behind a layer."""
    return f"layers.{layer}.resid"


def lower(build: Builder, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
    """What a jaxpr gives, written into a graph.

    Raises:
      ConfigError: LiteRT has no operator for something in it.
    """
    known: dict[Any, Value] = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))

    def value(atom: Any) -> Value:
        if not isinstance(atom, core.Literal):
            return known[atom]
        aval: Any = atom.aval
        return np.asarray(atom.val, aval.dtype)

    for equation in jaxpr.eqns:
        results = _equation(build, equation, [value(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _equation(build: Builder, equation: Any, inputs: list[Value]) -> list[Value]:
    name, params = equation.primitive.name, equation.params
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if inner is not None and name not in ("scan", "while", "cond"):
        jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
        named = NAMED.get(params.get("name") or jaxpr.debug_info.func_name)
        if named and not all(isinstance(x, np.ndarray) for x in inputs):
            return [named(build, jaxpr, inputs)]
        found = lower(build, jaxpr, consts, inputs)
        if (layer := layer_of(equation)) is not None:
            build.name(found[0], resid(layer))
        return found
    if name == "scan":
        return _unrolled(build, params, inputs)
    if name in _THROUGH:
        return inputs
    if name == "platform_index":  # of what is written for several devices the plain form, their definition
        return [np.int32(params["platforms"].index(None))]
    if name == "cond" and isinstance(inputs[0], np.integer):
        branch = params["branches"][int(inputs[0])]
        return lower(build, branch.jaxpr, branch.consts, inputs[1:])
    if all(isinstance(x, np.ndarray) for x in inputs):
        found = equation.primitive.bind(*map(jnp.asarray, inputs), **params)
        return [np.asarray(x) for x in (found if equation.primitive.multiple_results else [found])]
    if name not in RULES:
        raise ConfigError(
            f"this model cannot be written for LiteRT, whose graphs have no operator for what it computes ({name})"
        )
    found = RULES[name](build, equation, *inputs)
    return found if equation.primitive.multiple_results else [found]


def _unrolled(build: Builder, params: dict[str, Any], inputs: list[Value]) -> list[Value]:
    """A loop over what lies along the first dimension, one turn behind the other."""
    if "num_consts" in params:
        fixed, moving = params["num_consts"], params["num_carry"]
    else:  # as JAX 0.12 has it
        fixed, moving, _ = map(len, params["ft_in"].unpack())
    if params["reverse"] or len(params["jaxpr"].out_avals) > moving:
        raise ConfigError("a loop that runs backwards or keeps what each turn makes cannot be written for LiteRT")
    consts, carry, along = inputs[:fixed], inputs[fixed : fixed + moving], inputs[fixed + moving :]
    for turn in range(params["length"]):
        given = [*consts, *carry, *(build.part(x, turn) for x in along)]
        carry = lower(build, params["jaxpr"].jaxpr, params["jaxpr"].consts, given)
    return carry
