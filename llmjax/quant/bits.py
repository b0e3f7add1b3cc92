"""16-bit floats moved about as integers.

XLA:CPU has no 16-bit float gather, scatter or slice: it converts the operand to float32 and back, all of it, in every
step of a loop; or converts it once and keeps the copy (jaxlib 0.10).  Integers of the same width it leaves alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def storage(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype to keep values of ``dtype`` in where parts are written or cut out: uint16 for 16-bit floats."""
    return jnp.dtype(jnp.uint16) if dtype.itemsize == 2 else dtype


def to_storage(x: jax.Array) -> jax.Array:
    """``x`` as its ``storage`` dtype, bit for bit."""
    return lax.bitcast_convert_type(x, storage(x.dtype)) if storage(x.dtype) != x.dtype else x


def from_storage(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of ``to_storage`` for values of ``dtype``."""
    return lax.bitcast_convert_type(x, dtype) if x.dtype != dtype else x


@jax.custom_jvp
def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """``table[ids]`` along the first axis, differentiable in the table."""
    # The barrier keeps the reinterpreted table from becoming a loop invariant, that is a copy.
    table, ids = lax.optimization_barrier((table, ids))
    return from_storage(jnp.take(to_storage(table), ids, axis=0), table.dtype)


@look_up.defjvp
def _look_up_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> Any:
    (table, ids), (table_dot, _) = primals, tangents
    return look_up(table, ids), jnp.take(table_dot, ids, axis=0)
