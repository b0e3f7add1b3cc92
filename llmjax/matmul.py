"""The one place that decides how a product ``x . W`` runs; quantized weights go on to ``llmjax.quant.product``.

Definition: ``y[..., o] = sum_i float32(x[..., i]) * float32(W[o, i])``, both operands first rounded to the profile's
product dtype, the sum in float32.  Weights are output-major ``[out, in]``: Hugging Face's layout, and the one XLA:CPU
reads at memory speed.
"""

import jax
import jax.numpy as jnp

from llmjax.dots import dot
from llmjax.numerics import Numerics
from llmjax.quant.product import product
from llmjax.quant.qtensor import QTensor
from llmjax.tiles import over_tiles


def matmul(x: jax.Array, weight: jax.Array | QTensor, numerics: Numerics) -> jax.Array:
    """``x [..., in] . weight [out, in] -> float32 [..., out]``, in the profile's product dtype with a float32 sum."""
    if isinstance(weight, QTensor):
        y = product(x.reshape(-1, x.shape[-1]), weight, numerics.digits)
        return y.reshape(*x.shape[:-1], weight.shape[0])
    return _float_product(x, weight, numerics)


def _float_product(x: jax.Array, weight: jax.Array, numerics: Numerics) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1]).astype(numerics.products)

    def multiply(part: jax.Array) -> jax.Array:
        return dot(part.astype(numerics.products), rows, jnp.float32)

    converted = weight.dtype != numerics.products
    y = over_tiles(multiply, weight, weight.shape, rows) if converted else multiply(weight).T
    return y.reshape(*x.shape[:-1], weight.shape[0])
