"""What a person's functions compute by now.

A program keeps what they computed when it was compiled, whatever becomes of the variables they look at; and a job goes
on only where they do the same.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def computed(function: Callable[..., Any], *args: Any) -> str:
    """A hash of the operations that a pure function traces to for such arguments, and of all values it looks at; where
    it fails, of how.

    Args:
      function: the function.
      args: trees of ``jax.ShapeDtypeStruct``.
    """

    def anew(*args: Any) -> Any:  # a function of its own: JAX keeps traces by it
        return function(*args)

    try:
        closed = jax.make_jaxpr(anew)(*args)
    except Exception as error:  # whoever runs it raises it
        return type(error).__name__
    found = hashlib.sha256(str(closed).encode())
    for value in _values(closed.jaxpr, closed.consts):
        is_key = jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key)
        found.update(np.asarray(jax.random.key_data(value) if is_key else value).tobytes())
    return found.hexdigest()


def _values(jaxpr: Any, constants: Iterable[Any]) -> Iterator[Any]:
    """Of operations and of those within them (``jax.jit``, loops), the constants: as text they are cut short."""
    yield from constants
    for equation in jaxpr.eqns:
        yield from (var.val for var in equation.invars if isinstance(var, Literal))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if isinstance(inner, ClosedJaxpr):
                yield from _values(inner.jaxpr, inner.consts)
            elif isinstance(inner, Jaxpr):
                yield from _values(inner, ())


class Known:
    """What functions computed when programs were compiled with them."""

    def __init__(self) -> None:
        self._before: dict[Any, str] = {}

    def changed(self, now: Mapping[Any, str]) -> bool:
        """Whether any computes something else by now, so that all that was compiled is out of date."""
        found = any(self._before.get(key, sha) != sha for key, sha in now.items())
        self._before = {**({} if found else self._before), **now}
        return found
