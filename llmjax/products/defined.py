"""``x . W^T`` as it is defined: what every device but the CPU is given to compile.

A weight of another dtype than its product's is converted where it is multiplied, for the compiler to take the
conversion into the product.  Where it does not, there is a copy of that one weight: behind the barrier no conversion
begins before its x is known, nor is it moved out of a loop over tokens.

A few rows meet a quantized weight in float32 sums: XLA:GPU takes what a sum is made of into its kernel, however it is
computed, and the sums of several rows into one, which reads the weight once, as it is stored.  What a product of its
matrix units is made of it computes first, in memory, unless it is as simple as one conversion: four bits would be
written in eight, or in sixteen, and read again.  ``kernel``, on NVIDIA's cards, does without; see ``in_a_kernel``.

Float32 products are of the highest precision, on a GPU without TF32.  ``fast`` and ``dynamic_int8`` multiply with
quantized weights in bfloat16, which tensor cores do at many times the speed, and keep float32's accuracy: a float32
value is the sum of three bfloat16 ones to the last bit, and an integer of eight bits is one.  Where rows are many
``kernel`` has float16 instead, of which two are as good, in a row that is scaled into their range.  Activations of a
profile whose products are bfloat16 are rounded to one piece.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.numerics import Numerics
from llmjax.products.digits import pieces, to_digits
from llmjax.products.sums import total
from llmjax.products.tiles import rows_dot
from llmjax.quant.qtensor import QTensor, columns, halves, integers

# Rows that are few: a card's arithmetic on four bits is then no slower than its memory.
FEW = 4
# Rows that meet floats of 16 bits in ``kernel``: with more of them a library's products are quicker.
MOST_OF_FLOATS = 64


def as_defined(numerics: Numerics, x: jax.Array, weight: jax.Array | QTensor) -> jax.Array:
    """``x [rows, in] . weight [out, in] -> float32 [rows, out]``; see ``matmul`` for what it means."""
    if not isinstance(weight, QTensor):
        return _of_floats(numerics, x.astype(numerics.products), weight)
    scale, x = _operand(numerics, x, weight)
    if len(x) <= FEW:
        y = _in_sums(x.astype(jnp.float32), weight)
    elif x.dtype == jnp.bfloat16 or numerics.digits is not None:
        y = _in_bfloat16(x, weight)
    else:
        parts, q = _together(columns(x, weight), weight)
        y = total(rows_dot(c, w) for c, w in zip(parts, halves(q), strict=True))
    return y if scale is None else scale * y


def in_a_kernel(numerics: Numerics, x: jax.Array, weight: jax.Array | QTensor) -> jax.Array:
    """``as_defined``, but what is multiplied in 16 bits is ``kernel``'s, where that knows how and is the quicker."""
    if can_join(numerics, x, [weight]):
        return joined(numerics, x, [weight])[0]
    return as_defined(numerics, x, weight)


def can_join(numerics: Numerics, x: jax.Array, weights: list[Any]) -> bool:
    """Whether ``joined`` knows these weights, all of one kind, and such an x."""
    from llmjax.products import kernel  # Pallas takes as long to import as all of llmjax

    if not all(can_choose(weight, x, numerics) for weight in weights) or not kernel.are_alike(weights):
        return False
    return isinstance(weights[0], QTensor) or math.prod(x.shape[:-1]) <= MOST_OF_FLOATS


def joined(numerics: Numerics, x: jax.Array, weights: list[Any]) -> list[jax.Array]:
    """``in_a_kernel`` of x ``[rows, in]`` with some weights that it ``can_join``, all in one."""
    from llmjax.products import kernel

    scale, x = _operand(numerics, x, weights[0])
    found = kernel.packed_products(x, weights)
    return found if scale is None else [scale * y for y in found]


def can_choose(weight: Any, x: jax.Array, numerics: Numerics) -> bool:
    """Whether ``kernel`` knows a weight, or a stack, for such an x: what is multiplied in 16 bits."""
    from llmjax.products import kernel

    if isinstance(weight, QTensor):
        return (numerics.digits is not None or x.dtype == jnp.bfloat16) and kernel.can_serve(weight)
    return weight is not None and weight.dtype == numerics.products and kernel.can_serve(weight)


def chosen_product(numerics: Numerics, x: jax.Array, stack: jax.Array | QTensor, choice: Any) -> jax.Array:
    """``in_a_kernel`` of tiles of rows, each with the weight of a stack ``[E, out, in]`` that it has chosen.

    Args:
      numerics: the profile.
      x: ``[rows, in]``.
      stack: one that ``can_choose``.
      choice: a ``kernel.Choice``.
    """
    from llmjax.products import kernel

    scale, x = _operand(numerics, x, stack)
    y = kernel.packed_product(x, stack, choice)
    if scale is None:
        return y
    return y * (scale if choice.rows is None else scale[choice.rows.reshape(-1)])


def _operand(numerics: Numerics, x: jax.Array, weight: jax.Array | QTensor) -> tuple[jax.Array | None, jax.Array]:
    """What each row's result is to be multiplied with, if it is, and x as it meets a weight."""
    if not isinstance(weight, QTensor):
        # A row is rounded where it is read: what another kernel wrote would take one of its own.
        return None, x if len(x) == 1 else x.astype(numerics.products)
    if numerics.digits == 1:
        scale, (n,) = to_digits(x.astype(jnp.float32), 1)
        return scale, n.astype(jnp.bfloat16)
    return None, x.astype(jnp.bfloat16 if jnp.bfloat16 in (x.dtype, numerics.products) else jnp.float32)


def _of_floats(numerics: Numerics, x: jax.Array, weight: jax.Array) -> jax.Array:
    if weight.dtype != x.dtype:
        x, weight = _together(x, weight)
    y = rows_dot(x, weight.astype(x.dtype))
    # A GELU is not for cuBLAS to take into the product: its tanh need not be as near as XLA's.
    epilogue = numerics.activations == y.dtype != x.dtype and len(x) > FEW
    return lax.optimization_barrier(y) if epilogue else y


def _in_sums(x: jax.Array, q: QTensor) -> jax.Array:
    """Of a few rows, each in a sum of its own.  Where a channel has one scale, it is multiplied with afterwards; zero
    is taken from floats, see ``halves``."""
    _, q = _together(x, q)  # x stays what other weights meet: sums of one shape with the same x are one kernel
    plain = q.scales.shape[1] == 1 and q.offsets is None
    parts = halves(q.replace(scales=jnp.ones_like(q.scales)) if plain else q)
    y = jnp.stack([
        jnp.sum(total(w * c[None] for w, c in zip(parts, columns(row, q), strict=True)), -1) for row in x
    ])  # fmt: skip
    return y * q.scales.astype(jnp.float32)[None, :, 0] if plain else y


def _in_bfloat16(x: jax.Array, q: QTensor) -> jax.Array:
    """Of x in bfloat16, or of three ``pieces`` of float32 x.

    Where a channel has one scale, it is multiplied with afterwards, and the integers are exact.  Other weights are two
    pieces, all but 4e-6 of the float32 value; the product of two that small is left out.  That is a few times what a
    float32 product loses.
    """
    found, q = _together([x] if x.dtype == jnp.bfloat16 else pieces(x, 3), q)

    def product(x: list[jax.Array], parts: Iterable[jax.Array]) -> jax.Array:
        rows = jnp.concatenate(x)  # the weight is read once for all pieces of x
        y = total(rows_dot(c, w) for c, w in zip(columns(rows, q), parts, strict=True))
        return total(jnp.split(y, len(x))[::-1])  # the small ones first

    if q.scales.shape[1] == 1 and q.offsets is None:
        return product(found, [n.astype(jnp.bfloat16) for n in integers(q)]) * q.scales.astype(jnp.float32)[None, :, 0]
    large, small = zip(*(pieces(w, 2) for w in halves(q)), strict=True)
    return product(found[:1], small) + product(found[:2], large)


def _together(x: Any, weight: Any) -> Any:
    return lax.optimization_barrier((x, weight))
