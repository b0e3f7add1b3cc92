"""What the host gives a program, or gets from it, as one array: each on its own way to or from a GPU takes as long as a
thousand numbers do."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

# Of Python's own; what has a dtype keeps it.
_DTYPES = {bool: np.bool_, int: np.int32}


class Packed(struct.PyTreeNode):
    """A tree of arrays, of 32 bits a number or bool: the host's or, within a program, the device's.

    Attributes:
      numbers: int32 ``[n]``, the bits of all, one after the other.
      kinds: the tree's structure, and each array's shape and dtype (static).
    """

    numbers: Any
    kinds: tuple[Any, tuple[tuple[tuple[int, ...], np.dtype], ...]] = struct.field(pytree_node=False)

    @classmethod
    def of(cls, tree: Any) -> "Packed":
        """Of arrays and Python's numbers."""
        leaves, structure = jax.tree.flatten(tree)
        arrays = [x if isinstance(x, jax.Array) else np.asarray(x, _DTYPES.get(type(x))) for x in leaves]
        assert all(a.dtype == np.bool_ or a.dtype.itemsize == 4 for a in arrays)
        xp = jnp if any(isinstance(a, jax.Array) for a in arrays) else np
        bits = [(a.astype(np.int32) if a.dtype == np.bool_ else _bits(a, np.dtype(np.int32))).ravel() for a in arrays]
        return cls(xp.concatenate(bits), (structure, tuple((a.shape, a.dtype) for a in arrays)))

    def opened(self) -> Any:
        """The tree again, bit for bit: JAX's arrays or NumPy's, as the numbers are."""
        structure, kinds = self.kinds
        xp: Any = jnp if isinstance(self.numbers, jax.Array) else np
        parts = xp.split(self.numbers, np.cumsum([math.prod(shape) for shape, _ in kinds])[:-1])

        def array(part: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
            part = part.reshape(shape)
            return part != 0 if dtype == np.bool_ else _bits(part, dtype)

        return structure.unflatten([array(part, *kind) for part, kind in zip(parts, kinds, strict=True)])


def _bits(x: Any, dtype: np.dtype) -> Any:
    return lax.bitcast_convert_type(x, dtype) if isinstance(x, jax.Array) else x.view(dtype)


def unpacking(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose last arguments come packed."""

    def opening(*args: Any) -> Any:
        return function(*args[:-1], *args[-1].opened())

    return opening
