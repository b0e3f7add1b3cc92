"""The key/value cache: one pair of buffers a layer, a row per decode slot."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.models.attention import POSITION_AXIS
from llmjax.models.config import DecoderConfig
from llmjax.models.stack import STACKED
from llmjax.numerics import Numerics
from llmjax.quant.bits import storage


def make_cache(
    config: DecoderConfig, numerics: Numerics, slots: int, length: int, *, stacked: bool = False
) -> dict[str, Any]:
    """A zeroed ``cache`` collection in the storage of the dtype products run in.

    Args:
      config: the model's.
      numerics: the profile.
      slots: rows.
      length: positions a row.
      stacked: as ``models.stack`` stacks layers.

    Returns:
      ``layers_i / attn / {k, v}``, ``[slots, K, length, H]`` and ``[slots, K, H, length]``.
    """

    def layers(count: int) -> dict[str, Any]:
        rows, heads, width = count * slots, config.num_key_value_heads, config.head_dim
        shapes = {"k": (rows, heads, length, width), "v": (rows, heads, width, length)}
        return {"attn": {name: jnp.zeros(shape, storage(numerics.products)) for name, shape in shapes.items()}}

    count, period = config.num_hidden_layers, config.period
    if stacked:
        return {STACKED: tuple(layers(count // period) for _ in range(period))}
    return {f"layers_{i}": layers(1) for i in range(count)}


def along_positions(function: Callable[[jax.Array, int], jax.Array], cache: Any) -> Any:
    """``function(buffer, axis)`` of every buffer of a ``cache`` collection, the axis being that of positions."""
    return jax.tree_util.tree_map_with_path(lambda path, x: function(x, POSITION_AXIS[path[-1].key]), cache)


# What the cache of a job over many rows may take in memory.
_JOB_BYTES = 2 << 30
_JOB_SLOTS = (8, 32)


def job_slots(config: DecoderConfig, numerics: Numerics, length: int) -> int:
    """Slots for a job over many rows of up to ``length`` tokens: 32, fewer where their cache would take above 2 GiB,
    at least 8.  Of the model alone, so that the same command gives the same bits on any machine's free memory."""
    row = sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(jax.eval_shape(lambda: make_cache(config, numerics, 1, length)))
    )
    least, most = _JOB_SLOTS
    return int(np.clip(_JOB_BYTES // row, least, most))


def bucket(tokens: int, unit: int, context: int) -> int:
    """The cache length for ``tokens``: a power of two times ``unit``, so that few programs serve all lengths; never far
    above what ``context`` can use."""
    most = -(-context // unit) * unit
    length = unit
    while length < tokens:
        length *= 2
    return min(length, most)
