"""Checkpoints that transformers wrote, with what it computes for them: kinds whose files are more than their shapes."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

import llmjax
from tests.tiny import some

FOLDER = Path(__file__).parents[1] / "data" / "cases"
NAMES = sorted(folder.name for folder in FOLDER.iterdir())
# Each with something that no other has; the rest run with --runslow.
QUICK = {"gemma3n_cond", "gemma4_moe", "lfm2", "llama_dynamic_old", "phi35_mini_longrope", "qwen3_moe"}
SOME = some(QUICK, NAMES)
# Texts longer than the configuration's context are among them.
CONTEXT = 512


def kinds():
    """Model types that have a case, those of text models inside others among them."""
    configs = [json.loads((FOLDER / name / "config.json").read_text()) for name in NAMES]
    return {c["model_type"] for c in configs} | {c["text_config"]["model_type"] for c in configs if "text_config" in c}


@functools.cache
def loaded(name):
    with np.load(FOLDER / name / "expected.npz") as file:
        expected = {key: file[key] for key in file.files}
    return llmjax.load(FOLDER / name, context_length=CONTEXT), expected


@pytest.mark.parametrize("name", SOME)
def test_logits(name, record_property):
    model, expected = loaded(name)
    error = np.abs(model.logits([expected["ids"].tolist()])[0] - expected["logits"]).max()
    record_property("error", float(error))
    assert error <= expected["atol"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "mixed-8-4-8"])
@pytest.mark.parametrize("name", NAMES)
def test_quantized_weights_mean_their_dequantized_values(name, scheme, tmp_path):
    llmjax.convert(FOLDER / name, tmp_path / "q", quantize=scheme)
    packed, exact = llmjax.load(tmp_path / "q"), llmjax.load(tmp_path / "q", dtype="float32")
    found, expected = (model.logits([list(range(3, 15))])[0] for model in (packed, exact))
    assert np.abs(found - expected).max() <= 3e-5 * np.abs(expected).max()


def kl(a, b):
    """Of the distributions of two arrays of logits, the mean over tokens."""
    a, b = (x.astype(np.float64) for x in (a, b))
    a, b = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (a, b))
    return float((np.exp(a) * (a - b)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_as_transformers(name, record_property):
    """What the same roundings leave is far below what they cost: a twentieth at most, where twice is promised."""
    _, expected = loaded(name)
    if "bf16" not in expected:
        pytest.skip("stored in float32")
    model = llmjax.load(FOLDER / name, context_length=CONTEXT, numerics="hf")
    found = kl(expected["bf16"], model.logits([expected["short"].tolist()])[0])
    record_property("kl", found)
    assert found <= kl(expected["bf16"], expected["short_logits"]) / 20


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_hidden_states(name):
    model, expected = loaded(name)
    if "hidden" not in expected:
        pytest.skip("none stored")
    found = llmjax.trace(model, expected["short"].tolist(), "layers.*.resid").activations.values()
    for ours, theirs in zip(found, expected["hidden"], strict=True):
        assert np.abs(ours - theirs).max() <= expected["atol"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_generation(name):
    """As transformers' generate with its cache: what depends on a text's length changes on the way."""
    model, expected = loaded(name)
    llm = llmjax.LLM(model, max_batch=4, chunk=8, block=8, numerics="reference")
    params = llmjax.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    (out,) = llm.generate([expected["short"].tolist()], params)
    assert out.outputs[0].token_ids == expected["greedy"].tolist()
