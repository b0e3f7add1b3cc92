"""Each of JAX's primitives as LiteRT's operators, and the named functions that LiteRT has an operator for."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from converters.litert.builder import Builder, Node, Value, narrowed
from converters.litert.graph import TYPES, Weight
from llmjax.errors import ConfigError


def _product(build: Builder, jaxpr: Any, inputs: list[Value]) -> Node:
    x, weight = inputs
    shape = jaxpr.outvars[0].aval.shape
    return Node(build.reshaped(build.fully_connected(build.operand(x, whole=True), weight), shape), shape)


def _take(build: Builder, jaxpr: Any, inputs: list[Value]) -> Node:
    table, ids = inputs
    (gather,) = (e for e in jaxpr.eqns if e.primitive.name == "gather")
    (axis,) = gather.params["dimension_numbers"].start_index_map
    shape = jaxpr.outvars[0].aval.shape
    if not isinstance(table, Weight):
        operands = [build.operand(table, whole=True), build.operand(ids, whole=True)]
        return Node(build.graph.op("GATHER", operands, shape, axis=axis, batch_dims=0), shape)
    rows = build.reshaped(build.operand(ids, whole=True), (math.prod(ids.shape),))
    found = build.graph.op("EMBEDDING_LOOKUP", [rows, build.graph.weight(table)], (*build.shape(rows), table.shape[1]))
    return Node(build.reshaped(found, shape), shape)


def _unary(name: str, **options: Any) -> Callable[[Builder, Any, list[Value]], Node]:
    """An operator of the last dimension, or of each element."""

    def rule(build: Builder, jaxpr: Any, inputs: list[Value]) -> Node:
        index = build.operand(inputs[0], whole=True)
        inner, outer = build.plain(index), build.shape(index)
        inner = inner if build.shape(inner)[-1:] == outer[-1:] else index
        return Node(build.reshaped(build.graph.op(name, [inner], build.shape(inner), **options), outer), outer)

    return rule


def _floor_divide(build: Builder, jaxpr: Any, inputs: list[Value]) -> Node:
    return build.elementwise("FLOOR_DIV", jaxpr, *inputs)


# By the names of functions.
NAMED: Mapping[str | None, Callable[[Builder, Any, list[Value]], Node]] = {
    "_product": _product,
    "_take": _take,
    "floor_divide": _floor_divide,
    "softmax": _unary("SOFTMAX", beta=1.0),
    "_gelu_tanh": _unary("GELU", approximate=True),
    "gelu_new": _unary("GELU", approximate=True),
    "_gelu_erf": _unary("GELU", approximate=False),
}


def _operator(name: str) -> Callable[..., Node]:
    return lambda build, equation, *inputs: build.elementwise(name, equation, *inputs)


def _add(build: Builder, equation: Any, x: Value, y: Value) -> Node:
    """With a bias into the product that it is added to."""
    x, y = (y, x) if isinstance(x, np.ndarray) else (x, y)
    if isinstance(y, np.ndarray) and isinstance(x, Node):
        bias = narrowed(y)
        product = build.plain(x.index)
        maker = build.graph.maker(product)
        width = x.shape[-1:]
        if (
            maker
            and maker.name == "FULLY_CONNECTED"
            and maker.inputs[2] < 0
            and build.shape(product)[-1:] == width == bias.shape[-1:]
            and bias.size == width[0]
        ):
            inputs = [*maker.inputs[:2], build.graph.constant(bias.reshape(-1))]
            found = build.graph.op(maker.name, inputs, build.shape(product), **dict(maker.options))
            return Node(build.reshaped(found, x.shape), x.shape)
    return build.elementwise("ADD", equation, x, y)


def _multiply(build: Builder, equation: Any, x: Value, y: Value) -> Value:
    """By 1 is nothing; a product of two activations by a number is that of the smaller one, the first."""
    shape = equation.outvars[0].aval.shape
    for factor, other in ((x, y), (y, x)):
        if not isinstance(factor, np.ndarray) or other.shape != shape:
            continue
        if (factor == 1).all():
            return other
        product = build.graph.maker(build.plain(other.index))
        if product and product.name == "BATCH_MATMUL" and narrowed(factor).shape == ():
            first, second = product.inputs
            number = build.graph.constant(narrowed(factor))
            first = build.graph.op("MUL", [first, number], build.shape(first), activation=0)
            found = build.graph.op(product.name, [first, second], build.shape(product.output), **dict(product.options))
            return Node(build.reshaped(found, build.shape(other.index)), shape)
    return build.elementwise("MUL", equation, x, y)


def _divide(build: Builder, equation: Any, x: Value, y: Value) -> Node:
    """A sum by its count is a mean."""
    if isinstance(x, Node) and isinstance(y, np.ndarray) and (total := build.graph.maker(build.plain(x.index))):
        count = math.prod(build.shape(total.inputs[0])) // max(1, math.prod(build.shape(total.output)))
        if total.name == "SUM" and (y == count).all():
            found = build.graph.op("MEAN", total.inputs, build.shape(total.output), **dict(total.options))
            return Node(build.reshaped(found, build.shape(x.index)), x.shape)
    return build.elementwise("DIV", equation, x, y)


def _log1p(build: Builder, equation: Any, x: Value) -> Node:
    return build.elementwise("LOG", equation, build.elementwise("ADD", equation, x, np.ones((), np.float32)))


def _power(build: Builder, equation: Any, x: Value) -> Node:
    exponent = equation.params["y"]
    if not 1 <= exponent <= 8:
        raise ConfigError(f"a power of {exponent} cannot be written for LiteRT")
    found = x
    for _ in range(exponent - 1):
        found = build.elementwise("MUL", equation, found, x)
    return found


def _square(build: Builder, equation: Any, x: Value) -> Node:
    return build.elementwise("MUL", equation, x, x)


def _select(build: Builder, equation: Any, which: Value, no: Value, yes: Value) -> Node:
    return build.elementwise("SELECT_V2", equation, which, yes, no)


def _clamp(build: Builder, equation: Any, least: Value, x: Value, most: Value) -> Node:
    return build.elementwise("MINIMUM", equation, build.elementwise("MAXIMUM", equation, x, least), most)


def _convert(build: Builder, equation: Any, x: Value) -> Value:
    if isinstance(x, Weight) or TYPES[equation.params["new_dtype"].name] == build.graph.tensors[x.index].type:
        return x
    return build.elementwise("CAST", equation, x)


def _reducer(name: str) -> Callable[..., Node]:
    def rule(build: Builder, equation: Any, x: Value) -> Node:
        index, axes = build.operand(x, whole=True), equation.params["axes"]
        kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
        where = build.graph.constant(np.array(axes, np.int32))
        found = build.graph.op(name, [index, where], kept, build.graph.tensors[index].type, keep_dims=True)
        shape = equation.outvars[0].aval.shape
        return Node(build.reshaped(found, shape), shape)

    return rule


def _reshape(build: Builder, equation: Any, x: Value) -> Node:
    shape = equation.outvars[0].aval.shape
    return Node(build.reshaped(build.operand(x, whole=True), shape), shape)


def _broadcast(build: Builder, equation: Any, x: Value) -> Node:
    shape, places = equation.params["shape"], equation.params["broadcast_dimensions"]
    narrow = [1] * len(shape)
    for place, size in zip(places, build.shape(x.index), strict=True):
        narrow[place] = size
    return Node(build.reshaped(x.index, tuple(narrow)), shape)


def _transpose(build: Builder, equation: Any, x: Value) -> Node:
    return Node(build.transposed(x.index, equation.params["permutation"]), equation.outvars[0].aval.shape)


def _slice(build: Builder, equation: Any, x: Value) -> Node:
    if any(step != 1 for step in equation.params["strides"] or ()):
        raise ConfigError("a slice with steps cannot be written for LiteRT")
    index, shape = build.operand(x, whole=True), equation.outvars[0].aval.shape
    bounds = [build.graph.constant(np.array(n, np.int32)) for n in (equation.params["start_indices"], shape)]
    return Node(build.graph.op("SLICE", [index, *bounds], shape, build.graph.tensors[index].type), shape)


def _split(build: Builder, equation: Any, x: Value) -> list[Node]:
    """In slices."""
    index, axis = build.operand(x, whole=True), equation.params["axis"]
    found, at = [], 0
    for out in equation.outvars:
        begin, shape = [0] * len(x.shape), out.aval.shape
        begin[axis], at = at, at + shape[axis]
        bounds = [build.graph.constant(np.array(n, np.int32)) for n in (begin, shape)]
        found.append(Node(build.graph.op("SLICE", [index, *bounds], shape, build.graph.tensors[index].type), shape))
    return found


def _concatenate(build: Builder, equation: Any, *inputs: Value) -> Node:
    parts = [build.operand(x, whole=True) for x in inputs if 0 not in x.shape]
    aval, axis = equation.outvars[0].aval, equation.params["dimension"]
    if len(parts) == 1:
        return Node(parts[0], aval.shape)
    options = {"axis": axis, "activation": 0}
    return Node(build.graph.op("CONCATENATION", parts, aval.shape, TYPES[aval.dtype.name], **options), aval.shape)


def _stack(build: Builder, equation: Any, *inputs: Value) -> Node:
    aval = equation.outvars[0].aval
    options = {"count": len(inputs), "axis": equation.params["axis"]}
    parts = [build.operand(x, whole=True) for x in inputs]
    return Node(build.graph.op("PACK", parts, aval.shape, TYPES[aval.dtype.name], **options), aval.shape)


def _scatter(build: Builder, equation: Any, array: Value, place: Value, update: Value) -> Node:
    """``array.at[number].set(update)`` of the first dimension."""
    numbers, shape = equation.params["dimension_numbers"], array.shape
    if not isinstance(place, np.ndarray) or place.size != 1 or numbers.scatter_dims_to_operand_dims != (0,):
        raise ConfigError("a scatter cannot be written for LiteRT")
    index, at = build.operand(array, whole=True), int(place.reshape(()))
    parts = [build.reshaped(build.operand(update, whole=True), (1, *shape[1:]))]
    for first, last, where in ((0, at, 0), (at + 1, shape[0], len(parts) + 1)):
        if first < last:
            size = (last - first, *shape[1:])
            bounds = [build.graph.constant(np.array(n, np.int32)) for n in ((first, *[0] * (len(shape) - 1)), size)]
            parts.insert(where, build.graph.op("SLICE", [index, *bounds], size, build.graph.tensors[index].type))
    if len(parts) == 1:
        return Node(parts[0], shape)
    return Node(build.graph.op("CONCATENATION", parts, shape, axis=0, activation=0), shape)


def _update(build: Builder, equation: Any, array: Value, update: Value, *start: Value) -> Node:
    place = build.graph.op("PACK", [build.operand(i) for i in start], (len(start),), "INT32", count=len(start), axis=0)
    operands = [build.operand(array, whole=True), build.operand(update, whole=True), place]
    aval = equation.outvars[0].aval
    return Node(build.graph.op("DYNAMIC_UPDATE_SLICE", operands, aval.shape, TYPES[aval.dtype.name]), aval.shape)


def _dot(build: Builder, equation: Any, x: Value, y: Value) -> Node:
    """``[..., m, k]`` and ``[..., k, n]``, either of them the other way round."""
    ((x_sum,), (y_sum,)), batch = equation.params["dimension_numbers"]
    rank = len(x.shape)
    if batch != (tuple(range(rank - 2)),) * 2 or len(y.shape) != rank:
        raise ConfigError(
            f"a product over dimensions {equation.params['dimension_numbers']} cannot be written for LiteRT"
        )
    options = {"adj_x": x_sum == rank - 2, "adj_y": y_sum == rank - 1}
    operands = [build.operand(x, whole=True), build.operand(y, whole=True)]
    shape = equation.outvars[0].aval.shape
    return Node(build.graph.op("BATCH_MATMUL", operands, shape, **options), shape)


def _top_k(build: Builder, equation: Any, x: Value) -> list[Node]:
    """Of equal ones the first, in both."""
    k, axis = equation.params["k"], equation.params.get("axis", -1)
    if axis not in (-1, len(x.shape) - 1):
        raise ConfigError(f"the largest along dimension {axis} cannot be written for LiteRT")
    shape = (*x.shape[:-1], k)
    inputs = [build.operand(x, whole=True), build.graph.constant(np.array(k, np.int32))]
    return [Node(i, shape) for i in build.graph.several("TOPK_V2", inputs, [(shape, "FLOAT32"), (shape, "INT32")])]


# By the names of primitives.
RULES: Mapping[str, Callable[..., Value]] = {
    **{
        name: _operator(operator)
        for name, operator in {
            "abs": "ABS",
            "and": "LOGICAL_AND",
            "cos": "COS",
            "eq": "EQUAL",
            "exp": "EXP",
            "floor": "FLOOR",
            "ge": "GREATER_EQUAL",
            "gt": "GREATER",
            "le": "LESS_EQUAL",
            "log": "LOG",
            "logistic": "LOGISTIC",
            "lt": "LESS",
            "max": "MAXIMUM",
            "min": "MINIMUM",
            "ne": "NOT_EQUAL",
            "neg": "NEG",
            "not": "LOGICAL_NOT",
            "or": "LOGICAL_OR",
            "pow": "POW",
            "rsqrt": "RSQRT",
            "sin": "SIN",
            "sqrt": "SQRT",
            "sub": "SUB",
            "tanh": "TANH",
        }.items()
    },
    "add": _add,
    "broadcast_in_dim": _broadcast,
    "clamp": _clamp,
    "concatenate": _concatenate,
    "convert_element_type": _convert,
    "div": _divide,
    "dot_general": _dot,
    "dynamic_update_slice": _update,
    "expand_dims": _reshape,
    "integer_pow": _power,
    "log1p": _log1p,
    "mul": _multiply,
    "reduce_max": _reducer("REDUCE_MAX"),
    "reduce_min": _reducer("REDUCE_MIN"),
    "reduce_sum": _reducer("SUM"),
    "reshape": _reshape,
    "scatter": _scatter,
    "select_n": _select,
    "slice": _slice,
    "split": _split,
    "square": _square,
    "squeeze": _reshape,
    "stack": _stack,
    "top_k": _top_k,
    "transpose": _transpose,
}
