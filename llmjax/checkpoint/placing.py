"""Parameters to the device, one at a time: there is never a second copy of more than one, here or there."""

from typing import Any

import jax

from llmjax.checkpoint.hashes import remember
from llmjax.checkpoint.parameters import Parameter
from llmjax.device import in_memory, platform_of
from llmjax.models.tree import path_of, put_at


def put(tree: dict[str, Any], name: str, leaf: Parameter, *, where: Any = None, is_named_by_hash: bool = False) -> None:
    """Puts a parameter into its place in a tree, on the device.

    Args:
      tree: of parameters.
      name: canonical.
      leaf: of NumPy arrays.
      where: a sharding for each of them (``models.sharding``); None for JAX's default device.
      is_named_by_hash: no file says what the parameter is, so its bytes will, while they are here.

    Raises:
      NoRoomError: the device's memory is full.
    """
    lower = "store the weights in fewer bits (quantize, --quantize, or dtype, --dtype)"
    with in_memory(f"the weights, at {name}", lower):
        placed = jax.device_put(leaf, where)
        if platform_of(placed) != "cpu":  # which would have had no need of a copy
            jax.block_until_ready(placed)  # or copies of several wait here
    if is_named_by_hash and platform_of(placed) != "cpu":
        jax.tree.map(remember, placed, leaf)
    put_at(tree, path_of(name), placed)
