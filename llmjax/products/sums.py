"""``x . W^T`` of a few rows, the step of a few streams, as sums that XLA:CPU compiles itself.

It reads a weight once, widens it in registers and adds up on both cores, which for 8, 16 and 4 bits no library product
does, and in float32 is no slower than one: close to the speed of memory, whatever the CPU
(``scripts/bench_products.py``).  Two things make it so:

- A reduction of several operands is the only one XLA:CPU leaves in one piece with what it sums.
- LLVM may add up floats in any order (``numerics.Numerics.reassociates``): one after the other they would take four
  times as long, and lose more to rounding.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmjax.device import by_device
from llmjax.quant.qtensor import QTensor, columns, integers

# As many sums at once as the CPU has registers for: rows share the weights they read, channels the activations.
_ROWS = 4
_CHANNELS = (4, 2)
_SUMS = 16
# Rows at once in attention.
_CACHE_ROWS = 8


def can_sum(weight: jax.Array | QTensor) -> bool:
    """Whether ``by_weight`` serves a weight: its channels can be summed at least in pairs."""
    return weight.shape[0] % _CHANNELS[-1] == 0 and not (isinstance(weight, QTensor) and weight.bits == 5)


def by_weight(x: jax.Array, weight: jax.Array | QTensor) -> jax.Array:
    """``x [rows, in] . weight [out, in] -> float32 [rows, out]``, x in the dtype it is rounded to.

    A row's bits do not depend on its place among the others, but on how many there are.
    """
    rows = x.shape[0]
    passes = -(-rows // _ROWS)
    at_once = -(-rows // passes)
    x = jnp.pad(x.astype(jnp.float32), ((0, passes * at_once - rows), (0, 0)))  # all rows in sums of one kind
    parts = _stored(jnp.stack(columns(x, weight) if isinstance(weight, QTensor) else [x]))
    parts, weight = lax.optimization_barrier((parts, weight))
    y = [_some_rows(parts[:, i : i + at_once], weight) for i in range(0, len(x), at_once)]
    return jnp.concatenate(y)[:rows]


def _some_rows(x: jax.Array, weight: jax.Array | QTensor) -> jax.Array:
    """Of x's ``columns``, ``[P, rows, in / P]``."""
    if not isinstance(weight, QTensor):
        return _sum_of_products(x, [weight])
    parts, scales = _integers(weight), weight.scales.astype(jnp.float32)
    if weight.offsets is not None:
        return _sum_of_products(x, parts, scales, weight.offsets.astype(jnp.float32))
    if scales.shape[1] > 1:
        return _sum_of_products(x, parts, scales)
    return _sum_of_products(x, parts) * scales[None, :, 0]


def _integers(q: QTensor) -> list[jax.Array]:
    """As ``qtensor.integers``; four bits are taken apart in 32, where they end up, in fewer instructions."""
    if q.bits != 4:
        return list(integers(q))
    values = q.values.astype(jnp.int32)
    return [(values & 15) - q.zero, (values >> 4) - q.zero]


def _sum_of_products(
    x: jax.Array,
    parts: list[jax.Array],
    scales: jax.Array | None = None,
    offsets: jax.Array | None = None,
) -> jax.Array:
    """``sum_p x[p] . (scales * parts[p] + offsets)^T -> [rows, out]``.

    Args:
      x: float32 ``[P, rows, in / P]``.
      parts: P of ``[out, in / P]``.
      scales: float32 ``[out, G]``, or None for ones.
      offsets: as scales, or None for zeros.
    """
    rows, out = x.shape[1], parts[0].shape[0]
    # Where rows are several, so are a channel's sums: LLVM adds up parts in one order for this row, another for that.
    apart = len(parts) if rows > 1 else 1
    together = next(n for n in _CHANNELS if out % n == 0 and rows * apart * n <= _SUMS)
    groups = 1 if scales is None else scales.shape[1]

    def split(leaf: jax.Array) -> list[jax.Array]:
        return list(leaf.reshape(together, out // together, groups, -1))

    x = x.reshape(*x.shape[:2], groups, -1)
    wide = [split(p.astype(jnp.float32)) for p in parts]
    factors = None if scales is None else split(scales)
    if factors is not None and offsets is not None:  # not apart from the integers' sum, which it may nearly cancel
        wide = [[n * s + o for n, s, o in zip(w, factors, split(offsets), strict=True)] for w in wide]
        factors = None
    terms = []
    for row in range(rows):
        for channel in range(together):
            products = [w[channel] * c[row][None] for w, c in zip(wide, x, strict=True)]
            if apart == 1:
                products = [total(products)]
            terms += products if factors is None else [product * factors[channel] for product in products]
    sums = _added(terms, (1, 2))
    return jnp.stack([total(sums[i : i + apart]) for i in range(0, len(sums), apart)]).reshape(rows, out)


@jax.custom_jvp
def by_cache(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x [..., M, in] . w [..., out, in] -> float32 [..., M, out]``, M rows with the same w: attention."""
    return by_device(_rows_product, cpu=_by_cache_in_sums)(x, w)


def _rows_product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("...MI,...OI->...MO", x, w, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _by_cache_in_sums(x: jax.Array, w: jax.Array) -> jax.Array:
    """Unlike a library product it reads w where it stands, a slice of a cache say, without copying it first."""
    rows, out = x.shape[-2], w.shape[-2]
    x = _stored(x.astype(jnp.float32))
    # A reduction of one operand would not be left in one piece.
    together = 2 if rows % 2 and out % 2 == 0 else 1
    parts = w.astype(jnp.float32).reshape(*w.shape[:-2], together, out // together, w.shape[-1])
    at_once = next(n for n in range(min(rows, _CACHE_ROWS), 0, -1) if rows % n == 0)
    sums: list[jax.Array] = []
    for first in range(0, rows, at_once):
        terms = [
            parts[..., i, :, :] * x[..., row, None, :] for row in range(first, first + at_once) for i in range(together)
        ]
        sums += _added(terms, (terms[0].ndim - 1,))
    joined = [jnp.concatenate(sums[i : i + together], -1) for i in range(0, len(sums), together)]
    return jnp.stack(joined, -2)


@by_cache.defjvp
def _by_cache_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> Any:
    (x, w), (x_dot, w_dot) = primals, tangents
    return by_cache(x, w), _rows_product(x_dot, w) + _rows_product(x, w_dot)


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
