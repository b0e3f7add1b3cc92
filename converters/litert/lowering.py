"""From a traced function to a graph: each of JAX's primitives as LiteRT's operators.

What is computed of constants alone is a constant.  What stands in a named function that LiteRT has an operator for
(``NAMED``) becomes that one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from converters.litert.graph import TYPES, Graph, Shape, Weight
from llmjax.errors import ConfigError


class Node:
    """A tensor of the graph.  Its own shape may have 1 where ``shape`` has more: operators repeat it as they need."""

    def __init__(self, index: int, shape: Shape):
        self.index, self.shape = index, shape


Value = Any  # np.ndarray | Weight | Node


class Lowering:
    """Writes functions into a graph.

    Args:
      graph: to write into.
      quantized_activations: weights of few bits meet activations that the runtime rounds; else they are dequantized.
    """

    def __init__(self, graph: Graph, quantized_activations: bool):
        self.graph = graph
        self._in_place = quantized_activations

    def run(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
        """What a jaxpr gives.

        Raises:
          ConfigError: LiteRT has no operator for something in it.
        """
        known: dict[Any, Value] = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
        known.update(zip(jaxpr.invars, arguments, strict=True))

        def value(atom: Any) -> Value:
            return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [value(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if inner is not None and name not in ("scan", "while", "cond"):
            jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            named = NAMED.get(params.get("name") or jaxpr.debug_info.func_name)
            if named and not all(isinstance(x, np.ndarray) for x in inputs):
                return [named(self, jaxpr, inputs)]
            return self.run(jaxpr, consts, inputs)
        if name in _THROUGH:
            return inputs
        if all(isinstance(x, np.ndarray) for x in inputs):
            found = equation.primitive.bind(*map(jnp.asarray, inputs), **params)
            return [np.asarray(x) for x in (found if equation.primitive.multiple_results else [found])]
        if name not in RULES:
            raise ConfigError(
                f"this model cannot be written for LiteRT, whose graphs have no operator for what it computes ({name})"
            )
        found = RULES[name](self, equation, *inputs)
        return found if equation.primitive.multiple_results else [found]

    # What rules are made of.

    def operand(self, value: Value, *, whole: bool = False) -> int:
        """The tensor of a value; ``whole`` where the operator does not repeat what is 1 long."""
        if isinstance(value, np.ndarray):
            return self.graph.constant(value if whole else _narrowed(value))
        if isinstance(value, Weight):
            index = self.graph.weight(value)
            return index if value.form.type == "FLOAT32" else self.graph.op("DEQUANTIZE", [index], value.shape)
        tensor = self.graph.tensors[value.index]
        if whole and tensor.shape != value.shape:
            size = self.graph.constant(np.array(value.shape, np.int32))
            return self.graph.op("BROADCAST_TO", [value.index, size], value.shape, tensor.type)
        return value.index

    def shape(self, index: int) -> Shape:
        """Of a tensor."""
        return self.graph.tensors[index].shape

    def reshaped(self, index: int, shape: Shape) -> int:
        """A tensor in another shape."""
        while (maker := self.graph.maker(index)) and maker.name == "RESHAPE":
            index = maker.inputs[0]
        if self.shape(index) == shape:
            return index
        size = self.graph.constant(np.array(shape, np.int32))
        return self.graph.op("RESHAPE", [index, size], shape, self.graph.tensors[index].type)

    def plain(self, index: int) -> int:
        """What a tensor is a reshaped one of."""
        maker = self.graph.maker(index)
        return maker.inputs[0] if maker and maker.name == "RESHAPE" else index

    def transposed(self, index: int, order: Sequence[int]) -> int:
        """A tensor with its dimensions in another order."""
        maker, shape = self.graph.maker(index), self.shape(index)
        if maker and maker.name == "TRANSPOSE":
            before = np.frombuffer(self.graph.tensors[maker.inputs[1]].data or b"", np.int32)
            return self.transposed(maker.inputs[0], [int(before[i]) for i in order])
        after = tuple(shape[i] for i in order)
        moved = [i for i in order if shape[i] != 1]
        if moved == sorted(moved):
            return self.reshaped(index, after)
        places = self.graph.constant(np.array(order, np.int32))
        return self.graph.op("TRANSPOSE", [index, places], after, self.graph.tensors[index].type)

    def elementwise(self, name: str, equation: Any, *inputs: Value) -> Node:
        """An operator of each element."""
        operands = [self.operand(x) for x in inputs]
        aval = equation.outvars[0].aval
        options = {"activation": 0} if name in ("ADD", "SUB", "MUL", "DIV") else {}

        def made(operands: list[int]) -> int:
            shape = tuple(np.broadcast_shapes(*(self.shape(i) for i in operands)))
            return self.graph.op(name, operands, shape, TYPES[aval.dtype.name], **options)

        for index in operands:  # a reshape of the largest goes behind the operator, where it may meet its inverse
            inner, outer = self.shape(self.plain(index)), self.shape(index)
            if inner != outer == aval.shape:
                before = [self.plain(i) if i == index else self._regrouped(i, outer, inner) for i in operands]
                if None not in before:
                    return Node(self.reshaped(made([i for i in before if i is not None]), outer), aval.shape)
        return Node(made(operands), aval.shape)

    def _regrouped(self, index: int, outer: Shape, inner: Shape) -> int | None:
        """What broadcasts to ``inner`` as a tensor does to ``outer``, some of whose neighbouring dimensions are one
        there; None where that is not so, or would take much."""
        tensor = self.graph.tensors[index]
        shape = (1,) * (len(outer) - len(tensor.shape)) + tensor.shape
        if math.prod(shape) == 1:
            return index if not tensor.shape else self.reshaped(index, (1,) * len(inner))
        if math.prod(shape) == math.prod(outer):
            return self.plain(index) if self.shape(self.plain(index)) == inner else None
        at, after, wide = 0, [], list(shape)
        for size in inner:
            first, reached = at, 1
            while reached < size and at < len(outer):
                reached, at = reached * outer[at], at + 1
            if reached != size:
                return None
            repeats = math.prod(shape[first:at]) > 1
            wide[first:at] = outer[first:at] if repeats else shape[first:at]
            after.append(size if repeats else 1)
        if tuple(wide) != shape:
            if tensor.data is not None:
                return None
            size = self.graph.constant(np.array(wide, np.int32))
            index = self.graph.op("BROADCAST_TO", [index, size], tuple(wide), tensor.type)
        return self.reshaped(index, tuple(after))

    def fully_connected(self, x: int, weight: Value, bias: int = -1) -> int:
        """``x [..., in] . weight^T [..., out] + bias [out]``."""
        x = self.plain(x) if self.shape(self.plain(x))[-1:] == weight.shape[1:] else x
        in_place = self._in_place and isinstance(weight, Weight)
        operand = self.graph.weight(weight) if in_place else self.operand(weight, whole=True)
        options = {"activation": 0, "weights_format": 0, "keep_num_dims": True}
        shape = (*self.shape(x)[:-1], weight.shape[0])
        return self.graph.op("FULLY_CONNECTED", [x, operand, bias], shape, **options)


def _narrowed(array: np.ndarray) -> np.ndarray:
    """Without what repeats itself along a dimension."""
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if array.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, array.shape), array, equal_nan=True):
            array = first
    return array.reshape(()) if array.size == 1 else array


def _product(low: Lowering, jaxpr: Any, inputs: list[Value]) -> Node:
    x, weight = inputs
    shape = jaxpr.outvars[0].aval.shape
    return Node(low.reshaped(low.fully_connected(low.operand(x, whole=True), weight), shape), shape)


def _take(low: Lowering, jaxpr: Any, inputs: list[Value]) -> Node:
    table, ids = inputs
    (gather,) = (e for e in jaxpr.eqns if e.primitive.name == "gather")
    (axis,) = gather.params["dimension_numbers"].start_index_map
    shape = jaxpr.outvars[0].aval.shape
    if not isinstance(table, Weight):
        operands = [low.operand(table, whole=True), low.operand(ids, whole=True)]
        return Node(low.graph.op("GATHER", operands, shape, axis=axis, batch_dims=0), shape)
    rows = low.reshaped(low.operand(ids, whole=True), (math.prod(ids.shape),))
    found = low.graph.op("EMBEDDING_LOOKUP", [rows, low.graph.weight(table)], (*low.shape(rows), table.shape[1]))
    return Node(low.reshaped(found, shape), shape)


def _unary(name: str, **options: Any) -> Callable[[Lowering, Any, list[Value]], Node]:
    """An operator of the last dimension, or of each element."""

    def rule(low: Lowering, jaxpr: Any, inputs: list[Value]) -> Node:
        index = low.operand(inputs[0], whole=True)
        inner, outer = low.plain(index), low.shape(index)
        inner = inner if low.shape(inner)[-1:] == outer[-1:] else index
        return Node(low.reshaped(low.graph.op(name, [inner], low.shape(inner), **options), outer), outer)

    return rule


def _floor_divide(low: Lowering, jaxpr: Any, inputs: list[Value]) -> Node:
    return low.elementwise("FLOOR_DIV", jaxpr, *inputs)


# By the names of functions.
NAMED: Mapping[str | None, Callable[[Lowering, Any, list[Value]], Node]] = {
    "_product": _product,
    "_take": _take,
    "floor_divide": _floor_divide,
    "softmax": _unary("SOFTMAX", beta=1.0),
    "_gelu_tanh": _unary("GELU", approximate=True),
    "gelu_new": _unary("GELU", approximate=True),
    "_gelu_erf": _unary("GELU", approximate=False),
}
_THROUGH = ("copy", "optimization_barrier", "stop_gradient", "copy_p")


def _operator(name: str) -> Callable[..., Node]:
    return lambda low, equation, *inputs: low.elementwise(name, equation, *inputs)


def _add(low: Lowering, equation: Any, x: Value, y: Value) -> Node:
    """With a bias into the product that it is added to."""
    x, y = (y, x) if isinstance(x, np.ndarray) else (x, y)
    if isinstance(y, np.ndarray) and isinstance(x, Node):
        bias = _narrowed(y)
        product = low.plain(x.index)
        maker = low.graph.maker(product)
        width = x.shape[-1:]
        if (
            maker
            and maker.name == "FULLY_CONNECTED"
            and maker.inputs[2] < 0
            and low.shape(product)[-1:] == width == bias.shape[-1:]
            and bias.size == width[0]
        ):
            inputs = [*maker.inputs[:2], low.graph.constant(bias.reshape(-1))]
            found = low.graph.op(maker.name, inputs, low.shape(product), **dict(maker.options))
            return Node(low.reshaped(found, x.shape), x.shape)
    return low.elementwise("ADD", equation, x, y)


def _multiply(low: Lowering, equation: Any, x: Value, y: Value) -> Value:
    """By 1 is nothing; a product of two activations by a number is that of the smaller one, the first."""
    shape = equation.outvars[0].aval.shape
    for factor, other in ((x, y), (y, x)):
        if not isinstance(factor, np.ndarray) or other.shape != shape:
            continue
        if (factor == 1).all():
            return other
        product = low.graph.maker(low.plain(other.index))
        if product and product.name == "BATCH_MATMUL" and _narrowed(factor).shape == ():
            first, second = product.inputs
            number = low.graph.constant(_narrowed(factor))
            first = low.graph.op("MUL", [first, number], low.shape(first), activation=0)
            found = low.graph.op(product.name, [first, second], low.shape(product.output), **dict(product.options))
            return Node(low.reshaped(found, low.shape(other.index)), shape)
    return low.elementwise("MUL", equation, x, y)


def _divide(low: Lowering, equation: Any, x: Value, y: Value) -> Node:
    """A sum by its count is a mean."""
    if isinstance(x, Node) and isinstance(y, np.ndarray) and (total := low.graph.maker(low.plain(x.index))):
        count = math.prod(low.shape(total.inputs[0])) // max(1, math.prod(low.shape(total.output)))
        if total.name == "SUM" and (y == count).all():
            found = low.graph.op("MEAN", total.inputs, low.shape(total.output), **dict(total.options))
            return Node(low.reshaped(found, low.shape(x.index)), x.shape)
    return low.elementwise("DIV", equation, x, y)


def _log1p(low: Lowering, equation: Any, x: Value) -> Node:
    return low.elementwise("LOG", equation, low.elementwise("ADD", equation, x, np.ones((), np.float32)))


def _power(low: Lowering, equation: Any, x: Value) -> Node:
    exponent = equation.params["y"]
    if not 1 <= exponent <= 8:
        raise ConfigError(f"a power of {exponent} cannot be written for LiteRT")
    found = x
    for _ in range(exponent - 1):
        found = low.elementwise("MUL", equation, found, x)
    return found


def _square(low: Lowering, equation: Any, x: Value) -> Node:
    return low.elementwise("MUL", equation, x, x)


def _select(low: Lowering, equation: Any, which: Value, no: Value, yes: Value) -> Node:
    return low.elementwise("SELECT_V2", equation, which, yes, no)


def _clamp(low: Lowering, equation: Any, least: Value, x: Value, most: Value) -> Node:
    return low.elementwise("MINIMUM", equation, low.elementwise("MAXIMUM", equation, x, least), most)


def _convert(low: Lowering, equation: Any, x: Value) -> Value:
    if isinstance(x, Weight) or TYPES[equation.params["new_dtype"].name] == low.graph.tensors[x.index].type:
        return x
    return low.elementwise("CAST", equation, x)


def _reducer(name: str) -> Callable[..., Node]:
    def rule(low: Lowering, equation: Any, x: Value) -> Node:
        index, axes = low.operand(x, whole=True), equation.params["axes"]
        kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
        where = low.graph.constant(np.array(axes, np.int32))
        found = low.graph.op(name, [index, where], kept, low.graph.tensors[index].type, keep_dims=True)
        shape = equation.outvars[0].aval.shape
        return Node(low.reshaped(found, shape), shape)

    return rule


def _reshape(low: Lowering, equation: Any, x: Value) -> Node:
    shape = equation.outvars[0].aval.shape
    return Node(low.reshaped(low.operand(x, whole=True), shape), shape)


def _broadcast(low: Lowering, equation: Any, x: Value) -> Node:
    shape, places = equation.params["shape"], equation.params["broadcast_dimensions"]
    narrow = [1] * len(shape)
    for place, size in zip(places, low.shape(x.index), strict=True):
        narrow[place] = size
    return Node(low.reshaped(x.index, tuple(narrow)), shape)


def _transpose(low: Lowering, equation: Any, x: Value) -> Node:
    return Node(low.transposed(x.index, equation.params["permutation"]), equation.outvars[0].aval.shape)


def _slice(low: Lowering, equation: Any, x: Value) -> Node:
    if any(step != 1 for step in equation.params["strides"] or ()):
        raise ConfigError("a slice with steps cannot be written for LiteRT")
    index, shape = low.operand(x, whole=True), equation.outvars[0].aval.shape
    bounds = [low.graph.constant(np.array(n, np.int32)) for n in (equation.params["start_indices"], shape)]
    return Node(low.graph.op("SLICE", [index, *bounds], shape, low.graph.tensors[index].type), shape)


def _split(low: Lowering, equation: Any, x: Value) -> list[Node]:
    """In slices."""
    index, axis = low.operand(x, whole=True), equation.params["axis"]
    found, at = [], 0
    for out in equation.outvars:
        begin, shape = [0] * len(x.shape), out.aval.shape
        begin[axis], at = at, at + shape[axis]
        bounds = [low.graph.constant(np.array(n, np.int32)) for n in (begin, shape)]
        found.append(Node(low.graph.op("SLICE", [index, *bounds], shape, low.graph.tensors[index].type), shape))
    return found


def _concatenate(low: Lowering, equation: Any, *inputs: Value) -> Node:
    parts = [low.operand(x, whole=True) for x in inputs if 0 not in x.shape]
    aval, axis = equation.outvars[0].aval, equation.params["dimension"]
    if len(parts) == 1:
        return Node(parts[0], aval.shape)
    options = {"axis": axis, "activation": 0}
    return Node(low.graph.op("CONCATENATION", parts, aval.shape, TYPES[aval.dtype.name], **options), aval.shape)


def _stack(low: Lowering, equation: Any, *inputs: Value) -> Node:
    aval = equation.outvars[0].aval
    options = {"count": len(inputs), "axis": equation.params["axis"]}
    parts = [low.operand(x, whole=True) for x in inputs]
    return Node(low.graph.op("PACK", parts, aval.shape, TYPES[aval.dtype.name], **options), aval.shape)


def _scatter(low: Lowering, equation: Any, array: Value, place: Value, update: Value) -> Node:
    """``array.at[number].set(update)`` of the first dimension."""
    numbers, shape = equation.params["dimension_numbers"], array.shape
    if not isinstance(place, np.ndarray) or place.size != 1 or numbers.scatter_dims_to_operand_dims != (0,):
        raise ConfigError("a scatter cannot be written for LiteRT")
    index, at = low.operand(array, whole=True), int(place.reshape(()))
    parts = [low.reshaped(low.operand(update, whole=True), (1, *shape[1:]))]
    for first, last, where in ((0, at, 0), (at + 1, shape[0], len(parts) + 1)):
        if first < last:
            size = (last - first, *shape[1:])
            bounds = [low.graph.constant(np.array(n, np.int32)) for n in ((first, *[0] * (len(shape) - 1)), size)]
            parts.insert(where, low.graph.op("SLICE", [index, *bounds], size, low.graph.tensors[index].type))
    if len(parts) == 1:
        return Node(parts[0], shape)
    return Node(low.graph.op("CONCATENATION", parts, shape, axis=0, activation=0), shape)


def _update(low: Lowering, equation: Any, array: Value, update: Value, *start: Value) -> Node:
    place = low.graph.op("PACK", [low.operand(i) for i in start], (len(start),), "INT32", count=len(start), axis=0)
    operands = [low.operand(array, whole=True), low.operand(update, whole=True), place]
    aval = equation.outvars[0].aval
    return Node(low.graph.op("DYNAMIC_UPDATE_SLICE", operands, aval.shape, TYPES[aval.dtype.name]), aval.shape)


def _dot(low: Lowering, equation: Any, x: Value, y: Value) -> Node:
    """``[..., m, k]`` and ``[..., k, n]``, either of them the other way round."""
    ((x_sum,), (y_sum,)), batch = equation.params["dimension_numbers"]
    rank = len(x.shape)
    if batch != (tuple(range(rank - 2)),) * 2 or len(y.shape) != rank:
        raise ConfigError(
            f"a product over dimensions {equation.params['dimension_numbers']} cannot be written for LiteRT"
        )
    options = {"adj_x": x_sum == rank - 2, "adj_y": y_sum == rank - 1}
    operands = [low.operand(x, whole=True), low.operand(y, whole=True)]
    shape = equation.outvars[0].aval.shape
    return Node(low.graph.op("BATCH_MATMUL", operands, shape, **options), shape)


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
    "transpose": _transpose,
}
