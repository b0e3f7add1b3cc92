"""The engine's promises: same bits alone and in company, one compilation, cache equal to no cache, stream equal to
loop."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmjax
from llmjax import LLM, CheckpointError, RequestError, SamplingParams
from llmjax.models.watched import Program
from llmjax.runtime.engine import Engine
from tests.programs import engine_programs
from tests.tiny import checkpoint, random_ids, random_model, roomy, slow


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def llm(model):
    return roomy(LLM(model, max_batch=np.int64(4), chunk=16, block=16))


# Shorter than a chunk, at its border, across several, near the end of the context.
LENGTHS = [1, 5, 15, 16, 17, 33, 64, 90, 150]


def requests(llm, params=None):
    rng = np.random.default_rng(1)
    params = params or SamplingParams(temperature=0.9, top_p=0.95, max_tokens=12, logprobs=3)
    return [
        llm.request(random_ids(rng, n), dataclasses.replace(params, max_tokens=4 + n % 9), request_id=f"r{n}")
        for n in LENGTHS
    ]


def results(llm, reqs, **run):
    return {u.row.request.request_id: u.row.completion() for u in llm.run(reqs, **run) if u.row.finish_reason}


def test_rows_are_the_same_in_every_bit_alone_shuffled_and_among_others(llm):
    reqs = requests(llm)
    together = results(llm, reqs)
    assert len(together) == len(reqs)
    for request in reqs:
        assert results(llm, [request]) == {request.request_id: together[request.request_id]}
    order = np.random.default_rng(2).permutation(len(reqs))
    assert results(llm, [reqs[i] for i in order]) == together
    rng = np.random.default_rng(9)
    strangers = [
        llm.request(random_ids(rng, n), SamplingParams(temperature=0, max_tokens=30, min_tokens=20), request_id=f"s{n}")
        for n in (3, 120, 47, 80)
    ]
    mixed = [r for pair in zip(strangers, reqs, strict=False) for r in pair] + reqs[4:]
    assert {k: v for k, v in results(llm, mixed).items() if k in together} == together


@pytest.mark.slow
def test_what_a_process_asks_of_jax_changes_nothing(model, llm):
    request = requests(llm)[3]
    with jax.enable_x64(True), jax.disable_jit(True), jax.numpy_rank_promotion("raise"):  # as researchers have it
        wide = results(roomy(LLM(model, max_batch=4, chunk=16, block=16)), [request])
    assert wide == results(llm, [request])


def test_stopping_a_neighbour_early_leaves_the_others_bits(llm):
    """A stop string frees a slot in the middle of a burst and another row moves in."""
    reqs = requests(llm)
    assert results(llm, reqs, burst=1) == results(llm, reqs) == results(llm, reqs, burst=5)


@pytest.mark.slow
def test_a_longer_cache_changes_no_bit(model):
    short, long = (LLM(model, max_batch=4, chunk=16, block=16) for _ in range(2))
    request = requests(short)[5]
    before = results(short, [request])
    long.engine.store.ensure(200, 50)
    assert results(long, [request]) == before


def test_each_program_is_traced_once(model):
    llm = roomy(LLM(model, max_batch=4, chunk=16, block=16))
    for request in requests(llm):
        results(llm, [request])
    assert dict(llm.engine.traces) == {"prefill": 1, "decode": 1}


def test_a_chunk_and_a_burst_are_a_program_and_an_array_each(model, monkeypatch):
    """Whatever a row asks for: a GPU takes its time to be told of each."""
    llm, calls, run = roomy(LLM(model, max_batch=4, chunk=16, block=16)), [], Program.__call__
    plain, asking = SamplingParams(max_tokens=3, n=2), SamplingParams(max_tokens=9, logprobs=2, stop_token_ids=[5])

    def answer(i):
        short, long = [i, 1, 2], [i, *range(40)]
        return llm.generate([short, long, short], [asking, plain, asking])

    def counted(self, *args):
        calls.append((self._plain.__name__, sum(not isinstance(x, jax.Array) for x in jax.tree.leaves(args))))
        with jax.transfer_guard("allow"):
            return run(self, *args)

    answer(0)
    monkeypatch.setattr(Program, "__call__", counted)
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        for i in (1, 2):
            answer(i)
    assert {arrays for _, arrays in calls} == {1}
    found = Counter(name for name, _ in calls)
    assert found.pop("decode") <= 6 and found == {"prefill": 2 * (1 + 3), "share": 2 * (1 + 1)}


def test_greedy_equals_full_recompute_without_a_cache(llm, model):
    for request in requests(llm, SamplingParams(temperature=0)):
        out = results(llm, [request])[request.request_id]
        ids = request.ids + out.token_ids
        after = slice(len(request.ids) - 1, len(ids) - 1)
        (logits,) = model.logits([ids + [0] * (200 - len(ids))])  # of one length, to compile once
        assert np.argmax(logits[after], -1).tolist() == out.token_ids
        found = np.asarray(jax.nn.log_softmax(logits))[after][range(len(out.token_ids)), out.token_ids]
        np.testing.assert_allclose(found, out.token_logprobs, atol=1e-5, rtol=0)


def test_logits_are_one_program_for_lengths_that_are_padded_alike(model, caplog):
    model.logits([[1] * 200])
    with jax.log_compiles():
        assert [len(row) for row in model.logits([[1] * 199, [2] * 150])] == [199, 150]
    assert not caplog.records


def test_forced_decode_equals_prefill(llm, model):
    rng = np.random.default_rng(4)
    ids = random_ids(rng, 60)
    request = llm.request(ids[:7], SamplingParams(max_tokens=53, temperature=1), request_id="f", forced=ids[7:])
    out = results(llm, [request])["f"]
    assert out.token_ids == ids[7:]
    (score,) = llm.score([ids])
    np.testing.assert_allclose(out.token_logprobs, score.logprobs[7:], atol=1e-5, rtol=0)
    dense = np.asarray(jax.nn.log_softmax(model.logits([ids])[0]))
    np.testing.assert_allclose(score.logprobs[1:], dense[np.arange(59), ids[1:]], atol=1e-5, rtol=0)


def test_stream_is_generate(llm):
    prompt = random_ids(np.random.default_rng(0), 9)
    params = SamplingParams(temperature=1.0, max_tokens=40, seed=7)
    whole = llm.generate(prompt, params)[0].outputs[0]
    streamed = []
    for update in llm.run([llm.request(prompt, params)], burst=1):
        if update.row.finish_reason:
            streamed.append(update.row.completion())
    assert streamed == [whole]


def test_the_reported_seed_replays_a_row_alone(llm):
    prompts = [random_ids(np.random.default_rng(i), 6) for i in range(3)]
    params = SamplingParams(max_tokens=10)
    for prompt, out in zip(prompts, llm.generate(prompts, params), strict=True):
        again = llm.generate(prompt, dataclasses.replace(out.params, seed=out.seed))[0]
        assert again.outputs == out.outputs
        assert again.seed == out.seed


def test_samples_come_together_and_each_replays_alone(llm):
    prompts = [random_ids(np.random.default_rng(i), 9) for i in range(3)]
    params = SamplingParams(max_tokens=8, n=3)
    requests = (llm.request(p, params, request_id=f"r{i}") for i, p in enumerate(prompts))
    found = {output.request_id: output for output in llm.outputs(requests)}
    assert sorted(found) == ["r0", "r1", "r2"]
    for output in found.values():
        assert [c.index for c in output.outputs] == [0, 1, 2]
        assert len({tuple(c.token_ids) for c in output.outputs}) == 3
        for c in output.outputs:
            (alone,) = llm.generate(output.prompt_token_ids, SamplingParams(max_tokens=8, seed=c.seed))
            assert alone.outputs[0] == dataclasses.replace(c, index=0)
        assert output.seed == output.outputs[0].seed == llm.request([1], request_id=output.request_id).seed
    with pytest.raises(RequestError, match="n: a stream is one sample, found 3"):
        next(llm.stream(prompts[0], params))


def test_requests_are_taken_as_slots_become_free(llm):
    taken = []

    def requests():
        for i in range(40):
            taken.append(i)
            yield llm.request([i + 1], SamplingParams(max_tokens=1 + i % 3, n=1 + i % 2))

    outputs = llm.outputs(requests())
    for done, _ in enumerate(outputs, 1):
        assert len(taken) - done <= llm.engine.slots
    assert len(taken) == done == 40


def test_different_rows_and_seeds_differ(llm):
    prompt = [1, 2, 3]
    texts = {tuple(o.outputs[0].token_ids) for o in llm.generate([prompt] * 6, SamplingParams(max_tokens=8))}
    assert len(texts) == 6
    seeds = {
        tuple(llm.generate(prompt, SamplingParams(max_tokens=8, seed=s))[0].outputs[0].token_ids) for s in range(6)
    }
    assert len(seeds) == 6


def test_end_of_text_min_tokens_and_ignore_eos(llm, model):
    prompt = [5, 6, 7]
    free = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12))[0].outputs[0]
    eos = free.token_ids[2]
    first = free.token_ids.index(eos)
    ended = roomy(LLM(dataclasses.replace(model, eos_ids=(eos,)), max_batch=4, chunk=16, block=16))
    out = ended.generate(prompt, SamplingParams(temperature=0, max_tokens=12))[0].outputs[0]
    assert (out.token_ids, out.finish_reason) == (free.token_ids[: first + 1], "stop")
    later = ended.generate(prompt, SamplingParams(temperature=0, max_tokens=12, min_tokens=8))[0].outputs[0]
    assert eos not in later.token_ids[:8]
    ignored = ended.generate(prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))[0].outputs[0]
    assert ignored.token_ids == free.token_ids
    stopped = llm.generate(prompt, SamplingParams(temperature=0, stop_token_ids=[eos]))[0].outputs[0]
    assert (stopped.token_ids, stopped.stop_reason) == (out.token_ids, eos)


def test_logprobs_are_log_softmax_of_the_models_logits(llm, model):
    prompt = [4, 9, 2, 33]
    out = llm.generate(prompt, SamplingParams(temperature=1.7, top_k=5, max_tokens=6, logprobs=4))[0].outputs[0]
    ids = list(prompt)
    for token, logprob, step in zip(out.token_ids, out.token_logprobs, out.logprobs, strict=True):
        exact = np.asarray(jax.nn.log_softmax(model.logits([ids])[0][-1]))
        best = np.argsort(-exact, kind="stable")[:4]
        assert set(step) == {*best.tolist(), token}
        np.testing.assert_allclose([step[t] for t in step], exact[list(step)], atol=1e-5)
        assert step[token] == logprob
        ids.append(token)
    assert out.cumulative_logprob == pytest.approx(sum(out.token_logprobs))


def test_output_ends_at_the_context(llm):
    out = llm.generate(list(range(1, 196)), SamplingParams(temperature=0, max_tokens=50))[0]
    assert len(out.outputs[0].token_ids) == 5 == out.params.max_tokens
    assert out.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt: empty"),
        (list(range(200)), "200 tokens, longer than the model's context of 200 .*, or load the model with a longer"),
        ([1, 600], "token id 600 is outside the vocabulary"),
        ([1, -1], "token id -1 is outside the vocabulary"),
    ],
)
def test_bad_prompts(llm, prompt, message):
    with pytest.raises(RequestError, match=message):
        llm.request(prompt)
    if prompt:
        with pytest.raises(RequestError, match="prompt 1: "):
            llm.generate([[1], prompt])


def test_a_longer_context_is_advised_where_it_helps(model, tmp_path):
    with pytest.raises(RequestError, match=r"row 0: 201 tokens, .* 200; shorten it, or load .* \(context_length, --"):
        model.logits([[1] * 201])
    longer = llmjax.load(checkpoint(tmp_path / "model"), context_length=300)
    assert longer.logits([[1] * 201])[0].shape == (201, 600)


def test_truncated_prompt_keeps_its_end(model):
    llm = LLM(model, max_batch=4, chunk=16, block=16, truncate_prompt=True)
    request = llm.request(list(range(300)), SamplingParams(max_tokens=20))
    assert request.ids == list(range(120, 300))


@pytest.mark.parametrize(("field", "value"), [("slots", 0), ("chunk", 0), ("block", -1)])
def test_engine_settings(model, field, value):
    with pytest.raises(RequestError, match=f"{field}: expected an integer of at least"):
        Engine(model, **{field: value})


@pytest.mark.parametrize(
    ("profile", "dtype"),
    [
        *(slow("fast", "bfloat16"), slow("hf", "bfloat16"), slow("reference", "float32")),
        *(slow("reference", "bfloat16"), slow("hf", "float32"), slow("fast", "float32")),
    ],
)
def test_every_profile_runs_and_stays_deterministic(profile, dtype):
    llm = LLM(random_model(profile, dtype), max_batch=4, chunk=16, block=16)
    reqs = requests(llm)
    together = results(llm, reqs)
    assert results(llm, reqs[::-1]) == together
    assert results(llm, reqs[3:4]) == {reqs[3].request_id: together[reqs[3].request_id]}


@pytest.mark.parametrize("slots", [slow(1), slow(4)])
def test_no_program_holds_a_second_copy_of_a_weight(slots):
    """bfloat16 weights: neither the embedding lookup nor a product may convert a whole table, in or out of the loop."""
    model = random_model("fast", "bfloat16", vocab_size=20_000, hidden_size=96, tie_word_embeddings=True)
    llm = LLM(model, max_batch=slots, chunk=16, block=16)
    table = model.params["embed"]["weight"].nbytes
    llm.generate([1, 2, 3], SamplingParams(max_tokens=2, temperature=0))
    for compiled in engine_programs(llm):
        assert compiled.memory_analysis().temp_size_in_bytes < table
        assert "f32[20000,96]" not in compiled.as_text().split("ENTRY")[1]


@pytest.mark.parametrize(
    ("profile", "dtype", "slots"),
    [
        *(slow("reference", "float32", 4), slow("fast", "bfloat16", 1), slow("reference", "float32", 1)),
        *(slow("fast", "bfloat16", 4), slow("fast", "float32", 1), slow("fast", "float32", 4)),
        *(slow("reference", "bfloat16", 1), slow("reference", "bfloat16", 4)),
    ],
)
def test_no_program_copies_the_cache(profile, dtype, slots):
    """It is written in place: beside a long cache the temporaries are smaller than a single one of its buffers."""
    model = random_model(profile, dtype, max_position_embeddings=16384)
    llm = LLM(model, max_batch=slots, chunk=16, block=16)
    llm.engine.store.ensure(16384, slots * 512)
    buffer = max(leaf.nbytes for leaf in jax.tree.leaves(llm.engine.store.state.cache))
    for compiled in engine_programs(llm):
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < buffer
        assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(llm.engine.store.state.cache))


def test_a_stream_left_open_is_told_not_waited_for(llm):
    request = llm.request([1, 2, 3], SamplingParams(max_tokens=50, temperature=0))
    stream = llm.run([request], burst=1)
    for _ in zip(range(2), llm.run([llm.request([5], SamplingParams(max_tokens=2))], burst=1), strict=False):
        pass
    held = llm.run([llm.request([1, 2, 3], SamplingParams(max_tokens=3, temperature=0))])
    with llm._turn(), pytest.raises(RequestError, match="in the middle of a run"):
        next(stream)
    assert [u.row.finish_reason for u in held] == ["length"]


def test_the_engine_goes_on_after_an_interruption(llm):
    request = llm.request([1, 2, 3], SamplingParams(max_tokens=4, temperature=0))

    def interrupted():
        yield request
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(llm.run(interrupted()))
    assert results(llm, [request])["0"].finish_reason == "length"


def test_nan_is_an_error_not_a_text(model):
    params = jax.tree.map(lambda x: x, model.params)
    params["layers_1"]["mlp"]["up"]["weight"] = params["layers_1"]["mlp"]["up"]["weight"].at[3, 3].set(np.nan)
    llm = roomy(LLM(dataclasses.replace(model, params=params), max_batch=4, chunk=16, block=16))
    with pytest.raises(CheckpointError, match="the model computes NaN"):
        llm.generate([1, 2, 3])
    with pytest.raises(CheckpointError, match="the model computes NaN"):
        llm.score([[1, 2, 3]])


@pytest.fixture(scope="module")
def overflowing(model):
    """Of the tokens 0 and 7 it computes NaN."""
    params = jax.tree.map(lambda x: x, model.params)
    params["embed"]["weight"] = params["embed"]["weight"].at[np.array([0, 7])].set(np.inf)
    return roomy(LLM(dataclasses.replace(model, params=params), max_batch=4, chunk=16, block=16))


HEALTHY = [[100 + i, *range(200, 209)] for i in range(8)]
FEW = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def told(outputs):
    return [(o.outputs[0].token_ids, o.outputs[0].token_logprobs) for o in outputs]


def test_a_row_of_nan_fails_alone(overflowing, llm):
    """Padding, of whatever token, is nobody's fault."""
    wanted = told(llm.generate(HEALTHY, FEW))
    prompts = [*HEALTHY[:3], [7, 3], *HEALTHY[3:], [4] * 40 + [7]]  # places 3 and 9
    for scored in ({}, {"prompt_logprobs": 0}):
        params = dataclasses.replace(FEW, **scored)
        reqs = [overflowing.request(p, params, request_id=str(i)) for i, p in enumerate(prompts)]
        before = overflowing.engine.progress.rows
        found = {output.request_id: output for output in overflowing.outputs(reqs)}
        assert overflowing.engine.progress.rows - before == len(prompts)  # those that fail are over, too
        for output in (found.pop("3"), found.pop("9")):
            assert "the model computes NaN" in str(output.error) and not output.outputs
        assert told(found[i] for i in sorted(found, key=int)) == wanted
    with pytest.raises(CheckpointError, match="^prompt 3: tiny: the model computes NaN"):
        overflowing.generate(prompts, FEW)
    with pytest.raises(CheckpointError, match="^text 3: tiny: the model computes NaN"):
        overflowing.score(prompts)
    assert [s.logprobs for s in overflowing.score(HEALTHY)] == [s.logprobs for s in llm.score(HEALTHY)]


def test_infinity_is_no_number_either(model):
    """A token beside an infinite logit has the log-probability -inf, which a text could have."""
    params = jax.tree.map(lambda x: x, model.params)
    params["head"]["weight"] = jnp.zeros_like(params["head"]["weight"]).at[5, 0].set(np.inf).at[6, 0].set(-np.inf)
    llm = roomy(LLM(dataclasses.replace(model, params=params), max_batch=4, chunk=16, block=16))
    with pytest.raises(CheckpointError, match="the model computes NaN"):
        list(llm.run([llm.request([1, 2, 3], FEW, forced=[3, 3])]))
    with pytest.raises(CheckpointError, match="the model computes NaN"):
        llm.score([[1, 2, 3]])


def test_what_a_row_leaves_in_its_pages_is_nobody_elses(overflowing, llm):
    wanted = told(llm.generate(HEALTHY, FEW))
    reqs = [overflowing.request(ids, FEW, request_id=str(i)) for i, ids in enumerate([[1, 2], [7] * 150])]
    outputs = overflowing.outputs(reqs)
    assert next(outputs).request_id == "0"
    outputs.close()  # before anybody has looked at the other's numbers
    assert np.isnan(np.asarray(overflowing.engine.store.state.cache["layers_1"]["attn"]["k"])).any()
    assert told(overflowing.generate(HEALTHY, FEW)) == wanted


def test_numpy_ids_are_ids(llm):
    ids = np.array([3, 4, 5])
    params = SamplingParams(temperature=0, max_tokens=3)
    (one,), (other,) = llm.generate(ids, params), llm.generate([[3, 4, 5]], params)
    assert one.outputs[0].token_ids == other.outputs[0].token_ids and one.prompt_token_ids == [3, 4, 5]
    with pytest.raises(RequestError, match="expected a list of token ids"):
        llm.request([[1], [2, 3]])


def test_ids_of_any_library_become_pythons(llm):
    assert [type(i) for i in llm.request([3, np.int64(4), jax.numpy.int32(5)]).ids] == [int] * 3
    with pytest.raises(RequestError, match="expected a list of token ids"):
        llm.request([3, np.True_])
