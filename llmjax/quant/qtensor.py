"""Quantized weights as they are kept: integers, scales, and what the integers mean."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llmjax.quant.bits import look_up


class QTensor(struct.PyTreeNode):
    """A weight ``W [out, in]`` in few bits, or a stack of them ``[E, out, in]`` whose leaves have one more dimension in
    front; its leaves are NumPy or JAX arrays.

    What a value means, in float32 arithmetic::

        W[o, i] = scales[o, i // g] * (n[o, i] - zero) + offsets[o, i // g]      g = in / G

    with ``n`` the stored integer.  One equation holds MediaPipe's symmetric weights (no offsets), its asymmetric ones
    (``offsets = -zero point * scale``) and GGUF's Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 (offsets are its minima), each with
    its exact values.

    Attributes:
      values: 8 bits: int8 ``[out, in]``.  4 and 5 bits: the low four bits of two neighbours a byte, uint8 ``[out, in /
        2]``, the even index in the low half.
      scales: float32 or float16 ``[out, G]``; G = 1 is one scale per output channel.
      offsets: as scales, or None for zero.
      fifth: 5 bits alone: uint8 ``[out, in / 8]``, the fifth bits of the even indices, then those of the odd ones,
        the first of eight in the lowest bit.
      bits: 4, 5 or 8 (static).
      zero: the integer that means 0 where there are no offsets (static).
    """

    values: Any
    scales: Any
    offsets: Any = None
    fifth: Any = None
    bits: int = struct.field(pytree_node=False, default=8)
    zero: int = struct.field(pytree_node=False, default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)``, or ``(E, out, in)``."""
        *rows, columns = self.values.shape
        return (*rows, columns if self.bits == 8 else 2 * columns)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the values it stands for."""
        return jnp.dtype(jnp.float32)

    @property
    def group(self) -> int:
        """g: inputs that share a scale."""
        return self.shape[-1] // self.scales.shape[-1]

    @property
    def nbytes(self) -> int:
        """Size of what is stored."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def scheme(self) -> str:
        """Its name as ``inspect`` prints it: ``int4-g32``, ``int8``, ..."""
        name = f"int{self.bits}" + ("" if self.scales.shape[-1] == 1 else f"-g{self.group}")
        return name + ("-asym" if self.offsets is not None else "")

    def map(self, function: Callable[[Any], Any]) -> "QTensor":
        """Applies ``function`` to each leaf: for what acts on rows alone."""
        return jax.tree.map(function, self)


def is_qtensor(leaf: Any) -> bool:
    """For ``is_leaf`` in a walk over a tree: a packed weight stays whole."""
    return isinstance(leaf, QTensor)


def integers(q: QTensor) -> tuple[Any, ...]:
    """``n - zero`` as int8: for 8 bits ``([out, in],)``; for fewer the even and the odd columns, each ``[out, in /
    2]``.

    In two halves because putting them in order costs XLA:CPU ten times what a second product does.
    """
    stored = [n.astype(np.int8, copy=False) for n in _stored(q)]
    return tuple(n - np.int8(q.zero) if q.zero else n for n in stored)


def _stored(q: QTensor) -> tuple[Any, ...]:
    """``n``, in columns as ``integers`` has them: int8 for 8 bits, uint8 for fewer."""
    if q.bits == 8:
        return (q.values,)
    low, high = q.values & np.uint8(15), q.values >> np.uint8(4)
    if q.fifth is not None:
        xp = jnp if isinstance(q.fifth, jax.Array) else np
        places = xp.arange(8, dtype=np.uint8).reshape((1,) * q.fifth.ndim + (8,))
        bits = (q.fifth[..., None] >> places) & np.uint8(1)
        even, odd = xp.split(bits.reshape(*bits.shape[:-2], -1) << np.uint8(4), 2, axis=-1)
        low, high = low | even, high | odd
    return low, high


def columns(x: Any, q: QTensor) -> list[Any]:
    """The columns of ``x [..., in]`` as ``integers`` has the weight's."""
    return [x] if q.bits == 8 else [x[..., 0::2], x[..., 1::2]]


def halves(q: QTensor) -> tuple[Any, ...]:
    """The float32 values, in columns as ``integers`` has them.

    Zero is taken from floats, which is exact, too: XLA:CPU adds int8 in what it hands over to YNNPACK, and there sums
    of two halves, as the scales' derivative is, come out wrong (jaxlib 0.10.2).
    """
    scales = q.scales.astype(np.float32)[..., None]
    offsets = None if q.offsets is None else q.offsets.astype(np.float32)[..., None]

    def scaled(n: Any) -> Any:
        w = n.reshape(*q.scales.shape, -1).astype(np.float32)
        w = (w - np.float32(q.zero) if q.zero else w) * scales
        return (w if offsets is None else w + offsets).reshape(n.shape)

    return tuple(scaled(n) for n in _stored(q))


def dequantize(q: QTensor) -> Any:
    """``W``, float32 ``[out, in]``: NumPy from NumPy leaves, JAX from JAX ones."""
    parts = halves(q)
    if len(parts) == 1:
        return parts[0]
    xp = jnp if isinstance(parts[0], jax.Array) else np
    return xp.stack(parts, -1).reshape(q.shape)


def take(q: QTensor, ids: jax.Array) -> jax.Array:
    """``W[ids]`` float32: the embedding of token ids of any shape."""
    flat = ids.reshape(-1)
    return dequantize(q.map(lambda leaf: look_up(leaf, flat))).reshape(*ids.shape, q.shape[-1])


def pack(n: np.ndarray) -> np.ndarray:
    """Stored integers 0 to 15 ``[out, in]``, in even, two to a byte ``[out, in / 2]``."""
    return n[:, 0::2].astype(np.uint8) | (n[:, 1::2].astype(np.uint8) << 4)
