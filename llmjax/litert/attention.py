"""The composite that LiteRT's default delegate computes by itself, whatever its body says.

litert-torch puts attention into ``odml.scaled_dot_product_attention``.  XNNPACK knows it by name and never looks at the
body, which converters write badly: litert-converter 0.5.0 turns the transposition of a single key head into a reshape.

Source: VisitDotAttentionNode of TensorFlow Lite's XNNPACK delegate (``tensorflow/lite/delegates/xnnpack``).
"""

import jax
import jax.numpy as jnp

from converters.readers.litert.options import COMPOSITE
from converters.readers.litert.tflite import Operator, Subgraph
from llmjax.litert import products
from llmjax.litert.kernels import KERNELS
from llmjax.litert.products import Value, as_array
from llmjax.numerics import Numerics

NAME = "odml.scaled_dot_product_attention"


def is_taken(op: Operator, graph: Subgraph) -> bool:
    """Whether an operator is the composite and the delegate takes it: queries ``[B, T, N, H]``, keys and values
    ``[B, S, K, H]``, and a mask of S positions or none; else its body is run."""
    if op.name != COMPOSITE or op.options["name"] != NAME:
        return False
    inputs = [graph.tensors[i] for i in op.inputs]
    shapes = [tensor.shape for tensor in inputs if tensor.type == "FLOAT32" and len(tensor.shape) == 4]
    if len(shapes) != len(inputs) or len(shapes) not in (3, 4):
        return False
    (_, _, heads, width), keys, values = shapes[:3]
    fits = width == keys[3] == values[3] and keys[2] == values[2] > 0 and heads % keys[2] == 0
    return fits and all(mask[3] == keys[1] == values[1] for mask in shapes[3:])


def attention(op: Operator, x: list[Value], numerics: Numerics) -> jax.Array:
    """``softmax(cap(q * scale . k) + mask) . v``, as float32 ``[B, T, N, H]``."""
    q, k, v, *mask = map(as_array, x)
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    scale, cap = (op.options["floats"].get(name) for name in ("scale", "logit_cap"))

    def product(x: jax.Array, y: jax.Array, adjoint: bool) -> jax.Array:
        x = x.reshape(batch, groups, heads // groups, length, -1)
        y = jnp.moveaxis(y, 2, 1)[:, :, None]
        return products.batch_matmul(x, y, False, adjoint, numerics).reshape(batch, heads, length, -1)

    def apply(name: str, *x: jax.Array) -> jax.Array:
        return KERNELS[name](_ALONE, list(x), [], numerics)

    factor = jnp.float32(1 / width**0.5 if scale is None else scale)
    scores = product(jnp.moveaxis(apply("MUL", q, factor), 2, 1), k, True)
    if cap is not None:
        bound = jnp.float32(cap)
        scores = apply("MUL", apply("TANH", apply("DIV", scores, bound)), bound)
    for hidden in mask:
        scores = hidden + scores
    return jnp.moveaxis(product(apply("SOFTMAX", scores), v, False), 1, 2)


_ALONE = Operator("", (), (), {"activation": 0, "beta": 1.0})
