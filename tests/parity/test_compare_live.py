"""``scripts/dumps/transformers_dump.py``: what it writes of a real Hugging Face model is what ``compare`` reads."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import llmjax
from llmjax.cli.main import main
from tests import tiny
from tests.parity import golden

pytest.importorskip("torch", reason="parity extra not installed")
pytest.importorskip("transformers", reason="parity extra not installed")
reference = pytest.importorskip("tests.parity.reference")

SCRIPTS = Path(__file__).parents[2] / "scripts"
CASES = Path(__file__).parents[1] / "data" / "cases"
SCRIPT = SCRIPTS / "dumps" / "transformers_dump.py"


@pytest.mark.parametrize("kind", ["mistral", pytest.param("qwen3_5_cond", marks=pytest.mark.slow)])
def test_a_dump_of_transformers_is_the_model(kind, tmp_path, monkeypatch):
    """Whose norm of linear attention is another step than ours of that name."""
    folder = golden.write(kind, tmp_path / "m") if kind == "mistral" else CASES / kind
    ids = np.random.default_rng(1).integers(3, 90, 12).tolist()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), str(tmp_path / "d"), "--ids", ",".join(map(str, ids))])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    report = llmjax.compare(llmjax.load(folder), tmp_path / "d")
    assert (report.verdict, report.explained_by) == ("equivalent", "float32")
    assert report.coverage["tokens"] == 12 and report.coverage["taps"] > 0.8 * report.coverage["of"]
    assert report.logits["argmax_agreement"] == 1 and report.logits["kl_max"] < 1e-8
    (tmp_path / "no").mkdir()
    for model, message in ((folder, "expected token ids from 0 to .*, found"), (tmp_path / "no", "cannot load it")):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(model), str(tmp_path / "e"), "--ids", "1,9999999"])
        with pytest.raises(SystemExit, match=message):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not (tmp_path / "e").exists()


@pytest.mark.slow
def test_every_vector_of_transformers_is_the_model(tmp_path, monkeypatch, capsys):
    folder = golden.write("mistral", tmp_path / "m")
    vectors, theirs = str(tmp_path / "vectors"), str(tmp_path / "theirs")
    assert main(["vectors", "--model", str(folder), "--output", vectors]) == 0
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), theirs, "--vectors", vectors])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    capsys.readouterr()
    assert main(["compare", vectors, theirs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["explained_by"]) == ("equivalent", "float32")
    names = [v["name"] for v in json.loads(Path(vectors, "vectors.json").read_text())["vectors"]]
    assert found["subject"]["verdicts"] == dict.fromkeys(sorted(names), "equivalent") and len(names) > 4


@pytest.mark.parametrize(
    "index", [None, "[", "[]", '{"vectors": []}', '{"vectors": [{"name": "no"}]}', '{"vectors": [{"name": 3}]}']
)
def test_vectors_that_are_none_are_one_line(index, tmp_path):
    if index is not None:
        (tmp_path / "vectors.json").write_text(index)
    with pytest.raises(SystemExit, match=r"^\S+\.json: .*`llmjax vectors --output \S+` writes"):
        runpy.run_path(str(SCRIPT))["vectors"](tmp_path)


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """What ``compare`` says of a run of theirs with faults."""
    record = runpy.run_path(str(SCRIPT))["record"]
    ids = np.random.default_rng(1).integers(3, 90, 24).tolist()

    def compared(kind, facts, *faults, **functions):
        theirs = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        folder = golden.write(kind, tmp_path / "m")
        candidate = reference.load(folder, kind)
        for fault in faults:
            fault(candidate)
        for name, make in functions.items():
            monkeypatch.setattr(theirs, name, make(getattr(theirs, name)))
        arrays = {name: x.numpy() for name, x in record(candidate, ids).items()}
        return llmjax.compare(llmjax.load(folder), llmjax.Trace(arrays, {"token_ids": ids, **facts}))

    return compared


def by_module(report):
    found = {}
    for fault in report.faults:
        found.setdefault(fault["module"], []).append((fault["causes"][0]["cause"], fault["causes"][0]["detail"]))
    return found


@pytest.mark.slow
def test_a_window_a_sequence_and_one_scale_are_named(compared):
    f = runpy.run_path(str(SCRIPTS / "transformers_faults.py"))
    report = compared(
        "phi",
        {"dtype": "float32"},
        f["in_sequence"](1),
        f["weight"](f["sub"](1, "mlp.fc2"), f["one_scale"]),
        eager_attention_forward=f["windowed"](6),
    )
    window = [("window", "the window is 6 tokens")]
    found = by_module(report)
    assert {m: f for m, f in found.items() if m.endswith("probs")} == {
        f"layers.{i}.attn.probs": window for i in range(len(report.map) - 2)
    }
    assert found["layers.1.mlp.up"] == [("residual", "attention and MLP are sequential, not parallel")]
    assert found["layers.1.mlp.down"] == [("quantization", "the weight is rounded to int8 with one scale")]


@pytest.mark.slow
def test_small_mistakes_of_any_size_are_named(compared):
    """A base a little off, one head that meets another, rows out of order, a row and a bias that are other ones."""
    f = runpy.run_path(str(SCRIPTS / "transformers_faults.py"))
    sub = f["sub"]
    report = compared(
        "qwen2",
        {"dtype": "float32"},
        f["theta"](1000100, 14),
        f["rows"](sub(1, "mlp.down_proj"), [3, 4], [4, 3]),
        f["rows"](sub(2, "mlp.up_proj"), [5], None),
        f["more_bias"](sub(2, "self_attn.k_proj")),
        repeat_kv=f["one_head"],
    )
    found = by_module(report)
    everywhere = [
        ("rope_theta", "the base is 1.0001e+06"),
        ("head_mapping", "1 of 4 query heads meet other key/value heads (1 meets 1)"),
    ]
    assert found == {
        **{f"layers.{i}.attn": everywhere for i in range(4)},
        "layers.1.mlp.down": [("weight_swapped", "2 of 56 rows are in another order (3: 4, 4: 3)")],
        "layers.2.mlp.up": [("weight", "1 of 104 rows are other ones (5)")],
        "layers.2.attn.k": [("bias", "the bias is another")],
    }


@pytest.mark.slow
def test_a_cache_and_activations_of_sixteen_bits_are_one_arithmetic(compared):
    """As llama.cpp computes by default."""
    f = runpy.run_path(str(SCRIPTS / "transformers_faults.py"))
    facts = {"dtype": "float32", "numerics": "cache16, gelu16"}
    report = compared("qwen2", facts, f["activation16"], eager_attention_forward=f["cache16"])
    assert (report.verdict, report.explained_by, report.faults) == ("equivalent", "cache16", [])


@pytest.mark.parametrize(
    "variant, explained",
    tiny.some(
        [("cache of 8 bits", "cache_int8")],
        [
            ("cache of 8 bits", "cache_int8"),
            ("cache of float8", "cache_float8"),
            ("cache of 4 bits", "cache_int4"),
            ("cache of 8 bits, int4 and bfloat16", "int4"),
            ("static int8", "static_int8"),
            ("16a8w", "int8"),
            ("8da4w", "int4"),
        ],
    ),
)
def test_small_caches_and_static_activations_are_classes_of_what_declares_them(compared, variant, explained):
    """Rounded by torch, in transformers' own modules."""
    how = runpy.run_path(str(SCRIPTS / "no_faults.py"))["THEIRS"][variant]
    facts = {"dtype": how.dtype, "quantization": how.quantization, "kv_cache": how.kv_cache}
    restored = []

    def changed(model):
        how.change(model)
        restored.append(getattr(model, "_restore", None))

    try:
        report = compared("qwen2", facts, changed)
        assert (report.verdict, report.explained_by) == ("equivalent", explained), report.reason
    finally:
        for one in filter(None, restored):
            setattr(*one)
