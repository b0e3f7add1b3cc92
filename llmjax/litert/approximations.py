"""Functions as XNNPACK computes them, LiteRT's delegate on CPUs: quotients of polynomials in float32.

They are off by a few units in the last place.  Where activations are rounded to 8 bits behind them, that decides some
roundings, and each shows in the logits; so there they are followed.  In all else exact functions serve.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_PI = np.float32(np.pi)
# Half of it in two parts, and a whole turn in two, whose first has few enough bits for exact multiples.
_QUARTER = np.float32(np.pi / 2), np.float32(np.pi / 2 - float(np.float32(np.pi / 2)))
_TURN = np.float32(6.28125), np.float32(2 * np.pi - 6.28125)


def _polynomial(x: jax.Array, *coefficients: float) -> jax.Array:
    """The highest power first."""
    y = jnp.float32(coefficients[0])
    for c in coefficients[1:]:
        y = y * x + np.float32(c)
    return y


def _quotient(x: jax.Array, above: Sequence[float], below: Sequence[float]) -> jax.Array:
    """An odd function: ``x * above(x^2) / below(x^2)``."""
    square = x * x
    return x * _polynomial(square, *above) / _polynomial(square, *below)


def _within_a_turn(x: jax.Array) -> jax.Array:
    turns = jnp.round(x * np.float32(1 / (2 * np.pi)))
    return (x - turns * _TURN[0]) - turns * _TURN[1]


def _sin(x: jax.Array) -> jax.Array:
    """Of ``[-pi/2, pi/2]``."""
    return _quotient(x, (3.2340581529e-03, -1.3314664364e-01, 1), (4.8770775902e-04, 3.3519912511e-02, 1))


def sin(x: jax.Array) -> jax.Array:
    """Sine."""
    x = _within_a_turn(x)
    x = jnp.minimum(x, _PI - x)
    return _sin(jnp.maximum(x, -_PI - x))


def cos(x: jax.Array) -> jax.Array:
    """Cosine."""
    # XLA would add up the constants, whose sum is the first.
    x = lax.optimization_barrier(_QUARTER[0] - _within_a_turn(x)) + _QUARTER[1]
    x = jnp.minimum(x, _PI - x)
    x = jnp.maximum(x, -_PI - x)
    return _sin(jnp.minimum(x, _PI - x))


def tanh(x: jax.Array) -> jax.Array:
    """Hyperbolic tangent."""
    return _quotient(
        jnp.clip(x, -7.9807181358, 7.9807181358),
        (1.4248920266e-08, 2.1235626264e-05, 3.5330520477e-03, 1.3412411511e-01, 1),
        (8.1365948290e-07, 3.3472978976e-04, 2.6018999517e-02, 4.6745735407e-01, 1),
    )


def gelu(x: jax.Array) -> jax.Array:
    """GELU by tanh."""
    share = _quotient(
        jnp.clip(x, -4.84974098, 4.84974098),
        (4.9544411240e-08, 1.4302649106e-05, 2.6887017884e-04, 7.2898347862e-03, 6.0803253204e-02, 7.9788458347e-01),
        (1.3433452750e-06, 7.6477612311e-05, 1.3060354395e-03, 2.4381054565e-02, 2.4369759858e-01, 1),
    )
    return x * np.float32(0.5) * (share + 1)
