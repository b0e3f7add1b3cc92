"""Quantized weights: what the integers mean, how they are made, and that every program computes what is defined."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from llmjax import CheckpointError, ConfigError
from llmjax.model import Model
from llmjax.numerics import resolve
from llmjax.products import digits as product
from llmjax.products.matmul import matmul
from llmjax.products.sums import by_cache, by_weight
from llmjax.quant import gguf
from llmjax.quant.qtensor import QTensor, dequantize, integers, take
from llmjax.quant.rounding import quantize
from llmjax.quant.schemes import Recipe, Scheme, parse, recipe_names, role_of
from llmjax.runtime.cache import make_cache
from llmjax.runtime.state import empty_state
from tests.programs import compiled_programs
from tests.tiny import random_model, slow, some

RNG = np.random.default_rng(5)
SCHEMES = ("int8", "int4", "int8-asym", "int4-asym", "int8-g32", "int4-g64", "int4-g32-asym", "int4-g32-mse")


@pytest.fixture(autouse=True)
def small_weights_go_in_tiles(monkeypatch):
    monkeypatch.setattr("llmjax.products.tiles._SMALL_BYTES", 0)


@pytest.fixture(autouse=True)
def ranks_and_dtypes_are_said():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def weight(out: int = 40, width: int = 128) -> np.ndarray:
    w = RNG.standard_normal((out, width)).astype(np.float32) + np.float32(0.2)
    w[3] = 0
    w[5, 7] = 9
    return w


def quantized(w: np.ndarray, scheme: str) -> QTensor:
    return quantize(lambda a, b: w[a:b], w.shape, Scheme.parse(scheme))


def on_device(q: QTensor) -> QTensor:
    return q.map(jnp.asarray)


def multiplied(x: np.ndarray | jax.Array, w: QTensor | jax.Array, profile: str) -> np.ndarray:
    """``x . W^T`` as a model of that profile runs it."""
    numerics = resolve(profile, w.dtype)
    run = jax.jit(matmul, static_argnums=2, compiler_options=numerics.compiler_options("cpu"))
    return np.asarray(run(x, jax.tree.map(jnp.asarray, w), numerics))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_equation_says_what_a_value_means(scheme):
    q = quantized(weight(), scheme)
    out, width = q.shape
    for o, i in ((0, 0), (3, 1), (5, 7), (17, 64), (39, 127)):
        stored = int(q.values[o, i] if q.bits == 8 else q.values[o, i // 2] >> (4 * (i % 2)) & 15)
        g = i // q.group
        offset = np.float32(0) if q.offsets is None else q.offsets[o, g]
        assert dequantize(q)[o, i] == q.scales[o, g] * np.float32(stored - q.zero) + offset
    assert q.scheme == scheme.removesuffix("-mse") and q.group == (Scheme.parse(scheme).group or width)
    np.testing.assert_array_equal(dequantize(q), dequantize(on_device(q)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_loses_at_most_half_a_step(scheme):
    w = weight()
    q = quantized(w, scheme)
    step = np.repeat(np.abs(q.scales), q.group, 1)
    limit = 0.501 if "mse" not in scheme else 4  # a searched scale may cut a weight off
    assert (np.abs(dequantize(q) - w) <= limit * step + 1e-6).all()
    if "asym" not in scheme:
        np.testing.assert_array_equal(dequantize(q)[3], 0)


def test_symmetric_rounding_is_mediapipes():
    """Half to even, by true division, scale 1 for a channel of zeros, never the lowest integer."""
    w = np.array([[7, -7, 0.5, 1.5, 2.5, -0.5, -1.5, 3.49], [0] * 8], np.float32)
    q = quantized(w, "int4")
    np.testing.assert_array_equal(np.stack(integers(q), -1).reshape(q.shape), [[7, -7, 0, 2, 2, 0, -2, 3], [0] * 8])
    np.testing.assert_array_equal(q.scales, [[1], [1]])
    # XLA multiplies by the reciprocal of a broadcast divisor: these quotients then round to the other side.
    w = RNG.standard_normal((256, 300)).astype(np.float32)
    q = quantized(w, "int8")
    scales = np.array([[np.float32(max(map(abs, row))) / np.float32(127)] for row in w])
    np.testing.assert_array_equal(q.scales, scales)
    np.testing.assert_array_equal(q.values, np.round(w / scales))


def test_asymmetric_rounding_is_mediapipes():
    w = weight()
    q = quantized(w, "int8-asym")
    for o in (0, 5, 11):
        low, high = w[o].min(), w[o].max()
        scale = (high - low) / np.float32(255)
        zero = np.float32(-128) - low / scale
        assert q.scales[o, 0] == scale and q.offsets[o, 0] == -(scale * zero)
        np.testing.assert_array_equal(q.values[o], np.clip(np.round(w[o] / scale + zero), -128, 127))


def test_chunks_do_not_show(monkeypatch):
    w = weight(40, 128)
    whole = quantized(w, "int4-g32-asym")
    monkeypatch.setattr("llmjax.quant.arrays._CHUNK", 128 * 7)
    jax.tree.map(np.testing.assert_array_equal, whole, quantized(w, "int4-g32-asym"))


@pytest.mark.parametrize(
    ("shape", "scheme", "message"),
    [((4, 48), "int4-g32", "48 inputs are not a multiple of the group 32"), ((4, 7), "int4", "even number of inputs")],
)
def test_shapes_that_do_not_fit(shape, scheme, message):
    with pytest.raises(ConfigError, match=message):
        quantized(np.ones(shape, np.float32), scheme)


def test_nan_is_not_quantized():
    w = weight()
    w[1, 1] = np.nan
    with pytest.raises(CheckpointError, match="NaN"):
        quantized(w, "int8")


@pytest.mark.parametrize("kind", gguf.TYPES)
def test_gguf_blocks_keep_their_exact_values(kind):
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    out, blocks = 6, 512 // block
    raw = RNG.integers(0, 256, (out, blocks, nbytes), dtype=np.uint8)
    floats = {"Q6_K": [208]}.get(kind, [0, 2] if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else [0])
    for at in floats:
        raw[..., at : at + 2] = RNG.standard_normal((out, blocks, 1)).astype(np.float16).view(np.uint8)
    q = gguf.unpack(raw.reshape(-1), kind, (out, 512))
    np.testing.assert_array_equal(dequantize(q), quants.dequantize(raw.reshape(out, -1), GGMLQuantizationType[kind]))
    x = RNG.standard_normal((3, 512)).astype(np.float32)
    y = multiplied(x, q, "reference")
    truth = x.astype(np.float64) @ dequantize(q).astype(np.float64).T
    assert np.abs(y - truth).max() <= 2e-5 * np.abs(truth).max()
    assert q.nbytes <= 1.6 * raw.nbytes


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("profile", ["reference", "fast"])
@pytest.mark.parametrize("rows", [1, 5, slow(33)])
def test_weight_only_products(scheme, profile, rows):
    q = quantized(weight(70, 128), scheme)
    x = RNG.standard_normal((rows, 128)).astype(np.float32)
    y = multiplied(x, q, profile)
    truth = x.astype(np.float64) @ dequantize(q).astype(np.float64).T
    assert np.abs(y - truth).max() <= 3e-6 * np.abs(truth).max()


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-asym", "int4-asym"])
@pytest.mark.parametrize("count", [1, 3])
def test_digits_are_their_definition(scheme, count):
    """Integer products bit for bit; the float steps after them to a rounding."""
    q = quantized(weight(70, 128), scheme)
    x = RNG.standard_normal((6, 128)).astype(np.float32)
    x[2] = 0
    scale, digits = jax.jit(product.to_digits, static_argnums=1)(x, count)
    rest = sum(np.asarray(d, np.float64) / 254.0**k for k, d in enumerate(digits))
    np.testing.assert_allclose(rest * np.asarray(scale), x, atol=(0.51 / 127) * np.abs(x).max() / 254.0 ** (count - 1))
    n = np.zeros(q.shape, np.int64)
    parts = integers(q)
    for p, part in enumerate(parts):
        n[:, p :: len(parts)] = part
    sums = sum((np.asarray(d, np.int64) @ n.T) / 254.0**k for k, d in enumerate(digits))
    ones = sum(np.asarray(d, np.int64).sum(-1, keepdims=True) / 254.0**k for k, d in enumerate(digits))
    offsets = 0 if q.offsets is None else ones * q.offsets.astype(np.float64)[:, 0]
    expected = np.asarray(scale) * (q.scales.astype(np.float64)[:, 0] * sums + offsets)
    y = np.asarray(jax.jit(product.in_digits, static_argnums=2)(x, on_device(q), count))
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(y[2], 0)


def test_integer_products_are_exact():
    """With whole scales the result is a whole number, and every bit of it is right."""
    n = RNG.integers(-127, 128, (64, 256)).astype(np.int8)
    q = QTensor(n, np.ones((64, 1), np.float32))
    x = RNG.integers(-127, 128, (4, 256)).astype(np.float32)
    x[:, 0] = 127  # the scale is 1
    y = np.asarray(jax.jit(product.in_digits, static_argnums=2)(x, on_device(q), 1))
    np.testing.assert_array_equal(y, x.astype(np.int64) @ n.astype(np.int64).T)


@pytest.mark.parametrize("scheme", some({"int4-asym"}, ("int8", "int4", "int4-asym")))
@pytest.mark.parametrize("digits", [1, 3])
def test_digits_give_the_same_bits_in_any_batch_shape(scheme, digits):
    q = on_device(quantized(weight(70, 128), scheme))
    x = RNG.standard_normal((33, 128)).astype(np.float32)
    run = jax.jit(product.in_digits, static_argnums=2)
    whole = np.asarray(run(x, q, digits))
    for rows in (1, 2, 3, 4, 8, 17):
        np.testing.assert_array_equal(np.asarray(run(x[:rows], q, digits)), whole[:rows])


@pytest.mark.parametrize(
    ("tiles", "ways"),
    [
        (False, ("sum", "sum", "sum", "tiles", "sum", "sum", "digits")),
        (True, ("sum", "digits", "digits", "digits", "sum", "digits", "digits")),
    ],
)
def test_which_way_a_product_runs(tiles, ways, monkeypatch):
    """By rows and profile, for a CPU without and with AMX."""
    monkeypatch.setattr("llmjax.products.matmul.has_integer_tiles", lambda: tiles)
    q = on_device(quantized(weight(70, 128), "int8"))
    taken = []
    for name, way in (("in_digits", "digits"), ("in_tiles", "tiles"), ("by_weight", "sum")):
        monkeypatch.setattr(
            f"llmjax.products.matmul.{name}", lambda x, q, *_, way=way: (taken.append(way), jnp.zeros((len(x), 70)))[1]
        )
    fast, dynamic = (resolve(name, jnp.float32) for name in ("fast", "dynamic_int8"))
    for rows, numerics in (*((n, fast) for n in (1, 4, 16, 17)), *((n, dynamic) for n in (1, 4, 5))):
        matmul(jnp.ones((rows, 128)), q, numerics)
    assert tuple(taken) == ways
    taken.clear()
    for profile in ("reference", "hf"):
        matmul(jnp.ones((1, 128)), q, resolve(profile, jnp.float32))
    assert taken == ["tiles", "tiles"]


def test_three_digits_are_closer_than_a_float32_product():
    q = quantized(RNG.standard_normal((256, 2048)).astype(np.float32), "int8")
    x = RNG.standard_normal((8, 2048)).astype(np.float32)
    truth = x.astype(np.float64) @ dequantize(q).astype(np.float64).T

    def error(digits):
        run = jax.jit(lambda x, q: product.in_digits(x, q, digits) if digits else product.in_tiles(x, q))
        y = np.asarray(run(x, on_device(q)))
        return np.sqrt(np.mean((y - truth) ** 2)) / np.sqrt(np.mean(truth**2))

    assert error(3) <= 1.2 * error(None) and error(3) < 4e-7
    assert 1e-6 < error(2) < 1e-4
    assert 1e-3 < error(1) < 2e-2


@pytest.mark.parametrize("scheme", [*SCHEMES, "bfloat16"])
@pytest.mark.parametrize("shape", [(70, 128), (61, 2048), (64, 16384), (8, 192)])
def test_one_row_is_closer_than_a_float32_product(scheme, shape):
    """Odd numbers of channels take another way."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype(np.float32)
    x = rng.standard_normal((1, shape[1])).astype(np.float32)
    if scheme == "bfloat16":
        w, x = (jnp.asarray(a, jnp.bfloat16) for a in (w, x))
        y = multiplied(x, w, "fast")
        truth = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    else:
        q = quantized(w, scheme)
        y = multiplied(x, q, "fast")
        truth = x.astype(np.float64) @ dequantize(q).astype(np.float64).T
    # Groups are added up one by one, as a plain float32 product adds its terms.
    assert np.abs(y - truth).max() <= (3e-6 if "-g" in scheme else 1e-6) * np.abs(truth).max()


@pytest.mark.parametrize("kind", ["int8", "int8-asym", "int4", "int4-g32", "bfloat16", "float32"])
@pytest.mark.parametrize("rows", some({3, 16}, (2, 3, 5, 8, 16)))
@pytest.mark.parametrize("shape", [(70, 128), slow((192, 576)), slow((64, 16384))])
def test_a_row_has_the_same_bits_in_any_place(kind, rows, shape):
    """In a sum of several rows, among others."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype(np.float32)
    q = jnp.asarray(w, kind) if "float" in kind else quantized(w, kind)
    exact = np.asarray(q if "float" in kind else dequantize(q)).astype(np.float64)
    weights = q if "float" in kind else on_device(q)
    x = rng.standard_normal((rows, shape[1])).astype(np.float32)
    run = jax.jit(by_weight, compiler_options=resolve("fast", jnp.float32).compiler_options("cpu"))
    y = np.asarray(run(x, weights))
    truth = x.astype(np.float64) @ exact.T
    assert np.abs(y - truth).max() <= 3e-6 * np.abs(truth).max()
    for turn in range(1, rows):
        np.testing.assert_array_equal(np.roll(run(np.roll(x, turn, 0), weights), -turn, 0), y)
    alone = np.asarray(run(np.where(np.arange(rows)[:, None] == 1, x, 7), weights))
    np.testing.assert_array_equal(alone[1], y[1])


FEW, MANY = [(1, 32, 64), (1, 7, 64), (3, 20, 48), (8, 16, 128)], (71, 5, 32)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*itertools.product(FEW, ("float32", "bfloat16")), (MANY, "float32"), slow(MANY, "bfloat16")],
)
def test_by_cache(shape, dtype):
    """Batched, as attention has it."""
    rows, out, width = shape
    x, w = (jnp.asarray(RNG.standard_normal((2, 3, n, width)), dtype) for n in (rows, out))
    y = jax.jit(by_cache, compiler_options=resolve("fast", jnp.float32).compiler_options("cpu"))(x, w)
    truth = np.asarray(x, np.float64) @ np.asarray(w, np.float64).swapaxes(-1, -2)
    np.testing.assert_allclose(y, truth, atol=2e-6 * np.abs(truth).max())


@pytest.mark.parametrize("kind", ["int8", "int4", "int4-g32", "bfloat16", "float32", "attention"])
@pytest.mark.parametrize(("before", "name"), [(jnp.exp, "exponential"), (lambda x: jnp.maximum(x, 0), "maximum")])
def test_a_sum_does_not_make_its_activations_again(kind, before, name):
    """What comes before a sum would, within it, be computed for each output channel; cheap things cost most, for XLA
    takes those in first.  Nor are they written out once for each channel."""
    x, w = (RNG.standard_normal(shape).astype(np.float32) for shape in ((1, 512), (256, 512)))
    if kind == "attention":
        weights, multiply = jnp.asarray(w), by_cache
    else:
        weights = jnp.asarray(w, kind) if "float" in kind else on_device(quantized(w, kind))
        multiply = functools.partial(matmul, numerics=resolve("fast", weights.dtype))
    options = resolve("fast", jnp.float32).compiler_options("cpu")
    program = jax.jit(lambda x, w: multiply(before(x), w), compiler_options=options).lower(x, weights).compile()
    parts = program.as_text().split("\n}\n")
    sums = [part for part in parts if " reduce(" in part and "[256," in part]
    assert sums
    assert any(f"{name}(" in part for part in parts)
    assert not any(f"{name}(" in part for part in sums)
    assert program.memory_analysis().temp_size_in_bytes < w.nbytes / 4


@pytest.mark.parametrize("scheme", ["int8", "int4", "int4-g32", "int8-asym"])
@pytest.mark.parametrize("rows", [1, 5])
def test_dynamic_int8_is_its_definition(scheme, rows):
    q = quantized(weight(70, 128), scheme)
    x = RNG.standard_normal((rows, 128)).astype(np.float32)
    top = np.abs(x).max(-1, keepdims=True)
    rounded = np.round(x * (np.float32(127) / top)) * (top * np.float32(1 / 127))
    y = multiplied(x, q, "dynamic_int8")
    truth = rounded.astype(np.float64) @ dequantize(q).astype(np.float64).T
    assert np.abs(y - truth).max() <= 3e-6 * np.abs(truth).max()


@pytest.mark.parametrize("scheme", ["int8", "int4-g32-asym"])
def test_embedding_rows(scheme):
    q = quantized(weight(), scheme)
    ids = np.array([[3, 5, 39], [0, 0, 17]])
    rows = np.asarray(jax.jit(take)(on_device(q), ids))
    if q.offsets is None:
        np.testing.assert_array_equal(rows, dequantize(q)[ids])
    else:  # XLA rounds the product and the sum in one go
        np.testing.assert_allclose(rows, dequantize(q)[ids], atol=5e-7)


def tiny(profile: str, recipe: str) -> tuple[Model, Model]:
    """A model with quantized weights, and the float model of the same values."""
    wide = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4)
    model = random_model("reference", **wide)
    schemes = parse(recipe)
    packed, plain = {}, {}

    def visit(tree, into, exact, path):
        for key, value in tree.items():
            name = f"{path}{key}"
            if isinstance(value, dict):
                visit(value, into.setdefault(key, {}), exact.setdefault(key, {}), name + ".")
                continue
            scheme = schemes.scheme(name.replace("layers_", "layers."))
            into[key] = exact[key] = value
            if scheme is not None:
                w = np.asarray(value)
                q = quantize(lambda a, b, w=w: w[a:b], w.shape, scheme)
                into[key], exact[key] = on_device(q), jnp.asarray(dequantize(q))

    visit(model.params, packed, plain, "")
    made = [
        Model(model.architecture, model.config, p, resolve(n, jnp.float32), None, (), model.path)
        for p, n in ((packed, profile), (plain, "reference"))
    ]
    return made[0], made[1]


@pytest.mark.parametrize(
    ("profile", "recipe"),
    [
        *(slow("reference", "mixed-8-4-8"), ("fast", "int4-g32"), slow("reference", "int8"), slow("fast", "int8")),
        *(slow("reference", "int4-g32"), slow("fast", "mixed-8-4-8")),
    ],
)
def test_a_quantized_model_means_its_dequantized_values(profile, recipe):
    model, exact = tiny(profile, recipe)
    ids = [RNG.integers(0, 600, 19).tolist()]
    got, expected = model.logits(ids)[0], exact.logits(ids)[0]
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("profile", "dtype", "recipe", "slots"), [
    slow("fast", "float32", "int4-g32", 1), slow("dynamic_int8", "float32", "int8", 4),
    slow("fast", "bfloat16", None, 1), slow("fast", "bfloat16", None, 4), slow("fast", "float32", "int4-g32", 4),
    slow("dynamic_int8", "float32", "int8", 1),
    *(slow("reference", "bfloat16", None, slots) for slots in (1, 4)),
    *(slow("fast", "float32", recipe, slots) for recipe in ("int4", "int8") for slots in (1, 4)),
])  # fmt: skip
def test_no_program_holds_a_converted_model(profile, dtype, recipe, slots):
    """The temporaries of the compiled programs stay far below the float32 size of the weights they convert."""
    wide = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=4, num_hidden_layers=2)
    model = random_model(profile, dtype, **wide)
    if recipe:
        for name, layer in model.params.items():
            for role in layer.values() if name.startswith("layers") else ():
                for projection in role.values() if isinstance(role, dict) else ():
                    if isinstance(projection, dict):
                        w = np.asarray(projection["weight"])
                        projection["weight"] = on_device(quantized(w, recipe))
    size = 4 * sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(model.params, is_leaf=lambda x: hasattr(x, "bits"))
    )
    state = empty_state(make_cache(model.config, model.numerics, slots + 1, 256), slots, 512, 600)
    for compiled in compiled_programs(model, model.params, state, np.zeros((slots, 2), np.int32)):
        temporary = compiled.memory_analysis().temp_size_in_bytes
        assert temporary < 0.2 * size, f"{temporary / 1e6:.1f} MB beside weights of {size / 1e6:.1f} MB"


def test_gradients_pass_quantized_weights():
    """Towards what stands before them: adapters are trained so."""
    q = quantized(weight(), "int4-g32")
    x = RNG.standard_normal((2, 128)).astype(np.float32)
    gradient = jax.grad(lambda x: matmul(x, on_device(q), resolve("reference", jnp.float32)).sum())(x)
    np.testing.assert_allclose(gradient, np.broadcast_to(dequantize(q).sum(0), x.shape), rtol=1e-4, atol=1e-4)


def test_roles():
    names = ["embed.weight", "head.weight", "head.bias", "layers.3.attn.q.weight", "layers.0.attn.q_norm.weight"]
    names += ["layers.11.mlp.down.weight", "layers.11.mlp.down.bias", "final_norm.weight", "layers.2.mlp_norm.weight"]
    expected = ["embedding", "head", None, "attention", None, "feed_forward", None, None, None]
    assert list(map(role_of, names)) == expected


def test_recipes(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('attention = "int8"\nembedding = "int4-g32"\n[layers.0-1]\nattention = "float"\n[layers."1"]\n'
                    'feed_forward = "int4"\n')  # fmt: skip
    recipe = parse(file)
    names = """embed.weight head.weight layers.2.attn.q.weight layers.1.attn.q.weight layers.1.mlp.up.weight
    layers.2.mlp.up.weight final_norm.weight""".split()
    found = {n: str(recipe.scheme(n)) for n in names}
    assert list(found.values()) == ["int4-g32", "int4-g32", "int8", "None", "int4", "None", "None"]
    assert parse(recipe.to_dict()).to_dict() == recipe.to_dict()
    for name in recipe_names():
        assert isinstance(parse(name), Recipe)
    assert parse("int4").scheme("head.weight") == Scheme(4)


@pytest.mark.parametrize(
    ("quantize_", "message"),
    [
        ("int3", "unknown 'int3'; expected a scheme"),
        ("int4-g48", "expected a group of 32, 64 or 128, found 48"),
        ("int4-asym-mse", "symmetric schemes alone"),
        ("none.toml", "cannot read the recipe"),
        ({"attn": "int8"}, "unknown role attn; expected attention, feed_forward, embedding, head"),
        ({"attention": 8}, "attention: expected a scheme's name or 'float', found 8"),
        ({"attention": "int5"}, "unknown scheme 'int5'"),
        ({"layers": {"3-1": {}}}, "expected a layer or a range such as '0-3', found '3-1'"),
        ({"layers": {"0": {"head": "int8"}}}, "unknown role head; expected attention, feed_forward"),
    ],
)
def test_recipes_that_are_refused(quantize_, message):
    with pytest.raises(ConfigError, match=message):
        parse(quantize_)
