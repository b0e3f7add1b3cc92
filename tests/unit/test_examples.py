"""The research examples run, say what is so, and draw it."""

import importlib
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

import llmjax
from tests.tiny import checkpoint

FOLDER = Path(__file__).parents[2] / "scripts" / "examples"
NAMES = sorted(f.stem for f in FOLDER.glob("*.py") if f.stem != "picture")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("examples"), max_position_embeddings=400)


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Runs one: what it returns, and the texts of its picture."""
    monkeypatch.syspath_prepend(FOLDER)

    def run(name, *options):
        picture = tmp_path / "picture.svg"
        found = importlib.import_module(name).main([*map(str, options), "--output", str(picture)])
        return found, [e.text or "" for e in ElementTree.parse(picture).iter() if e.tag.endswith("text")]

    return run


def test_each_is_short_and_tested():
    assert NAMES == [
        "activation_patching",
        "head_ablation",
        "logit_lens",
        "own_attention",
        "steering_vector",
        "train_lora",
    ]
    assert all(len((FOLDER / f"{name}.py").read_text().splitlines()) < 80 for name in NAMES)


def test_logit_lens(example, tiny):
    (probs, tokens), texts = example("logit_lens", "--model", tiny, "--prompt", "Hi you")
    model = llmjax.load(tiny)
    ids = model.tokenizer.encode("Hi you")
    logits = model.logits([ids])[0]
    expected = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True)).max(-1)
    np.testing.assert_allclose(probs[-1], expected, rtol=1e-4)  # after the last layer it is what the model says
    assert tokens[-1] == [model.tokenizer.decode([int(i)]) for i in logits.argmax(-1)]
    assert not np.allclose(probs[0], probs[-1], rtol=1e-2) and "layers.0.resid" in texts


@pytest.mark.slow
def test_train_lora(example, tiny):
    losses, texts = example("train_lora", "--model", tiny, "--steps", "12")
    assert losses[-1] < 0.95 * losses[0] and len(losses) == 7 and "step 12" in texts


@pytest.mark.slow
def test_activation_patching(example, tiny):
    share, texts = example(
        "activation_patching", "--model", tiny, "--clean", "abcd", "--other", "abXd", "--answers", "x", "y"
    )
    assert share.shape == (2, 4) and "layer 1" in texts
    np.testing.assert_allclose(share[:, :2], 0, atol=1e-4)  # before they differ
    np.testing.assert_allclose(share[-1], [0, 0, 0, 1], atol=1e-4)  # the last token's last residual says it all


@pytest.mark.slow
def test_head_ablation(example, tiny):
    """What a head costs is what the model loses where nothing of that head goes through o."""
    cost, texts = example("head_ablation", "--model", tiny)
    assert cost.shape == (2, 6) and "layer 1" in texts
    model = llmjax.load(tiny)
    ids = 2 * model.tokenizer.encode(importlib.import_module("head_ablation").TEXT)

    def loss():
        logits = model.logits([ids[:-1]])[0]
        log_probs = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
        return -log_probs[np.arange(len(ids) - 1), ids[1:]][len(ids) // 2 :].mean()

    whole, o = loss(), model.params["layers_1"]["attn"]["o"]
    width = o["weight"].shape[1] // 6
    o["weight"] = o["weight"].at[:, 4 * width : 5 * width].set(0)
    np.testing.assert_allclose(cost[1, 4], loss() - whole, atol=1e-5)
    assert abs(cost[1, 4]) > 1e-4


@pytest.mark.slow
def test_own_attention(example, tiny):
    """With all in sight it is llmjax's own."""
    found, _ = example("own_attention", "--model", tiny)
    model = llmjax.load(tiny, context_length=512)
    ids = model.tokenizer.encode(importlib.import_module("own_attention").TEXT * 3)
    assert found["all"] == pytest.approx(-np.mean(llmjax.LLM(model, numerics="reference").score([ids])[0].logprobs[1:]))
    assert len(set(found.values())) == 3


@pytest.mark.slow
def test_on_the_demo_model(example, smollm2_path):
    """Steering goes both ways; the answer moves from the country's name to the last token; sinks save a window."""
    steered, texts = example("steering_vector", "--model", smollm2_path, "--strengths", -4, 0, 4)
    assert steered[0] < steered[1] < steered[2] and len(texts) == 7
    share, _ = example("activation_patching", "--model", smollm2_path)
    assert share[0, 3] > 0.8 and share[-1, -1] > 0.99 and abs(share[:, :3]).max() < 1e-3
    found, _ = example("own_attention", "--model", smollm2_path)
    assert found["all"] <= found["window 12 + 4 sinks"] < found["window 16"]


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_readmes_snippets(tmp_path, monkeypatch, capsys, smollm2_path):
    """As they stand, one after the other; what they print is what it should be."""
    monkeypatch.chdir(tmp_path)
    section = README[README.index("## Research\n") : README.index("## What is where\n")]
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", section, re.S):
        exec(snippet, names)
    model, states, trace, tap = (names[n] for n in ("model", "states", "trace", "tap"))
    np.testing.assert_allclose(states.row(1)[tap], trace.activations[tap], rtol=1e-4, atol=1e-4)
    steered = names["llm"].model.logits([names["ids"]])[0]
    np.testing.assert_allclose(names["logits"](model.params, 4.0)[0], steered, rtol=1e-3, atol=1e-2)
    text = names["llm"].generate("The film was", {"max_tokens": 12, "temperature": 0})[0].outputs[0].text
    assert text in capsys.readouterr().out and text != ""
