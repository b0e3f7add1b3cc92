"""Every architecture against what transformers computed once: no torch needed."""

import jax
import numpy as np
import pytest

import llmjax
from llmjax.models.registry import architectures
from tests.parity import golden
from tests.parity.golden import TOLERANCE, arrays, error, meta
from tests.parity.test_cases import kinds
from tests.parity.variants import VARIANTS

# What compiles the whole engine runs on these by default.
QUICK = {"gemma2_window_1"}
# And on a prompt of several windows: every kind of rope, mask and bias.
LONG = {"falcon_rw", "gemma2", "gemma3_multimodal", "llama_llama3", "phi_gqa_qk_norm", "stablelm_qkv_bias_qk_norm"}


@pytest.fixture(scope="module", params=golden.some(golden.ONE_EACH))
def case(request):
    return request.param, golden.load(request.param)


@pytest.fixture(scope="module", params=golden.some(LONG))
def long_case(request):
    return request.param, golden.load(request.param)


@pytest.fixture(scope="module", params=golden.some(QUICK))
def quick_case(request):
    return request.param, golden.load(request.param)


@pytest.fixture(autouse=True)
def strict_jax():
    """As who looks for mistakes in programs of their own has it: models say their ranks and dtypes."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def test_every_architecture_has_variants_and_every_variant_a_file():
    assert {c["model_type"] for c in VARIANTS.values()} | kinds() == set(architectures())
    assert set(VARIANTS) == set(golden.NAMES), "run scripts/make_golden.py"
    for name, config in VARIANTS.items():
        assert meta(name)["config"] == config, f"{name} changed: run scripts/make_golden.py {name}"


def test_logits(long_case, record_property):
    name, model = long_case
    expected = arrays(name)
    found = error(model.logits([expected["long"].tolist()])[0][meta(name)["rows"]], expected["logits_long"])
    record_property("error", found)
    assert found <= TOLERANCE


def test_every_layer_and_every_position_of_a_short_prompt(case):
    name, model = case
    expected = arrays(name)
    trace = llmjax.trace(model, expected["short"].tolist(), ["embed", "layers.*.resid", "logits"])
    *hidden, logits = trace.activations.values()
    assert error(logits, expected["logits_short"]) <= TOLERANCE
    for found, wanted in zip(hidden, expected["hidden"], strict=True):
        assert error(found, wanted) <= TOLERANCE


def test_cached_generation_and_scores(quick_case):
    """Chunks, blocks and windows smaller than the prompts, through the engine."""
    name, model = quick_case
    expected = arrays(name)
    llm = llmjax.LLM(model, max_batch=4, chunk=16, block=32)
    out = llm.generate(expected["short"][:7].tolist(), llmjax.SamplingParams(temperature=0, max_tokens=24))
    assert out[0].outputs[0].token_ids == expected["greedy"].tolist()
    ids = expected["long"].tolist()
    (score,) = llm.score([ids])
    rows = [r for r in meta(name)["rows"] if r + 1 < len(ids)]
    wide = expected["logits_long"][: len(rows)].astype(np.float64)
    log_probs = wide - np.logaddexp.reduce(wide, -1, keepdims=True)
    wanted = [log_probs[i, ids[r + 1]] for i, r in enumerate(rows)]
    assert error(np.array([score.logprobs[r + 1] for r in rows]), np.array(wanted)) <= 3 * TOLERANCE


@pytest.mark.parametrize(
    "name", golden.some({"falcon_11_heads_untied"}, [n for n in golden.NAMES if "hf_logits_short" in arrays(n)])
)
def test_profile_hf_is_transformers_where_it_differs_from_the_paper(name):
    """Falcon's ALiBi in bfloat16: visible from position 256 on, or with head counts that are no power of two."""
    expected = arrays(name)
    model = golden.load(name, "hf")
    short, long = model.logits([expected["short"].tolist(), expected["long"].tolist()])
    assert error(short, expected["hf_logits_short"]) <= TOLERANCE
    assert error(long[meta(name)["rows"]], expected["hf_logits_long"]) <= TOLERANCE
    assert error(expected["logits_long"], expected["hf_logits_long"]) > 30 * TOLERANCE


def test_rows_do_not_depend_on_their_batch(quick_case):
    name, model = quick_case
    expected = arrays(name)
    short, long = expected["short"].tolist(), expected["long"].tolist()
    together = model.logits([short, long[:1], short[:9]])
    for ids, found in zip([short, long[:1], short[:9]], together, strict=True):
        np.testing.assert_array_equal(model.logits([ids])[0], found)
    assert error(together[2], expected["logits_short"][:9]) <= TOLERANCE
