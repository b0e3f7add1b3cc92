"""The draw: which token follows, given logits, parameters and a key.  Defined here, so that another runtime can replay
it.

For one row, in float32, from the logits that ``llmjax.runtime.logits`` leaves:

1. Candidates stand in descending logit order, ties by lower id.  ``x_i = exp((l_i - l_0) / temperature)``.
2. ``top_k`` keeps the first k; ``Z`` is the mass (sum of x) of what is kept.
3. ``top_p`` keeps the shortest run whose mass reaches ``top_p * Z``, at least one candidate.
4. ``min_p`` keeps candidates with ``x_i >= min_p`` and ``x_i > 0``; ``Z`` is now the mass of what is left.
5. ``u`` is uniform in [0, 1): the upper 24 bits of the first word of ``threefry2x32(row key, (0, step))`` over
``2**24``, which is
   ``jax.random.fold_in(key, step)``; ``step`` counts the row's generated tokens from 0.
6. The token is the first candidate whose cumulative mass exceeds ``u * Z``; where rounding leaves none, the last one
kept.

Temperature 0 takes the first candidate.  A row's key is ``jax.random.key(seed)`` of its own seed, or
``fold_in(key(job seed), first 32 bits of sha256(row id))``; as a seed that is the key's two words in one 64-bit
integer.  Sample i > 0 of a prompt with ``n`` > 1 has ``fold_in(row key, i)``; sample 0 has the row's key.
"""

import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmjax.device import by_device
from llmjax.runtime.params import MAX_LOGPROBS

# Candidates looked at before the whole vocabulary is sorted: a sort of 256,000 logits takes as long as a decode step.
HEAD = 512

_WORD = 0xFFFFFFFF
_IMPL = "threefry2x32"  # by name: jax_default_prng_impl must not change a draw


class Knobs(NamedTuple):
    """Sampling parameters of all rows, each ``[B]``: temperature, top_p, min_p float32; top_k int32; key uint32 ``[B,
    2]``."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    key: jax.Array


def key_words(seed: int) -> np.ndarray:
    """uint32 ``[2]``: the key of a seed; equal to ``jax.random.key(seed)`` for seeds that fit it."""
    return np.array([seed >> 32, seed & _WORD], np.uint32)


def row_seed(job_seed: int, row_id: str) -> int:
    """The seed of a row that brings none: a function of the job's seed and the row's id, not of its place in the
    batch."""
    number = int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:4], "big")
    return _folded(job_seed, number)


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample ``index`` of a prompt whose own is ``seed``."""
    return _folded(seed, index) if index else seed


def _folded(seed: int, data: int) -> int:
    """``_fold_in`` on the host, which need not wait for a device: threefry2x32 of 20 rounds (Salmon et al. 2011)."""
    keys = [seed >> 32, seed & _WORD]
    keys.append(keys[0] ^ keys[1] ^ 0x1BD11BDA)
    x, y = keys[0], data + keys[1] & _WORD
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x = x + y & _WORD
            y = (y << turn | y >> 32 - turn) & _WORD ^ x
        x, y = x + keys[(i + 1) % 3] & _WORD, y + keys[(i + 2) % 3] + i + 1 & _WORD
    return x << 32 | y


@jax.jit
def _fold_in(words: jax.Array, data: jax.Array) -> jax.Array:
    key = jax.random.wrap_key_data(words, impl=_IMPL)
    return jax.random.key_data(jax.random.fold_in(key, data))


def uniform(words: jax.Array, step: jax.Array) -> jax.Array:
    """float32 in [0, 1) from a key's words uint32 ``[2]`` and a step int32 ``[]``."""
    return (_fold_in(words, step)[0] >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def draw(logits: jax.Array, knobs: Knobs, step: jax.Array) -> jax.Array:
    """Draws a token for each row.

    Args:
      logits: float32 ``[B, V]``; -inf bars a token.
      knobs: per row.
      step: int32 ``[B]``, tokens generated so far.

    Returns:
      int32 ``[B]``.
    """
    u = jax.vmap(uniform)(knobs.key, step)

    def sampled() -> jax.Array:
        best, ids = best_candidates(logits, min(HEAD, logits.shape[-1]))
        tokens, settled = jax.vmap(_from_head)(logits, best, ids, knobs, u)
        settled |= knobs.temperature == 0
        return by_device(_resorted, cpu=_resorted_one_by_one)(logits, knobs, u, tokens, settled)

    likeliest = most_likely(logits)
    tokens = lax.cond(jnp.any(knobs.temperature > 0), sampled, lambda: likeliest)
    return jnp.where(knobs.temperature > 0, tokens, likeliest)


def _resorted(logits: jax.Array, knobs: Knobs, u: jax.Array, tokens: jax.Array, settled: jax.Array) -> jax.Array:
    """``tokens``, those of rows that are not settled drawn from the whole vocabulary: all rows at once where there is
    any, for what a GPU does next its host must know."""
    found = lax.cond(jnp.all(settled), lambda: tokens, lambda: jax.vmap(_from_all)(logits, knobs, u))
    return jnp.where(settled, tokens, found)


def _resorted_one_by_one(
    logits: jax.Array, knobs: Knobs, u: jax.Array, tokens: jax.Array, settled: jax.Array
) -> jax.Array:
    def resort(row: tuple[jax.Array, ...]) -> jax.Array:
        row_logits, row_u, token, done, *rest = row
        return lax.cond(done, lambda: token, lambda: _from_all(row_logits, Knobs(*rest), row_u))

    return lax.map(resort, (logits, u, tokens, settled, *knobs))


def most_likely(logits: jax.Array) -> jax.Array:
    """int32 ``[B]`` of ``[B, V]``: the lowest id among equals, as ``jnp.argmax``, which takes six times as long."""
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    highest = logits == jnp.max(logits, -1, keepdims=True)
    return jnp.min(jnp.where(highest, ids[None], ids[-1]), -1)


def likeliest(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The highest of ``[B, V]``, its id as ``most_likely`` has it, NaN left out, and the logsumexp, of which NaN is
    not: a GPU reads them once for all."""

    def joined(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        share = jnp.exp(jnp.where(a[0] == b[0], 0, -jnp.abs(a[0] - b[0])))  # of the lower one in terms of the higher
        total = jnp.where(first, a[2] + b[2] * share, a[2] * share + b[2])
        return jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1]), total

    each = logits, lax.broadcasted_iota(jnp.int32, logits.shape, 1), jnp.ones_like(logits)
    nothing = np.float32(-np.inf), np.int32(logits.shape[1] - 1), np.float32(0)
    highest, best, total = lax.reduce(each, nothing, joined, [1])
    return highest, best, highest + jnp.log(total)


def best_candidates(logits: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The ``size`` highest logits of each row and their ids, the lower id first among equals.

    XLA's top-k has -0 below 0, which are equals.  The barrier keeps a later slice of the result out of it, which it
    would turn into a sort of the whole vocabulary: 40 times slower on the CPU (jaxlib 0.10).
    """
    best, ids = lax.top_k(jnp.where(logits == 0, jnp.abs(logits), logits), size)
    return lax.optimization_barrier(best), lax.optimization_barrier(ids)


def alternatives(logits: jax.Array, norm: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids and log-probabilities ``[B, MAX_LOGPROBS]`` of the most likely tokens; zeros unless ``wanted``.

    Args:
      logits: float32 ``[B, V]``.
      norm: float32 ``[B]``, their logsumexp.
      wanted: bool ``[]``.
    """
    size = min(MAX_LOGPROBS, logits.shape[-1])

    def top() -> tuple[jax.Array, jax.Array]:
        best, ids = best_candidates(logits, size)
        pad = ((0, 0), (0, MAX_LOGPROBS - size))
        return jnp.pad(ids, pad), jnp.pad(best - norm[:, None], pad, constant_values=-jnp.inf)

    shape = (logits.shape[0], MAX_LOGPROBS)
    return lax.cond(wanted, top, lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)))


def _weights(logits: jax.Array, top: jax.Array, temperature: jax.Array) -> jax.Array:
    return jnp.exp((logits - top) / jnp.where(temperature > 0, temperature, 1.0))


def _kept(x: jax.Array, cumulative: jax.Array, mass: jax.Array, top_k: jax.Array, knobs: Knobs) -> jax.Array:
    """How many of the sorted candidates ``x [C]`` survive top-k, top-p and min-p (each keeps a prefix)."""
    index = jnp.arange(x.shape[0], dtype=jnp.int32)
    before = cumulative - x
    in_p = (knobs.top_p >= 1) | (before < knobs.top_p * mass)
    keep = (index < top_k) & in_p & (x >= knobs.min_p) & (x > 0) | (index == 0)
    return jnp.min(jnp.where(keep, x.shape[0], index))


def _pick(cumulative: jax.Array, ids: jax.Array, kept: jax.Array, mass: jax.Array, u: jax.Array) -> jax.Array:
    return ids[jnp.minimum(jnp.sum(cumulative <= u * mass), kept - 1)]


def _from_head(
    logits: jax.Array, best: jax.Array, ids: jax.Array, knobs: Knobs, u: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The draw of one row from its best candidates, and whether they settle it."""
    size, vocab = best.shape[0], logits.shape[0]
    x = _weights(best, best[0], knobs.temperature)
    cumulative = jnp.cumsum(x)
    top_k = jnp.where(knobs.top_k == 0, vocab, jnp.minimum(knobs.top_k, vocab))
    in_head = top_k <= size
    everything = jnp.sum(_weights(logits, best[0], knobs.temperature))
    mass = jnp.where(in_head, cumulative[jnp.minimum(top_k, size) - 1], everything)
    kept = _kept(x, cumulative, mass, top_k, knobs)
    cut_inside = in_head | (kept < size) | (size == vocab)
    untouched = (knobs.top_k == 0) & (knobs.top_p >= 1) & (knobs.min_p == 0)
    token = _pick(cumulative, ids, kept, jnp.where(cut_inside, cumulative[kept - 1], mass), u)
    return token, cut_inside | (untouched & (u * mass < cumulative[-1]))


def _from_all(logits: jax.Array, knobs: Knobs, u: jax.Array) -> jax.Array:
    """The draw of one row from the whole vocabulary, sorted."""
    vocab = logits.shape[0]
    best, ids = best_candidates(logits, vocab)
    x = _weights(best, best[0], knobs.temperature)
    cumulative = jnp.cumsum(x)
    top_k = jnp.where(knobs.top_k == 0, vocab, jnp.minimum(knobs.top_k, vocab))
    mass = cumulative[top_k - 1]
    kept = _kept(x, cumulative, mass, top_k, knobs)
    return _pick(cumulative, ids, kept, cumulative[kept - 1], u)
