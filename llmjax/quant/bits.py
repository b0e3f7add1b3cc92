"""16-bit floats moved about as integers.

XLA:CPU has no 16-bit float gather, scatter or slice: it converts the operand to float32 and back, all of it, in every
step of a loop; or converts it once and keeps the copy (jaxlib 0.10).  Integers of the same width it leaves alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmjax.device import by_device
from llmjax.errors import RequestError


def storage(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype to keep values of ``dtype`` in where parts are written or cut out: uint16 for 16-bit floats."""
    return jnp.dtype(jnp.uint16) if dtype.itemsize == 2 else dtype


def to_storage(x: jax.Array) -> jax.Array:
    """``x`` as its ``storage`` dtype, bit for bit.

    Raises:
      RequestError: when differentiated in 16 bits: an integer has no derivative, and to lose one without a word is
        worse.  What only moves values (``look_up``, ``cut``) has a rule of its own.
    """
    return _integers(x) if storage(x.dtype) != x.dtype else x


@jax.custom_jvp
def _integers(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, storage(x.dtype))


@_integers.defjvp
def _integers_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    raise RequestError(
        f"derivative: found {primals[0].dtype} values stored as integers, in a key/value cache say, which have none; "
        "differentiate a call without a cache (model.apply)"
    )


def from_storage(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of ``to_storage`` for values of ``dtype``."""
    return lax.bitcast_convert_type(x, dtype) if x.dtype != dtype else x


def rounded_off(x: jax.Array, bits: int) -> jax.Array:
    """float32 x, none of it NaN, without the last ``bits`` of its mantissa: the nearest, of two the even one.  A pair
    of casts XLA may drop, and Triton has no ``lax.reduce_precision``."""
    found = lax.bitcast_convert_type(x, jnp.int32)
    found = found + (1 << bits - 1) - 1 + ((found >> bits) & 1)
    return lax.bitcast_convert_type(found & -(1 << bits), jnp.float32)


def halves(x: jax.Array) -> list[jax.Array]:
    """Two of float16 whose sum is float32 x, of less than 2^15 everywhere: all but 1.2e-7 of a value or 3e-8."""
    large = rounded_off(x, 13)  # as float16 has it
    return [large.astype(jnp.float16), (x - large).astype(jnp.float16)]


def into_half(top: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A power of two that brings the largest of some values to between 2^14 and 2^15, where ``halves`` lose least, and
    what undoes it; float32, as ``top``."""
    exponent = jnp.maximum(lax.bitcast_convert_type(top, jnp.int32) >> 23, 27)  # no less than 2^-100
    factor, scale = (lax.bitcast_convert_type(e << 23, jnp.float32) for e in (268 - exponent, exponent - 14))
    return factor, scale


def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """``table[ids]`` along the first axis, differentiable in the table."""
    return _moved(partial(jnp.take, axis=0), table, ids)


def cut(table: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """``size`` entries of the first axis from ``start``, or the last ones; differentiable in the table."""
    return _moved(partial(lax.dynamic_slice_in_dim, slice_size=size), table, start)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _moved(move: Callable[..., jax.Array], table: jax.Array, where: jax.Array) -> jax.Array:
    def as_integers(table: jax.Array, where: jax.Array) -> jax.Array:
        # The barrier keeps the reinterpreted table from becoming a loop invariant, that is a copy.
        table, where = lax.optimization_barrier((table, where))
        return from_storage(move(to_storage(table), where), table.dtype)

    return by_device(move, cpu=as_integers)(table, where)


@_moved.defjvp
def _moved_jvp(move: Callable[..., jax.Array], primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> Any:
    (table, where), (table_dot, _) = primals, tangents
    y = _moved(move, table, where)
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return y, np.zeros(y.shape, jax.dtypes.float0)
    # In float32: what the uses of an entry send back is added up before it is rounded.
    return y, move(table_dot.astype(jnp.float32), where).astype(y.dtype)
