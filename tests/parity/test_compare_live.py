"""``scripts/dumps/transformers_dump.py``: what it writes of a real Hugging Face model is what ``compare`` reads."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import llmjax
from tests.parity import golden

pytest.importorskip("torch", reason="parity extra not installed")
pytest.importorskip("transformers", reason="parity extra not installed")

SCRIPT = Path(__file__).parents[2] / "scripts" / "dumps" / "transformers_dump.py"


def test_a_dump_of_transformers_is_the_model(tmp_path, monkeypatch):
    folder = golden.write("mistral", tmp_path / "m")
    ids = np.random.default_rng(1).integers(3, 90, 12).tolist()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), str(tmp_path / "d"), "--ids", ",".join(map(str, ids))])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    report = llmjax.compare(llmjax.load(folder), tmp_path / "d")
    assert (report.verdict, report.explained_by) == ("equivalent", "float32")
    assert report.coverage["tokens"] == 12 and report.coverage["taps"] > 0.8 * report.coverage["of"]
    assert report.logits["argmax_agreement"] == 1 and report.logits["kl_max"] < 1e-9
