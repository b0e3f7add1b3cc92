"""SamplingParams: what is refused, and that the message names field, value and range."""

import functools

import pytest

import llmjax
from llmjax import RequestError, SamplingParams
from llmjax.errors import shown

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
