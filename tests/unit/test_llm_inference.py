"""MediaPipe's face: its option names and defaults, synchronous and with listeners."""

import dataclasses
import sys
import threading
import types

import pytest

import llmjax
from llmjax import LLM, LlmInference, LlmInferenceOptions, RequestError
from tests.tiny import roomy


@pytest.fixture(scope="module")
def task(short_smollm2):
    llm = roomy(LLM(short_smollm2, max_batch=2), 500)
    with LlmInference(LlmInferenceOptions("smollm2", max_tokens=24, temperature=0.0), llm) as t:
        yield t


def test_defaults_are_mediapipes():
    options = LlmInferenceOptions("m")
    assert (options.max_tokens, options.top_k, options.temperature, options.random_seed) == (512, 40, 0.8, 0)


def test_response_counts_prompt_and_output_together(task):
    prompt = "The capital of France is"
    text = task.generate_response(prompt)
    assert text
    assert task.size_in_tokens(prompt) == 5
    assert task.size_in_tokens(text) <= 24 - 5


def test_a_prompt_that_leaves_no_room(task):
    with pytest.raises(RequestError, match="leave no room for an answer within max_tokens 24"):
        task.generate_response("word " * 40)


def test_more_tokens_are_advised_where_they_help(task):
    for context, advice in ((8192, "shorten it, or raise max_tokens$"), (30, "of 30; shorten it$")):
        llm = types.SimpleNamespace(model=types.SimpleNamespace(context_length=context), tokenizer=task._llm.tokenizer)
        with pytest.raises(RequestError, match=advice):
            LlmInference(task._options, llm)._room("word " * 40)


@pytest.mark.parametrize("name", ["result_listener", "error_listener"])
def test_a_listener_is_a_function(name):
    with pytest.raises(RequestError, match=f"{name}: expected a function, found 5"):
        LlmInference.create_from_options(LlmInferenceOptions("m", **{name: 5}))


def with_listeners(task, **listeners):
    other = LlmInference(dataclasses.replace(task._options, **listeners), task._llm)
    return other


def test_async_gives_pieces_then_done(task):
    seen = []
    other = with_listeners(task, result_listener=lambda piece, done: seen.append((piece, done)))
    future = other.generate_response_async("The capital of France is")
    text = future.result(timeout=120)
    assert text == task.generate_response("The capital of France is")
    pieces, flags = zip(*seen, strict=True)
    assert "".join(pieces) == text and flags == (*[False] * (len(seen) - 1), True)
    assert len(seen) > 3


def test_async_errors_reach_the_listener_and_the_future(task):
    errors = []
    other = with_listeners(task, result_listener=lambda *_: None, error_listener=errors.append)
    future = other.generate_response_async("word " * 40)
    with pytest.raises(RequestError, match="leave no room"):
        future.result(timeout=60)
    assert [type(e) for e in errors] == [RequestError]
    assert other.generate_response_async("hi").result(timeout=60) is not None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_listener_that_fails_leaves_no_future_open(task):
    def fail(*_):
        raise ValueError("mine")

    other = with_listeners(task, result_listener=fail, error_listener=fail)
    with pytest.raises(ValueError, match="mine"):
        other.generate_response_async("hi").result(timeout=60)
    leaving = with_listeners(task, result_listener=lambda *_: sys.exit(3), error_listener=fail)
    with pytest.raises(SystemExit):
        leaving.generate_response_async("hi").result(timeout=60)
    assert task.generate_response("hi") is not None


def test_one_answer_at_a_time(task):
    go = threading.Event()
    other = with_listeners(task, result_listener=lambda *_: go.wait(60))
    future = other.generate_response_async("The capital of France is")
    with pytest.raises(RequestError, match="still under way"):
        other.generate_response_async("hi")
    go.set()
    future.result(timeout=120)


def test_async_needs_a_listener(task):
    with pytest.raises(RequestError, match="result_listener"):
        task.generate_response_async("hi")


def test_closed(task):
    other = with_listeners(task)
    other.close()
    with pytest.raises(RequestError, match="closed"):
        other.generate_response("hi")
    assert task.generate_response("The capital")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"top_k": 0}, "top_k"), ({"temperature": -1.0}, "temperature"), ({"max_tokens": 1}, "max_tokens")],
)
def test_bad_options_are_found_before_loading(change, message):
    with pytest.raises(RequestError, match=message):
        LlmInference.create_from_options(LlmInferenceOptions("nowhere", **change))


def test_missing_model():
    with pytest.raises(llmjax.CheckpointError, match="no such file"):
        LlmInference.create_from_options(LlmInferenceOptions("nowhere"))
