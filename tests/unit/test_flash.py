"""Attention as a GPU's kernel, interpreted here: what the folded blocks give."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models.attention import Scores, _grouped, _ungrouped, cached_attention
from llmjax.models.context import Context
from llmjax.models.flash import can_serve, flash_attention
from llmjax.numerics import resolve
from llmjax.quant.bits import to_storage
from tests.tiny import slow

PAGE, PAGES = 64, 5
# One row's chunk that ends in the middle of a tile, or rows of a step in their first and last page.
CHUNK, STEP = [130 + np.arange(30)], [[7], [319]]
CASES = [
    ("reference", STEP, 70, 30.0),
    slow("fast", CHUNK, None, None),
    slow("reference", CHUNK, 40, None),
    slow("fast", STEP, None, None),
    slow("hf", STEP, 70, None),
    slow("hf", CHUNK, 40, 30.0),
]


@pytest.mark.parametrize(("profile", "positions", "window", "cap"), CASES)
def test_the_kernel_is_the_folded_attention(profile, positions, window, cap):
    numerics = resolve(profile, jnp.dtype(jnp.float32 if profile == "reference" else jnp.bfloat16))
    rng = np.random.default_rng(0)
    rows, heads, groups, width = len(positions), 1, 3, 16
    pages = rows * PAGES + 1
    table = rng.permutation(pages)[: rows * PAGES].reshape(rows, PAGES).astype(np.int32)
    keys, values = (
        to_storage(jnp.asarray(rng.normal(size=(pages, heads, *size)), numerics.products))
        for size in ((PAGE, width), (width, PAGE))
    )
    queries = jnp.asarray(rng.normal(size=(rows, len(positions[0]), heads * groups, width)), numerics.activations)
    ctx = Context(jnp.asarray(positions, jnp.int32), numerics, 32, jnp.asarray(table))
    scores = Scores(width**-0.5, softcap=cap, window=window)
    assert can_serve(keys)
    grouped = _grouped(queries, heads).astype(numerics.products)

    @jax.jit
    def kernel(grouped, table, positions):
        rule = partial(scores, ctx=ctx)
        return flash_attention(rule, numerics, window, grouped, keys, values, table, positions, interpret=True)

    found = kernel(grouped, ctx.table, ctx.positions)
    wanted = cached_attention(queries, keys, values, scores, ctx)
    error = np.abs(np.asarray(_ungrouped(found).astype(queries.dtype) - wanted, np.float64)).max()
    assert error < (1e-6 if profile == "reference" else 1e-2)  # probabilities are rounded under another maximum
    if profile == "reference":  # neither a neighbour nor a longer table moves a bit
        longer = jnp.pad(ctx.table[-1:], ((0, 0), (0, 3)))
        np.testing.assert_array_equal(kernel(grouped[-1:], longer, ctx.positions[-1:]), found[-1:])
