"""Jobs and datasets on a cluster of Ray's own; test_fleet.py does without Ray what can be done so."""

import importlib.util
import json
import os

import pytest

from scripts import kill_ray
from tests import tiny

pytestmark = [
    pytest.mark.slow,  # Ray begins in ten seconds, and every worker imports JAX
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray: pip install 'llmjax[ray]'"),
]


def test_workers_and_the_job_killed_it_ends_as_one_process(tmp_path):
    """scripts/kill_ray.py does this fifty times."""
    expected = kill_ray.one_process(tmp_path, 400, 16)
    found = kill_ray.kill_often(tmp_path, kills=2, drivers=1, actors=2, seed=1, expected=expected)
    assert sum(found.values()) == 3 and found["the driver"] == 1


@pytest.mark.filterwarnings("ignore")  # Ray Data warns of its own ways
def test_rows_of_a_dataset_are_those_of_a_job(tmp_path, monkeypatch):
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import pyarrow
    import ray
    import ray.data

    from llmjax import LLM
    from llmjax.batch import job
    from llmjax.batch.ray import build

    model = str(tiny.checkpoint(tmp_path / "model"))
    rows = [{"key": f"r{i}", "question": "ab" * (1 + i % 9), "max_tokens": 1 + i % 5, "other": i} for i in range(90)]
    asked = [{"id": row["key"], "prompt": row["question"], "max_tokens": row["max_tokens"]} for row in rows]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    options = job.Options(ordered=True, progress_seconds=0)
    files = str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")
    job.run(lambda: LLM(model, max_batch=8), *files, {"temperature": 0.7}, options)
    monkeypatch.setenv("PYTHONPATH", str(kill_ray.ROOT))
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=4, logging_level="critical")
    try:
        names = {"id": "key", "prompt": "question"}
        answer = build(model, {"temperature": 0.7}, columns=names, actors=2, rows=16, max_batch=8)
        found = answer(ray.data.from_arrow(pyarrow.Table.from_pylist(rows)).repartition(5)).take_all()
    finally:
        ray.shutdown()
    found.sort(key=lambda row: row["other"])
    assert [row["row"] for row in found] == (tmp_path / "out.jsonl").read_text().splitlines()
