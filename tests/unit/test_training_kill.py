"""A training run killed by the system, in a process of its own; scripts/kill_training.py does this twenty times."""

import pytest

from scripts import kill_training


@pytest.mark.slow  # each start of the run imports JAX and loads its programs
@pytest.mark.parametrize(("kills", "dpo"), [(20, False), (6, True)])
def test_killed_often_it_ends_the_same(tmp_path, kills, dpo):
    found = kill_training.kill_often(tmp_path, kills=kills, steps=200, seed=1, dpo=dpo)
    assert sum(found.values()) == kills and found["steps"] > kills // 4
