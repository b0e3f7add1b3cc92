"""``x . W^T`` of a single row, the step of a single stream, as one sum that XLA:CPU compiles itself.

It reads a weight once, widens it in registers and adds up on both cores, which for 8, 16 and 4 bits no library product
does, and in float32 is no slower than one: close to the speed of memory, whatever the CPU
(``scripts/bench_products.py``).  Two things make it so:

- A reduction of several operands is the only one XLA:CPU leaves in one piece with what it sums.
- LLVM may add up floats in any order (``numerics.Numerics.reassociates``): one after the other they would take four
  times as long, and lose more to rounding.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmjax.numerics import Numerics
from llmjax.quant.qtensor import QTensor, integers

# As many sums at once as the CPU has registers for; they share the activations they read.
_TOGETHER = (4, 2)
# Rows that share a weight in one sum, for the same reason.
_ROWS = 8


def sums_pay(numerics: Numerics) -> bool:
    """Whether sums run as fast as this module needs them to."""
    return numerics.reassociates and jax.default_backend() == "cpu"


def summed(weight: jax.Array | QTensor) -> bool:
    """Whether ``one_row`` serves a weight: its channels can be summed at least in pairs."""
    return weight.shape[0] % _TOGETHER[-1] == 0 and not (isinstance(weight, QTensor) and weight.bits == 5)


def one_row(x: jax.Array, weight: jax.Array | QTensor) -> jax.Array:
    """``x [1, in] . weight [out, in] -> float32 [1, out]``, x in the dtype it is rounded to."""
    x = x.astype(jnp.float32)
    packed = isinstance(weight, QTensor) and weight.bits < 8
    columns = _stored(jnp.concatenate([x[:, 0::2], x[:, 1::2]]) if packed else x)
    columns, weight = lax.optimization_barrier((columns, weight))
    if isinstance(weight, QTensor):
        return _quantized_sum(list(columns), weight)
    return _sum_of_products(list(columns), [weight])


def _quantized_sum(columns: list[jax.Array], q: QTensor) -> jax.Array:
    parts, scales = _integers(q), q.scales.astype(jnp.float32)
    if q.offsets is not None:
        return _sum_of_products(columns, parts, scales, q.offsets.astype(jnp.float32))
    if scales.shape[1] > 1:
        return _sum_of_products(columns, parts, scales)
    return _sum_of_products(columns, parts) * scales[:, 0]


def _integers(q: QTensor) -> list[jax.Array]:
    """As ``qtensor.integers``; four bits are taken apart in 32, where they end up, in fewer instructions."""
    if q.bits != 4:
        return list(integers(q))
    values = q.values.astype(jnp.int32)
    return [(values & 15) - q.zero, (values >> 4) - q.zero]


def _sum_of_products(
    columns: list[jax.Array],
    parts: list[jax.Array],
    scales: jax.Array | None = None,
    offsets: jax.Array | None = None,
) -> jax.Array:
    """``sum_p columns[p] . (scales * parts[p] + offsets)^T -> [1, out]``.

    Args:
      columns: float32 ``[in / P]`` each.
      parts: ``[out, in / P]`` each.
      scales: float32 ``[out, G]``, or None for ones.
      offsets: as scales, or None for zeros.
    """
    out = parts[0].shape[0]
    together = next(n for n in _TOGETHER if out % n == 0)
    groups = 1 if scales is None else scales.shape[1]

    def split(leaf: jax.Array) -> list[jax.Array]:
        return list(leaf.reshape(together, out // together, groups, -1))

    columns = [c.reshape(groups, -1) for c in columns]
    wide = [split(p.astype(jnp.float32)) for p in parts]
    if scales is not None and offsets is not None:  # not apart from the integers' sum, which it may nearly cancel
        wide = [[n * s + o for n, s, o in zip(w, split(scales), split(offsets), strict=True)] for w in wide]
    terms = [total(w * c for w, c in zip(channels, columns, strict=True)) for channels in zip(*wide, strict=True)]
    if scales is not None and offsets is None:
        terms = [term * s for term, s in zip(terms, split(scales), strict=True)]
    return jnp.stack(_added(terms, (1, 2))).reshape(1, out)


def few_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x [..., M, in] . w [..., out, in] -> float32 [..., M, out]``, M rows with the same w: cached attention.

    Unlike a library product it reads w where it stands, a slice of a cache say, without copying it first.
    """
    rows, out = x.shape[-2], w.shape[-2]
    x = _stored(x.astype(jnp.float32))
    # A reduction of one operand would not be left in one piece.
    together = 2 if rows % 2 and out % 2 == 0 else 1
    parts = w.astype(jnp.float32).reshape(*w.shape[:-2], together, out // together, w.shape[-1])
    at_once = next(n for n in range(min(rows, _ROWS), 0, -1) if rows % n == 0)
    sums: list[jax.Array] = []
    for first in range(0, rows, at_once):
        terms = [
            parts[..., i, :, :] * x[..., row, None, :] for row in range(first, first + at_once) for i in range(together)
        ]
        sums += _added(terms, (terms[0].ndim - 1,))
    joined = [jnp.concatenate(sums[i : i + together], -1) for i in range(0, len(sums), together)]
    return jnp.stack(joined, -2)


def _stored(x: jax.Array) -> jax.Array:
    """float32 x, kept in memory for a sum that reads it once for each output channel.

    XLA:CPU would take into the sum, and do again for each channel, what x is made by: a norm's multiplication, say.
    It never does a reduction twice, and that of x's bits with themselves leaves x; one of floats it might hand over,
    with the copies of x for all channels, to a library.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = lax.reduce_or(lax.optimization_barrier(jnp.stack([bits, bits])), (0,))
    return lax.bitcast_convert_type(bits, jnp.float32)


def _added(terms: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    zeros = [np.float32(0)] * len(terms)
    return lax.reduce(terms, zeros, lambda a, b: [i + j for i, j in zip(a, b, strict=True)], axes)


def total(parts: Iterable[jax.Array]) -> jax.Array:
    """Of arrays, added up in their order."""
    return functools.reduce(jnp.add, parts)
