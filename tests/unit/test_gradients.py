"""Derivatives: whatever program multiplies, they are those of the float32 product of the same values."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import LlmjaxError
from llmjax.lora.apply import Lora, with_loras
from llmjax.models.context import Context
from llmjax.numerics import PROFILES, resolve
from llmjax.products.matmul import matmul
from llmjax.products.sums import by_cache
from llmjax.quant.bits import look_up
from llmjax.quant.gguf import TYPES
from llmjax.quant.qtensor import QTensor, dequantize, pack, take
from llmjax.quant.rounding import quantize
from llmjax.quant.schemes import Scheme
from llmjax.runtime.cache import make_cache
from tests.parity import golden
from tests.tiny import random_model, slow, some
from tests.unit.test_stack import packed_model

RNG = np.random.default_rng(11)
KINDS = ("float32", "bfloat16", "float16", "int8", "int4", "int8-asym", "int4-g32-asym", "Q5_0", "Q5_1")
QUICK = {("reference", "bfloat16"), ("fast", "bfloat16"), ("fast", "int4"), ("mediapipe_cpu", "int4-g32-asym")}
# Each of them another way to multiply: sums of one and of several rows, products.
ROWS = (1, 4, 8, 40)


@pytest.fixture
def several_tiles(monkeypatch):
    """Tiles of 16 channels, of which the last overlaps."""
    monkeypatch.setattr("llmjax.products.plain._SMALL_BYTES", 0)
    monkeypatch.setattr("llmjax.products.tiles._SMALL_BYTES", 0)
    monkeypatch.setattr("llmjax.products.tiles._TILE_BYTES", 1)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def weight(kind: str, shape: tuple[int, int] = (70, 128)) -> jax.Array | QTensor:
    w = normal(*shape)
    if "float" in kind:
        return jnp.asarray(w, kind)
    if kind.startswith("int"):
        return quantize(lambda a, b: w[a:b], shape, Scheme.parse(kind)).map(jnp.asarray)
    n = RNG.integers(0, 32, shape)
    planes = np.concatenate([n[:, 0::2] >> 4, n[:, 1::2] >> 4], 1)
    scales, offsets = (normal(shape[0], shape[1] // 32).astype(np.float16) for _ in range(2))
    q = QTensor(pack(n & 15), scales, offsets if kind == "Q5_1" else None, np.packbits(planes, -1, "little"),
                bits=5, zero=TYPES[kind].zero)  # fmt: skip
    return q.map(jnp.asarray)


def floats(weight: jax.Array | QTensor) -> list[jax.Array]:
    """What has a derivative."""
    return [weight.scales, *([] if weight.offsets is None else [weight.offsets])] if is_packed(weight) else [weight]


def with_floats(weight: jax.Array | QTensor, leaves: list[jax.Array]) -> jax.Array | QTensor:
    return weight.replace(**dict(zip(("scales", "offsets"), leaves, strict=False))) if is_packed(weight) else leaves[0]


def is_packed(leaf) -> bool:
    return isinstance(leaf, QTensor)


def plainly(leaf: jax.Array | QTensor) -> jax.Array:
    """The float32 values, by what JAX differentiates itself."""
    return dequantize(leaf) if is_packed(leaf) else leaf.astype(jnp.float32)


def assert_close(found, expected, tolerance: float = 1e-5) -> None:
    """Leaf by leaf, of the largest value; 16-bit leaves to their rounding."""
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        allowed = max(tolerance, float(jnp.finfo(f.dtype).eps) if f.dtype.itemsize == 2 else 0)
        f, e = np.asarray(f, np.float64), np.asarray(e, np.float64)
        assert np.abs(f - e).max() <= allowed * np.abs(e).max()


def numpy_derivatives(x, w, x_dot, leaves_dot, seed):
    """By the chain rule: ``(x_bar, leaves_bar, y_dot)``."""
    values = np.asarray(plainly(w), np.float64)
    w_bar = np.asarray(seed, np.float64).T @ np.asarray(x, np.float64)
    if not is_packed(w):
        return seed @ values, [w_bar], x_dot @ values.T + x @ np.asarray(leaves_dot[0], np.float64).T
    one = w.replace(scales=jnp.ones_like(w.scales), offsets=None)
    n = np.asarray(dequantize(one), np.float64).reshape(*w.scales.shape, -1)
    grouped = w_bar.reshape(n.shape)
    leaves_bar = [(grouped * n).sum(-1), grouped.sum(-1)][: len(leaves_dot)]
    w_dot = sum(np.asarray(d, np.float64)[..., None] * f for d, f in zip(leaves_dot, (n, 1), strict=False))
    return seed @ values, leaves_bar, x_dot @ values.T + x @ w_dot.reshape(values.shape).T


@pytest.mark.parametrize(("profile", "kind"), some(QUICK, itertools.product(PROFILES, KINDS)))
def test_products(several_tiles, profile, kind):
    """In x and in what is float of W, both modes."""
    w = weight(kind)
    numerics = resolve(profile, w.dtype)
    leaves = floats(w)
    dtype = numerics.activations
    cases = [
        (jnp.asarray(normal(n, 128), dtype), jnp.asarray(normal(n, 128), dtype), jnp.asarray(normal(n, 70)))
        for n in ROWS
    ]
    leaves_dot = [jnp.asarray(normal(*leaf.shape), leaf.dtype) for leaf in leaves]

    @jax.jit
    def derivatives(cases, leaves):
        def one(x, x_dot, seed):
            def product(x, leaves):
                return matmul(x, with_floats(w, leaves), numerics)

            backward = jax.vjp(product, x, leaves)[1]
            return *backward(seed), jax.jvp(product, (x, leaves), (x_dot, leaves_dot))[1]

        return [one(*case) for case in cases]

    for (x, x_dot, seed), found in zip(cases, derivatives(cases, leaves), strict=True):
        assert found[0].dtype == x.dtype and [f.dtype for f in found[1]] == [leaf.dtype for leaf in leaves]
        x, x_dot, seed = (np.asarray(a, np.float64) for a in (x, x_dot, seed))
        assert_close(found, numpy_derivatives(x, w, x_dot, leaves_dot, seed))


@pytest.mark.parametrize("kind", ["float32", "int4-g32-asym"])
def test_derivatives_of_derivatives_of_many(several_tiles, kind):
    """Hessian times vector, in a batch, with the inner values computed again."""
    w, x, vector = weight(kind), normal(3, 4, 128), normal(4, 128)
    leaves = floats(w)

    def hessian_vector(multiply):
        @jax.checkpoint
        def loss(x, leaves):
            return jnp.sum(jnp.tanh(multiply(x, with_floats(w, leaves)) / 10) ** 2)

        def directional(x, leaves):
            return jnp.vdot(jax.grad(loss)(x, leaves), vector)

        return jax.jit(jax.vmap(jax.grad(directional, (0, 1)), (0, None)))(x, leaves)

    exact = functools.partial(jnp.matmul, precision="highest")
    assert_close(
        hessian_vector(lambda x, w: matmul(x, w, resolve("fast", w.dtype))),
        hessian_vector(lambda x, w: exact(x, plainly(w).T)),
    )


@pytest.mark.parametrize("whole", [False, True])
def test_scales_of_two_halves(monkeypatch, whole):
    """Large enough for XLA:CPU to hand the sums over to a library."""
    monkeypatch.setattr("llmjax.products.plain._SMALL_BYTES", whole << 30)
    w, x, seed = weight("int4-g32", (300, 512)), normal(5, 512), normal(5, 300)
    numerics = resolve("fast", w.dtype)
    found = jax.jit(jax.grad(lambda s: jnp.vdot(matmul(x, w.replace(scales=s), numerics), seed)))(w.scales)
    assert_close(found, numpy_derivatives(x, w, x, [w.scales], seed)[1][0])
    ids, seed = jnp.arange(300)[::-1], normal(300, 512)
    found = jax.jit(jax.grad(lambda s: jnp.vdot(take(w.replace(scales=s), ids), seed)))(w.scales)
    n = np.asarray(dequantize(w.replace(scales=jnp.ones_like(w.scales))), np.float64)
    assert_close(found, (n * seed[::-1]).reshape(300, 16, -1).sum(-1))


def test_embeddings_add_up_before_they_round():
    """A token that comes 300 times: sums of bfloat16 would stay at 256."""
    table = jnp.ones((4, 8), jnp.bfloat16)
    found = jax.grad(lambda t: look_up(t, jnp.full(300, 2)).astype(jnp.float32).sum())(table)
    np.testing.assert_array_equal(found[2], 300)


def test_sums_over_a_cache():
    x, w, x_dot, w_dot = normal(2, 3, 8), normal(2, 6, 8), normal(2, 3, 8), normal(2, 6, 8)
    found = jax.jvp(by_cache, (x, w), (x_dot, w_dot))[1]
    assert_close(found, np.einsum("bmi,boi->bmo", x_dot, w) + np.einsum("bmi,boi->bmo", x, w_dot))


def test_a_cache_of_16_bits_says_that_it_has_no_derivative():
    model = random_model("fast", "bfloat16")
    cache, ids = make_cache(model.config, model.numerics, 1, 256), jnp.zeros((1, 1), jnp.int32)
    ctx = Context(ids, model.numerics, table=jnp.zeros((1, 1), jnp.int32))

    def logits(params):
        return model.module.apply({"params": params, "cache": cache}, ids, ctx, mutable=["cache"])[0]

    with pytest.raises(LlmjaxError, match="model.apply"):
        jax.jvp(logits, (model.params,), (model.params,))


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_no_gradient_holds_a_converted_model(kind):
    """Through a chain of weights towards x: adapters are trained so."""
    chain = [weight(kind, (512, 512)) for _ in range(12)]

    def loss(x, chain):
        for w in chain:
            x = jnp.tanh(matmul(x, w, resolve("reference", w.dtype)))
        return x.sum()

    program = jax.jit(jax.grad(loss)).lower(normal(4, 512), chain).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.25 * 12 * 4 * 512 * 512


def loss(model, params, ids):
    log_probs = jax.nn.log_softmax(model.apply(params, ids[:, :-1]))
    return -jnp.take_along_axis(log_probs, ids[:, 1:, None], -1).mean()


def gradients(model, params, ids):
    """And those of the float32 model of the same values, carried back to what is stored."""

    def exactly(params):
        return jax.tree.map(plainly, params, is_leaf=is_packed)

    exact = dataclasses.replace(model, numerics=resolve("reference", jnp.float32))
    return (
        jax.jit(jax.grad(functools.partial(loss, model), allow_int=True))(params, ids),
        jax.jit(jax.grad(lambda p, ids: loss(exact, exactly(p), ids), allow_int=True))(params, ids),
    )


def assert_same_gradients(found, expected) -> None:
    for (path, f), e in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        # Adding one number to all keys of a head moves no softmax: a key bias without a norm has rounding alone.
        if f.dtype != jax.dtypes.float0 and np.abs(e).max() > 1e-6:
            assert_close(f, e, 1e-4 if np.ndim(e) else 1e-3)  # a number's own is a sum over all, much of which cancels
            assert np.abs(f).max() > 0, path


@pytest.mark.parametrize("name", golden.some(set()))
def test_a_bfloat16_checkpoint(name):
    """``reference`` computes in float32, whatever is stored: its gradients are rounded once."""
    model = golden.load(name, dtype="bfloat16")
    ids = jnp.asarray(golden.arrays(name)["short"])[None]
    assert_same_gradients(*gradients(model, model.params, ids))


@pytest.mark.parametrize(("profile", "scheme"), [slow("fast", "int8"), slow("reference", "int4-g32-asym")])
def test_an_adapter_beside_packed_weights(profile, scheme):
    """Eight tokens: rows that ``fast`` sums."""
    model = random_model(profile, hidden_size=64, intermediate_size=96, num_attention_heads=4, tie_word_embeddings=True)
    model.params["embed"]["weight"] = weight(scheme, (600, 64))
    loras = {}
    for layer, role in itertools.product(("layers_0", "layers_1"), ("attn", "mlp")):
        for name, projection in model.params[layer][role].items():
            out, width = projection["weight"].shape
            projection["weight"] = weight(scheme, (out, width))
            factors = (jnp.asarray(normal(4, width)), jnp.asarray(normal(out, 4)), jnp.float32(0.1))
            loras[f"{layer.replace('_', '.')}.{role}.{name}.weight"] = Lora(*factors)
    ids = jnp.asarray(RNG.integers(0, 600, (1, 9)))
    assert_same_gradients(*gradients(model, with_loras(model.params, loras), ids))


@pytest.mark.parametrize("profile", some({"dynamic_int8"}, PROFILES))
def test_transforms_from_outside(profile):
    """Row by row under ``vmap``, whole, and compiled: one model, and one gradient beside packed weights."""
    model = dataclasses.replace(packed_model("int8"), numerics=resolve(profile, jnp.float32))
    ids = jnp.asarray(RNG.integers(0, 600, (3, 9)))
    for wrong, found in (([[1, 2]], r"\[\[1, 2\]\]"), (ids[0], "int32"), (ids * 1.0, "float32")):
        with pytest.raises(LlmjaxError, match=rf"ids: expected an array of integers \[B, T\], found {found}"):
            model.apply(model.params, wrong)
    plain = model.apply(model.params, ids)
    by_row = jax.vmap(lambda params, row: model.apply(params, row[None])[0], (None, 0))
    for same in (jax.jit(model.apply), jax.jit(by_row)):
        assert_close(same(model.params, ids), plain, 1e-5)
    by_row = jax.vmap(jax.grad(lambda p, row: loss(model, p, row[None]), allow_int=True), (None, 0))
    found = jax.jit(by_row)(model.params, ids)
    means = jax.tree.map(lambda leaf: leaf if leaf.dtype == jax.dtypes.float0 else leaf.mean(0), found)
    whole = jax.jit(jax.grad(functools.partial(loss, model), allow_int=True))
    assert_same_gradients(means, whole(model.params, ids))


@pytest.mark.slow
def test_the_demo_model(short_smollm2):
    """As in the README, under the profile of generation; beside packed weights their scales and offsets."""
    ids = jnp.asarray([short_smollm2.tokenizer.encode("The capital of France is Paris.")])
    found, expected = gradients(short_smollm2, short_smollm2.params, ids)
    assert_same_gradients(found, expected)
    assert isinstance(found["layers_0"]["attn"]["q"]["weight"], QTensor)
