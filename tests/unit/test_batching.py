"""Continuous batching: prompts that begin alike are computed once, nothing waits for a long prompt, slots stay busy,
nothing is compiled on the way."""

import numpy as np
import pytest

from llmjax import LLM, SamplingParams
from llmjax.runtime.prefixes import Prefixes
from llmjax.runtime.schedule import Schedule
from tests.tiny import random_ids, random_model, roomy, slow

CHUNK = 16
RNG = np.random.default_rng(7)
SYSTEM = random_ids(RNG, 40)


def engine(model, **options):
    return roomy(LLM(model, max_batch=4, chunk=CHUNK, block=16, **options))


@pytest.fixture(scope="module")
def model():
    return random_model()


def family(llm):
    """Prompts that share two chunks and a half, one of them whole and some n times; others share nothing."""
    tails = [random_ids(RNG, n) for n in (1, 5, 8, 30, 60)]
    prompts = [SYSTEM, *(SYSTEM + t for t in tails), SYSTEM[:32], SYSTEM[:33], SYSTEM[:20] + tails[3], tails[4], SYSTEM]
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=3 + 5 * i % 11, n=1 + 2 * (i % 3 == 1), logprobs=2)
        yield llm.request(prompt, params, request_id=str(i))


# With a window: tests/unit/test_shared_keys.py, too.
@pytest.mark.parametrize("window", [None, slow(24)])
def test_shared_beginnings_leave_every_bit(model, window):
    if window is not None:
        model = random_model(model_type="mistral", sliding_window=window)
    shared, apart = engine(model), engine(model, enable_prefix_caching=False)
    requests = list(family(shared))
    expected = {o.request_id: o for o in apart.outputs(requests)}
    assert apart.engine.progress.reused_tokens == 0
    for order in (requests, requests[::-1]):
        assert {o.request_id: o for o in shared.outputs(order)} == expected
    counts, whole = shared.engine.progress, apart.engine.progress
    assert counts.prefill_tokens + counts.reused_tokens == 2 * whole.prefill_tokens
    assert counts.reused_tokens > 0.6 * 2 * whole.prefill_tokens
    assert max(shared.engine.traces.values()) == 1


def test_what_a_slot_holds():
    prefixes = Prefixes(3, 4)
    ids = np.arange(11)
    place = prefixes.find(ids, {0, 1, 2})
    prefixes.take(place, ids)
    assert place.length == 0
    for n in (4, 8, 11):
        prefixes.add(place.slot, ids[:n])
    others = {0, 1, 2} - {place.slot}

    def found(ids, free=others):
        return prefixes.find(np.asarray(ids), free)

    assert (found(ids).length, found(ids).is_whole) == (11, True)
    assert (found(ids[:10]).length, found(ids[:10]).is_whole) == (8, False)
    assert found(ids[:8]).length == 4  # its last token must be computed
    assert found([*ids[:9], 99, 98, 97]).length == 8
    assert found([*ids, 11, 12]).length == 8  # what follows the last whole chunk was computed with padding behind it
    assert found([5, *ids]).length == 0
    assert found(ids[:9], {0, 1, 2}).slot == place.slot  # nothing to copy
    assert found(np.arange(20, 30), {0, 1, 2}).slot != place.slot  # the slot that rested longest


def test_a_run_that_is_stopped_where_a_prompt_is_shared_leaves_what_it_says(model, monkeypatch):
    """A prompt that has its place holds what the books say, however early the run ends."""
    llm, admit = engine(model), Schedule.admit
    request = llm.request(random_ids(RNG, 20), SamplingParams(max_tokens=5, n=2))

    def answered():
        return [output.outputs for output in llm.outputs([request])]

    def stopped(self):
        found = admit(self)
        if self.rows:
            llm.engine.stop()
        return found

    expected = answered()
    llm.engine.store.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Schedule, "admit", stopped)
        assert answered() == []
    assert answered() == expected


def spied(llm, name, calls):
    program = getattr(llm.engine, name)
    setattr(llm.engine, name, lambda *args: calls.append(name) or program(*args))


def test_rows_decode_while_a_long_prompt_comes_in(model):
    llm, calls = engine(model), []
    for name in ("_prefill", "_decode"):
        spied(llm, name, calls)
    short = llm.request([1, 2, 3], SamplingParams(max_tokens=40), request_id="short")
    long = llm.request(random_ids(RNG, 100), SamplingParams(max_tokens=5), request_id="long")
    done = [o.request_id for o in llm.outputs([short, long])]
    assert set(done) == {"short", "long"}
    chunk, step = ["_prefill"], ["_decode"]
    assert calls[:11] == 4 * chunk + step + 3 * chunk + step + chunk + step


def test_slots_stay_busy_and_nothing_is_compiled_on_the_way(model):
    llm = engine(model)

    def requests():
        for i in range(60):
            yield llm.request(random_ids(RNG, 1 + 17 * i % 60), SamplingParams(max_tokens=10 + 7 * i % 31))

    outputs = list(llm.outputs(requests()))
    progress = llm.engine.progress
    assert progress.rows == len(outputs) == 60
    assert progress.decode_tokens == sum(len(o.outputs[0].token_ids) for o in outputs)
    assert progress.busy > 0.85
    assert dict(llm.engine.traces) == {"prefill": 1, "decode": 1}


@pytest.mark.slow
def test_a_row_that_ends_makes_room_at_once(model):
    """One row ends after 2 steps, the others after 30; the fifth must not wait for them."""
    llm, calls = engine(model), []
    spied(llm, "_decode", calls)
    lengths = (2, 30, 30, 30, 25)
    requests = [llm.request([i], SamplingParams(max_tokens=n), request_id=str(i)) for i, n in enumerate(lengths)]
    for _ in llm.outputs(requests):
        pass
    assert llm.engine.progress.decode_steps <= 2 + 30 + 4
