"""Attention as a GPU's kernel, interpreted here: what the folded blocks give."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models import attention, flash, flash_step
from llmjax.models.attention import Scores, cached_attention
from llmjax.models.context import Context
from llmjax.numerics import resolve
from llmjax.quant.bits import to_storage
from tests import triton
from tests.tiny import slow

PAGE, PAGES = 32, 18
# Profiles that are asked about with float32 keys and values, which one of them multiplies in halves.
FLOAT32 = ("reference", "dynamic_int8")
# One row's chunk that ends in the middle of a tile, or rows of a step in their first and last page.
CHUNK, STEP = [130 + np.arange(28)], [[7], [570]]
# The same, as if they were so many that programs have several parts each and, of float32, tensor cores.
MANY = [[7], [570]]
# Heads of one power of two, of several, and of some of whose last a part is missing.
CASES = [
    ("dynamic_int8", STEP, 70, 30.0, 24, True),
    slow("reference", STEP, 70, 30.0, 24, True),
    slow("dynamic_int8", CHUNK, 40, None, 272, False),
    slow("fast", CHUNK, None, None, 80, False),
    slow("reference", CHUNK, 40, None, 100, True),
    slow("fast", STEP, None, None, 112, True),
    slow("hf", STEP, 70, None, 16, True),
    slow("hf", CHUNK, 40, 30.0, 8, True),
    slow("reference", CHUNK, None, None, 64, False),
    slow("reference", STEP, None, None, 512, False),
    slow("fast", CHUNK, 40, None, 272, False),
    slow("dynamic_int8", MANY, 70, 30.0, 24, True),
    slow("reference", MANY, None, None, 100, False),
    slow("fast", MANY, 70, None, 112, True),
]


def example(profile, positions, window, cap, width, alibi, pages_each=PAGES):
    """A rule, and what it is asked about."""
    numerics = resolve(profile, jnp.dtype(jnp.float32 if profile in FLOAT32 else jnp.bfloat16))
    rng = np.random.default_rng(0)
    rows, heads, groups = len(positions), 2, 3
    pages = rows * pages_each + 1
    table = rng.permutation(pages)[: rows * pages_each].reshape(rows, pages_each).astype(np.int32)
    keys, values = (
        to_storage(jnp.asarray(rng.normal(size=(pages, heads, *size)), numerics.products))
        for size in ((PAGE, width), (width, PAGE))
    )
    queries = jnp.asarray(rng.normal(size=(rows, len(positions[0]), heads * groups, width)), numerics.activations)
    ctx = Context(jnp.asarray(positions, jnp.int32), numerics, 32, jnp.asarray(table))
    return Scores(width**-0.5, softcap=cap, window=window, alibi=alibi), (queries, keys, values, ctx)


def as_asked(positions, monkeypatch):
    if positions is MANY:
        for name, value in {"_FEW": 0, "_ENOUGH": 8, "_PART_OF_MANY": 16}.items():
            monkeypatch.setattr(flash_step, name, value)


@pytest.mark.parametrize(("profile", "positions", "window", "cap", "width", "alibi"), CASES)
def test_the_kernel_is_the_folded_attention(profile, positions, window, cap, width, alibi, monkeypatch):
    as_asked(positions, monkeypatch)
    monkeypatch.setattr(flash, "flash_attention", partial(flash.flash_attention, interpret=True))
    scores, (queries, keys, values, ctx) = example(profile, positions, window, cap, width, alibi)
    assert flash.can_serve(keys)
    kernel = jax.jit(partial(attention._in_a_kernel, scores))
    found = kernel(queries, keys, values, ctx)
    wanted = cached_attention(queries, keys, values, scores, ctx)
    error = np.abs(np.asarray(found - wanted, np.float64)).max()
    assert error < (2e-6 if profile in FLOAT32 else 1e-2)  # probabilities are rounded under another maximum
    if profile in FLOAT32:  # neither a neighbour nor a longer table moves a bit, nor what lies behind the last token
        longer = ctx.replace(positions=ctx.positions[-1:], table=jnp.pad(ctx.table[-1:], ((0, 0), (0, 3))))
        page, place = divmod(positions[-1][-1], PAGE)
        page = ctx.table[-1, page]
        keys, values = keys.at[page, :, place + 1 :].set(1e9), values.at[page, :, :, place + 1 :].set(1e9)
        np.testing.assert_array_equal(kernel(queries[-1:], keys, values, longer), found[-1:])


@pytest.mark.parametrize(
    ("profile", "positions", "window", "cap", "width", "alibi"),
    [
        ("hf", [[7], [70]], 40, None, 24, True),
        slow("reference", CHUNK, 40, 30.0, 100, True),
        slow("fast", CHUNK, None, None, 80, False),
        slow("reference", [[7], [95]], None, None, 512, False),
        slow("dynamic_int8", CHUNK, None, 30.0, 112, True),
        slow("hf", CHUNK, 40, 30.0, 8, True),
        slow("dynamic_int8", MANY, 70, None, 24, True),
    ],
)
def test_what_triton_is_given_reads_and_writes_what_it_may(profile, positions, window, cap, width, alibi, monkeypatch):
    """And it is the folded attention, under the roundings of ``hf`` to the last bit of a result, or one more."""
    scores, args = example(
        profile, positions, window, cap, width, alibi, pages_each=1 + max(map(max, positions)) // PAGE
    )
    with monkeypatch.context() as patched:
        as_asked(positions, patched)
        patched.setattr(flash.pl, "pallas_call", triton.kernel)
        found = attention._in_a_kernel(scores, *args)
    options = args[-1].numerics.compiler_options("cpu")
    wanted = jax.jit(lambda *args: cached_attention(*args[:3], scores, args[3]), compiler_options=options)(*args)
    error = np.abs(np.asarray(found - wanted, np.float64)).max()
    assert error < (3e-6 if profile in FLOAT32 else 8e-3)
