"""What scripts make of a user's mistake: one line and an exit code, never a traceback, nor "right" over nothing."""

import ast
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from scripts import check_litert, gpu_part, measure_full_size, plan_job
from tests import tiny

PLAN = ["--model", "config:gemma-2b", "--rows", "10", "--prompt-tokens", "8", "--answer-tokens", "4"]
FULL = ["config:gemma-2b", "bfloat16"]


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (plan_job, [*PLAN, "--rows", "0"], "--rows: expected at least 1, found 0"),
        (plan_job, [*PLAN, "--prompt-tokens", "nan"], "--prompt-tokens: expected a number above 0, found nan"),
        (plan_job, [*PLAN, "--model", __file__], "expected config:NAME, or a directory with a config.json"),
        (plan_job, [*PLAN, "--pilot", "list.json"], "--pilot list.json: expected what a batch job writes"),
        (plan_job, [*PLAN, "--pilot", "no.json"], "No such file or directory: 'no.json'"),
        (check_litert, ["nowhere"], "nowhere: no such directory"),
        (check_litert, ["."], "no file to check in tflite, handwritten, ops, litertlm below it"),
        (measure_full_size, [*FULL, "--quantize", "int5"], "quantize: unknown 'int5'"),
        (measure_full_size, ["config:qwen3-0.6b", "bfloat16", "--mediapipe", "cpu-int8"], "is none of its models"),
        (measure_full_size, [*FULL, "nowhere"], "nowhere: no such directory"),
    ],
)
def test_a_mistake_costs_a_line(script, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    monkeypatch.setattr(sys, "argv", ["script", *words])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code not in (0, None)
    assert message in f"{end.value.code}\n{capsys.readouterr().err}"


def test_no_processor_is_measured_as_a_card(monkeypatch):
    torch = types.SimpleNamespace(__version__="2", cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    for kind, message in {"int8": "no GPU for jax", "transformers": "no GPU for torch 2"}.items():
        with pytest.raises(SystemExit, match=message):
            gpu_part.check_card(kind)


def test_what_is_no_number_is_not_right(tmp_path, monkeypatch):
    """Nor is what has nothing to be compared with."""

    class Found:
        """A graph's model whose logits are these."""

        numerics = type("Numerics", (), {"digits": 0})

        def follow(self, ids, prefill):
            return self.logits, {}

    found, path = Found(), tmp_path / "x.tflite"
    found.logits = np.zeros((3, 5))
    monkeypatch.setattr(check_litert, "model", lambda path: found)
    assert list(check_litert.check_model(path)) == ["no .npz of results beside it"]
    stored = {f"ids/{run}": np.arange(30) for run in ("s0", "s1")}
    stored |= {f"xnn1/{run}/logits": np.zeros((3, 5)) for run in ("s0", "s1", "s2")}
    np.savez(tmp_path / "x.npz", **stored)
    assert list(check_litert.check_model(path)) == []
    found.logits = np.full((3, 5), np.nan)
    assert list(check_litert.check_model(path)) == ["logits: 9 rows of 9 above 5e-05, up to nan"]


def test_models_of_scripts_want_no_pytest():
    """scripts/quickstart.sh installs none, and the README's kill_test.py runs in what it made."""
    top = ast.parse(Path(tiny.__file__).read_text(encoding="utf-8")).body
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    assert "jax" in names and "pytest" not in names
