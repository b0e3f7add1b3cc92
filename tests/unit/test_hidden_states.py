"""Activations of many texts: on disk what a trace has, and derivatives by any of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmjax
from llmjax import RequestError
from tests.parity.test_cases import loaded
from tests.tiny import random_ids, random_model

MODEL = random_model()
RNG = np.random.default_rng(2)
TEXTS = [random_ids(RNG, n) for n in (5, 31, 1, 16, 17, 40, 3)]
TAPS = ["embed", "layers.*.resid", "layers.0.attn.q_rot"]


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    return llmjax.hidden_states(MODEL, iter(TEXTS), TAPS, output=tmp_path_factory.mktemp("states") / "out")


def test_the_disk_has_what_a_trace_has(states, monkeypatch):
    assert len(states) == len(TEXTS) and states.taps == [
        "embed", "layers.0.attn.q_rot", "layers.0.resid", "layers.1.resid"
    ]  # fmt: skip
    assert states["token_ids"].tolist() == sum(TEXTS, [])
    assert states["layers.0.attn.q_rot"].shape == (113, 6, 8) and states["embed"].dtype == np.float32
    for i in (2, 5):
        expected = llmjax.trace(MODEL, TEXTS[i], TAPS).activations
        found = states.row(i)
        assert list(found) == list(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(states.row(-1)["embed"], states["embed"][110:113])
    assert states.manifest["texts"] == 7 and states.manifest["tokens"] == 113


@pytest.mark.slow
def test_a_text_is_as_long_as_without_its_padding(tmp_path):
    """To ropes that follow the length, beyond the one the model was made for."""
    model = loaded("llama_dynamic_old")[0]
    texts = [RNG.integers(0, 290, n).tolist() for n in (5, 40)]
    found = llmjax.hidden_states(model, texts, "*.resid", output=tmp_path / "out")
    for i, text in enumerate(texts):
        for name, value in llmjax.trace(model, text, "*.resid").activations.items():
            np.testing.assert_allclose(found.row(i)[name], value, rtol=1e-4, atol=1e-4)


def test_padding_is_of_no_token_for_which_the_model_computes_nan(states, tmp_path):
    params = jax.tree.map(lambda x: x, MODEL.params)
    params["embed"]["weight"] = params["embed"]["weight"].at[0].set(np.inf)
    model = dataclasses.replace(MODEL, params=params)
    found = llmjax.hidden_states(model, [TEXTS[0]], "*.resid", output=tmp_path / "out")
    assert 0 not in TEXTS[0]
    np.testing.assert_array_equal(found.row(0)["layers.1.resid"], states.row(0)["layers.1.resid"])


def test_groups_that_fill_on_the_way_and_half_the_bytes(states, tmp_path, monkeypatch):
    monkeypatch.setattr("llmjax.oracle.hidden_states.TOGETHER", 32)
    found = llmjax.hidden_states(MODEL, TEXTS, "*.resid", output=tmp_path / "half", dtype="float16")
    assert found.taps == ["layers.0.resid", "layers.1.resid"]
    for name in found.taps:
        np.testing.assert_allclose(found[name], states[name], rtol=2e-3, atol=2e-3)
    assert np.load(tmp_path / "half/layers.0.resid.npy").shape == (113, 48)  # by NumPy alone


@pytest.mark.parametrize(
    "texts, options, message",
    [
        ([[1, 2], [9999]], {}, "text 1: token id 9999 is outside the vocabulary"),
        ([[1]], {"taps": "layers.9.*"}, "'layers.9.\\*' matches none of embed, "),
        ([[1]], {"taps": "*.probs"}, "probabilities are not written"),
        ([[1]], {"taps": []}, "taps: \\[\\] matches none of embed, "),
        ([[1]], {"taps": None}, "taps: None matches none of embed, "),
        ([[1]], {"dtype": "int8"}, "dtype: expected float32 or float16, found 'int8'"),
        ([[1]], {"dtype": "float16", "interventions": {"embed": lambda x: x * 1e6}, "taps": "embed"}, "0: values that"),
        ([], {}, "batch: empty"),
        ("text", {}, "batch: expected token id lists"),
    ],
)
def test_nothing_is_left_of_what_fails(texts, options, message, tmp_path):
    with pytest.raises(RequestError, match=message):
        llmjax.hidden_states(MODEL, texts, output=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_of_traces_is_one_after_the_other():
    texts = [TEXTS[0], TEXTS[6]]
    found = llmjax.trace(MODEL, texts, "*.resid")
    for trace, ids in zip(found, texts, strict=True):
        alone = llmjax.trace(MODEL, ids, "*.resid")
        assert trace.manifest == alone.manifest
        for name, value in alone.activations.items():
            np.testing.assert_array_equal(trace.activations[name], value)
    (only,) = llmjax.trace(MODEL, [TEXTS[0]], "embed")
    assert only.manifest["token_ids"] == TEXTS[0]
    with pytest.raises(RequestError, match="row 1: empty"):
        llmjax.trace(MODEL, [TEXTS[0], []])


def surprise(logits):
    return -jax.nn.log_softmax(logits[-1])[7]


def test_gradients_are_those_of_what_is_added(tmp_path):
    """By a tap that has an intervention, too: behind it; beside the taps' own values."""
    ids, name, change = TEXTS[0], "layers.0.resid", {"layers.0.resid": lambda x: 2 * x}
    trace = llmjax.trace(MODEL, ids, ["*.resid", "*.probs", "logits"], interventions=change, gradients_of=surprise)
    assert set(trace.gradients) == set(trace.activations)
    assert {n: g.shape for n, g in trace.gradients.items()} == {n: a.shape for n, a in trace.activations.items()}
    plain = llmjax.trace(MODEL, ids, ["*.resid"], interventions=change).activations
    np.testing.assert_allclose(trace.activations["layers.1.resid"], plain["layers.1.resid"], rtol=1e-5, atol=1e-5)

    def loss(added):
        moved = {name: lambda x: 2 * x + added}
        return surprise(MODEL.apply(MODEL.params, jnp.array([ids]), interventions=moved)[0])

    expected = jax.jit(jax.grad(loss))(jnp.zeros((1, len(ids), 48)))[0]
    np.testing.assert_allclose(trace.gradients[name], expected, rtol=1e-4, atol=1e-5)
    probability = jax.nn.softmax(trace.activations["logits"][-1]).at[7].add(-1)
    np.testing.assert_allclose(trace.gradients["logits"][-1], probability, rtol=1e-4, atol=1e-6)
    trace.save(tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "activations.safetensors", "gradients", "manifest.json"
    ]  # fmt: skip
    assert list(json.loads((tmp_path / "out/manifest.json").read_text())["interventions"]) == [name]
    same = llmjax.compare(tmp_path / "out", tmp_path / "out")
    assert same.verdict == "identical"


def test_what_is_no_number_has_no_gradients():
    with pytest.raises(
        RequestError, match="gradients_of: expected a function that returns a float, found float32 .600."
    ):
        llmjax.trace(MODEL, TEXTS[0], "embed", gradients_of=lambda logits: logits[-1])
    with pytest.raises(RequestError, match="gradients_of: expected a function of the logits, found 'logits'"):
        llmjax.trace(MODEL, TEXTS[0], "embed", gradients_of="logits")


def test_a_folder_is_opened_again_by_its_name(states, tmp_path):
    again = llmjax.HiddenStates(str(states.path))
    assert len(again) == len(TEXTS) and again.taps == states.taps
    with pytest.raises(RequestError, match="path: expected a path, found 5"):
        llmjax.HiddenStates(5)
    for ask in (len, lambda found: found.taps, lambda found: found.row(0)):
        with pytest.raises(RequestError, match="cannot be read, expected a folder of hidden_states: No such file"):
            ask(llmjax.HiddenStates(tmp_path))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RequestError, match="manifest.json: cannot be read"):
        llmjax.HiddenStates(tmp_path).taps  # noqa: B018
