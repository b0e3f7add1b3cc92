"""What users hand to ``LLM``, ``load``, ``trace`` and ``LlmInference``: one clear error for what is none, never a
traceback, and nothing that is left out in silence."""

import re

import jax
import numpy as np
import pytest

import llmjax
from llmjax import (
    LLM,
    LlmInference,
    LlmInferenceOptions,
    LlmInferenceSession,
    LlmInferenceSessionOptions,
    SamplingParams,
)
from llmjax.errors import CheckpointError, ConfigError, LoraError, RequestError, TooLongError
from llmjax.oracle import trace as tracing
from tests import tiny

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TALK = [{"role": "user", "content": "hi"}]
SHORT = SamplingParams(max_tokens=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("doors"))


@pytest.fixture(scope="module")
def llm(folder):
    return tiny.roomy(LLM(folder, max_batch=4, chunk=16, block=16, chat_template=TEMPLATE))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts: expected a text, a list of token ids, or a list of those, found None"),
        (5, "prompts: expected .* found 5"),
        ({"prompt": "x"}, "prompts: expected .* found {'prompt': 'x'}"),
        (b"abc", "prompts: expected .* found b'abc'"),
        ([None], "prompt 0: prompt: expected a text or a list of token ids, found None"),
        (["a", 1], "prompt 1: prompt: expected .* found 1"),
        ([1.5], "prompt 0: prompt: expected .* found 1.5"),
        ([b"abc"], "prompt 0: prompt: expected .* found b'abc'"),
        ([[]], "prompt 0: prompt: empty"),
        ([1, "a"], "prompt: expected a list of token ids"),
    ],
)
def test_no_prompt(llm, prompts, message):
    with pytest.raises(RequestError, match=f"^{message}"):
        llm.generate(prompts)
    told = re.sub(r"^prompt(s?)", r"text\1", message).replace(": prompt:", ": text:")
    with pytest.raises(RequestError, match=f"^{told}"):
        llm.score(prompts)


def test_every_kind_of_list_is_one(llm):
    expected = llm.generate([[5, 6]], SHORT)[0]
    for prompts in ([np.array([5, 6])], np.array([[5, 6]]), iter([(5, 6)]), [jax.numpy.array([5, 6])], [range(5, 7)]):
        (found,) = llm.generate(prompts, [{"max_tokens": 2}])
        assert found == expected and all(type(i) is int for i in found.prompt_token_ids)


@pytest.mark.parametrize("params", ["x", 5, [5], ["x"], [SHORT, SHORT], [{"max_tokens": 0}], {"max_token": 1}])
def test_no_parameters(llm, params):
    with pytest.raises(RequestError, match="sampling_params: expected|max_tokens: expected|unknown sampling parameter"):
        llm.generate(["a"], params)
    with pytest.raises(RequestError, match="sampling_params: expected|max_tokens: expected|unknown sampling parameter"):
        llm.chat([TALK], params)


@pytest.mark.parametrize("chat", [TALK[0], None, 5, "hi", [None], [[]], [5], [TALK, None]])
def test_no_conversation(llm, chat):
    with pytest.raises(RequestError, match=r"^(conversation \d: )?messages: expected a (non-empty )?list"):
        llm.chat(chat, SHORT)


def test_a_conversation_each_with_its_own_parameters(llm):
    found = llm.chat([TALK, TALK], [SHORT, {"max_tokens": 3}], lora=[None, None])
    assert [len(output.outputs[0].token_ids) for output in found] == [2, 3]
    with pytest.raises(TypeError, match="unknown option of a chat dates"):
        llm.chat(TALK, dates="x")


def test_a_long_prompt_among_others_keeps_its_kind_of_error(llm):
    with pytest.raises(TooLongError, match="^prompt 1: prompt: 300 tokens"):
        llm.generate([[1], [1] * 300])


def test_a_stream_refuses_what_it_has_no_place_for(llm):
    for params in (SamplingParams(logprobs=1), SamplingParams(prompt_logprobs=0), SamplingParams(n=2)):
        with pytest.raises(RequestError, match="a stream is"):
            list(llm.stream("a", params))


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (CheckpointError, {"model": None}),
        (CheckpointError, {"model": 5}),
        (LoraError, {"loras": ["a"]}),
        (LoraError, {"lora": 5}),
        (ConfigError, {"config": 5}),
        (ConfigError, {"quantize": 5}),
        (ConfigError, {"numerics": np.array([1, 2])}),
        (ConfigError, {"dtype": np.zeros(0)}),
        (ConfigError, {"check_finite": np.array([1, 2])}),
        (ConfigError, {"context_length": np.array([1, 2])}),
        (ConfigError, {"context_length": 2**70}),
        (RequestError, {"seed": -1}),
        (RequestError, {"max_batch": True}),
        (RequestError, {"generation_config": "vllm"}),
        (RequestError, {"chat_template": 5}),
        (RequestError, {"chat_template_kwargs": [1]}),
        (RequestError, {"chat_template_kwargs": {"messages": []}}),
    ],
)
def test_no_model_no_option(folder, error, options):
    with pytest.raises(error, match=f"^{'model' if 'model' in options else next(iter(options))}"):
        LLM(**({"model": folder} | options))


def test_token_ids_twice_in_a_bias():
    with pytest.raises(RequestError, match="logit_bias: a token is there twice"):
        SamplingParams(logit_bias={"5": 1, 5: 2})


def test_logits_of_what_is_no_batch(llm):
    for batch in (None, 5, "abc"):
        with pytest.raises(RequestError, match="^batch: expected a list of token id lists"):
            llm.model.logits(batch)


def test_closed_twice(folder):
    options = LlmInferenceOptions(str(folder), max_tokens=np.int64(20))
    task = LlmInference.create_from_options(options)
    task.close()
    task.close()
    for call in (task.size_in_tokens, task.generate_response):
        with pytest.raises(RequestError, match="this task is closed"):
            call("a")
    assert repr(task) == "LlmInference(closed)"
    with pytest.raises(RequestError, match="^options: expected LlmInferenceOptions, found None"):
        LlmInference.create_from_options(None)
    with pytest.raises(RequestError, match="^llm_inference: expected an LlmInference, found None"):
        llmjax.LlmInferenceSession.create_from_options(None)
    with LlmInference.create_from_options(options) as task:
        for wrong in (5, ["x"]):
            with pytest.raises(LoraError, match="^lora: expected a path, found"):
                LlmInferenceSession.create_from_options(task, LlmInferenceSessionOptions(lora_path=wrong))
    with pytest.raises(RequestError, match="^supported_lora_ranks"):
        LlmInference.create_from_options(LlmInferenceOptions(str(folder), supported_lora_ranks=5))


def test_what_things_look_like(llm, folder):
    model = f"Model('{folder}': llama, 97,776 weights in float32, 0.4 MB; numerics fast; a context of 200 tokens)"
    assert repr(llm.model) == model
    assert repr(llm).startswith(f"LLM({model}; 4 slots; memory: weights 0.4 MB")
    assert repr(llm.tokenizer) == f"Tokenizer('{folder / 'tokenizer.json'}': bpe, 257 tokens)"
    packed = llmjax.load(folder, quantize="int8")
    assert "97,776 weights in int8, float32" in repr(packed)


def test_a_shape_is_traced_once(llm):
    program = tracing._program(llm.model.numerics, "cpu")._plain
    first = llmjax.trace(llm.model, [1, 2, 3], ["logits", "*.resid"])
    before = program._cache_size()
    again = llmjax.trace(llm.model, [1, 2, 3], ["logits", "*.resid"])
    other = llmjax.trace(llm.model, [3, 2, 1], ["logits", "*.resid"])
    assert program._cache_size() == before
    assert first.activations.keys() == {"logits", "layers.0.resid", "layers.1.resid"}
    np.testing.assert_array_equal(first.activations["logits"], again.activations["logits"])
    assert np.abs(first.activations["logits"] - other.activations["logits"]).max() > 0.1
    assert repr(first) == "Trace(3 activations of 3 tokens: layers.0.resid to logits)"


@pytest.mark.parametrize("taps", ["layers.*.reside", ["logits", "layers.*.reside"]])
def test_a_tap_that_matches_nothing(llm, taps):
    with pytest.raises(
        RequestError, match=r"^taps: 'layers\.\*\.reside' matches no activation; there are embed, "
    ) as e:
        llmjax.trace(llm.model, [1], taps)
    assert "layers.N.mlp.gate, " in str(e.value) and str(e.value).endswith(", final_norm, head, logits")


def test_taps_that_are_none(llm):
    for taps in (None, [5], []):
        with pytest.raises(RequestError, match="^taps: expected a glob"):
            llmjax.trace(llm.model, [1], taps)


@pytest.mark.parametrize("what", [5, None, ["x"], b"x", np.array(3)])
def test_nothing_to_compare(llm, what):
    with pytest.raises(RequestError, match="^compare: expected a dump's directory, a Dump, a Trace or a Model, found"):
        llmjax.compare(llm.model, what)
    with pytest.raises(RequestError, match="^batch: expected|^compare: expected"):
        llm.model.logits(what) if isinstance(what, np.ndarray) else llmjax.compare(what or 5, llm.model)
