"""Products with weights, whatever way round they run: their definition in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.numerics import resolve
from llmjax.products import tiles
from llmjax.products.defined import as_defined
from llmjax.products.dots import dot
from llmjax.products.matmul import _on_cpu, matmul
from llmjax.quant.qtensor import QTensor, dequantize, pack
from tests.unit.test_quant import on_device, quantized

RNG = np.random.default_rng(3)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 17, 40])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_dot_is_its_definition(dtype, rows):
    w, x = (jnp.asarray(RNG.integers(-127, 128, (n, 96)), dtype) for n in (70, rows))
    y = jax.jit(dot, static_argnums=2)(w, x, jnp.int32 if dtype == "int8" else jnp.float32)
    assert y.shape == (70, rows)
    np.testing.assert_array_equal(y, np.asarray(w, np.int64) @ np.asarray(x, np.int64).T)  # sums below 2^24


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(("profile", "stored"), [("fast", "bfloat16"), ("reference", "bfloat16"), ("hf", "float16")])
def test_weights_of_16_bits(profile, stored, rows):
    """Both operands rounded to the profile's product dtype, the sum in float32."""
    numerics = resolve(profile, stored)
    w = jnp.asarray(RNG.standard_normal((70, 96)), stored)
    x = jnp.asarray(RNG.standard_normal((rows, 96)), jnp.float32)
    y = jax.jit(matmul, static_argnums=2, compiler_options=numerics.compiler_options("cpu"))(x, w, numerics)
    expected = np.asarray(x.astype(numerics.products), np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("whole", [16 << 20, 4096])
def test_many_rows(bits, whole, monkeypatch):
    """Forth and back, converted at once or in tiles of which the last overlaps the one before."""
    monkeypatch.setattr(tiles, "_WHOLE_BYTES", whole)
    monkeypatch.setattr("llmjax.products.plain._SMALL_BYTES", 0)
    x, back = (jnp.asarray(RNG.standard_normal((260, n)), jnp.float32) for n in (96, 38))
    if bits == 16:
        weight = jnp.asarray(RNG.standard_normal((38, 96)), jnp.bfloat16)
        w = np.asarray(weight, np.float64)
    else:
        n = RNG.integers(0, 16, (38, 96)) if bits == 4 else RNG.integers(-127, 128, (38, 96)).astype(np.int8)
        scales, offsets = (RNG.standard_normal((38, 3)).astype(np.float32) for _ in range(2))
        weight = QTensor(pack(n) if bits == 4 else n, scales, offsets, bits=bits).map(jnp.asarray)
        w = n * np.repeat(scales, 32, 1).astype(np.float64) + np.repeat(offsets, 32, 1)
    y, pull = jax.vjp(jax.jit(lambda x: matmul(x, weight, resolve("reference", jnp.dtype(jnp.float32)))), x)
    for found, wanted in ((y, np.asarray(x, np.float64) @ w.T), (pull(back)[0], np.asarray(back, np.float64) @ w)):
        np.testing.assert_allclose(found, wanted, atol=3e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("product", [_on_cpu, as_defined])
def test_activations_are_rounded_where_products_are_bfloat16(product, rows):
    """Beside packed weights, too, on whatever device."""
    rng = np.random.default_rng(0)
    x, q = rng.standard_normal((rows, 64)), quantized(rng.standard_normal((24, 64)).astype(np.float32), "int8")
    for dtype in (jnp.bfloat16, jnp.float32):
        found = product(resolve("fast", jnp.dtype(dtype)), jnp.asarray(x, jnp.float32), on_device(q))
        wanted = np.asarray(jnp.asarray(x, dtype), np.float64) @ np.asarray(dequantize(q), np.float64).T
        assert np.abs(found - wanted).max() / np.abs(wanted).max() < 2e-6
