"""The cache: what each layer keeps of every token, in pages that the decode slots' rows share out among them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.models.config import DecoderConfig
from llmjax.models.pages import shape
from llmjax.models.stack import STACKED
from llmjax.numerics import Numerics
from llmjax.quant.bits import storage


def make_cache(
    config: DecoderConfig, numerics: Numerics, pages: int, page: int, *, slots: int = 1, stacked: bool = False
) -> dict[str, Any]:
    """A zeroed ``cache`` collection in the storage of the dtype products run in.

    Args:
      config: the model's.
      numerics: the profile.
      pages: P.
      page: positions in one.
      slots: rows of which there is what layers carry.
      stacked: as ``models.stack`` stacks layers.

    Returns:
      ``layers_i``, and in it what the layer keeps (``DecoderConfig.cache``): most often ``attn / {k, v}``, ``[P, K,
      page, H]`` and ``[P, K, H, page]``; what it carries (``DecoderConfig.carried``), float32 ``[slots, ...]``.  Of a
      model with ``row_arrays`` those, ``[P, ...]``.
    """
    if (arrays := config.row_arrays) is not None:
        return {name: jnp.zeros((pages, *shape), dtype) for name, (shape, dtype) in arrays.items()}

    def buffers(layer: int, count: int) -> dict[str, Any]:
        kept = {
            module: {
                name: jnp.zeros(shape(name, count * pages, *size, page), storage(numerics.products))
                for name, size in sizes.items()
            }
            for module, sizes in config.cache(layer).items()
        }
        carried = {
            module: {name: jnp.zeros((count * slots, *size), jnp.float32) for name, size in sizes.items()}
            for module, sizes in config.carried(layer).items()
        }
        assert not (kept and carried)  # see ``models.stack``
        return kept | carried

    count, period = config.num_hidden_layers, config.period
    if stacked:
        return {STACKED: tuple(buffers(i, count // period) for i in range(period))}
    return {f"layers_{i}": own for i in range(count) if (own := buffers(i, 1))}


def grown(cache: Any, layers: int, shapes: Any) -> Any:
    """``cache`` with more pages, zeroed ones.  A buffer is freed before the next is copied: one of them is in memory
    twice, not all.

    Args:
      cache: its buffers are gone afterwards, but for those that remain as they are.
      layers: in each buffer, stacked.
      shapes: what becomes of it, as ``jax.eval_shape`` says.
    """

    def longer(buffer: jax.Array, to: jax.ShapeDtypeStruct) -> jax.Array:
        if buffer.shape == to.shape:
            return buffer
        new = jax.block_until_ready(_longer(buffer, layers, (len(to) - len(buffer)) // layers))
        buffer.delete()
        return new

    return jax.tree.map(longer, cache, shapes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _longer(buffer: jax.Array, layers: int, more: int) -> jax.Array:
    pages, *one = buffer.shape  # of which nothing may be kept: no -1 stands for their number
    each = buffer.reshape(layers, pages // layers, *one)
    padding = [(0, more if axis == 1 else 0) for axis in range(each.ndim)]
    return jnp.pad(each, padding).reshape(pages + layers * more, *one)


# What the cache of a job over many rows may take in memory.
_JOB_BYTES = 2 << 30
_JOB_SLOTS = (8, 32)
_JOB_TOKENS = 1024


def job_slots(config: DecoderConfig, numerics: Numerics) -> int:
    """Slots for a job over many rows: 32, fewer where a cache of 1,024 tokens in each would take above 2 GiB, at least
    8.  Of the model alone, so that the same command gives the same bits on any machine's free memory."""
    least, most = _JOB_SLOTS
    return int(np.clip(_JOB_BYTES // nbytes(lambda: make_cache(config, numerics, 1, _JOB_TOKENS)), least, most))


def nbytes(make: Callable[[], Any]) -> int:
    """What the arrays of a tree take, without making them."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make)))


def bucket(tokens: int, unit: int, context: int) -> int:
    """The length of rows to compile for, where one has ``tokens``: a power of two times ``unit``, so that few programs
    serve all; never far above what ``context`` can use."""
    most = -(-context // unit) * unit
    length = unit
    while length < tokens:
        length *= 2
    return min(length, most)
