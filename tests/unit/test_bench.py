"""The benchmark: that it measures what it says, in the engine's own programs; never how fast."""

import json
from pathlib import Path

import pytest

from llmjax.bench import measure, probes
from llmjax.bench.cost import Costs
from llmjax.bench.report import to_text
from llmjax.checkpoint.loading import load
from llmjax.cli.main import main
from llmjax.errors import RequestError
from llmjax.products.cpu import has_integer_tiles
from llmjax.runtime.engine import Engine
from tests.tiny import checkpoint, random_model


@pytest.fixture
def small_probes(monkeypatch):
    monkeypatch.setattr(probes, "_READ_BYTES", {"cpu": 1 << 22, "gpu": 1 << 22})
    monkeypatch.setattr(probes, "_MATMUL_SIZE", {"cpu": 64, "gpu": 64})


@pytest.mark.slow
def test_command(small_probes, tmp_path, capsys):
    path = str(checkpoint(tmp_path / "m", max_position_embeddings=1000, num_hidden_layers=1))
    command = ["bench", "--model", path, "--quantize", "int8", "--max-batch", "4", "--in-use", "1,4", "--repeat", "2"]
    command += ["--prompt-lengths", "9,150", "--output-length", "40", "--context", "20,600", "--cache", "512,1024"]
    assert main([*command, "--json", "--profile", str(tmp_path / "p")]) == 0
    profiles = {path.parents[3].name for path in (tmp_path / "p").rglob("*.xplane.pb")}
    found = json.loads(capsys.readouterr().out)
    keys = [(s["phase"], s["tokens"], s["cache"], s["in_use"]) for s in found["settings"]]
    assert keys == [
        *[("prefill", 9, 512, 1), ("prefill", 150, 512, 1)],
        *[("decode", 20, 512, 1), ("decode", 20, 512, 4), ("decode", 20, 1024, 1), ("decode", 20, 1024, 4)],
        *[("decode", 600, 1024, 1), ("decode", 600, 1024, 4)],
    ]
    assert profiles == {f"{phase}-{tokens}-{rows}-{cache}" for phase, tokens, cache, rows in keys}
    # Three digits are multiplied in integers only where tiles of them are.
    assert set(found["matmul_flops_per_second"]) == {"float32"} | ({"int8"} if has_integer_tiles() else set())
    assert found["model"]["weight_bytes"] < 2 * found["model"]["parameters"]
    assert found["peak_bytes"] > 1e6 and found["load_seconds"] > 0
    for s in found["settings"]:
        rate = s["tokens_per_second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert s["bytes_per_second"] > 0 and s["flops_per_second"] > 0 and s["of_limit"] > 0
        assert (s["first_token_seconds"] is not None) == (s["phase"] == "prefill")
    compiled = [s["compile_seconds"] > 0 for s in found["settings"]]
    assert compiled == [True, False, False, False, True, False, False, False]


@pytest.mark.slow
def test_table(small_probes):
    options = measure.Options(slots=4, prompt_lengths=(5,), output_length=3, repeat=1)
    lines = to_text(measure.run(random_model, options)).splitlines()
    assert len({len(line) for line in lines[-3:]}) == 1
    assert [line.split()[0] for line in lines[-3:]] == ["phase", "prefill", "decode"]


@pytest.mark.slow
def test_decoding_begins_with_a_context_and_makes_all_tokens():
    engine = Engine(random_model(eos_ids=(0, 1, 2)), slots=4)
    bench = measure.Runner(engine)
    assert bench.decode(context=50, new=37, in_use=2, length=256) > 0
    assert engine.store.state.position.tolist()[:2] == [87, 87]
    assert engine.store.state.step.tolist() == [37, 37, 0, 0]
    assert engine.traces == {"decode": 1}


def test_costs_of_a_model():
    """Counted by hand: a layer's 4 projections and 3 of the feed-forward; the embedding is looked up, the head read."""
    model = random_model()
    layer = 48 * 48 + 2 * 48 * 16 + 48 * 48 + 3 * 48 * 96
    norms, head = 5 * 48, 600 * 48
    step = Costs(model).decode_step(rows=3, context=9)
    assert step.nbytes == 4 * (2 * layer + norms + head) + 3 * 10 * 2 * (2 * 2 * 8 * 4)
    assert step.flops == 3 * (2 * (2 * layer + norms + head) + 10 * 2 * 4 * 6 * 8)
    tied = random_model(tie_word_embeddings=True)
    assert Costs(tied).decode_step(3, 9) == step
    whole, chunked = (Costs(model).prefill(10, chunk) for chunk in (10, 5))
    assert chunked.flops == whole.flops + 2 * head
    assert whole.nbytes < chunked.nbytes < 2 * whole.nbytes


def test_costs_of_quantized_weights_and_windows(tmp_path):
    path = checkpoint(tmp_path / "m")
    full, packed = (Costs(load(path, quantize=q)) for q in (None, "mixed-8-4-8"))
    assert packed.parameters == full.parameters
    assert packed.decode_step(1, 0).flops == full.decode_step(1, 0).flops
    assert packed.decode_step(1, 0).nbytes < full.decode_step(1, 0).nbytes / 3


def test_probes_are_positive():
    assert probes.read_probe(1 << 22)() > 0
    for dtype in ("float32", "bfloat16", "int8"):
        assert probes.matmul_probe(dtype, 64)() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_use": (9,)}, "at most the 8 there are"),
        ({"prompt_lengths": (0,)}, "prompt length: expected a positive"),
        ({"contexts": (190,)}, r"model's context of 200; measure fewer .*, or load the model with a longer one"),
        ({"contexts": (50,), "caches": (60,)}, "cache: 60 positions do not hold 50 tokens and 32"),
        ({"profile": Path(__file__)}, "test_bench.py: expected a directory, found"),
        ({"profile": Path(__file__) / "p"}, "p: cannot be made: Not a directory"),
    ],
)
def test_what_cannot_be_measured(options, message):
    with pytest.raises(RequestError, match=message):
        measure.run(random_model, measure.Options(**({"prompt_lengths": (9,)} | options)))
