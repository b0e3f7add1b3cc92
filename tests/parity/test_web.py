"""Our gpu files in MediaPipe's own web runtime; runs where scripts/web_check.sh has run once."""

import importlib.util
import time
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "scripts" / "web_check.py"


@pytest.fixture(scope="module")
def web_check():
    spec = importlib.util.spec_from_file_location("web_check", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if problem := module.missing():
        pytest.skip(problem)
    return module


@pytest.mark.slow
def test_the_official_runtime_says_the_same(web_check, tmp_path):
    """Gemma with an adapter, too."""
    files = {f"{kind}-int4": web_check.make(tmp_path, kind, 4) for kind in ("GEMMA_2B", "STABLELM_4E1T_3B")}
    answers = web_check.run_official(files)
    assert set(answers["GEMMA_2B-int4"]) == {"", "lora"}
    assert all(web_check.compare(name, made, answers[name]) for name, made in files.items())


@pytest.mark.slow
def test_a_browser_that_never_answers_is_left(web_check, monkeypatch, tmp_path):
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 600\n")
    silent.chmod(0o755)
    monkeypatch.setenv("LLMJAX_CHROMIUM", str(silent))
    made = web_check.make(tmp_path, "GEMMA_2B", 8)
    began = time.monotonic()
    answers = web_check.run_official({"a": made, "b": made}, {"browser": 1})
    assert time.monotonic() - began < 60
    assert all("browser: no answer within 1 s" in answers[name]["error"] for name in "ab")


@pytest.mark.slow
def test_a_step_that_takes_too_long_tells_what_the_browser_said(web_check, tmp_path):
    made = web_check.make(tmp_path, "GEMMA_2B", 8)
    error = web_check.run_official({"a": made}, {"prompt": 0.001})["a"]["error"]
    assert error.startswith("prompt: no answer within 0.001 s\n") and "WebGPU adapter: " in error
