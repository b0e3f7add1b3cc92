"""What each operator computes.

A kernel takes the operator, its inputs (constants that fix shapes are NumPy arrays; None where one is left out), the
tensors it fills, and the profile; it returns the value of its output, or of all in a tuple.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from converters.readers.litert.options import HADAMARD
from converters.readers.litert.tflite import Operator, Tensor
from llmjax.litert import approximations, products, recurrence
from llmjax.litert.products import Dequantized, Filter, Square, Value, as_array
from llmjax.models.layers import gelu_erf, gelu_tanh
from llmjax.numerics import Numerics
from llmjax.quant.qtensor import QTensor, take

Kernel = Callable[[Operator, list[Value], list[Tensor], Numerics], Any]

# By TFLite's numbers of fused activations; it has two more, which its own kernels leave out.
_ACTIVATIONS: tuple[Callable[[Any], Any], ...] = (
    lambda x: x,
    jax.nn.relu,
    lambda x: jnp.clip(x, -1, 1),
    lambda x: jnp.clip(x, 0, 6),
)
TYPES = {
    "FLOAT32": np.float32,
    "FLOAT16": np.float16,
    "BFLOAT16": jnp.bfloat16,
    "INT64": np.int32,  # JAX's integers; no graph counts further
    "INT32": np.int32,
    "UINT32": np.uint32,
    "INT16": np.int16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


def activated(op: Operator, y: jax.Array) -> jax.Array:
    """With the activation that the operator was fused with.

    Raises:
      ValueError: there is no such one.
    """
    number = op.options.get("activation", 0)
    if not 0 <= number < len(_ACTIVATIONS):
        raise ValueError(f"fused activation {number} is not supported")
    return _ACTIVATIONS[number](y)


def constant(value: Value, what: str) -> np.ndarray:
    """A value that fixes shapes.

    Raises:
      ValueError: it is computed by the graph.
    """
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{what} is no constant")
    return value


def _elementwise(function: Callable[..., Any]) -> Kernel:
    return lambda op, x, out, numerics: activated(op, function(*map(as_array, x)))


def _approximated(exact: Callable[..., Any], theirs: Callable[..., Any]) -> Kernel:
    """The runtime's own arithmetic where activations are rounded behind it."""

    def kernel(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
        arrays = list(map(as_array, x))
        return activated(op, (theirs if numerics.digits == 1 and arrays[0].dtype == jnp.float32 else exact)(*arrays))

    return kernel


def _axes(value: Value, rank: int) -> tuple[int, ...]:
    return tuple(sorted({int(a) % max(1, rank) for a in constant(value, "an axis").reshape(-1)}))


def _reducer(function: Callable[..., Any]) -> Kernel:
    def kernel(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
        array = as_array(x[0])
        return function(array, axis=_axes(x[1], array.ndim), keepdims=op.options["keep_dims"])

    return kernel


def _in_their_order(function: Callable[..., Any], theirs: Callable[..., Any]) -> Kernel:
    """Adds up along dimensions, in the runtime's order where activations are rounded behind it."""

    def kernel(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
        array = as_array(x[0])
        if numerics.digits != 1 or array.dtype != jnp.float32:
            return _reducer(function)(op, x, out, numerics)
        squares = isinstance(x[0], Square)
        found = theirs(x[0].root if squares else array, _axes(x[1], array.ndim), squares)
        return found.reshape(out[0].shape)

    return kernel


def _fully_connected(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    if op.options["weights_format"]:
        raise ValueError("shuffled weights are not supported")
    weight = x[1]
    if isinstance(weight, Dequantized) and isinstance(weight.weight, Filter):
        weight = as_array(weight)
    rows = as_array(x[0]).reshape(-1, weight.shape[1])
    bias = as_array(x[2]) if len(x) > 2 and x[2] is not None else None
    y = products.fully_connected(rows, weight, bias, numerics)
    return activated(op, y.reshape(out[0].shape))


def _depthwise(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    bias = as_array(x[2]) if len(x) > 2 and x[2] is not None else None
    return activated(op, products.depthwise(as_array(x[0]), x[1], bias, op.options, numerics))


def _batch_matmul(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    return products.batch_matmul(as_array(x[0]), as_array(x[1]), op.options["adj_x"], op.options["adj_y"], numerics)


def _embedding(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    ids, table = as_array(x[0]), x[1].weight if isinstance(x[1], Dequantized) else x[1]
    return (take(table, ids) if isinstance(table, QTensor) else as_array(table)[ids]).astype(jnp.float32)


def _dequantize(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    if isinstance(x[0], QTensor | Filter):
        return Dequantized(x[0])
    if x[0].ndim == 2 and not isinstance(x[0], np.ndarray):
        return Dequantized(x[0])  # a float16 weight, which a product widens as it reads
    return x[0].astype(jnp.float32)


def _softmax(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    softmax = approximations.softmax if numerics.digits == 1 else jax.nn.softmax
    return softmax(as_array(x[0]) * np.float32(op.options["beta"]))


def _gelu(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    own = approximations.gelu, approximations.gelu_tanh
    by_erf, by_tanh = own if numerics.digits == 1 else (gelu_erf, gelu_tanh)
    return (by_tanh if op.options["approximate"] else by_erf)(as_array(x[0]))


def _reshape(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    return as_array(x[0]).reshape(out[0].shape)


def _slice(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    array, begin, size = as_array(x[0]), x[1], out[0].shape
    if isinstance(begin, np.ndarray):
        return lax.slice(array, begin.tolist(), [int(b) + s for b, s in zip(begin, size, strict=True)])
    return lax.dynamic_slice(array, list(begin), size)


def _strided_slice(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    array, options = as_array(x[0]), op.options
    if options["ellipsis_mask"] or options["new_axis_mask"]:
        raise ValueError("an ellipsis or a new axis is not supported")
    index: list[slice | int] = []
    for i, (begin, end, step) in enumerate(zip(*(constant(v, "a bound").tolist() for v in x[1:4]), strict=True)):
        end += begin if options["offset"] else 0
        first, last = options["begin_mask"] >> i & 1, options["end_mask"] >> i & 1
        if options["shrink_axis_mask"] >> i & 1:
            index.append((0 if step > 0 else -1) if first else begin)
        else:
            index.append(slice(None if first else begin, None if last else end, step))
    return array[tuple(index)]


def _update_slice(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    array, update, start = as_array(x[0]), as_array(x[1]), jnp.asarray(x[2])
    # LiteRT clamps at both ends, where JAX counts negative numbers from the end.
    start = jnp.clip(start, 0, np.asarray(array.shape, np.int32) - np.asarray(update.shape, np.int32))
    return lax.dynamic_update_slice(array, update, [start[i] for i in range(array.ndim)])


def _gather(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    array, ids, axis, batch = as_array(x[0]), as_array(x[1]), op.options["axis"], op.options["batch_dims"]
    axis %= array.ndim
    if not 0 <= batch <= min(axis, ids.ndim):
        raise ValueError(f"batch_dims {batch} is not supported")
    take_along: Callable[..., Any] = lambda a, i: jnp.take(a, i, axis=axis - batch)  # noqa: E731
    for _ in range(batch):
        take_along = jax.vmap(take_along)
    return take_along(array, ids)


def _gather_nd(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    array, places = as_array(x[0]), jnp.moveaxis(as_array(x[1]), -1, 0)
    return array.at[tuple(places)].get(mode="fill", wrap_negative_indices=False)


def _select(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    condition, yes, no = map(as_array, x)
    if op.name == "SELECT" and condition.ndim == 1 < yes.ndim:
        condition = condition.reshape(-1, *[1] * (yes.ndim - 1))
    return jnp.where(condition, yes, no)


def _concatenation(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    if op.options["activation"]:
        raise ValueError("a fused activation, which LiteRT leaves out here, is not supported")
    return jnp.concatenate(list(map(as_array, x)), op.options["axis"])


def _split(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    axis, array = (x[0], x[1]) if op.name == "SPLIT" else (x[2], x[0])
    (at,) = constant(axis, "an axis").reshape(-1).tolist()
    sizes = [tensor.shape[at] for tensor in out]
    return tuple(jnp.split(as_array(array), np.cumsum(sizes)[:-1].tolist(), at))


def _unpack(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    array, axis = as_array(x[0]), op.options["axis"]
    return tuple(jnp.take(array, i, axis=axis) for i in range(array.shape[axis]))


def _pad(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    fill = as_array(x[2]).reshape(()) if len(x) > 2 else 0
    return jnp.pad(as_array(x[0]), constant(x[1], "the padding").tolist(), constant_values=fill)


def _transpose(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    return jnp.transpose(as_array(x[0]), constant(x[1], "the order of dimensions").tolist())


def _cast(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    return as_array(x[0]).astype(TYPES[out[0].type])


def _broadcast(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    return jnp.broadcast_to(as_array(x[1] if op.name == "FILL" else x[0]), out[0].shape)


def _tile(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    return jnp.tile(as_array(x[0]), constant(x[1], "the number of copies").tolist())


def _pick(function: Callable[..., Any]) -> Kernel:
    def kernel(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
        array = as_array(x[0])
        (axis,) = _axes(x[1], array.ndim)
        return function(array, axis=axis).astype(np.int32)

    return kernel


def _cumsum(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    array = as_array(x[0])
    (axis,) = _axes(x[1], array.ndim)
    reverse, size = op.options["reverse"], array.shape[axis]
    if op.options["exclusive"]:  # nothing is taken away again: of large numbers no small ones would be left
        pads = [(0, 0)] * array.ndim
        pads[axis] = (int(not reverse), int(reverse))
        array = lax.slice_in_dim(jnp.pad(array, pads), int(reverse), size + int(reverse), axis=axis)
    return lax.cumsum(array, axis, reverse=reverse)


def _divide(x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = jnp.broadcast_arrays(x, y)
    # XLA would multiply by the reciprocal of what several numbers are divided by.
    return x / lax.optimization_barrier(y) if jnp.issubdtype(x.dtype, jnp.inexact) else lax.div(x, y)


def _kept_apart(kernel: Kernel) -> Kernel:
    """Of an operator that ends in a product: it is rounded before another adds to it, where activations are rounded
    behind both, as LiteRT's operators are."""

    def kept(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
        y = kernel(op, x, out, numerics)
        # Whatever stands between the two keeps the compiler from making one operation of them.
        return jnp.maximum(y, approximations.LEAST) if numerics.digits == 1 and y.dtype == jnp.float32 else y

    return kept


def _squared(kernel: Kernel) -> Kernel:
    """Of one that may multiply something with itself."""

    def squared(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
        y = kernel(op, x, out, numerics)
        alone = len(set(op.inputs)) == 1 and not op.options.get("activation")
        return Square(as_array(x[0]), y) if alone and numerics.digits == 1 and y.dtype == jnp.float32 else y

    return squared


_UNARY: dict[str, Callable[..., Any]] = {
    "ABS": jnp.abs,
    "CEIL": jnp.ceil,
    "FLOOR": jnp.floor,
    "LOGICAL_NOT": jnp.logical_not,
    "NEG": jnp.negative,
    "RELU": jax.nn.relu,
    "RELU6": lambda x: jnp.clip(x, 0, 6),
    "ROUND": jnp.round,
    "SIGN": jnp.sign,
    "SQUARE": jnp.square,
    "ZEROS_LIKE": jnp.zeros_like,
}
_BINARY: dict[str, Callable[..., Any]] = {
    "ADD": operator.add,
    "DIV": _divide,
    "EQUAL": jnp.equal,
    "FLOOR_DIV": jnp.floor_divide,
    "FLOOR_MOD": jnp.mod,
    "GREATER": jnp.greater,
    "GREATER_EQUAL": jnp.greater_equal,
    "LESS": jnp.less,
    "LESS_EQUAL": jnp.less_equal,
    "LOGICAL_AND": jnp.logical_and,
    "LOGICAL_OR": jnp.logical_or,
    "MAXIMUM": jnp.maximum,
    "MINIMUM": jnp.minimum,
    "MUL": operator.mul,
    "NOT_EQUAL": jnp.not_equal,
    "SQUARED_DIFFERENCE": lambda x, y: jnp.square(x - y),
    "SUB": operator.sub,
}
_PRODUCTS = (
    *("DEPTHWISE_CONV_2D", "EMBEDDING_LOOKUP", "FULLY_CONNECTED", "GELU", "MEAN", "MUL", "SOFTMAX", "SQUARE"),
    *("SQUARED_DIFFERENCE", HADAMARD),
)
KERNELS: dict[str, Kernel] = {
    **{name: _elementwise(function) for name, function in (_UNARY | _BINARY).items()},
    **{f"REDUCE_{name.upper()}": _reducer(getattr(jnp, name)) for name in ("all", "any", "max", "min", "prod")},
    **dict.fromkeys(("EXPAND_DIMS", "RESHAPE", "SQUEEZE"), _reshape),
    recurrence.NAME: recurrence.gated_delta_update,
    HADAMARD: lambda op, x, out, n: products.rotated(as_array(x[0]), op.options["size"]),
    "ARG_MAX": _pick(jnp.argmax),
    "ARG_MIN": _pick(jnp.argmin),
    "BATCH_MATMUL": _batch_matmul,
    "BROADCAST_TO": _broadcast,
    "CAST": _cast,
    "CONCATENATION": _concatenation,
    "COS": _approximated(jnp.cos, approximations.cos),
    "CUMSUM": _cumsum,
    "DEPTHWISE_CONV_2D": _depthwise,
    "DEQUANTIZE": _dequantize,
    "DYNAMIC_UPDATE_SLICE": _update_slice,
    "EMBEDDING_LOOKUP": _embedding,
    "EXP": _approximated(jnp.exp, approximations.exp),
    "FILL": _broadcast,
    "FULLY_CONNECTED": _fully_connected,
    "GATHER": _gather,
    "GATHER_ND": _gather_nd,
    "GELU": _gelu,
    "LEAKY_RELU": lambda op, x, out, n: jax.nn.leaky_relu(as_array(x[0]), op.options["alpha"]),
    "LOG": _approximated(jnp.log, approximations.log),
    "LOGISTIC": _approximated(jax.nn.sigmoid, approximations.logistic),
    "MEAN": _in_their_order(jnp.mean, approximations.mean),
    "PACK": lambda op, x, out, n: jnp.stack(list(map(as_array, x)), op.options["axis"]),
    "PAD": _pad,
    "PADV2": _pad,
    "POW": _approximated(jnp.power, approximations.power),
    "RSQRT": _approximated(lax.rsqrt, approximations.rsqrt),
    "SELECT": _select,
    "SELECT_V2": _select,
    "SIN": _approximated(jnp.sin, approximations.sin),
    "SLICE": _slice,
    "SOFTMAX": _softmax,
    "SPLIT": _split,
    "SPLIT_V": _split,
    "SQRT": _approximated(jnp.sqrt, approximations.sqrt),
    "STRIDED_SLICE": _strided_slice,
    "SUM": _in_their_order(jnp.sum, approximations.total),
    "TANH": _approximated(jnp.tanh, approximations.tanh),
    "TILE": _tile,
    "TOPK_V2": lambda op, x, out, n: tuple(lax.top_k(as_array(x[0]), int(constant(x[1], "a number").reshape(())))),
    "TRANSPOSE": _transpose,
    "UNPACK": _unpack,
}
KERNELS |= {name: _kept_apart(KERNELS[name]) for name in _PRODUCTS}
KERNELS |= {name: _squared(KERNELS[name]) for name in ("MUL", "SQUARE")}


def put_results(op: Operator, found: Any, tensors: list[Tensor], values: dict[int, Value]) -> None:
    """Adds what an operator computed, one thing or a tuple, to the values of tensors.

    Raises:
      ValueError: it has not the shape or the type that the file says.
    """
    results = found if isinstance(found, tuple) else (found,)
    for i, tensor, result in zip(op.outputs, tensors, results, strict=True):
        if tuple(result.shape) != tensor.shape:
            raise ValueError(f"{list(result.shape)} computed, the file says {list(tensor.shape)}")
        if isinstance(result, jax.Array) and result.dtype != TYPES[tensor.type]:
            raise ValueError(f"{result.dtype} computed, the file says {tensor.type}")
        values[i] = result
