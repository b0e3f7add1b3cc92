"""A GPU beside the CPU, where there is one: ``JAX_PLATFORMS=cuda,cpu pytest -m gpu tests/gpu``.

On the CPU beside itself, which shows that the checks run and can fail, without one.
"""

import jax
import numpy as np
import pytest

from tests.gpu import checks

ALL = checks.checks()


def gpu() -> jax.Device:
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        pytest.skip("no GPU for JAX")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_a_gpu_beside_the_cpu(name):
    found = ALL[name](jax.devices("cpu")[0], gpu())
    assert found.fine, found


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ALL)[:14])
def test_the_cpu_beside_itself(name):
    cpu = jax.devices("cpu")[0]
    found = ALL[name](cpu, cpu)
    assert found.fine, found


def test_what_differs_is_seen():
    assert checks.compared(iter((np.ones(3), np.ones(3))), 1e-5).fine
    for wrong in (np.array([1, 1, 1.001]), np.array([1, np.nan, 1])):
        assert not checks.compared(iter((np.ones(3), wrong)), 1e-5).fine
