"""The gated delta rule by itself; whole models stand in ``tests/parity/test_cases.py``, its states in
``test_shared_keys.py``."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models import delta
from llmjax.models.context import Context
from llmjax.models.delta import CHUNK, GatedDelta, delta_rule
from llmjax.numerics import resolve


def tokens(count):
    rng = np.random.default_rng(4)
    shapes = {"state": (2, 2, 3, 4, 5), "q": (2, count, 2, 5), "k": (2, count, 2, 5), "v": (2, count, 2, 3, 4)}
    found = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    found["k"] /= np.linalg.norm(found["k"], axis=-1, keepdims=True)
    found["decay"] = np.log(rng.uniform(0.1, 1, (2, count, 2, 3))) * rng.choice([0, 1, 60], (2, count, 1, 1))
    return found | {"beta": rng.uniform(0.1, 1, (2, count, 2, 3))}


@pytest.mark.parametrize("count", [1, 9, CHUNK + 7])
def test_the_rule(count):
    """As it is written: ``S (I - beta k k^T) decay + beta v k^T``, a matrix a head; some tokens forget nothing, some
    all, some see a key once more."""
    x = tokens(count)
    x["k"][:, 3:6] = x["k"][:, 2:3]
    state, y = delta_rule(**{name: jnp.float32(value) for name, value in x.items()})
    for b, key, value in np.ndindex(2, 2, 3):
        matrix = x["state"][b, key, value]
        for t in range(count):
            k, beta, decay = x["k"][b, t, key], x["beta"][b, t, key, value], np.exp(x["decay"][b, t, key, value])
            matrix = decay * matrix @ (np.eye(5) - beta * np.outer(k, k))
            matrix = matrix + beta * np.outer(x["v"][b, t, key, value], k)
            np.testing.assert_allclose(y[b, t, key, value], matrix @ x["q"][b, t, key], atol=1e-5)
        np.testing.assert_allclose(state[b, key, value], matrix, atol=1e-5)


def test_gradients_in_chunks():
    """Those of one token after the other; where nothing within a chunk is kept, the memory of one chunk does."""
    x = {name: jnp.float32(value) for name, value in tokens(12 * CHUNK + 3).items()}

    def in_turn(state, **each):
        def step(state, token):
            state, y = delta_rule(state, **jax.tree.map(lambda x: x[:, None], token))
            return state, y[:, 0]

        state, y = jax.lax.scan(step, state, {name: jnp.moveaxis(x, 1, 0) for name, x in each.items()})
        return state, jnp.moveaxis(y, 0, 1)

    def loss(x, rule):
        state, y = rule(**x)
        return jnp.sum(jnp.sin(state)) + jnp.sum(jnp.sin(y))

    rules = in_turn, delta_rule, partial(delta_rule, kept=False)
    programs = [jax.jit(jax.grad(partial(loss, rule=rule))).lower(x).compile() for rule in rules]
    wanted, *found = (program(x) for program in programs)
    for name in x:
        assert np.abs(wanted[name]).max() > 0.01
        for each in found:
            np.testing.assert_allclose(each[name], wanted[name], rtol=1e-4, atol=1e-5)
    kept, again = (program.memory_analysis().temp_size_in_bytes for program in programs[1:])
    assert again < 0.2 * kept
    # Blocks of a chunk's inverse are not cut out one by one: sixty slices, and half of what there was to compile.
    assert jax.jit(delta._inverse).lower(jnp.zeros((CHUNK, CHUNK))).as_text().count("stablehlo.slice") < CHUNK // 2


def test_training_keeps_no_chunks():
    """On the way to a gradient, where it recomputes anything, a layer keeps little of what is within chunks."""
    module = GatedDelta(2, 6, 8, 8, 4, jax.nn.silu, 1e-6)
    x = jnp.zeros((1, 12 * CHUNK, 16))
    ids = jnp.zeros(x.shape[:2], jnp.int32)

    def kept(recompute):
        ctx = Context.whole(ids, resolve("reference", x.dtype), recompute=recompute)
        params = jax.eval_shape(module.init, jax.random.key(0), x, ctx)
        found = jax.eval_shape(lambda p, x: jax.vjp(lambda x: module.apply(p, x, ctx), x)[1], params, x)
        return sum(leaf.size for leaf in jax.tree.leaves(found))

    assert kept("nothing") < 0.4 * kept(None)
