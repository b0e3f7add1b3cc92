"""The gated delta rule by itself; whole models stand in ``tests/parity/test_cases.py``, its states in
``test_shared_keys.py``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models.delta import _CHUNK, delta_rule


def tokens(count):
    rng = np.random.default_rng(4)
    shapes = {"state": (2, 2, 3, 4, 5), "q": (2, count, 2, 5), "k": (2, count, 2, 5), "v": (2, count, 2, 3, 4)}
    found = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    found["k"] /= np.linalg.norm(found["k"], axis=-1, keepdims=True)
    found["decay"] = np.log(rng.uniform(0.1, 1, (2, count, 2, 3))) * rng.choice([0, 1, 60], (2, count, 1, 1))
    return found | {"beta": rng.uniform(0.1, 1, (2, count, 2, 3))}


@pytest.mark.parametrize("count", [1, 9, _CHUNK + 7])
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
    """Those of one token after the other."""
    x = {name: jnp.float32(value) for name, value in tokens(_CHUNK + 3).items()}

    def in_turn(state, **each):
        def step(state, token):
            state, y = delta_rule(state, **jax.tree.map(lambda x: x[:, None], token))
            return state, y[:, 0]

        state, y = jax.lax.scan(step, state, {name: jnp.moveaxis(x, 1, 0) for name, x in each.items()})
        return state, jnp.moveaxis(y, 0, 1)

    def loss(x, rule):
        state, y = rule(**x)
        return jnp.sum(jnp.sin(state)) + jnp.sum(jnp.sin(y))

    wanted, found = (jax.jit(jax.grad(loss), static_argnums=1)(x, rule) for rule in (in_turn, delta_rule))
    for name in x:
        assert np.abs(wanted[name]).max() > 0.01
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5)
