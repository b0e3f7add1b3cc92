"""The search for scales, against rounding to nearest and a plain loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmjax.quant.search import FACTORS, mse_scales


def error(groups: np.ndarray, scales: np.ndarray, hi: int, weighted: bool = True) -> np.ndarray:
    """Squared error per group in float64."""
    s = np.where(scales == 0, np.float32(1), scales)[..., None]
    n = np.clip(np.round(groups / s), -hi - 1, hi)
    off = (n * s - groups).astype(np.float64)
    return np.square(off * groups if weighted else off).sum(-1)


def to_nearest(groups: np.ndarray, hi: int) -> np.ndarray:
    return np.abs(groups).max(-1) / np.float32(hi)


@given(seed=st.integers(0, 1000), hi=st.sampled_from([7, 127]), tail=st.sampled_from([1, 3, 100]))
def test_never_worse_than_rounding_to_nearest(seed, hi, tail):
    rng = np.random.default_rng(seed)
    groups = (rng.standard_t(tail, (5, 3, 32)) * np.exp(rng.uniform(-30, 30, (5, 3, 1)))).astype(np.float32)
    assert (error(groups, mse_scales(groups, hi), hi) <= error(groups, to_nearest(groups, hi), hi)).all()


@pytest.mark.parametrize("group", [32, 128, 1024])
def test_the_gain_on_gaussian_weights_in_4_bits(group):
    groups = np.random.default_rng(0).normal(size=(64, 4, group)).astype(np.float32)
    scales = mse_scales(groups, 7), to_nearest(groups, 7)
    for weighted in (True, False):  # the plain error falls as well, although it is not what is sought
        found, nearest = (error(groups, s, 7, weighted).sum() for s in scales)
        assert found < 0.8 * nearest


def test_the_same_as_trying_every_candidate():
    groups = np.random.default_rng(1).normal(size=(2, 3, 64)).astype(np.float32)
    largest = np.where(groups.max(-1) > -groups.min(-1), groups.max(-1), groups.min(-1))
    tried = [to_nearest(groups, 7), *(largest / np.float32(-8) * np.float32(r) for r in FACTORS)]
    errors = np.stack([error(groups, s, 7) for s in tried])
    np.testing.assert_array_equal(
        mse_scales(groups, 7), np.take_along_axis(np.stack(tried), errors.argmin(0)[None], 0)[0]
    )


def test_a_row_does_not_depend_on_its_neighbours():
    groups = np.random.default_rng(2).normal(size=(700, 2, 128)).astype(np.float32)  # several chunks
    whole = mse_scales(groups, 7)
    assert whole.tobytes() == mse_scales(groups, 7).tobytes()
    for row in (0, 255, 256, 699):
        np.testing.assert_array_equal(whole[row], mse_scales(groups[row : row + 1], 7)[0])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("peak", [7, 8])
def test_what_can_be_exact_is(sign, peak):
    integers = np.random.default_rng(3).integers(-6, 7, (4, 2, 32)).astype(np.float32)
    integers[..., 5] = peak * sign
    scales = mse_scales(integers * np.float32(0.25), 7)
    np.testing.assert_array_equal(scales, np.float32(0.25 if peak == 7 or sign < 0 else -0.25))


def test_zeros_and_nothing():
    groups = np.zeros((2, 2, 32), np.float32)
    groups[1, 1] = 1
    found = mse_scales(groups, 7)
    np.testing.assert_array_equal(found == 0, [[True, True], [True, False]])
    assert error(groups, found, 7).max() == 0
    assert mse_scales(np.zeros((0, 2, 32), np.float32), 7).shape == (0, 2)
    assert found.dtype == np.float32
