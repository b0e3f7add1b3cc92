"""The draw against an independent NumPy replay of its definition, and against the distribution it should have."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.runtime import decode, sampling
from llmjax.runtime.sampling import HEAD, Knobs, key_words, row_seed, sample_seed
from llmjax.runtime.state import empty_state

draw, uniform = jax.jit(sampling.draw), jax.jit(sampling.uniform)
uniforms = jax.jit(jax.vmap(sampling.uniform))


def replay(logits, temperature, top_k, top_p, min_p, u):
    """The six steps of llmjax.runtime.sampling's docstring, one row, in float64."""
    order = np.argsort(-logits, kind="stable")
    if temperature == 0:
        return order[0]
    x = np.exp((logits[order].astype(np.float64) - logits[order[0]]) / temperature)
    if top_k:
        x = x[:top_k]
    if top_p < 1:
        reached = np.cumsum(x) >= top_p * x.sum()
        x = x[: np.argmax(reached) + 1]
    x = x[: max(1, int(np.sum(x >= min_p)))]
    return order[min(int(np.sum(np.cumsum(x) <= u * x.sum())), len(x) - 1)]


def knobs(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    keys = np.stack([key_words(seed + i) for i in range(rows)])
    return Knobs(
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, top_k, jnp.int32),
        jnp.full(rows, top_p, jnp.float32),
        jnp.full(rows, min_p, jnp.float32),
        jnp.asarray(keys),
    )


SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 5.0, "top_k": HEAD + 200},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 30.0, "top_p": 0.95},  # flat: the cut lies far outside the head
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 50.0, "min_p": 0.2},
    {"temperature": 1.1, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 100.0},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [50, 3000])
def test_draw_follows_its_definition(setting, vocab):
    rng = np.random.default_rng(3)
    rows = 64
    logits = (rng.normal(size=(rows, vocab)) * 4).astype(np.float32)
    logits[:, 7] = logits[:, 3]  # ties go to the lower id
    logits[0, [9, 11]] = logits[0].max() + 1
    logits[1:20] -= logits[1:20].max(-1, keepdims=True) + 1
    logits[1:20, 9], logits[1:20, 11] = -0.0, 0.0  # equals as well
    k, step = knobs(rows, **setting), jnp.arange(rows, dtype=jnp.int32)
    u = np.asarray(uniforms(k.key, step), np.float64)
    got = np.asarray(draw(jnp.asarray(logits), k, step))
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | setting
    expected = [replay(logits[i], u=u[i], **full) for i in range(rows)]
    # float32 sums against float64: a draw that falls on the border of two candidates may take either
    assert np.sum(got != expected) <= 1
    if setting["temperature"] == 0:
        assert got[0] == 9


def test_rows_with_different_settings_do_not_touch_each_other():
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(size=(len(SETTINGS), 2000)) * 3, jnp.float32)
    alone = [knobs(1, **s) for s in SETTINGS]
    mixed = jax.tree.map(lambda *x: jnp.concatenate(x), *alone)
    step = jnp.zeros(len(SETTINGS), jnp.int32)
    together = draw(logits, mixed, step)
    for i, k in enumerate(alone):
        same = jax.tree.map(lambda x: jnp.repeat(x, len(SETTINGS), 0), k)
        assert together[i] == draw(jnp.tile(logits[i], (len(SETTINGS), 1)), same, step)[0]


def test_frequencies_are_the_distribution():
    logits = jnp.log(jnp.asarray([0.5, 0.25, 0.15, 0.07, 0.03], jnp.float32))
    rows = 20_000
    tokens = draw(jnp.tile(logits, (rows, 1)), knobs(rows, seed=100), jnp.zeros(rows, jnp.int32))
    counts = np.bincount(np.asarray(tokens), minlength=5)
    expected = rows * np.exp(np.asarray(logits, np.float64))
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 18.5  # 99.9 % of a chi-square distribution with 4 degrees of freedom


def test_uniform_is_jax_fold_in():
    key = jax.random.key(123, impl="threefry2x32")
    word = int(jax.random.key_data(jax.random.fold_in(key, 17))[0])
    assert float(uniform(jnp.asarray(key_words(123)), jnp.int32(17))) == (word >> 8) / 2**24


def test_row_seed_replays_as_a_seed():
    """The 64-bit seed of a row is its folded key, word for word."""
    number = int.from_bytes(hashlib.sha256(b"row-7").digest()[:4], "big")
    folded = jax.random.fold_in(jax.random.key(5, impl="threefry2x32"), number)
    assert key_words(row_seed(5, "row-7")).tolist() == jax.random.key_data(folded).tolist()
    assert row_seed(5, "row-7") != row_seed(5, "row-8") != row_seed(6, "row-8")
    for seed in (0, 2**32 - 1, 2**32, 2**64 - 1):  # on the host, as on a device
        folded = jax.random.fold_in(jax.random.wrap_key_data(key_words(seed), impl="threefry2x32"), 2**32 - 1)
        assert key_words(sample_seed(seed, 2**32 - 1)).tolist() == jax.random.key_data(folded).tolist()


def test_barred_tokens_are_never_drawn():
    logits = jnp.full((16, 100), -jnp.inf).at[:, 42].set(-3.0)
    for setting in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 2.0, "top_p": 0.5}):
        assert set(np.asarray(draw(logits, knobs(16, **setting), jnp.zeros(16, jnp.int32)))) == {42}


def test_what_a_gpu_chooses_where_nothing_is_asked_for(monkeypatch):
    """Reading the logits once: of equals the first, bars, logits whose exponentials would be infinite, and NaN, which
    must be seen wherever it stands."""
    monkeypatch.setattr(decode, "draw", lambda logits, knobs, step: jnp.full(len(logits), -1, jnp.int32))
    logits = np.random.default_rng(5).normal(size=(4, 60)).astype(np.float32)
    logits[0, [9, 3, 50]] = logits[0].max() + 1
    logits[1, 10:] = -np.inf
    logits[2] += 300
    state = empty_state({}, 4, 8, 60).replace(logits=jnp.asarray(logits), active=jnp.ones(4, bool))
    choose = jax.jit(decode._likeliest_or_drawn)
    norm, token, broken, *_ = choose(state)
    np.testing.assert_allclose(norm, np.log(np.sum(np.exp(logits.astype(np.float64)), -1)), rtol=1e-6)
    np.testing.assert_array_equal(token, [3, *logits[1:].argmax(1)])
    assert not broken.any()
    for place in (0, 31, 59):
        norm, *_ = choose(state.replace(logits=state.logits.at[3, place].set(jnp.nan)))
        assert np.isnan(norm).tolist() == [False, False, False, True]
    asked = state.replace(knobs=state.knobs._replace(temperature=jnp.zeros(4).at[1].set(1)))
    np.testing.assert_array_equal(choose(asked)[1], -1)
