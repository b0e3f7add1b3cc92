"""SamplingParams: what is refused, and that the message names field, value and range."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

import llmjax
from llmjax import RequestError, SamplingParams
from llmjax.errors import ConfigError, shown
from llmjax.quant.schemes import parse
from llmjax.training.config import TrainConfig

NESTED = functools.reduce(lambda inner, _: [inner], range(5000), [])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("stop", ["", "x"]),
        ("stop", [3]),
        ("stop", 5),
        ("stop_token_ids", 7),
        ("stop_token_ids", "7"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("ignore_eos", 1),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("n", 0),
        ("n", 1.0),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -3),
        ("logit_bias", {3: 101}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", [3]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("bad_words", [""]),
        ("top_k", 3_000_000_000),
        ("temperature", 10**400),
        ("temperature", -(10**5000)),
        ("repetition_penalty", 1e39),
        ("repetition_penalty", 1e-50),
        ("repetition_penalty", 10**400),
        ("max_tokens", 10**5000),
        ("min_tokens", 2**63),
        ("seed", 10**5000),
        ("seed", "18446744073709551616"),
        ("seed", "007"),
        ("seed", "-1"),
        ("seed", "9" * 5000),
        ("stop", [10**5000]),
        ("stop", ["\ud800"]),
        ("bad_words", "a\udcff"),
        ("stop_token_ids", [2**31]),
        ("allowed_token_ids", [10**5000]),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {10**5000: 1}),
        ("logit_bias", {5: 10**400}),
        ("logit_bias", {"05": 1}),
        ("n", 10**5000),
        ("n", NESTED),
        ("bad_words", NESTED),
    ],
    ids=shown,
)
def test_invalid_values_are_refused_by_name(field, value):
    with pytest.raises(RequestError, match=f"^{field}: expected .*, found") as refused:
        SamplingParams(**{field: value})
    assert len(str(refused.value)) < 250


def test_min_tokens_above_max_tokens():
    with pytest.raises(RequestError, match="min_tokens: expected at most max_tokens 3, found 4"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_samples_of_a_greedy_prompt():
    with pytest.raises(RequestError, match="n: expected 1 with temperature 0, where all samples are the same, found 2"):
        SamplingParams(n=2, temperature=0)


def test_unknown_parameter_from_json():
    with pytest.raises(RequestError, match="unknown sampling parameter temprature"):
        SamplingParams.from_dict({"temprature": 1})


def test_forms_are_settled():
    params = SamplingParams(stop="a", top_k=-1, stop_token_ids=[3])
    assert (params.stop, params.top_k, params.stop_token_ids) == (("a",), 0, (3,))
    assert SamplingParams(logit_bias={"5": 1}).logit_bias == {5: 1}
    assert SamplingParams(seed="18446744073709551615").seed == 2**64 - 1 and SamplingParams(seed="0").seed == 0
    assert SamplingParams(top_k=2**31 - 1, max_tokens=2**63 - 1).top_k == 2**31 - 1


def test_every_public_name_exists():
    for name in llmjax.__all__:
        assert getattr(llmjax, name) is not None


def test_numbers_of_numpy_and_jax():
    given = {
        "temperature": np.float32(0.5),
        "top_k": np.int64(3),
        "ignore_eos": np.bool_(True),
        "seed": np.uint64(2**63),
    }
    lists = {"stop_token_ids": np.array([1, 2]), "allowed_token_ids": [np.int32(3)], "stop": (np.str_("x"),)}
    params = SamplingParams(**given, **lists, top_p=jnp.float32(0.25), logit_bias={np.int64(4): np.float32(1.5)})
    expected = {"temperature": 0.5, "top_k": 3, "ignore_eos": True, "seed": 2**63, "top_p": 0.25}
    expected |= {"stop_token_ids": (1, 2), "allowed_token_ids": (3,), "stop": ("x",), "logit_bias": {4: 1.5}}
    found = {name: getattr(params, name) for name in expected}
    assert found == expected and json.dumps(found, default=None)
    config = TrainConfig(rank=np.int64(4), learning_rate=np.float64(0.5), betas=np.array([0.5, 0.75]))
    assert (config.rank, config.learning_rate, config.betas) == (4, 0.5, (0.5, 0.75))


@pytest.mark.parametrize(
    "value", [np.array([1, 2]), np.zeros(0), np.full((1, 1), 0.5), np.float32("nan"), np.array("x")]
)
def test_an_array_is_no_number(value):
    for field in ("temperature", "top_k", "n", "seed", "logprobs"):
        with pytest.raises(RequestError, match=f"^{field}: expected an? (number|integer)"):
            SamplingParams(**{field: value})
    with pytest.raises(ConfigError, match="^rank: expected a positive integer, found"):
        TrainConfig(rank=value)


def test_keys_of_any_type_are_named():
    with pytest.raises(RequestError, match="unknown sampling parameter 5, x"):
        SamplingParams.from_dict({5: 1, "x": 2})
    with pytest.raises(ConfigError, match="unknown 5, x"):
        TrainConfig.from_dict({5: 1, "x": 2})
    with pytest.raises(ConfigError, match="training: expected an object, found 5"):
        TrainConfig.from_dict(5)
    with pytest.raises(ConfigError, match="unknown role 5, x"):
        parse({5: "int8", "x": "int8"})
