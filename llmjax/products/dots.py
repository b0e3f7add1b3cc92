"""``W . x^T`` the way XLA:CPU computes it fastest; every product with a weight comes down to this.

Measured with jaxlib 0.10 on two cores with AVX2 (``scripts/bench_products.py``); another release may want another
choice, none changes what is computed.
"""

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.products.cpu import has_bfloat16_dot, has_integer_dot

# One row of 8 or 16 bits takes a path twenty times slower than memory; a row of zeros is nearly free.
_MIN_ROWS = 2
# Up to so many rows of a type of so many bytes ``x . W^T`` is faster, by a third for int8 and two and a half times for
# bfloat16; above, and always in float32, ``W . x^T`` is, by up to twice.  A CPU with an instruction for the type is as
# fast either way, and rows first spares it the transpose.
_ROWS_FIRST = {1: 4, 2: 16, 4: 0}


def dot(weight: jax.Array, x: jax.Array, dtype: jnp.dtype | type) -> jax.Array:
    """``weight [out, in] . x^T [in, rows] -> [out, rows]`` with sums of ``dtype``, at the highest precision."""
    rows, size = x.shape[0], x.dtype.itemsize
    if rows < _MIN_ROWS and size < 4:
        x = jnp.pad(x, ((0, _MIN_ROWS - rows), (0, 0)))
    has_dot = {jnp.dtype(jnp.int8): has_integer_dot, jnp.dtype(jnp.bfloat16): has_bfloat16_dot}
    first = x.shape[0] <= _ROWS_FIRST.get(size, 0) or (x.dtype in has_dot and has_dot[x.dtype]())
    # The barrier: XLA would turn the transpose of a product into the product the other way round.
    y = lax.optimization_barrier(_dot(x, weight, dtype) if first else _dot(weight, x, dtype))
    return (y.T if first else y)[:, :rows]


def _dot(a: jax.Array, b: jax.Array, dtype: jnp.dtype | type) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), lax.Precision.HIGHEST, dtype)
