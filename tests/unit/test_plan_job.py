"""The arithmetic of a job that is planned, by hand."""

import json

import pytest

from llmjax.errors import RequestError
from scripts import plan_job
from scripts.plan_job import Machine, Rates, Rows, Weights


def test_by_what_a_machine_can_do():
    # 8 GB of weights at 1000 GB/s: a step takes 8 ms, and 1 s for 125 of them in 10 slots.
    weights, rows = Weights(8 * 10**9, 8 * 10**9, 8, 10_000, 10), Rows(3600, 300, 200)
    rates = plan_job.rates_of(rows, weights, Machine(80e9, 1e12, 1e18, 1.0))
    # Beside them 10 rows of 300 + 100 tokens of 10 kB: 40 MB.
    assert rates.slots == 10 and rates.decode == pytest.approx(10 * 1e12 / 8.04e9)
    assert rates.prefill == pytest.approx(1e18 / 16e9)
    slow = plan_job.rates_of(rows, weights, Machine(80e9, 1e12, 1e12, 0.5))  # bound by operations: 0.32 s a step
    assert slow.decode == pytest.approx(10 / 0.32) and slow.prefill == pytest.approx(31.25)
    small = plan_job.rates_of(rows, weights, Machine(8.0e9 + 4 * 4 * 5e6 / 3, 1e12, 1e18, 1.0))
    assert small.slots == 4  # of 5 MB each, in three quarters of 26.7 MB
    with pytest.raises(
        RequestError, match="memory: 8.00 GB holds no row beside weights of 8.00 GB: a row takes 5.0 MB"
    ):
        plan_job.rates_of(rows, weights, Machine(8.001e9, 1e12, 1e18))


def test_hours():
    rates = Rates(32, prefill=1000, decode=100, row_seconds=0.5, start_seconds=36)
    assert plan_job.hours(Rows(7200, 500, 100), rates, 1) == pytest.approx(2 * (0.5 + 1 + 0.5) + 0.01)
    assert plan_job.hours(Rows(7200, 500, 100), rates, 4) == pytest.approx(1.01)
    text = plan_job.report(Rows(7200, 500, 100), Weights(10**9, 10**9, 4, 1000, 32), rates, 4, 2.0)
    assert "500.0 MB" in text and "19.2 MB of cache" in text and "1.01 hours on 4 machines" in text
    assert "8.08 (4.0 machine hours at 2)" in text


def test_by_what_a_pilot_did():
    run = {
        "rows": 50, "load_seconds": 3.0, "seconds": 40.0, "compile_seconds": 5.0, "prefill_tokens": 400,
        "reused_tokens": 100, "decode_tokens": 1000, "prefill_seconds": 10.0, "decode_seconds": 20.0, "busy": 0.8,
    }  # fmt: skip
    counts = {"rows": 100, "failed": 0, "prompt_tokens": 1000, "completion_tokens": 2000}
    rates, prompt, answer = plan_job.measured({"runs": [run, run], "counts": counts, "job": {"slots": 8}})
    assert (prompt, answer) == (10, 20)
    assert rates == Rates(8, 50.0, 50.0, 0.1, 8.0)
    # As the pilot itself: 100 rows in its 2 x 35 s without compiling.
    assert plan_job.hours(Rows(100, 10, 20), rates, 1) * 3600 - 8 == pytest.approx(70)
    with pytest.raises(RequestError, match="it answered no row"):
        plan_job.measured({"runs": [run | {"rows": 0}], "counts": counts, "job": {"slots": 8}})


def test_of_a_configuration(monkeypatch, capsys):
    weights = plan_job.weights_of("config:gemma-2b", 8)
    assert (weights.parameters, weights.used) == (2_506_172_416, 2_506_172_416)  # its card; the table is the head
    assert weights.token_bytes == 18 * 2 * 256 * 2 and weights.nbytes == 2_506_172_416
    phi = plan_job.weights_of("config:phi-2", 16)
    assert phi.parameters == 2_779_683_840 and phi.used == phi.parameters - 51_200 * 2560
    carrying = plan_job.weights_of("config:qwen3.5-0.8b", 8)  # in 18 of 24 layers, the others attend
    assert carrying.token_bytes == 6 * 2 * 2 * 256 * 2
    assert carrying.slot_bytes == 18 * 4 * (16 * 128 * 128 + 3 * 3 * 2048)
    monkeypatch.setattr("sys.argv", ["plan_job", "--model", "config:gemma-2b", "--rows", "5"])
    with pytest.raises(SystemExit, match="plan_job: --prompt-tokens, --answer-tokens: needed where no --pilot"):
        plan_job.main()


def test_a_pilot_from_a_file(monkeypatch, capsys, tmp_path):
    run = {
        "rows": 10, "load_seconds": 0.0, "seconds": 3.0, "compile_seconds": 0.0, "prefill_tokens": 100,
        "reused_tokens": 0, "decode_tokens": 200, "prefill_seconds": 1.0, "decode_seconds": 2.0, "busy": 1.0,
    }  # fmt: skip
    counts = {"rows": 10, "failed": 0, "prompt_tokens": 100, "completion_tokens": 200}
    (tmp_path / "m.json").write_text(json.dumps({"runs": [run], "counts": counts, "job": {"slots": 8}}))
    flags = ["--model", "config:gemma-2b", "--rows", "24000", "--pilot", str(tmp_path / "m.json"), "--machines", "2"]
    monkeypatch.setattr("sys.argv", ["plan_job", *flags])
    plan_job.main()
    assert "1.00 hours on 2 machines for 24,000 rows of 10 + 20 tokens" in capsys.readouterr().out
