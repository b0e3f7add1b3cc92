"""What the rules of lowering are made of: values, and the operators that several rules need."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from converters.litert.graph import TYPES, Graph, Shape, Stack, Weight
from llmjax.errors import ConfigError


class Node:
    """A tensor of the graph.  Its own shape may have 1 where ``shape`` has more: operators repeat it as they need."""

    def __init__(self, index: int, shape: Shape):
        self.index, self.shape = index, shape


Value = Any  # np.ndarray | Weight | Stack | Node


class Builder:
    """Writes values into a graph.

    Args:
      graph: to write into.
      quantized_activations: weights of few bits meet activations that the runtime rounds; else they are dequantized.
    """

    def __init__(self, graph: Graph, quantized_activations: bool):
        self.graph = graph
        self._in_place = quantized_activations

    def operand(self, value: Value, *, whole: bool = False) -> int:
        """The tensor of a value; ``whole`` where the operator does not repeat what is 1 long."""
        if isinstance(value, np.ndarray):
            return self.graph.constant(value if whole else narrowed(value))
        if isinstance(value, Weight):
            index = self.graph.weight(value)
            if value.form.block:
                raise ConfigError(
                    f"activations: {value.name}: LiteRT expands weights of blocks to zeros; quantize to int8 or int4, "
                    "or let it round activations (dynamic-int8)"
                )
            return index if value.form.type == "FLOAT32" else self.graph.op("DEQUANTIZE", [index], value.shape)
        tensor = self.graph.tensors[value.index]
        if whole and tensor.shape != value.shape:
            size = self.graph.constant(np.array(value.shape, np.int32))
            return self.graph.op("BROADCAST_TO", [value.index, size], value.shape, tensor.type)
        return value.index

    def part(self, value: Value, number: int) -> Value:
        """One of what lies along the first dimension."""
        if isinstance(value, Stack):
            return value.parts[number]
        if isinstance(value, np.ndarray):
            return value[number]
        index, (count, *rest) = self.operand(value, whole=True), value.shape
        shape = tuple(rest)
        made = [(shape, self.graph.tensors[index].type)] * count
        return Node(self.graph.several("UNPACK", [index], made, count=count, axis=0)[number], shape)

    def name(self, value: Value, name: str) -> None:
        """Names what an operator made."""
        index = self.plain(value.index)
        if self.graph.maker(index) is not None:
            self.graph.tensors[index] = dataclasses.replace(self.graph.tensors[index], name=name)

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
        options: dict[str, Any] = {"activation": 0, "weights_format": 0, "keep_num_dims": True}
        shape = (*self.shape(x)[:-1], weight.shape[0])
        return self.graph.op("FULLY_CONNECTED", [x, operand, bias], shape, **options)


def narrowed(array: np.ndarray) -> np.ndarray:
    """Without what repeats itself along a dimension."""
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if array.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, array.shape), array, equal_nan=True):
            array = first
    return array.reshape(()) if array.size == 1 else array
