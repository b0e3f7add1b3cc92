"""The gated delta rule by itself; whole models stand in ``tests/parity/test_cases.py``, its states in
``test_shared_keys.py``."""

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.models.delta import _SEGMENT, delta_rule


def tokens(count):
    rng = np.random.default_rng(4)
    shapes = {"state": (2, 2, 3, 4, 5), "q": (2, count, 2, 5), "k": (2, count, 2, 5), "v": (2, count, 2, 3, 4)}
    found = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    found["k"] /= np.linalg.norm(found["k"], axis=-1, keepdims=True)
    return found | {name: rng.uniform(0.1, 1, (2, count, 2, 3)) for name in ("decay", "beta")}


def test_the_rule():
    """As it is written: ``S (I - beta k k^T) decay + beta v k^T``, a matrix a head."""
    x = tokens(9)
    state, y = delta_rule(**{name: jnp.float32(value) for name, value in x.items()})
    for b, key, value in np.ndindex(2, 2, 3):
        matrix = x["state"][b, key, value]
        for t in range(9):
            k, beta = x["k"][b, t, key], x["beta"][b, t, key, value]
            matrix = x["decay"][b, t, key, value] * matrix @ (np.eye(5) - beta * np.outer(k, k))
            matrix = matrix + beta * np.outer(x["v"][b, t, key, value], k)
            np.testing.assert_allclose(y[b, t, key, value], matrix @ x["q"][b, t, key], atol=1e-5)
        np.testing.assert_allclose(state[b, key, value], matrix, atol=1e-5)


def test_gradients_where_states_are_computed_again():
    x = {name: jnp.float32(value) for name, value in tokens(2 * _SEGMENT).items()}

    def loss(x, kept):
        state, y = delta_rule(**x, kept=kept)
        return jnp.sum(jnp.sin(state)) + jnp.sum(jnp.sin(y))

    wanted, found = (jax.jit(jax.grad(loss), static_argnums=1)(x, kept) for kept in (True, False))
    for name in x:
        assert np.abs(wanted[name]).max() > 0.1
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)
