"""The one place that decides how a product ``x . W`` runs.

Definition: ``y[..., o] = sum_i float32(x[..., i]) * float32(W[o, i])``, both operands first rounded to the profile's
product dtype, the sum in float32.  A quantized weight means its dequantized values; under ``dynamic_int8``, x is first
rounded to 8 bits (``digits``).  Weights are output-major ``[out, in]``: Hugging Face's layout, and the
one XLA:CPU reads at memory speed.

On the CPU, by weight, profile and rows of x; the reasons are a benchmark's lines (``scripts/bench_products.py``):

===============================  ===================================  ==================================================
a few rows, all but 5 bits       ``fast``, ``dynamic_int8``           ``sums``: one row at the speed of memory
one scale a channel, 4, 8 bits   ``fast`` with AMX                    ``digits.in_digits``: exact integers
                                 ``dynamic_int8``, ``mediapipe_cpu``  the same, one digit
256 rows and more, in float32    all but one digit's                  ``tiles.rows_first``: converted whole
floats of the product's dtype    all                                  ``dots``: the library's product
whatever else                    all                                  ``tiles``: converted a tile at a time
===============================  ===================================  ==================================================

Elsewhere a product is written as it is defined (``defined``), and the compiler knows best; but on an NVIDIA card what
is multiplied in 16 bits meets packed weights, and a few rows floats, in a kernel (``kernel``), those of an x at once.

The derivative is that of the float32 product of the same x and W (``plain``), whatever ran: in x, in float weights, in
a packed weight's scales and offsets.  Activations that are rounded, to the product's dtype or to 8 bits, are passed
straight through: to the derivative there is no rounding.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from llmjax.device import by_device, knows_cuda
from llmjax.numerics import Numerics
from llmjax.products.cpu import has_integer_tiles
from llmjax.products.defined import as_defined, can_join, in_a_kernel, joined
from llmjax.products.digits import in_digits, in_tiles, to_digits
from llmjax.products.dots import dot
from llmjax.products.plain import plain
from llmjax.products.sums import by_weight, can_sum, total
from llmjax.products.tiles import many, over_tiles, rows_first
from llmjax.quant.qtensor import QTensor


def matmul(x: jax.Array, weight: jax.Array | QTensor, numerics: Numerics) -> jax.Array:
    """``x [..., in] . weight [out, in] -> float32 [..., out]``, in the profile's product dtype with a float32 sum.

    Differentiable in every mode as the float32 product is; rounded activations are passed straight through.
    """
    return _product(x.reshape(-1, x.shape[-1]), weight, numerics).reshape(*x.shape[:-1], weight.shape[0])


def matmuls(x: jax.Array, weights: list[Any], numerics: Numerics) -> list[jax.Array | None]:
    """``matmul`` with each of some weights, where that is one kernel; None for each of them where it is not."""
    if not (knows_cuda() and can_join(numerics, x, weights)):
        return [None for _ in weights]
    rows = _products(x.reshape(-1, x.shape[-1]), weights, numerics)
    return [y.reshape(*x.shape[:-1], -1) for y in rows]


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _products(x: jax.Array, weights: list[Any], numerics: Numerics) -> list[jax.Array]:
    def each(product: Any) -> Any:
        return lambda x, weights: [product(numerics, x, weight) for weight in weights]

    return by_device(each(as_defined), cpu=each(_on_cpu), cuda=partial(joined, numerics))(x, weights)


@partial(_products.defjvp, symbolic_zeros=True)
def _products_jvp(numerics: Numerics, primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (x, weights), (x_dot, weight_dots) = primals, tangents
    y = _products(x, weights, numerics)
    each = zip(weights, weight_dots, y, strict=True)
    return y, [_tangent(x, weight, x_dot, weight_dot, like) for weight, weight_dot, like in each]


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(x: jax.Array, weight: jax.Array | QTensor, numerics: Numerics) -> jax.Array:
    plainly, on_cpu, on_card = (partial(function, numerics) for function in (as_defined, _on_cpu, in_a_kernel))
    return by_device(plainly, cpu=on_cpu, cuda=on_card)(x, weight)


@partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(numerics: Numerics, primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (x, weight), (x_dot, weight_dot) = primals, tangents
    y = _product(x, weight, numerics)
    return y, _tangent(x, weight, x_dot, weight_dot, y)


def _tangent(x: jax.Array, weight: Any, x_dot: Any, weight_dot: Any, y: jax.Array) -> jax.Array:
    """Of the product ``y``."""
    terms = [] if is_zero(x_dot) else [plain(x_dot, weight)]
    if not all(map(is_zero, jax.tree.leaves(weight_dot))):
        terms.append(plain(x, _tangent_weight(weight, weight_dot)))
    return total(terms) if terms else jnp.zeros_like(y)


def is_zero(tangent: Any) -> bool:
    """Whether a tangent that a rule with ``symbolic_zeros`` is given says that nothing changes."""
    return isinstance(tangent, SymbolicZero) or tangent.dtype == jax.dtypes.float0


def _tangent_weight(weight: Any, tangent: Any) -> Any:
    """float32; of a packed weight the same integers with the tangents of scales and offsets."""

    def floats(leaf: jax.Array, leaf_dot: Any) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return jnp.zeros(leaf.shape) if is_zero(leaf_dot) else leaf_dot.astype(jnp.float32)

    return jax.tree.map(floats, weight, tangent)


def _on_cpu(numerics: Numerics, x: jax.Array, weight: jax.Array | QTensor) -> jax.Array:
    if isinstance(weight, QTensor):
        x = x if numerics.digits == 1 else x.astype(numerics.products)
        return _quantized_product(x.astype(jnp.float32), weight, numerics)
    return _float_product(x.astype(numerics.products), weight, numerics)


def _quantized_product(x: jax.Array, q: QTensor, numerics: Numerics) -> jax.Array:
    summed = len(x) <= summed_rows(q, numerics)
    digits = integer_digits(numerics)
    if digits is not None and not summed and q.scales.shape[1] == 1 and q.bits != 5:
        return in_digits(x, q, digits)
    scale = None
    if numerics.digits == 1:
        scale, (rounded,) = to_digits(x, 1)
        x = rounded.astype(jnp.float32)
    if many(x) and scale is None:  # one digit's sums are integers, whatever is beside them
        return rows_first(x, q)
    y = by_weight(x, q) if summed else in_tiles(x, q)
    return y if scale is None else scale * y


def _float_product(x: jax.Array, weight: jax.Array, numerics: Numerics) -> jax.Array:
    if len(x) <= summed_rows(weight, numerics):
        return by_weight(x, weight)

    if many(x) and x.dtype == jnp.float32:
        return rows_first(x, weight)

    def multiply(part: jax.Array) -> jax.Array:
        return dot(part.astype(numerics.products), x, jnp.float32)

    converted = weight.dtype != numerics.products
    return over_tiles(multiply, weight, weight.shape, x) if converted else multiply(weight).T


def summed_rows(weight: jax.Array | QTensor, numerics: Numerics) -> int:
    """Up to how many rows meet a weight in a sum on the CPU; 0 for none.

    Sums of one row are the fastest there is for every kind.  More rows are worth it until the alternative is as fast:
    a library product of bfloat16 or of one digit soon, tiles and three digits not before sixteen.
    """
    if not (numerics.reassociates and can_sum(weight)):
        return 0
    if not isinstance(weight, QTensor):
        return 4 if weight.dtype.itemsize < 4 else 1
    if weight.scales.shape[1] > 1 or weight.offsets is not None or has_integer_tiles():
        return 1
    return 4 if numerics.digits == 1 else 16


def integer_digits(numerics: Numerics) -> int | None:
    """Digits in which several rows meet quantized weights on the CPU; None where they do as floats.  One pays on any,
    three with AMX alone, for they are three times the rows of a float32 product."""
    return numerics.digits if numerics.digits == 1 or has_integer_tiles() else None
