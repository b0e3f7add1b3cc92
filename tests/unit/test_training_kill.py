"""A training run killed by the system, in a process of its own; scripts/kill_training.py does this twenty times."""

import pytest

from scripts import kill_training


@pytest.mark.slow  # each start of the run imports JAX and loads its programs
def test_killed_often_it_ends_the_same(tmp_path):
    found = kill_training.kill_often(tmp_path, kills=20, steps=200, seed=1)
    assert sum(found.values()) == 20 and found["steps"] > 5
