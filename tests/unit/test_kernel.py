"""Products with packed weights as a GPU's kernel, interpreted here: what the plain formula gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.products import kernel
from llmjax.products.defined import _in_bfloat16, pieces
from llmjax.quant.qtensor import dequantize
from tests.tiny import slow
from tests.unit.test_quant import on_device, quantized

# Scheme, rows, outputs, inputs: none a multiple of its tile, the last channels a tile that repeats some; a few tiles
# of rows; long inputs, in parts.
CASES = [
    ("int4-g32-asym", 5, 200, 192, 3),
    ("int8", 150, 40, 2048, 1),
    slow("int4", 150, 200, 4096, 3),
    slow("int8-asym", 7, 130, 2048, 3),
    slow("int8-g64", 33, 16, 1024, 3),
    slow("int4-g128", 64, 300, 256, 1),
]


@pytest.mark.parametrize(("scheme", "rows", "out", "width", "count"), CASES)
def test_the_kernel_is_the_plain_product(scheme, rows, out, width, count):
    rng = np.random.default_rng(0)
    q = quantized(rng.standard_normal((out, width)).astype(np.float32), scheme)
    x = rng.standard_normal((rows, width)) * np.exp(rng.standard_normal((rows, 1)))
    parts = pieces(jnp.asarray(x, jnp.float32), count)
    x, w = sum(np.asarray(piece, np.float64) for piece in parts), np.asarray(dequantize(q), np.float64)
    q = on_device(q)
    assert kernel.can_serve(q)
    run = jax.jit(partial(kernel.packed_product, interpret=True))
    found = run(parts, q)
    assert found.shape == (rows, out) and found.dtype == jnp.float32
    size = np.abs(x) @ np.abs(w).T  # of what is summed
    assert (np.abs(found - x @ w.T) / size).max() < 3e-7
    assert (np.abs(np.asarray(found, np.float64) - jax.jit(_in_bfloat16)(parts, q)) / size).max() < 5e-6
    # Other neighbours, the same bits.
    np.testing.assert_array_equal(run([piece.at[1:].set(1) for piece in parts], q)[0], found[0])
