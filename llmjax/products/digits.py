"""Products with quantized weights: what each arithmetic means, and the programs that compute it.

Two definitions, in float32, ``W`` being the dequantized weight (``qtensor``):

``weight-only``
    ``y = x . W^T``.  The profiles ``reference``, ``hf`` and ``fast``.
``dynamic int8``
    ``y = x' . W^T`` with each row of activations rounded to 8 bits, symmetric:
    ``s = max|x| * f32(1/127)``,  ``q = round_half_even(x * (127 / max|x|))``,  ``x' = s * q``.

Two programs for several rows; which one runs, ``llmjax.products.matmul`` decides:

``in_tiles`` dequantizes a tile of rows at a time, small enough to stay in the cache, and multiplies in float32: it
serves every scheme and never holds a float weight.

``in_digits`` serves one scale per output channel.  A row of activations is written in digits of base 254,
``x = s * (q1 + q2/254 + q3/254^2)``, and the digits are multiplied as integers, which is exact.  Three digits are
weight-only with less error than a float32 product has (2e-7 of max|x|), one digit is dynamic int8; the result has the
same bits for any number of rows, in any order of summation.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmjax.device import by_device
from llmjax.products.dots import dot
from llmjax.products.sums import total
from llmjax.products.tiles import over_tiles
from llmjax.quant.qtensor import QTensor, columns, halves, integers

_BASE = 254


def _columns(x: jax.Array, q: QTensor) -> tuple[list[jax.Array], QTensor]:
    """``columns``, and the weight behind a barrier: without it XLA moves what it can of the unpacking out of the decode
    loop and keeps the result.  What is done to x before is done once for all weights that it meets."""
    return lax.optimization_barrier((columns(x, q), q))


def in_tiles(x: jax.Array, q: QTensor) -> jax.Array:
    """Weight-only in float32: ``x [rows, in] -> [rows, out]``, some output channels at a time."""
    parts, q = _columns(x, q)

    def multiply(part: QTensor) -> jax.Array:
        return total(dot(w, c, jnp.float32) for c, w in zip(parts, halves(part), strict=True))

    return over_tiles(multiply, q, q.shape, parts[0])


def to_digits(x: jax.Array, count: int) -> tuple[jax.Array, list[jax.Array]]:
    """``x = scale * sum_k digits[k] / 254^k``: scale float32 ``[rows, 1]``, digits int8 like x, -127 to 127."""
    top = jnp.max(jnp.abs(x), -1, keepdims=True)
    rest = x * jnp.where(top > 0, 127 / top, 0)
    digits = []
    for _ in range(count):
        digit = jnp.round(rest)
        digits.append(digit.astype(jnp.int8))
        rest = (rest - digit) * _BASE
    return top * np.float32(1 / 127), digits


def in_digits(x: jax.Array, q: QTensor, count: int) -> jax.Array:
    """Weight-only (``count`` 3) or dynamic int8 (1) in exact integers: ``x [rows, in] -> [rows, out]``.

    Definition, ``D`` being the sum over digits ``sum_k (digits[k] . n^T) / 254^k`` with exact integer products and
    ``E`` the same for a weight of ones::

        y = scale_x * (scales * D + offsets * E)
    """
    scale, digits = to_digits(x, count)
    rows = jnp.concatenate(digits)
    parts, q = _columns(rows, q)
    return scale * _scaled(_integer_product(parts, q), rows, q, count)


def integer_product(x: jax.Array, q: QTensor) -> jax.Array:
    """``x . n^T`` of int8 ``x [rows, in]`` and a weight's integers, exact: int32 ``[rows, out]``."""

    def plainly(parts: list[jax.Array], q: QTensor) -> jax.Array:
        contract = (((1,), (1,)), ((), ()))
        return total(
            lax.dot_general(c, n, contract, preferred_element_type=jnp.int32)
            for c, n in zip(parts, integers(q), strict=True)
        )

    return by_device(plainly, cpu=_integer_product)(columns(x, q), q)


def _integer_product(parts: list[jax.Array], q: QTensor) -> jax.Array:
    """``integer_product`` on the CPU, of x's ``columns``."""

    def multiply(part: QTensor) -> jax.Array:
        return total(dot(n, c, jnp.int32) for c, n in zip(parts, integers(part), strict=True))

    # Eight bits are multiplied as they stand.
    return multiply(q).T if q.bits == 8 else over_tiles(multiply, q, q.shape, parts[0], jnp.int32)


def _scaled(sums: jax.Array, digits: jax.Array, q: QTensor, count: int) -> jax.Array:
    """``scales * D + offsets * E`` of ``in_digits``, of int32 sums ``[count * rows, out]``."""
    rows = digits.shape[0] // count
    y = _combined(sums, count, rows) * q.scales.astype(jnp.float32)[None, :, 0]
    if q.offsets is not None:
        ones = jnp.sum(digits.astype(jnp.int32), -1, keepdims=True)
        y = y + _combined(ones, count, rows) * q.offsets.astype(jnp.float32)[None, :, 0]
    return y


def _combined(sums: jax.Array, count: int, rows: int) -> jax.Array:
    """``sum_k sums[k] / 254^k`` of int32 ``[count * rows, out]``, the smallest first."""
    parts = sums[: count * rows].reshape(count, rows, -1).astype(jnp.float32)
    total = parts[-1]
    for k in range(count - 2, -1, -1):
        total = parts[k] + total * np.float32(1 / _BASE)
    return total


# A pair of casts XLA may drop.
_nearest = partial(lax.reduce_precision, exponent_bits=8, mantissa_bits=7)


def pieces(x: jax.Array, count: int, nearest: Callable[[jax.Array], jax.Array] = _nearest) -> list[jax.Array]:
    """bfloat16 arrays that add up to float32 x, to the last bit if they are three, the largest first; ``nearest``
    rounds to such a number."""
    found = []
    for _ in range(count):
        piece = nearest(x)
        found.append(piece.astype(jnp.bfloat16))
        x = x - piece
    return found
