"""What the host gives a program, as one array: each on its own way to a GPU takes as long as a thousand numbers do."""

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
    """A tree of the host's arrays, of 32 bits a number or bool.

    Attributes:
      numbers: int32 ``[n]``, the bits of all, one after the other.
      kinds: the tree's structure, and each array's shape and dtype (static).
    """

    numbers: Any
    kinds: tuple[Any, tuple[tuple[tuple[int, ...], np.dtype], ...]] = struct.field(pytree_node=False)

    @classmethod
    def of(cls, tree: Any) -> "Packed":
        """Of NumPy arrays and Python's numbers."""
        leaves, structure = jax.tree.flatten(tree)
        arrays = [np.asarray(x, _DTYPES.get(type(x))) for x in leaves]
        assert all(a.dtype == np.bool_ or a.itemsize == 4 for a in arrays)
        bits = [(a.astype(np.int32) if a.dtype == np.bool_ else a.view(np.int32)).ravel() for a in arrays]
        return cls(np.concatenate(bits), (structure, tuple((a.shape, a.dtype) for a in arrays)))

    def opened(self) -> Any:
        """The tree, of JAX's arrays, bit for bit."""
        structure, kinds = self.kinds
        parts = jnp.split(self.numbers, np.cumsum([math.prod(shape) for shape, _ in kinds])[:-1])

        def array(part: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
            part = part.reshape(shape)
            return part != 0 if dtype == np.bool_ else lax.bitcast_convert_type(part, dtype)

        return structure.unflatten([array(part, *kind) for part, kind in zip(parts, kinds, strict=True)])


def unpacking(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose last arguments come packed."""

    def opening(*args: Any) -> Any:
        return function(*args[:-1], *args[-1].opened())

    return opening
