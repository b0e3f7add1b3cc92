"""Products with quantized weights: what each arithmetic means, and the programs that compute it.

Two definitions, in float32, ``W`` being the dequantized weight (``qtensor``):

``weight-only``
    ``y = x . W^T``.  The profiles ``reference``, ``hf`` and ``fast``.
``dynamic int8``
    ``y = x' . W^T`` with each row of activations rounded to 8 bits, symmetric:
    ``s = max|x| * f32(1/127)``,  ``q = round_half_even(x * (127 / max|x|))``,  ``x' = s * q``.

The first, ``in_tiles``, dequantizes a tile of rows at a time, small enough to stay in the cache, and multiplies in
float32: it serves every scheme and never holds a float weight.

The second, ``in_digits``, serves one scale per output channel on the CPU: for any number of rows where the CPU has an
instruction for integer products (three digits of many rows are three times a float32 product's work), and for dynamic
int8.  A row of activations is written in digits of base 254, ``x = s * (q1 + q2/254 + q3/254^2)``, and the digits are
multiplied as integers, which is exact.  Three digits are weight-only with less error than a float32 product has (2e-7
of max|x|), one digit is dynamic int8; the result has the same bits for any number of rows, in any order of summation.

``in_row`` is the same for one row, the step of a single stream, as a sum that XLA:CPU compiles itself: it widens the
weights in registers and reads them almost at the speed of memory, which no library product does on a CPU without such
an instruction.  There weight-only takes two digits, as large as 32 bits hold their sums.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmjax.cpu import has_integer_dot
from llmjax.dots import dot
from llmjax.quant.qtensor import QTensor, halves, integers
from llmjax.tiles import over_tiles

_BASE = 254


def product(x: jax.Array, q: QTensor, digits: int | None) -> jax.Array:
    """``x [rows, in] . W^T -> float32 [rows, out]``.

    Args:
      x: activations.
      q: the weight.
      digits: 1 is dynamic int8, more is weight-only in integers where the scheme allows; None is weight-only in
        float32.
    """
    x = x.astype(jnp.float32)
    if digits is not None and q.scales.shape[1] == 1 and jax.default_backend() == "cpu":
        if x.shape[0] == 1 and digits == 1:
            return in_row(x, q, 1, _BASE)
        if x.shape[0] == 1 and not has_integer_dot():
            return in_row(x, q, 2, _largest_base(q))
        if digits == 1 or has_integer_dot():
            return in_digits(x, q, digits)
    if digits == 1:
        scale, (rounded,) = to_digits(x, 1)
        x = scale * rounded.astype(jnp.float32)
    return in_tiles(x, q)


def _columns(x: jax.Array, q: QTensor) -> tuple[list[jax.Array], QTensor]:
    """``x``'s columns as ``integers`` has the weight's, and the weight behind a barrier: without it XLA moves what it
    can of the unpacking out of the decode loop and keeps the result.  What is done to x before is done once for all
    weights that it meets."""
    parts = 1 if q.bits == 8 else 2
    return lax.optimization_barrier(([x[:, i::parts] for i in range(parts)], q))


def in_tiles(x: jax.Array, q: QTensor) -> jax.Array:
    """Weight-only in float32: ``x [rows, in] -> [rows, out]``, some output channels at a time."""
    columns, q = _columns(x, q)

    def multiply(part: QTensor) -> jax.Array:
        return _sum(dot(w, c, jnp.float32) for c, w in zip(columns, halves(part), strict=True))

    return over_tiles(multiply, q, q.shape, columns[0])


def _sum(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def to_digits(x: jax.Array, count: int, base: int = _BASE) -> tuple[jax.Array, list[jax.Array]]:
    """``x = scale * sum_k digits[k] / base^k``: scale float32 ``[rows, 1]``, digits like x, between -base/2 and
    base/2: int8 where they fit, else int32."""
    top = jnp.max(jnp.abs(x), -1, keepdims=True)
    largest = base // 2
    rest = x * jnp.where(top > 0, largest / top, 0)
    digits = []
    for _ in range(count):
        digit = jnp.round(rest)
        digits.append(digit.astype(jnp.int8 if largest <= 127 else jnp.int32))
        rest = (rest - digit) * base
    return top * np.float32(1 / largest), digits


def in_digits(x: jax.Array, q: QTensor, count: int) -> jax.Array:
    """Weight-only (``count`` 3) or dynamic int8 (1) in exact integers: ``x [rows, in] -> [rows, out]``.

    Definition, ``D`` being the sum over digits ``sum_k (digits[k] . n^T) / 254^k`` with exact integer products and
    ``E`` the same for a weight of ones::

        y = scale_x * (scales * D + offsets * E)
    """
    scale, digits = to_digits(x, count)
    rows = jnp.concatenate(digits)
    columns, q = _columns(rows, q)

    def multiply(part: QTensor) -> jax.Array:
        return _sum(dot(n, c, jnp.int32) for c, n in zip(columns, integers(part), strict=True))

    # Eight bits are multiplied as they stand.
    sums = multiply(q).T if q.bits == 8 else over_tiles(multiply, q, q.shape, columns[0], jnp.int32)
    return scale * _scaled(sums, rows, q, count, _BASE)


def in_row(x: jax.Array, q: QTensor, count: int, base: int) -> jax.Array:
    """``in_digits`` for one row, its digits of ``base``: ``x [1, in] -> [1, out]``.

    One reduction computes the sums of several output channels and all digits: a reduction of several operands is the
    only one that XLA:CPU leaves in one piece with what it sums, so that the widened weights are never stored, and
    channels summed together share the digits they read (``scripts/bench_products.py``).
    """
    scale, digits = to_digits(x, count, base)
    rows = jnp.concatenate(digits).astype(jnp.int32)
    out, width = q.shape
    # XLA stores a concatenation of two pieces or more; digits made in another way it would make again for each output
    # channel.  A single digit of 8-bit weights is therefore cut in two.
    halved = q.bits == 8 and count == 1 and width % 2 == 0
    columns = jnp.split(rows, 2, 1) if halved else [rows] if q.bits == 8 else [rows[:, 0::2], rows[:, 1::2]]
    pieces = jnp.concatenate([c[k : k + 1] for k in range(count) for c in columns])
    pieces, q = lax.optimization_barrier((pieces, q))
    weights = [n for part in integers(q) for n in (jnp.split(part, 2, 1) if halved else [part])]
    # As many sums at once as the CPU has registers for; two digits of unpacked halves leave none to share.
    together = 1 if q.bits < 8 and count > 1 else next(n for n in (4, 2, 1) if out % n == 0)
    wide = [n.astype(jnp.int32).reshape(together, out // together, -1) for n in weights]
    terms = [
        _sum(n[channel] * pieces[k * len(columns) + i] for i, n in enumerate(wide))
        for k in range(count)
        for channel in range(together)
    ]
    zero = jnp.int32(0)
    sums = lax.reduce(terms, [zero] * len(terms), lambda a, b: [i + j for i, j in zip(a, b, strict=True)], (1,))
    return scale * _scaled(jnp.stack(sums).reshape(count, out), rows, q, count, base)


def _largest_base(q: QTensor) -> int:
    """Of digits whose products with a row of ``q`` add up within 32 bits, and that float32 holds exactly."""
    widest = 128 if q.bits == 8 else 1 << q.bits
    return 2 * min((2**31 - 1) // (widest * q.shape[1]), 2**15 - 1)


def _scaled(sums: jax.Array, digits: jax.Array, q: QTensor, count: int, base: int) -> jax.Array:
    """``scales * D + offsets * E`` of ``in_digits``, of int32 sums ``[count * rows, out]``."""
    rows = digits.shape[0] // count
    y = _combined(sums, count, rows, base) * q.scales.astype(jnp.float32)[:, 0]
    if q.offsets is not None:
        ones = jnp.sum(digits.astype(jnp.int32), -1, keepdims=True)
        y = y + _combined(ones, count, rows, base) * q.offsets.astype(jnp.float32)[:, 0]
    return y


def _combined(sums: jax.Array, count: int, rows: int, base: int) -> jax.Array:
    """``sum_k sums[k] / base^k`` of int32 ``[count * rows, out]``, the smallest first."""
    parts = sums[: count * rows].reshape(count, rows, -1).astype(jnp.float32)
    total = parts[-1]
    for k in range(count - 2, -1, -1):
        total = parts[k] + total * np.float32(1 / base)
    return total
