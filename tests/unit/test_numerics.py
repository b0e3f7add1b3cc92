"""What the profiles let the compiler do: sums in another order, and nothing else."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from llmjax.models.context import Context
from llmjax.models.experts import Experts
from llmjax.models.layers import gelu_tanh
from llmjax.models.ministral3 import GrowingScores
from llmjax.models.rope import Rope
from llmjax.numerics import PROFILES, resolve

RNG = np.random.default_rng(11)
FAST = resolve("fast", jnp.float32).compiler_options("cpu")

# Function, its definition in float64, arguments, error allowed: absolute, or relative to a value above 1.
FUNCTIONS = {
    "exp": (jnp.exp, np.exp, RNG.uniform(-80, 0, 40000), 2e-7),
    "tanh": (jnp.tanh, np.tanh, RNG.uniform(-12, 12, 40000), 5e-7),
    "logistic": (jax.nn.sigmoid, lambda x: 1 / (1 + np.exp(-x)), RNG.uniform(-60, 60, 40000), 3e-7),
    "log": (jnp.log, np.log, np.exp(RNG.uniform(-60, 60, 40000)), 3e-7),
    "rsqrt": (lax.rsqrt, lambda x: x**-0.5, np.exp(RNG.uniform(0, 30, 40000)), 3e-7),
    "sin": (jnp.sin, np.sin, RNG.uniform(0, 131072, 40000), 2e-7),
    "cos": (jnp.cos, np.cos, RNG.uniform(0, 131072, 40000), 2e-7),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_keep_their_accuracy(name):
    """Made of sums that only hold in the order they are written in: the angles of a long context, above all."""
    function, definition, x, error = FUNCTIONS[name]
    x = x.astype(np.float32)
    y = np.asarray(jax.jit(function, compiler_options=FAST)(x))
    truth = definition(x.astype(np.float64))
    np.testing.assert_array_less(np.abs(y - truth) / np.maximum(1, np.abs(truth)), error)


@pytest.mark.parametrize("options", [None, FAST], ids=["reference", "fast"])
def test_gelu_keeps_its_digits_where_it_is_small(options):
    """A norm behind a branch that is small everywhere would show what is left of them."""
    x = np.linspace(-8, -0.01, 4001, dtype=np.float32)
    y = np.asarray(jax.jit(gelu_tanh, compiler_options=options)(x))
    z = x.astype(np.float64)
    truth = z / (1 + np.exp(-2 * (2 / np.pi) ** 0.5 * (z + 0.044715 * z**3)))
    np.testing.assert_allclose(y, truth, rtol=1e-5)


def test_ministral3_rounds_its_queries():
    """As transformers: the factor to 16 bits, and then the product."""
    q = jnp.full((1, 5, 1, 1), 1.3, jnp.bfloat16)
    grown = GrowingScores(1.0, beta=0.1, original=8).grown(q, jnp.array([[0, 7, 8, 40, 3000]]))
    assert grown.ravel().tolist() == [1.296875, 1.296875, 1.390625, 1.53125, 2.0625]


@pytest.mark.parametrize(("dtype", "wanted"), [(jnp.bfloat16, 1.296875), (jnp.float32, 1.2890625)])
def test_what_experts_say_is_rounded_as_their_weights_are(dtype, wanted):
    """As torch multiplies, whose sum is in float32: Qwen3's weights have 16 bits there, Gemma 4's have 32."""
    one, down = jnp.ones((2, 1, 1), jnp.bfloat16), jnp.array([[[1.46]], [[0.9]]], jnp.bfloat16)
    params = {"gate": {"weight": one}, "up": {"weight": one}, "down": {"weight": down}}
    x, share = jnp.ones((1, 1, 1), jnp.bfloat16), jnp.array([[[0.7, 0.3]]], jnp.bfloat16).astype(dtype)
    profile = resolve("hf", jnp.bfloat16)
    for every in (False, True):
        ctx = Context.whole(jnp.zeros((1, 1), jnp.int32), profile).replace(all_experts=every)
        apply = jax.jit(Experts(2, 1, lambda x: x).apply, compiler_options=profile.compiler_options("cpu"))
        assert apply({"params": params}, x, share, jnp.array([[[0, 1]]]), ctx).item() == wanted


def test_rotations_keep_their_accuracy():
    positions = jnp.array([[0, 1, 777, 8191, 131071]], jnp.int32)
    rope = partial(Rope(1e4, 64), ctx=Context(positions, resolve("reference", jnp.dtype(jnp.float32))))
    x = RNG.standard_normal((1, 5, 2, 64)).astype(np.float32)
    y = jax.jit(rope, compiler_options=FAST)(x)
    np.testing.assert_allclose(y, jax.jit(rope)(x), atol=5e-7)


def test_nan_and_infinity_keep_their_meaning():
    """But for ``x - x``, which becomes 0 whatever x is."""
    x = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf, 0.0])

    @jax.jit
    def plain(x):
        return (
            jnp.isnan(x),
            x / x,
            jnp.maximum(x, 0),
            jnp.exp(x),
            jnp.where(x > 0, x, -x),
            x - 1e-3,
            jnp.max(x),
            jnp.sum(x * 2),
        )

    options = jax.jit(plain, compiler_options=FAST)
    for found, expected in zip(options(x), plain(x), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_which_profiles_reorder_sums():
    assert [name for name in PROFILES if resolve(name, jnp.float32).reassociates] == ["fast", "dynamic_int8"]
    assert FAST and not resolve("reference", jnp.float32).compiler_options("cpu")
