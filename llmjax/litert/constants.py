"""A graph's constants: whole numbers that fix shapes stay in the program, all else is its arguments.

Small floats, too: what XLA knows of a factor or an exponent it uses to compute something else instead, a reciprocal for
a division, a square root for a power, and the last bit is another.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from converters.readers.litert.tflite import BITS, Subgraph, Tensor, TfliteFile
from llmjax.errors import named
from llmjax.litert.kernels import TYPES
from llmjax.litert.products import Filter
from llmjax.quant.qtensor import QTensor

# Elements of a constant that is compiled into the program: shapes, axes.
_SMALL = 64
_INTEGERS = ("INT8", "UINT8", "INT4", "INT2")


class Constants:
    """The constants of all subgraphs of a file, each read once however many tensors share its buffer.

    Args:
      file: the file.

    Attributes:
      weights: those that are arguments, by name.
    """

    def __init__(self, file: TfliteFile):
        self._file = file
        self.weights: dict[str, Any] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def read(self, graph: Subgraph, tensor: Tensor) -> np.ndarray | str:
        """The value of a constant that stays in the program, or the name of another among ``weights``.

        Raises:
          CheckpointError: it is damaged, or of a type that llmjax does not have.
        """
        q = tensor.quantization
        if tensor.type in _INTEGERS and q is not None:
            scales, axis = self._scales(graph, tensor)
            zeros = self._zeros(graph, tensor, len(scales))
            key: tuple[Any, ...] = (tensor.buffer, tensor.type, tensor.shape, axis, scales.shape, scales.tobytes())
            key += (None if zeros is None else zeros.tobytes(),)
            return self._named(key, tensor, lambda: self._quantized(tensor, scales, zeros, axis))
        if q is not None:
            self._file.fail(f"tensor {named(tensor.name)}: quantized {tensor.type} is not supported")
        if tensor.type not in TYPES:
            self._file.fail(f"tensor {named(tensor.name)}: constants of type {tensor.type} are not supported")
        stored = np.dtype(np.int64) if tensor.type == "INT64" else np.dtype(TYPES[tensor.type])
        array = self._file.data(tensor).view(stored).reshape(tensor.shape)
        if tensor.type == "INT64":
            if array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
                self._file.fail(f"tensor {named(tensor.name)}: an INT64 that does not fit 32 bits")
            array = array.astype(np.int32)
        if array.dtype.kind in "iub" and (array.size <= _SMALL or array.ndim == 1):
            return np.array(array)
        return self._named((tensor.buffer, tensor.type, tensor.shape), tensor, lambda: jnp.asarray(array))

    def _named(self, key: tuple[Any, ...], tensor: Tensor, make: Any) -> str:
        if key not in self._names:
            name = tensor.name if tensor.name not in self.weights else f"{tensor.name};{len(self.weights)}"
            self.weights[name] = make()
            self._names[key] = name
        return self._names[key]

    def _scales(self, graph: Subgraph, tensor: Tensor) -> tuple[np.ndarray, int]:
        """float32 or float16, ``[channels, blocks]``, and the channels' dimension.

        Raises:
          CheckpointError: there are not as many as the shape wants.
        """
        q, where = tensor.quantization, f"tensor {named(tensor.name)} {tensor.type} {list(tensor.shape)}"
        assert q is not None
        if q.block:
            holder = graph.tensors[q.scales_tensor]
            if holder.type not in ("FLOAT16", "FLOAT32") or not self._file.is_constant(holder):
                self._file.fail(f"{where}: scales of type {holder.type}, expected constants of FLOAT16")
            if len(tensor.shape) != 2 or (tensor.shape[0], tensor.shape[1] / q.block) != holder.shape:
                self._file.fail(f"{where}: blocks of {q.block} do not fit scales {list(holder.shape)}")
            return self._file.data(holder).view(TYPES[holder.type]).reshape(holder.shape), 0
        assert q.scales is not None
        axis = q.axis if len(q.scales) > 1 else 0
        channels = tensor.shape[axis] if 0 <= axis < len(tensor.shape) else -1
        if len(q.scales) not in (1, channels):
            self._file.fail(f"{where}: {len(q.scales)} scales for {channels} channels of dimension {q.axis}")
        scales = q.scales if len(q.scales) == channels else np.repeat(q.scales, max(channels, 1))
        return scales[:, None], axis

    def _zeros(self, graph: Subgraph, tensor: Tensor, channels: int) -> np.ndarray | None:
        """The integers that mean 0, float32 ``[channels, 1]``; None where all are 0.

        Raises:
          CheckpointError: there are not as many as scales, or an operator takes them that LiteRT does not let.
        """
        q = tensor.quantization
        assert q is not None
        zeros = q.zeros if len(q.zeros) else np.zeros(1, np.int64)
        if len(zeros) not in (1, channels) or zeros.min() < -128 or zeros.max() > 255:
            self._file.fail(f"damaged: tensor {named(tensor.name)}: zero points {zeros.tolist()[:8]}")
        unsigned = tensor.type == "UINT8"  # which is read as int8
        if not unsigned and not zeros.any():
            return None
        takers = [op for op in graph.operators if any(i >= 0 and graph.tensors[i] is tensor for i in op.inputs)]
        if q.block or any(op.name != "DEQUANTIZE" for op in takers):
            what = "UINT8 weights" if unsigned else "weights with zero points"
            self._file.fail(
                f"tensor {named(tensor.name)}: {what} are supported where a DEQUANTIZE takes them, no other"
            )
        zeros = zeros.reshape(-1, 1) - (128 if unsigned else 0)
        return np.broadcast_to(zeros, (channels, 1)).astype(np.float32)

    def _quantized(self, tensor: Tensor, scales: np.ndarray, zeros: np.ndarray | None, axis: int) -> QTensor | Filter:
        data = self._file.data(tensor)
        if len(tensor.shape) == 2 and axis == 0:
            return _matrix(data, tensor, jnp.asarray(scales), None if zeros is None else jnp.asarray(-zeros * scales))
        shape = [1] * len(tensor.shape)
        shape[axis] = len(scales)
        n = _integers(data, tensor)
        n = n if zeros is None else n.astype(np.int16) - zeros.astype(np.int16).reshape(shape)
        return Filter(jnp.asarray(n), jnp.asarray(scales, np.float32).reshape(shape))


def _matrix(data: np.ndarray, tensor: Tensor, scales: Any, offsets: Any) -> QTensor:
    out, width = tensor.shape
    if tensor.type == "INT4" and width % 2 == 0:
        # Two's complement, the even index in the low half: llmjax's own layout but for the sign.
        return QTensor(jnp.asarray((data ^ np.uint8(0x88)).reshape(out, -1)), scales, offsets, bits=4, zero=8)
    return QTensor(jnp.asarray(_integers(data, tensor)), scales, offsets)


def _integers(data: np.ndarray, tensor: Tensor) -> np.ndarray:
    """int8 of two's complement numbers of 8, 4 or 2 bits, the first in a byte's lowest; of UINT8, 128 less."""
    bits = BITS[tensor.type]
    if bits == 8:
        data = data ^ np.uint8(0x80) if tensor.type == "UINT8" else data
        return data.view(np.int8).reshape(tensor.shape)
    parts = [((data << np.uint8(8 - bits - at)).view(np.int8) >> np.int8(8 - bits)) for at in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(-1)[: math.prod(tensor.shape)].reshape(tensor.shape)
