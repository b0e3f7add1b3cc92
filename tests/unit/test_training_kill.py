"""A training run killed by the system, in a process of its own; scripts/kill_training.py does this twenty times."""

import pytest

from scripts import kill_training


@pytest.mark.slow  # each start of the run imports JAX and loads its programs
@pytest.mark.parametrize(("kills", "flags"), [(20, ()), (6, ("--dpo", "--dora"))])
def test_killed_often_it_ends_the_same(tmp_path, kills, flags):
    found = kill_training.kill_often(tmp_path, kills=kills, steps=200, seed=1, flags=flags)
    assert sum(found.values()) == kills and found["steps"] > kills // 4
