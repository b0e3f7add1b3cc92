"""One set of parameters for a model, whichever door it comes through."""

import inspect

import jax
import numpy as np
import pytest

import llmjax
from llmjax import LLM, ConfigError, LlmInference, LlmInferenceOptions, RequestError
from llmjax.checkpoint.loading import LoadOptions
from tests import tiny
from tests.mediapipe_files import GEMMA
from tests.unit.test_lora import write_adapter

IDS = [5, 9, 2, 77]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "m")


def test_a_path_takes_what_load_takes():
    assert {"path", "numerics", *LoadOptions.__annotations__} == set(inspect.signature(llmjax.load).parameters)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16"},
        {"quantize": "int8", "numerics": "dynamic_int8"},
        {"config": {"rms_norm_eps": 0.25}},
        {"numerics": "reference"},
    ],
    ids=str,
)
def test_a_path_gives_the_model_that_load_gives(folder, options):
    found, expected = LLM(folder, **options).model, llmjax.load(folder, **({"numerics": "fast"} | options))
    assert (found.config, found.numerics) == (expected.config, expected.numerics)
    assert jax.tree.structure(found.params) == jax.tree.structure(expected.params)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.parametrize("options", [{"random_weights": True}, {"lora_mode": "merged"}, {"config": "config:none"}])
def test_what_load_refuses_a_path_refuses(folder, options):
    with pytest.raises(llmjax.LlmjaxError) as expected:
        llmjax.load(folder, **options)
    with pytest.raises(type(expected.value)) as found:
        LLM(folder, **options)
    assert str(found.value) == str(expected.value)


def test_a_parameter_there_is_not(folder):
    with pytest.raises(TypeError, match="unknown parameter quantise; those of llmjax.load are dtype, quantize"):
        LLM(folder, quantise="int8")


@pytest.mark.parametrize("profile", ["fast", "hf", "reference"])
def test_a_loaded_model_computes_under_the_numerics_that_are_asked_for(folder, profile):
    model = llmjax.load(folder, dtype="bfloat16")
    found, expected = LLM(model, numerics=profile).model, llmjax.load(folder, dtype="bfloat16", numerics=profile)
    assert found.numerics == expected.numerics and found.params is model.params
    np.testing.assert_array_equal(found.logits([IDS])[0], expected.logits([IDS])[0])
    assert model.numerics.name == "reference"


def test_numerics_that_nobody_chose_are_warned_of(folder, recwarn):
    with pytest.warns(UserWarning, match=r'reference, llmjax.load.s default.*slower.*LLM\(model, numerics="fast"\)'):
        assert LLM(llmjax.load(folder)).model.numerics.name == "reference"
    LLM(llmjax.load(folder, numerics="reference"))
    LLM(llmjax.load(folder), numerics="reference")
    LLM(tiny.random_model("reference"))
    assert not recwarn.list


@pytest.mark.parametrize("name", LoadOptions.__annotations__)
def test_what_would_want_the_model_loaded_again_is_refused(name):
    model = tiny.random_model()
    with pytest.raises(RequestError, match=f"^{name}: the model is loaded already.*llmjax.load, or the path to LLM"):
        LLM(model, **{name: True if name in ("check_finite", "random_weights") else "float32"})
    LLM(model, **{name: None})


def test_numerics_that_a_loaded_model_cannot_have(folder):
    for profile in ("mediapipe_cpu", "fast"):
        with pytest.raises(ConfigError, match=f"loaded for mediapipe_gpu.*load it with numerics='{profile}'"):
            LLM(llmjax.load(GEMMA, numerics="mediapipe_gpu"), numerics=profile)
    expected = llmjax.load(GEMMA, numerics="mediapipe_gpu")
    assert LLM(llmjax.load(GEMMA), numerics="mediapipe_gpu").model.config == expected.config
    with pytest.raises(ConfigError, match="dynamic_int8 is about quantized weights and there are none"):
        LLM(llmjax.load(folder), numerics="dynamic_int8")
    with pytest.raises(ConfigError, match="unknown profile 'quick'"):
        LLM(llmjax.load(folder), numerics="quick")


def test_an_adapter_merged_for_narrow_products_stays_there(folder, tmp_path):
    adapter = write_adapter(folder, tmp_path / "adapter")
    model = llmjax.load(folder, dtype="bfloat16", numerics="fast", lora=adapter)
    with pytest.raises(ConfigError, match="its adapter merged as products in bfloat16 need it"):
        LLM(model, numerics="reference")
    wide = llmjax.load(folder, dtype="bfloat16", lora=adapter)
    found = LLM(wide, numerics="fast").model.logits([IDS])[0]
    np.testing.assert_array_equal(found, model.logits([IDS])[0])


def test_mediapipes_face_takes_numerics(folder):
    for options, expected in (({}, "fast"), ({"numerics": "reference"}, "reference")):
        with LlmInference.create_from_options(LlmInferenceOptions(str(folder), **options)) as task:
            assert task._llm.model.numerics.name == expected


@pytest.mark.parametrize("name", ["truncate_prompt", "enable_prefix_caching", "fold_system"])
def test_a_switch_is_true_or_false(name):
    with pytest.raises(RequestError, match=f"{name}: expected true or false, found 'false'"):
        LLM(tiny.random_model(), **{name: "false"})
