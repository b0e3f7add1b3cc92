"""Functions as XNNPACK computes them, LiteRT's delegate on CPUs: polynomials, their quotients, and sums, in float32.

They are off by a few units in the last place.  Where activations are rounded to 8 bits behind them, that decides some
roundings, and each shows in the logits of that token and of all that see it; so there they are followed.  In all else
exact functions serve.  The sigmoid and the order of sums are those of processors with AVX-512; with AVX2 some last bits
are others, as are square roots, which XNNPACK begins with an approximation of the processor's own.
"""

import math
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
# And this the nearest 32nd, as a number of them in the last bits.
_TO_32NDS = np.float32(1.5 * 2**18)
_POWERS = (2 ** (np.arange(32) / 32)).astype(np.float32)
_LANES = 16
# VRSQRT14PS, the same on Intel's processors and AMD's: 32 straight lines between powers of two, of odd ones first.
_STARTS, _SLOPES = (
    np.array(numbers.split(), np.int32)
    for numbers in (
        """
        370709 365049 359644 354468 349516 344759 340193 335801 331581 327515 323589 319805 316149 312618 309201 305899
        302695 299587 296575 293657 290819 288062 285380 282776 280242 277773 275367 273022 270741 268509 266336 264214
        524265 516257 508613 501298 494286 487559 481101 474897 468922 463169 457623 452276 447106 442106 437279 432603
        428071 423683 419423 415288 411277 407379 403592 399907 396319 392827 389430 386110 382879 379734 376655 373658
        """,
        """
        707 675 647 619 595 571 549 527 509 491 473 457 441 427 413 401 389 377 365 355 345 335 325 317 309 301 293 285
        279 271 265 259 1001 955 915 877 841 807 775 747 719 693 669 647 625 603 585 567 549 533 517 501 487 473 461 449
        437 425 415 403 393 385 375 367
        """,
    )
)
_ADDED_UP_IN_ORDER = 32  # by XLA's reductions
LEAST = np.finfo(np.float32).min


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


def logistic(x: jax.Array) -> jax.Array:
    """Sigmoid: of an exponent's fraction five bits are looked up, the rest is for a polynomial."""
    z = -jnp.abs(x)
    # XLA would take the constants away again before it has rounded anything.
    shifted = lax.optimization_barrier(z * np.float32(1.442695022) + _TO_32NDS)
    bits = lax.bitcast_convert_type(shifted, jnp.int32) - _TO_32NDS.view(np.int32)
    found, whole, n = jnp.asarray(_POWERS)[bits & 31], bits >> 5, shifted - _TO_32NDS
    rest = n * np.float32(1.904654212e-09) + (n * np.float32(-0.6931471825) + z)
    p = rest * found * _polynomial(rest, 0.5, 1.000014663) + found
    e = jnp.where(whole < -126, 0, p * lax.bitcast_convert_type((whole + 127) << 23, jnp.float32))
    share = e / (e + 1)
    return jnp.where(x < 0, share, 1 - share)


def log(x: jax.Array) -> jax.Array:
    """Natural logarithm: of numbers from one over the root of two to the root of two, and powers of two."""
    bits = lax.bitcast_convert_type(x * np.float32(1.4142134190), jnp.int32)
    power = ((bits >> 23) - 127).astype(jnp.float32)
    near_one = lax.bitcast_convert_type(bits & (1 << 23) - 1 | 127 << 23, jnp.float32)
    r = jnp.maximum(near_one * np.float32(7.0710688829e-01), LEAST) - 1  # rounded twice
    below = _polynomial(r, 0.049584995955, 0.599170029163, 1.5, 1)
    y = power * np.float32(np.log(2)) + r * _polynomial(r, 1.824996918440e-01, 1, 1) / below
    return jnp.where((x > 0) & (x < jnp.inf), y, jnp.log(x))


def exp(x: jax.Array) -> jax.Array:
    """Exponential: a power of two, and a quotient for the rest of the logarithm.  From 88.4 on it is infinite, and 0 of
    what is no number."""
    log2 = jnp.clip(x * np.float32(1.442695022), -127, 128)
    log2 = jnp.where(jnp.isnan(x), -127, log2)
    whole = jnp.round(log2)
    rest = log2 - whole
    above = rest * _polynomial(rest, 5.5375634693e-03, 4.8078041524e-02, 6.9314718246e-01)
    below = _polynomial(rest, 2.3987604305e-02, -2.7721086144e-01, 1)
    # Were the sum's product one of several, XLA would multiply it out.
    share = lax.optimization_barrier(above / below) + 1
    return lax.bitcast_convert_type((whole.astype(jnp.int32) + 127) << 23, jnp.float32) * share


def power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """A power.  Of one exponent for all, a positive whole number or nearly, the runtime's own kernel multiplies: the
    power of its half by itself, and by x once more where it is odd."""
    y = x**exponent
    if exponent.size != 1 or exponent.shape == x.shape:
        return y
    whole = jnp.round(exponent)

    def multiplied(i: jax.Array, y: jax.Array) -> jax.Array:
        return y * y * jnp.where(whole.astype(jnp.int32) >> 30 - i & 1, x, 1)

    counted = (jnp.abs(exponent - whole) < 1e-5) & (whole >= 1) & (whole < 2.0**31)
    return jnp.where(counted, lax.fori_loop(0, 31, multiplied, jnp.ones_like(y)), y)


def softmax(x: jax.Array) -> jax.Array:
    """Along the last dimension."""
    e = _exp(x - jnp.max(x, -1, keepdims=True))
    return e * (1 / _total(e, 64))


def rsqrt(x: jax.Array) -> jax.Array:
    """One over the square root: the processor's approximation, and a step of Newton's method."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    line, along, exponent = (bits >> 18) & 63, (bits >> 8) & 1023, (bits >> 23) - 127
    digits = (jnp.asarray(_STARTS)[line] * 128 - jnp.asarray(_SLOPES)[line] * along) >> 9
    digits = jnp.where(bits & 0xFFFFFF == 127 << 23 & 0xFFFFFF, 1 << 17, digits)  # powers of four are exact
    y = digits.astype(jnp.float32) * lax.bitcast_convert_type(110 - (exponent >> 1) << 23, jnp.float32)
    # Whatever stands between a product and a difference keeps the compiler from making one rounding of both.
    off = jnp.maximum(x * (y * y), LEAST) - 1
    y = y - jnp.maximum(off * (np.float32(0.5) * y), LEAST)
    y = jnp.where(x < np.finfo(np.float32).tiny, jnp.inf, jnp.where(x == jnp.inf, 0, y))
    return jnp.where(jnp.isnan(x) | (x < 0), jnp.nan, y)


def sqrt(x: jax.Array) -> jax.Array:
    """Square root."""
    known = jnp.where(x < 0, jnp.nan, jnp.where(x == jnp.inf, x, 0))
    return jnp.where((x < np.finfo(np.float32).tiny) | (x == jnp.inf), known, x * rsqrt(x))


def _exp(x: jax.Array) -> jax.Array:
    """Of numbers that are not positive."""
    shifted = lax.optimization_barrier(x * np.float32(1.442695022) + _TO_INTEGER)
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(shifted, jnp.int32) << 23, jnp.float32)
    rest = x
    for part in (0.693145752, 1.428606765e-06):
        rest = (shifted - _TO_INTEGER) * np.float32(-part) + rest
    p = _polynomial(rest, 8.289290592e-03, 4.189782217e-02, 1.666765213e-01, 4.999915063e-01, 9.999997020e-01)
    return jnp.where(x < np.float32(-87.33654022), 0, rest * power * p + power)


def mean(x: jax.Array, axes: Sequence[int] = (-1,), squares: bool = False) -> jax.Array:
    """Along dimensions, which are kept; of what is given or of its squares."""
    return total(x, axes, squares) * np.float32(1 / max(1, math.prod(x.shape[i] for i in axes)))


def total(x: jax.Array, axes: Sequence[int] = (-1,), squares: bool = False) -> jax.Array:
    """The sum along dimensions, which are kept; of what is given or of its squares.  Dimensions side by side are one to
    XNNPACK; along the last one it has sums of its own, others it adds up in order."""
    left = {i % x.ndim for i in axes}
    while left:
        last = first = max(left)
        while first - 1 in left:
            first -= 1
        left -= {*range(first, last + 1)}
        before, here, behind = x.shape[:first], math.prod(x.shape[first : last + 1]), x.shape[last + 1 :]
        if behind:
            y = _in_columns(x.reshape(*before, here, math.prod(behind)), squares)
        else:
            y = (_total_of_squares if squares else _total)(x.reshape(*before, here))
        x, squares = y.reshape(*before, *[1] * (last + 1 - first), *behind), False
    return x


def _in_columns(x: jax.Array, squares: bool) -> jax.Array:
    """``[..., n, C]``: C sums in order."""

    def add(sums: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        return _with_squares(sums, row) if squares else sums + row, None

    rows = jnp.moveaxis(x, -2, 0)
    return lax.scan(add, jnp.zeros(rows.shape[1:], x.dtype), rows)[0]


def _total_of_squares(x: jax.Array) -> jax.Array:
    """``[..., 1]``: a square and what it is added to are rounded once, not twice.  Four registers take turns as far as
    whole ones go, the sum of all takes the rest; then halves upon halves."""
    sums, whole = jnp.zeros((*x.shape[:-1], 4 * _LANES), x.dtype), x.shape[-1] // _LANES * _LANES
    for at in range(0, whole, 4 * _LANES):
        sums = _with_squares(sums, x[..., at : min(at + 4 * _LANES, whole)])
    return _halved(_with_squares(_halved(sums, _LANES), x[..., whole:]))


def _with_squares(sums: jax.Array, x: jax.Array) -> jax.Array:
    first, rest = sums[..., : x.shape[-1]], sums[..., x.shape[-1] :]
    # No other sum joins in.  Were x filled up with zeros, the compiler would choose between them and rounded products.
    return jnp.concatenate([jnp.maximum(x * x + first, LEAST), rest], -1)


def _halved(sums: jax.Array, lanes: int = 1) -> jax.Array:
    while (half := sums.shape[-1] // 2) >= lanes:
        sums = sums[..., :half] + sums[..., half:]
    return sums


def _total(x: jax.Array, step: int = _LANES) -> jax.Array:
    """``[..., 1]``: two registers take turns as far as whole steps go, the sum of both takes the rest; then halves upon
    halves."""
    whole = x.shape[-1] // step * step
    sums = _by_lanes(x[..., :whole], 2 * _LANES)
    sums = sums[..., :_LANES] + sums[..., _LANES:]
    sums = _by_lanes(jnp.concatenate([sums, x[..., whole:]], -1), _LANES)
    return _halved(sums)


def _by_lanes(x: jax.Array, lanes: int) -> jax.Array:
    """``[..., lanes]``: as many sums side by side, each in order."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % lanes)])
    x = x.reshape(*x.shape[:-1], -1, lanes)
    sums = _in_order(x[..., :_ADDED_UP_IN_ORDER, :])
    for i in range(_ADDED_UP_IN_ORDER, x.shape[-2], _ADDED_UP_IN_ORDER - 1):
        more = x[..., i : i + _ADDED_UP_IN_ORDER - 1, :]
        sums = _in_order(jnp.concatenate([sums[..., None, :], more], -2))
    return sums


def _in_order(x: jax.Array) -> jax.Array:
    """The sum of few along the last but one dimension.  XLA takes sums apart, but not where it sums pairs."""

    def add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
        return [a[0] + b[0], a[1] | b[1]]

    pairs = lax.reduce([x, jnp.zeros(x.shape, bool)], [np.float32(0), False], add, (x.ndim - 2,))
    return lax.optimization_barrier(pairs)[0]
