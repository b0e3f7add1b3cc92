"""A job killed by the system, in a process of its own; scripts/kill_test.py does this fifty times."""

import pytest

from scripts import kill_test


@pytest.mark.slow  # each start of the job imports JAX and loads its programs
def test_killed_often_it_ends_the_same(tmp_path):
    found = kill_test.kill_often(tmp_path, kills=4, rows=150, seed=1)
    assert found["before"] + found["among"] + found["after"] == 4
