"""Products with packed weights as a GPU's kernel, interpreted here: what the plain formula gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from llmjax.models import experts
from llmjax.models.attention import Scores
from llmjax.models.context import Context
from llmjax.models.layers import Attention, GatedMLP
from llmjax.numerics import resolve
from llmjax.products import kernel, matmul
from llmjax.products.defined import _in_bfloat16, can_choose
from llmjax.quant.qtensor import dequantize
from tests import triton
from tests.tiny import slow
from tests.unit.test_quant import on_device, quantized

# Scheme, rows, outputs, inputs, x's dtype: none a multiple of its tile, the last channels a tile that repeats some; a
# few tiles of rows; long inputs, in parts.
CASES = [
    ("int4-g32-asym", 1, 200, 384, "float32"),
    slow("int4-g32-asym", 5, 200, 192, "float32"),
    ("int8", 150, 40, 2048, "bfloat16"),
    slow("int4", 150, 200, 4096, "float32"),
    slow("int8-asym", 7, 130, 2048, "float32"),
    slow("int8-g64", 33, 16, 1024, "float32"),
    slow("int4-g128", 64, 300, 256, "bfloat16"),
]


@pytest.mark.parametrize(("scheme", "rows", "out", "width", "dtype"), CASES)
def test_the_kernel_is_the_plain_product(scheme, rows, out, width, dtype):
    rng = np.random.default_rng(0)
    q = quantized(rng.standard_normal((out, width)).astype(np.float32), scheme)
    x = rng.standard_normal((rows, width)) * np.exp(9 * rng.standard_normal((rows, 1)))
    given = jnp.asarray(x, dtype)
    x, w = np.asarray(given, np.float64), np.asarray(dequantize(q), np.float64)
    q = on_device(q)
    assert kernel.can_serve(q)
    run = jax.jit(partial(kernel.packed_product, interpret=True))
    found = run(given, q)
    assert found.shape == (rows, out) and found.dtype == jnp.float32
    size = np.abs(x) @ np.abs(w).T  # of what is summed
    assert (np.abs(found - x @ w.T) / size).max() < 3e-7
    assert (np.abs(np.asarray(found, np.float64) - jax.jit(_in_bfloat16)(given, q)) / size).max() < 5e-6
    # Other neighbours, the same bits.
    np.testing.assert_array_equal(run(given.at[1:].set(1), q)[0], found[0])


@pytest.mark.parametrize(
    ("scheme", "rows", "out", "width", "dtype"),
    [
        ("int4-g32-asym", 5, 40, 64, "float32"),
        slow("int8", 150, 40, 2048, "bfloat16"),
        slow("int4", 150, 200, 512, "float32"),
        slow("int8-asym", 7, 130, 2048, "float32"),
    ],
)
def test_what_triton_is_given_reads_and_writes_what_it_may(scheme, rows, out, width, dtype, monkeypatch):
    """And all of the result."""
    monkeypatch.setattr(kernel.pl, "pallas_call", triton.kernel)
    rng = np.random.default_rng(0)
    q = quantized(rng.standard_normal((out, width)).astype(np.float32), scheme)
    given = jnp.asarray(rng.standard_normal((rows, width)) * np.exp(9 * rng.standard_normal((rows, 1))), dtype)
    x, w = np.asarray(given, np.float64), np.asarray(dequantize(q), np.float64)
    found = kernel.packed_product(given, on_device(q))
    assert (np.abs(found - x @ w.T) / (np.abs(x) @ np.abs(w).T)).max() < 3e-7


STACKS = ["int4-g32-asym", slow("bfloat16"), slow("float16"), slow("int8"), slow("int4"), slow("int8-g64")]


def stack_of(kind, *shapes, experts=3):
    """A stack of each shape, and its values."""
    rng = np.random.default_rng(1)
    for shape in shapes:
        w = rng.standard_normal((experts, *shape)).astype(np.float32) / 8
        if kind.startswith("int"):
            parts = [quantized(one, kind) for one in w]
            q = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
            yield on_device(q), np.stack([np.asarray(dequantize(part), np.float64) for part in parts])
        else:
            q = jnp.asarray(w, kind)
            yield q, np.asarray(q, np.float64)


@pytest.mark.parametrize("gathered", [True, slow(False)])
@pytest.mark.parametrize("kind", STACKS)
def test_each_tile_meets_the_weight_it_has_chosen(kind, gathered, monkeypatch):
    """As Triton is given it, in a tile nobody asks for, too, of which nothing is known."""
    monkeypatch.setattr(kernel.pl, "pallas_call", triton.kernel)
    ((q, w),) = stack_of(kind, (40, 2048 if kind == "bfloat16" else 128))
    rng = np.random.default_rng(0)
    numbers, rows = np.int32([2, 0, 3]), rng.integers(0, 7, (3, 16), np.int32)
    given = rng.standard_normal((7 if gathered else 48, w.shape[2])).astype(np.float32)
    given = jnp.asarray(given, q.dtype)
    choice = kernel.Choice(jnp.asarray(numbers), jnp.asarray(rows) if gathered else None, 16)
    assert kernel.can_serve(q)
    found = np.asarray(kernel.packed_product(given, q, choice), np.float64).reshape(3, 16, 40)
    x = np.asarray(given, np.float64)[rows] if gathered else np.asarray(given, np.float64).reshape(3, 16, -1)
    for i, number in enumerate(numbers[:2]):
        size = np.abs(x[i]) @ np.abs(w[number]).T
        assert (np.abs(found[i] - x[i] @ w[number].T) / size).max() < 3e-7


@pytest.mark.parametrize(
    ("kind", "profile", "tokens"),
    [
        ("bfloat16", "fast", 9),
        slow("bfloat16", "fast", 1),
        slow("bfloat16", "hf", 150),
        slow("int4-g32", "fast", 9),
        slow("int8", "dynamic_int8", 9),
        slow("int8", "fast", 100),
    ],
)
def test_a_mixture_in_kernels_is_the_mixture(kind, profile, tokens, monkeypatch):
    monkeypatch.setattr(kernel, "packed_product", partial(kernel.packed_product, interpret=True))
    names, shapes = ("gate", "up", "down"), ((64, 128), (64, 128), (128, 64))
    both = dict(zip(names, stack_of(kind, *shapes), strict=True))
    stack, values = ({name: pair[i] for name, pair in both.items()} for i in (0, 1))
    numerics = resolve(profile, jnp.dtype("float32" if kind.startswith("int") else kind))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((tokens, 128)), numerics.activations)
    chosen = np.argsort(rng.standard_normal((tokens, 3)), -1)[:, :2].astype(np.int32)
    chosen[1:2] = 3  # none
    assert all(can_choose(q, x, numerics) for q in stack.values())
    run = jax.jit(partial(experts._in_kernels, jax.nn.silu, numerics, tokens == 1))
    found = run(x, chosen, stack)
    assert found.shape == (tokens, 2, 128) and found.dtype == numerics.activations
    given, wanted = np.asarray(x, np.float64), np.zeros(found.shape)
    for token, pair in np.ndindex(tokens, 2):
        if (number := chosen[token, pair]) < 3:
            gate, up = (values[name][number] @ given[token] for name in ("gate", "up"))
            wanted[token, pair] = values["down"][number] @ (gate / (1 + np.exp(-gate)) * up)
    exact = profile == "fast" and kind != "bfloat16"
    assert np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max() < (2e-6 if exact else 2e-2)
    # Other neighbours, the same bits.
    others = run(x.at[1:].set(1), np.where(np.arange(tokens)[:, None], 0, chosen).astype(np.int32), stack)
    np.testing.assert_array_equal(others[0], found[0])


@pytest.mark.parametrize(
    ("scheme", "rows", "outs", "width"),
    [
        ("int4-g64-asym", 1, (130, 64), 256),
        ("int8", 2, (40, 16), 1024),
        slow("int4", 1, (20, 16, 19), 2048),
        slow("int4-g32", 1, (18,), 16384),
        slow("int4-g32-asym", 5, (40,), 64),
        slow("int8-g64", 20, (70, 16), 512),
        slow("bfloat16", 1, (70, 16), 512),
        slow("bfloat16", 64, (130, 16), 256),
        slow("float16", 20, (40,), 64),
    ],
)
def test_products_with_several_weights_are_the_plain_ones(scheme, rows, outs, width, monkeypatch):
    """As Triton is given them: channels that two programs have, parts of the columns, rows for groups."""
    monkeypatch.setattr(kernel.pl, "pallas_call", triton.kernel)
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((out, width)).astype(np.float32) for out in outs]
    x = jnp.asarray(rng.standard_normal((rows, width)), jnp.float32)
    if scheme.startswith("int"):
        weights = [quantized(w, scheme) for w in weights]
        packed, values = [on_device(q) for q in weights], [np.asarray(dequantize(q), np.float64) for q in weights]
    else:
        x, packed = x if rows == 1 else x.astype(scheme), [jnp.asarray(w, scheme) for w in weights]
        values = [np.asarray(w, np.float64) for w in packed]
    assert all(map(kernel.can_serve, packed)) and kernel.are_alike(packed)
    given = np.asarray(x if scheme.startswith("int") else x.astype(scheme), np.float64)
    for w, found in zip(values, kernel.packed_products(x, packed), strict=True):
        assert (np.abs(found - given @ w.T) / (np.abs(given) @ np.abs(w).T)).max() < 3e-7


def test_what_differs_in_more_than_channels_is_not_taken_together():
    q = on_device(quantized(np.ones((16, 64), np.float32), "int8"))
    assert kernel.are_alike([q, q.map(lambda leaf: leaf[:8])])
    others = [
        quantized(np.ones((16, width), np.float32), kind)
        for width, kind in ((64, "int4"), (128, "int8"), (64, "int8-g32"))
    ]
    assert not any(kernel.are_alike([q, on_device(other)]) for other in others)
    assert not kernel.are_alike([jnp.ones((16, 64), jnp.bfloat16), jnp.ones((16, 64), jnp.float16)])


@pytest.mark.parametrize("profile", ["fast", slow("dynamic_int8")])
def test_what_meets_the_same_row_is_one_kernel(profile, monkeypatch):
    """And each projection has its own product."""
    calls = []

    def interpreted(x, weights, product=kernel.packed_products):
        calls.append(len(weights))
        return product(x, weights, interpret=True)

    monkeypatch.setattr(kernel, "packed_products", interpreted)
    monkeypatch.setattr(matmul, "knows_cuda", lambda: True)
    monkeypatch.setattr(matmul, "by_device", lambda plain, cpu, cuda: cuda)
    rng = np.random.default_rng(0)

    def weight(*shape):
        w = quantized(rng.standard_normal(shape).astype(np.float32), "int4")
        return {"weight": on_device(w)}, np.asarray(dequantize(w), np.float64)

    shapes = {"q": (256, 256), "k": (128, 256), "v": (128, 256), "o": (256, 256), "gate": (384, 256), "up": (384, 256)}
    made = {name: weight(*shape) for name, shape in (shapes | {"down": (256, 384)}).items()}
    params, values = ({name: pair[i] for name, pair in made.items()} for i in (0, 1))
    x = jnp.asarray(rng.standard_normal((1, 1, 256)), jnp.float32)
    ctx = Context.whole(jnp.zeros((1, 1), jnp.int32), resolve(profile, jnp.dtype("float32")))
    for module in (Attention(4, 2, 64, Scores(1.0)), GatedMLP(384, jax.nn.silu)):
        taps = jax.jit(partial(module.apply, mutable=["taps"]))({"params": params}, x, ctx)[1]["taps"]
        for name in ("q", "k", "v") if "q" in taps else ("gate", "up"):
            wanted = values[name] @ np.asarray(x, np.float64)[0, 0]
            found = taps[name]["tap:"][0, 0]
            assert np.abs(found - wanted).max() / np.abs(wanted).max() < (1e-6 if profile == "fast" else 2e-2)
    assert calls == [3, 1, 2, 1]
    pair = [params[name]["weight"] for name in ("gate", "up")]
    step = jax.jit(lambda x, pair: jax.jvp(lambda x: matmul.matmuls(x, pair, ctx.numerics), (x,), (x[..., ::-1],))[1])
    for name, found in zip(("gate", "up"), step(x, pair), strict=True):  # of the float32 product, whatever ran
        wanted = values[name] @ np.asarray(x, np.float64)[0, 0, ::-1]
        assert np.abs(found[0, 0] - wanted).max() / np.abs(wanted).max() < 1e-6


def test_what_is_out_of_bounds_is_seen():
    def read(x, y):
        y[0] = x[pl.program_id(0) + 4]

    options = {"out_shape": jax.ShapeDtypeStruct((1,), jnp.float32), "compiler_params": plt.CompilerParams()}
    with pytest.raises(AssertionError, match="argument 0: offset 4 of 4"):
        triton.kernel(read, grid=(1,), **options)(jnp.zeros(4))


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_is_two_pieces_of_float16(count):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 96 * count)) * np.exp2(rng.integers(-20, 0, (7, 96 * count)))
    x *= np.float64([[1e-28, 1e-20, 1e-5, 1, 1e5, 1e38, 0]]).T
    x = x.astype(np.float32)
    pieces, scale = (np.asarray(a, np.float64) for a in kernel.in_float16(jnp.asarray(x), count, interpret=True))
    found = (scale[:, None] * pieces.sum(0)).reshape(count, 7, 96).transpose(1, 2, 0).reshape(x.shape)
    top = np.abs(x).max(1, keepdims=True)
    assert (np.abs(found - x) <= np.maximum(2.0**-23 * np.abs(x), 2.0**-39 * top)).all()
