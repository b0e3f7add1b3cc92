"""Functions as XNNPACK computes them, LiteRT's delegate on CPUs: polynomials, their quotients, and sums, in float32.

They are off by a few units in the last place.  Where activations are rounded to 8 bits behind them, that decides some
roundings, and each shows in the logits of that token and of all that see it; so there they are followed.  In all else
exact functions serve.  Sums go in the order of processors with AVX2.  Square roots and their reciprocals alone are not
followed: XNNPACK begins them with an approximation of the processor's own, which differs between makers.
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

# Added to a small number it leaves the nearest integer, plus 127, in the last bits.
_TO_INTEGER = np.float32(1.5 * 2**23 + 127)
_ADDED_UP_IN_ORDER = 32  # by XLA's reductions


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
    """GELU by the error function."""
    share = _quotient(
        jnp.clip(x, -5.1638283730, 5.1638283730),
        (4.5835321316e-08, 1.2609783880e-05, 3.2973114867e-04, 9.3065137044e-03, 6.6972173750e-02, 7.9788452387e-01),
        (1.1988805682e-06, 7.2267655923e-05, 1.8622842617e-03, 2.8431978077e-02, 2.5060352683e-01, 1),
    )
    return x * np.float32(0.5) * (share + 1)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by tanh."""
    share = _quotient(
        jnp.clip(x, -4.84974098, 4.84974098),
        (4.9544411240e-08, 1.4302649106e-05, 2.6887017884e-04, 7.2898347862e-03, 6.0803253204e-02, 7.9788458347e-01),
        (1.3433452750e-06, 7.6477612311e-05, 1.3060354395e-03, 2.4381054565e-02, 2.4369759858e-01, 1),
    )
    return x * np.float32(0.5) * (share + 1)


def _exp(x: jax.Array, *log_2: float) -> jax.Array:
    """Of numbers that are not positive; the logarithm in parts."""
    # XLA would take the constant away again before it has rounded anything.
    shifted = lax.optimization_barrier(x * np.float32(1.442695022) + _TO_INTEGER)
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(shifted, jnp.int32) << 23, jnp.float32)
    rest = x
    for part in log_2:
        rest = (shifted - _TO_INTEGER) * np.float32(-part) + rest
    p = _polynomial(rest, 8.289290592e-03, 4.189782217e-02, 1.666765213e-01, 4.999915063e-01, 9.999997020e-01)
    return jnp.where(x < np.float32(-87.33654022), 0, rest * power * p + power)


def logistic(x: jax.Array) -> jax.Array:
    """Sigmoid."""
    e = _exp(-jnp.abs(x), 0.6931471825)
    share = e / (e + 1)
    return jnp.where(x < 0, share, 1 - share)


def softmax(x: jax.Array) -> jax.Array:
    """Along the last dimension."""
    e = _exp(x - jnp.max(x, -1, keepdims=True), 0.693145752, 1.428606765e-06)
    return e * (1 / _total(e, 16))


def mean(x: jax.Array) -> jax.Array:
    """Along the last dimension, which is kept."""
    return _total(x, 32) * np.float32(1 / x.shape[-1])


def _total(x: jax.Array, lanes: int) -> jax.Array:
    """``[..., 1]``: as many sums side by side, each in order, then halves upon halves."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % lanes)])
    x = x.reshape(*x.shape[:-1], -1, lanes)
    sums = _in_order(x[..., :_ADDED_UP_IN_ORDER, :])
    for i in range(_ADDED_UP_IN_ORDER, x.shape[-2], _ADDED_UP_IN_ORDER - 1):
        more = x[..., i : i + _ADDED_UP_IN_ORDER - 1, :]
        sums = _in_order(jnp.concatenate([sums[..., None, :], more], -2))
    while lanes > 1:
        lanes //= 2
        sums = sums[..., :lanes] + sums[..., lanes:]
    return sums


def _in_order(x: jax.Array) -> jax.Array:
    """The sum of few along the last but one dimension.  XLA takes sums apart, but not where it sums pairs."""

    def add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        return [a[0] + b[0], a[1] | b[1]]

    pairs = lax.reduce([x, jnp.zeros(x.shape, bool)], [np.float32(0), False], add, (x.ndim - 2,))
    return lax.optimization_barrier(pairs)[0]
