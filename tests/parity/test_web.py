"""Our gpu files in MediaPipe's own web runtime; runs where scripts/web_check.sh has run once."""

import importlib.util
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "scripts" / "web_check.py"


@pytest.mark.slow
def test_the_official_runtime_says_the_same(tmp_path):
    spec = importlib.util.spec_from_file_location("web_check", _SCRIPT)
    web_check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(web_check)
    if problem := web_check.missing():
        pytest.skip(problem)
    files = {f"{kind}-int4": web_check.make(tmp_path, kind, 4) for kind in ("GEMMA_2B", "STABLELM_4E1T_3B")}
    answers = web_check.run_official(files)
    assert all(web_check.compare(name, path, answers[name]) for name, path in files.items())
