"""Every architecture against the transformers that is installed: new weights, its own config dialect, bfloat16."""

import json

import jax
import numpy as np
import pytest

import llmjax
from tests import gguf_files
from tests.parity import checkpoints, golden
from tests.parity.golden import TOLERANCE, error, meta
from tests.parity.test_cases import FOLDER as CASES

torch = pytest.importorskip("torch", reason="parity extra not installed")
pytest.importorskip("transformers", reason="parity extra not installed")
reference = pytest.importorskip("tests.parity.reference")

SEED = 77


@pytest.fixture(scope="module", params=golden.some({"gemma3_multimodal"}))
def name(request):
    return request.param


def ids_of(name: str) -> list[int]:
    return np.random.RandomState(SEED).randint(0, 150, 45).tolist()


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of each row of logits."""
    log_p, log_q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), -1, keepdims=True) for x in (p, q))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def test_new_weights_saved_by_transformers(name, tmp_path):
    """save_pretrained writes the config and the tensors in its current dialect; both must be read."""
    m = meta(name)
    theirs = reference.load(
        checkpoints.write(tmp_path / "a", m["config"], m["shapes"], SEED), m["config"]["model_type"]
    )
    theirs.save_pretrained(tmp_path / "b")
    assert "dtype" in json.loads((tmp_path / "b/config.json").read_text())
    ids = ids_of(name)
    for folder, profile in (("a", "reference"), ("b", "hf")):
        found = llmjax.load(tmp_path / folder, numerics=profile).logits([ids])[0]
        with reference.float32_alibi() if profile == "reference" else reference.as_it_is():
            assert error(found, reference.logits(theirs, ids)) <= TOLERANCE


def test_experts_that_transformers_saves_as_it_computes_with_them(tmp_path):
    """All of a layer in one tensor, where published files have three for each."""
    folder = CASES / "qwen3_moe"
    reference.load(folder, "qwen3_moe").save_pretrained(tmp_path, save_original_format=False)
    assert len(llmjax.inspect(tmp_path).tensors) < len(llmjax.inspect(folder).tensors)
    found, expected = (llmjax.load(path).params for path in (tmp_path, folder))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", ["gemma4_moe", "phi35_mini_longrope", "smollm3"])
def test_a_gguf_file_becomes_a_directory_of_transformers(name, tmp_path):
    """Ropes that the file has as tensors stand in the config, and of the last two classes' padding tokens, which small
    vocabularies do not have, none is left to transformers."""
    llmjax.convert(gguf_files.write(CASES / name, tmp_path / "x.gguf"), tmp_path / "hf", to="hf")
    model_type = json.loads((tmp_path / "hf/config.json").read_text())["model_type"]
    with np.load(CASES / name / "expected.npz") as expected:
        found = reference.logits(reference.load(tmp_path / "hf", model_type), expected["ids"].tolist())
        assert np.abs(found - expected["logits"]).max() <= expected["atol"]


def test_bfloat16_rounds_as_transformers_does(name, tmp_path):
    """Profile hf: closer to transformers' bfloat16 run than that is to its own float32 run, by far except for Falcon,
    whose fused attention torch evaluates in a way of its own."""
    m = meta(name)
    folder = checkpoints.write(tmp_path, m["config"], m["shapes"], SEED, "bfloat16")
    ids = ids_of(name)
    theirs, exact = (
        reference.logits(reference.load(folder, m["config"]["model_type"], dtype), ids)
        for dtype in ("bfloat16", "float32")
    )
    ours = llmjax.load(folder, numerics="hf").logits([ids])[0]
    assert ours.dtype == np.float32
    allowed = 1.5 if m["config"]["model_type"] == "falcon" else 0.9
    assert kl(theirs, ours).mean() <= allowed * kl(theirs, exact).mean()
    exact_ours = llmjax.load(folder, numerics="reference").logits([ids])[0]
    if m["config"]["model_type"] != "falcon":  # whose bfloat16 ALiBi `reference` does not share
        assert error(exact_ours, exact) <= TOLERANCE


@pytest.mark.parametrize("name", golden.some({"phi3", "falcon_40b"}, ("phi", "qwen2", "gemma3", "phi3", "falcon_40b")))
def test_float16_files(name, tmp_path):
    m = meta(name)
    folder = checkpoints.write(tmp_path, m["config"], m["shapes"], SEED, "float16")
    ids = ids_of(name)
    expected = reference.logits(reference.load(folder, m["config"]["model_type"], "float32"), ids)
    assert error(llmjax.load(folder).logits([ids])[0], expected) <= TOLERANCE
