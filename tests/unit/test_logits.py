"""What changes the logits before the draw, against a plain NumPy definition over several steps of a real decode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import LLM, RequestError, SamplingParams
from llmjax.runtime.logits import bad_word_ids
from tests.tiny import random_ids, random_model, roomy

PROMPT = random_ids(np.random.default_rng(3), 21)
STEPS = 14
EOS = 77


@pytest.fixture(scope="module")
def model():
    return random_model(eos_ids=(EOS,))


@pytest.fixture(scope="module")
def llm(model):
    return roomy(LLM(model, max_batch=4, chunk=16, block=16))


def adjusted(logits, prompt, generated, params, words):
    """The steps of llmjax.runtime.logits's docstring after the processor, one row."""
    x = logits.astype(np.float32).copy()
    barred = np.zeros(len(x), bool)
    if params.allowed_token_ids is not None:
        barred[[i for i in range(len(x)) if i not in params.allowed_token_ids]] = True
    for word in words:
        if list(word[:-1]) == generated[len(generated) - len(word) + 1 :][: len(word) - 1]:
            barred[word[-1]] |= len(word) - 1 <= len(generated)
    if len(generated) < params.min_tokens:
        barred[EOS] = True
    x[barred] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in {*prompt, *generated}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(generated):
        x[token] -= params.frequency_penalty * generated.count(token) + params.presence_penalty
    return x


def replay(model, params, words=(), change=None):
    """Greedy tokens by full recomputation."""
    generated = []
    while len(generated) < STEPS and EOS not in generated:
        logits = model.logits([PROMPT + generated])[0][-1]
        logits = logits if change is None else change(logits, PROMPT + generated)
        generated.append(int(np.argmax(adjusted(logits, PROMPT, generated, params, words))))
    return generated


def run(llm, params, words=()):
    request = dataclasses.replace(llm.request(PROMPT, params), bad_words=tuple(map(tuple, words)))
    # Room for a row in each slot from the beginning: a cache that grows is compiled again.
    (output,) = llm.outputs([request], reserve=[len(PROMPT) + STEPS] * llm.engine.slots)
    return output.outputs[0]


GREEDY = SamplingParams(temperature=0, max_tokens=STEPS)
LIKELY = 12  # allowed tokens few enough to come again, so that penalties bite


def settings(model):
    """Settings, each of which changes the plain answer."""
    best = np.argsort(-model.logits([PROMPT])[0][-1])[:LIKELY].tolist()
    few = {"allowed_token_ids": best}
    plain = replay(model, GREEDY)
    yield "allowed", few, ()
    yield "bias", {"logit_bias": {plain[0]: -100.0, 5: 3.5, best[3]: 2.0}}, ()
    yield "repetition", few | {"repetition_penalty": 1.7}, ()
    yield "encouraged", {"repetition_penalty": 0.3}, ()
    yield "presence", few | {"presence_penalty": 2.0}, ()
    yield "frequency", few | {"frequency_penalty": 0.9}, ()
    yield "negative", few | {"frequency_penalty": -1.5, "presence_penalty": -2.0}, ()
    yield "one token", {}, [plain[:1], [plain[3]]]
    yield "sequences", {}, [plain[1:3], plain[2:6], [9, plain[0]], [PROMPT[-1], plain[0]]]
    yield "all", few | dict(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.4, min_tokens=9,
        logit_bias={best[1]: 4.0, EOS: 50.0}), [best[:2], best[2:5]]  # fmt: skip


def test_every_option_follows_its_definition_and_leaves_the_neighbours_alone(llm, model):
    plain = run(llm, GREEDY)
    assert plain.token_ids == replay(model, GREEDY)
    requests, expected = [], {}
    for name, options, words in settings(model):
        params = dataclasses.replace(GREEDY, **options)
        expected[name] = replay(model, params, words)
        assert expected[name] != plain.token_ids, name
        request = llm.request(PROMPT, params, request_id=name)
        requests += [dataclasses.replace(request, bad_words=tuple(map(tuple, words)))]
        requests += [llm.request(PROMPT, GREEDY, request_id=f"plain {name}")]
    found = {output.request_id: output.outputs[0] for output in llm.outputs(requests)}
    assert {name: found[name].token_ids for name in expected} == expected
    alone = run(llm, GREEDY)
    assert all(dataclasses.replace(found[f"plain {n}"], seed=0) == dataclasses.replace(alone, seed=0) for n in expected)
    assert llm.engine.traces["decode"] == llm.engine.traces["prefill"] == 1


def test_logprobs_stay_the_models_own(llm, model):
    out = run(llm, dataclasses.replace(GREEDY, logit_bias={5: 100}, logprobs=1, max_tokens=1))
    exact = np.asarray(jax.nn.log_softmax(model.logits([PROMPT])[0][-1]))
    assert out.token_ids == [5]
    np.testing.assert_allclose(out.token_logprobs, [exact[5]], atol=1e-5)
    assert set(out.logprobs[0]) == {5, int(np.argmax(exact))}


def test_a_barred_token_is_never_drawn(llm):
    allowed = [3, 8, 500]
    params = SamplingParams(temperature=100, max_tokens=40, n=8, allowed_token_ids=allowed)
    (output,) = llm.generate([PROMPT], params)
    assert {t for c in output.outputs for t in c.token_ids} == set(allowed)


def test_where_everything_is_barred_bad_words_give_way(llm):
    assert run(llm, dataclasses.replace(GREEDY, allowed_token_ids=[4], max_tokens=3), [[4, 4]]).token_ids == [4] * 3


@pytest.mark.parametrize("length", [1, 2, 16, 17, 40])
def test_prompt_logprobs(llm, model, length):
    prompt = random_ids(np.random.default_rng(length), length)
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=4, prompt_logprobs=3, n=2))
    first, *rest = output.prompt_logprobs
    assert first is None and len(rest) == length - 1
    exact = np.asarray(jax.nn.log_softmax(model.logits([prompt])[0]))
    for row, token, found in zip(exact, prompt[1:], rest, strict=False):
        assert set(found) == {*np.argsort(-row, kind="stable")[:3].tolist(), token}
        np.testing.assert_allclose(list(found.values()), row[list(found)], atol=1e-5)
    (without,) = llm.generate([prompt], SamplingParams(max_tokens=4, n=2))
    assert without.outputs == output.outputs and without.prompt_logprobs is None
    # Among others that go on while its prompt is scored, it begins where that ended.
    greedy = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    params = [dataclasses.replace(greedy, max_tokens=30)] * 2 + [dataclasses.replace(greedy, prompt_logprobs=3)]
    *_, among = llm.generate([PROMPT, PROMPT[:9], prompt], params)
    assert among.outputs[0].token_ids == llm.generate([prompt], greedy)[0].outputs[0].token_ids


@pytest.mark.slow
def test_a_processor_comes_first_and_sees_the_tokens(model):
    def processor(logits, tokens):
        """Away from the last token's neighbour id, and towards an id that tells the lengths."""
        rows = jnp.arange(logits.shape[0])
        last = tokens.ids[rows, tokens.length - 1]
        told = 100 + tokens.length - tokens.prompt_length
        return logits.at[rows, last + 1].set(-jnp.inf).at[rows, told].add(3.0)

    def change(logits, ids):
        logits = logits.copy()
        if ids[-1] + 1 < len(logits):
            logits[ids[-1] + 1] = -np.inf
        logits[100 + len(ids) - len(PROMPT)] += 3
        return logits

    llm = roomy(LLM(model, max_batch=4, chunk=16, block=16, logits_processor=processor))
    expected = replay(model, GREEDY, change=change)
    assert run(llm, GREEDY).token_ids == expected != replay(model, GREEDY)
    allowed = dataclasses.replace(GREEDY, allowed_token_ids=[1, 2, 104, 300, 301])
    assert run(llm, allowed).token_ids == replay(model, allowed, change=change)
    broken = LLM(model, max_batch=4, logits_processor=lambda logits, tokens: logits * jnp.nan)
    with pytest.raises(Exception, match="logits processor"):
        broken.generate([1, 2])


def test_a_processor_that_is_none_is_told(model):
    of_all = r"must return logits of the shape that it is given, \[4, 600\] here, found "
    for wrong, message in (
        ("x", "expected a function of logits and tokens, found 'x'"),
        (lambda logits, tokens: None, f"{of_all}None"),
        (lambda logits, tokens: logits[0], rf"{of_all}float32 \[600\]"),
        (lambda logits, tokens: jnp.argmax(logits, -1), rf"{of_all}int32 \[4\]"),
    ):
        with pytest.raises(RequestError, match=f"logits_processor: .*{message}"):
            LLM(model, max_batch=4, logits_processor=wrong)


def test_bad_words_are_made_as_vllm_makes_them():
    class Words:
        """A space before a known word is part of its token, otherwise a token of its own."""

        @staticmethod
        def encode(text, *, add_bos):
            assert add_bos is False
            if text in (" cat", "cat"):
                return [1 + text.startswith(" ")]
            return [30] * text.startswith(" ") + [ord(c) for c in text.lstrip()]

    found = bad_word_ids(Words(), ["cat", " cat", "ab"])
    assert found == ((1,), (2,), (1,), (2,), (97, 98))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"allowed_token_ids": [3, 600]}, "allowed_token_ids: 600 is outside the vocabulary"),
        ({"logit_bias": {600: 1}}, "logit_bias: 600 is outside the vocabulary"),
        ({"bad_words": ["a"]}, "no tokenizer files"),
    ],
)
def test_requests_that_cannot_run(llm, params, message):
    with pytest.raises(Exception, match=message):
        llm.request(PROMPT, SamplingParams(**params))


def test_too_many_or_too_long_bad_words(llm, model):
    from llmjax.runtime.logits import row_controls

    with pytest.raises(RequestError, match="at most 256 sequences of at most 16 tokens .* found 1, the longest of 17"):
        row_controls(SamplingParams(), [range(17)], 600)
    with pytest.raises(RequestError, match="leave no token"):
        row_controls(SamplingParams(allowed_token_ids=[4]), [[4]], 600)
