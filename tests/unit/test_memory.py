"""Memory: the cache holds the tokens in use, within a budget; where that ends rows wait, and keep their bits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import LLM, RequestError, SamplingParams
from llmjax.batch import dryrun, job
from llmjax.cli.main import main
from llmjax.errors import NoRoomError
from llmjax.models.attention import Scores, block_range, cached_attention
from llmjax.models.context import Context
from llmjax.numerics import resolve
from llmjax.runtime import memory
from llmjax.runtime.cache import grown
from llmjax.runtime.memory import Memory, parse
from llmjax.runtime.pages import Pages
from llmjax.runtime.row import Row
from tests.tiny import checkpoint, random_ids, random_model, roomy, slow

CHUNK = BLOCK = 16
PAGE = 2 * BLOCK


@pytest.fixture(scope="module")
def model():
    return random_model(max_position_embeddings=1000, num_hidden_layers=1)


@pytest.fixture(scope="module")
def ample(model):
    return engine(model)


def engine(model, pages=None, slots=4):
    """An LLM whose budget has room for so many pages, the one that is nobody's not counted."""
    options = dict(max_batch=slots, chunk=CHUNK, block=BLOCK)
    if pages is None:
        return LLM(model, **options)
    m = LLM(model, **options).engine.store.memory
    return LLM(model, **options, memory=m.weights + m.slots + (pages + 1) * m.page)


def requests(llm, answer=90):
    """Rows of up to six pages, some with a beginning in common, one with its prompt's log-probabilities."""
    rng = np.random.default_rng(3)
    shared = random_ids(rng, 40)
    for i, length in enumerate((7, 60, 33, 90, 16, 45)):
        ids = shared + random_ids(rng, length - 40) if length > 40 else random_ids(rng, length)
        params = SamplingParams(max_tokens=answer - 5 * i, logprobs=2, prompt_logprobs=1 if i == 3 else None)
        yield llm.request(ids, params, request_id=f"r{i}")


def results(llm, answer=90, reserve=(400,) * 4):
    """With a cache as large as the budget allows from the beginning, to compile once."""
    return {o.request_id: o for o in llm.outputs(requests(llm, answer), reserve=reserve)}


@pytest.fixture
def put_off(monkeypatch):
    """The rows that are put off, each time."""
    found, put_off = [], Row.put_off
    monkeypatch.setattr(Row, "put_off", lambda row: found.append(row.request.request_id) or put_off(row))
    return found


@pytest.mark.parametrize("pages", [slow(7), slow(9)])
def test_rows_that_were_put_off_keep_their_bits(ample, model, put_off, pages):
    """The longest needs six pages for itself, and three more while its prompt is scored."""
    expected = results(ample)
    assert not put_off
    tight = engine(model, pages)
    assert results(tight) == expected
    assert put_off and "r0" not in put_off  # the oldest goes on in any case
    store = tight.engine.store
    assert store.pages.total <= pages + 1
    store.settle()
    held = {p for slot in range(4) for p in store.pages.table[slot, : store.pages.held(slot)].tolist()}
    assert len(held) + store.pages.free == store.pages.total - 1
    assert tight.engine.progress.decode_tokens == sum(len(o.outputs[0].token_ids) for o in expected.values())


@pytest.mark.slow
def test_a_stream_that_was_put_off_shows_each_token_once(ample, model, put_off):
    tight = engine(model, 7)
    updates = tight.run(requests(tight), burst=3, reserve=(400,) * 4)
    rows = [update.row for update in updates if update.row.finish_reason]
    assert put_off
    expected = {name: output.outputs[0] for name, output in results(ample).items()}
    assert {row.request.request_id: row.completion() for row in rows} == expected


@pytest.mark.slow
def test_a_cache_that_grew_on_the_way_moves_no_bit(ample, model):
    expected, traces = results(ample), ample.engine.traces["decode"]
    grows = engine(model)
    assert results(grows, reserve=()) == expected
    assert grows.engine.traces["decode"] > traces == 1


@pytest.mark.slow
def test_the_cache_holds_the_tokens_in_use(model):
    """One long row among short ones, and an answer that may fill the context but ends early."""
    llm = engine(model)
    rng = np.random.default_rng(0)
    long = llm.request(random_ids(rng, 800), SamplingParams(max_tokens=3, temperature=0), request_id="long")
    short = [llm.request(random_ids(rng, 5), SamplingParams(max_tokens=9), request_id=str(i)) for i in range(6)]
    assert {o.request_id for o in llm.outputs([long, *short])} == {"long", *map(str, range(6))}
    assert 26 <= llm.engine.store.pages.total <= 2 * (26 + 3)
    greedy = SamplingParams(temperature=0, max_tokens=30)
    token = llm.generate([1, 2, 3], greedy)[0].outputs[0].token_ids[-1]
    open_ended = engine(model)
    ended = open_ended.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=None, stop_token_ids=[token]))[0]
    assert ended.params.max_tokens == 997 and len(ended.outputs[0].token_ids) <= 30
    assert open_ended.engine.store.pages.total == 1 + 9  # room for an answer of 256 tokens, to compile seldom


def test_a_row_that_does_not_fit_alone_fails_and_the_others_are_answered():
    model = random_model()
    ample, tight = roomy(engine(model)), engine(model, 5)  # the one runs the programs of other tests
    found = results(tight)
    assert tight.engine.progress.rows == len(found)
    expected = results(ample, reserve=())
    assert [name for name in found if found[name].error] == ["r3"]
    assert not found["r3"].outputs and "181 tokens" in str(found["r3"].error)  # its prompt twice: it is scored, too
    assert {n: o for n, o in found.items() if n != "r3"} == {n: o for n, o in expected.items() if n != "r3"}
    with pytest.raises(
        NoRoomError, match=r"^memory: 161 tokens of one row take .* the budget of .* room for 160; give"
    ):
        tight.generate([1, 2, 3], SamplingParams(max_tokens=500, ignore_eos=True))
    with pytest.raises(NoRoomError, match="memory: 170 tokens"):
        tight.score(list(range(170)))
    (score,) = tight.score(list(range(150)))
    assert score == ample.score(list(range(150)))[0]
    full = tight.generate([1, 2, 3], SamplingParams(max_tokens=158, temperature=0))[0]  # the last is not fed
    assert full.outputs == ample.generate([1, 2, 3], SamplingParams(max_tokens=158, temperature=0))[0].outputs
    with pytest.raises(NoRoomError, match="^prompt 1: memory: 181 tokens"):
        tight.generate([[1], list(range(180))], SamplingParams(max_tokens=2))
    with pytest.raises(NoRoomError, match="memory: 181 tokens"):
        next(tight.stream(list(range(180))))


def with_more(cache, pages):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) + pages, *x.shape[1:]), x.dtype), cache)


@pytest.mark.slow
def test_growing_frees_each_buffer_before_the_next(model):
    llm = engine(model)
    llm.generate([1, 2, 3], SamplingParams(max_tokens=2))
    state = llm.engine.store.state
    old = jax.tree.leaves(state.cache)
    before = [np.asarray(x).copy() for x in old]
    new = jax.tree.leaves(grown(state.cache, 1, with_more(state.cache, 5)))
    assert all(x.is_deleted() for x in old)
    for x, values in zip(new, before, strict=True):
        assert len(x) == len(values) + 5
        np.testing.assert_array_equal(x[:-5], values)
        assert not np.asarray(x[-5:]).any()


def test_stacked_layers_grow_each_in_its_place():
    buffer = jnp.arange(2 * 3 * 4.0).reshape(6, 1, 2, 2)
    (new,) = jax.tree.leaves(grown([jnp.copy(buffer)], 2, with_more([buffer], 2)))
    np.testing.assert_array_equal(new.reshape(2, 4, 4)[:, :3], buffer.reshape(2, 3, 4))
    assert not new.reshape(2, 4, 4)[:, 3].any()


def test_pages_belong_to_those_that_use_them():
    """Against plain lists: what is lent stays, what is written to is the slot's own."""
    rng = np.random.default_rng(0)
    pages = Pages(4, 8)
    pages.grow(30, 80)
    held = [[] for _ in range(4)]
    for _ in range(400):
        slot, source, tokens = rng.integers(4), rng.integers(4), int(rng.integers(0, 60))
        if rng.random() < 0.5:
            count = min(int(rng.integers(0, 8)), pages.held(slot) + pages.free)
            pages.keep(slot, count)
            pages.give(slot, count)
        elif tokens <= 8 * pages.held(source) and pages.free:
            whole, before = tokens // 8, pages.table[source].copy()
            origin, copy = pages.lend(source, slot, tokens)
            table = pages.table[slot]
            assert table[:whole].tolist() == before[:whole].tolist()
            assert pages.held(slot) == pages.needed(tokens)
            if copy:
                assert origin == before[whole] and table[whole] == copy != origin
            elif tokens % 8:
                assert slot == source and table[whole] == before[whole]
            if tokens % 8:
                assert sum(table[whole] in pages.table[s, : pages.held(s)] for s in range(4)) == 1
        held = [pages.table[s, : pages.held(s)].tolist() for s in range(4)]
        used = {p for h in held for p in h}
        assert 0 not in used and len(used) + pages.free == 29
        assert all(not pages.table[s, pages.held(s) :].any() for s in range(4))


def test_windows_follow_the_rows_in_use():
    """A row at rest stands at 0; blocks of 256, a window of 512."""
    first, turns = block_range(jnp.array([[15999], [0]]), 256, 512)
    assert (first.tolist(), int(turns)) == ([60, 0], 3)
    first, turns = block_range(jnp.array([[15999], [700], [0]]), 256, 512)
    assert (first.tolist(), int(turns)) == ([60, 0, 0], 3)
    first, turns = block_range(jnp.array([[15999], [0]]), 256, None)
    assert (first.tolist(), int(turns)) == ([0, 0], 63)
    first, turns = block_range(jnp.arange(1024, 1152)[None], 128, 512)  # a chunk of a prompt
    assert (first.tolist(), int(turns)) == ([4], 5)


def test_no_block_before_a_window_is_read():
    """It holds NaN: not even nothing times it is nothing."""
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.normal(size=(2, 1, 2, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((21, 1, 32, 8), (21, 1, 8, 32)))
    table = np.zeros((2, 20), np.int32)
    table[0] = rng.permutation(np.arange(1, 21))
    before = table[0, :17]  # position 639 sees from 600 on: pages 18 and 19
    ctx = Context(jnp.array([[639], [0]]), resolve("reference", jnp.float32), 16, jnp.asarray(table))
    attended = jax.jit(lambda k, v: cached_attention(q, k, v, Scores(1.0, window=40), ctx))
    expected = attended(k, v)
    broken = [x.at[before].set(jnp.nan) for x in (k, v)]
    np.testing.assert_array_equal(attended(*broken), expected)
    keys, values = k[table[0]].reshape(640, 8)[600:], jnp.moveaxis(v[table[0], 0], 1, 2).reshape(640, 8)[600:]
    plain = jax.nn.softmax(q[0, 0] @ keys.T) @ values
    np.testing.assert_allclose(expected[0, 0], plain, atol=1e-5)


def test_a_budget():
    m = Memory(budget=1000, weights=300, slots=100, page=50, buffer=10, tokens=32)
    assert (m.pages, m.most_tokens, m.pages_from(4)) == (12, 11 * 32, 11)
    big = Memory(budget=6 * 10**9, weights=2_500_000_000, slots=70_000_000, page=11_796_480, buffer=1, tokens=256)
    assert big.describe() == (
        "weights 2.50 GB, slots 70.0 MB, cache up to 3.42 GB as rows fill it (73,984 tokens of 46.1 kB); budget 6.00 GB"
    )
    with pytest.raises(
        RequestError, match=r"memory: the budget is 0.0 MB, and this model needs 0.0 MB at least \(weig"
    ):
        Memory(budget=549, weights=300, slots=100, page=50, buffer=10, tokens=32)


@pytest.mark.parametrize(
    ("text", "count"),
    [(7, 7), (1.5e9, 1_500_000_000), ("6GB", 6 * 10**9), ("1.5 GiB", 3 << 29), ("500m", 5 * 10**8), ("64K", 64_000)],
)
def test_sizes(text, count):
    assert parse(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1", "6XB", "0", True, None])
def test_no_sizes(text):
    with pytest.raises(RequestError, match="memory: expected bytes, or a size such as 6GB or 500MB, found"):
        parse(text)


def test_the_default_is_three_quarters_of_what_is_free_beside_the_weights(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 8000)
    monkeypatch.setattr(memory, "_status", lambda path: {"RssAnon": 900})
    cpu = jax.devices("cpu")[0]
    assert memory.default_budget(500, cpu) == 500 + 6000  # the weights are in memory
    assert memory.default_budget(2900, cpu) == 2900 + 4500  # 2,000 bytes of them are not, or not for sure
    assert memory.default_budget(20_000, cpu) == 20_000 + 1500
    assert memory.default_budget(500, cpu, 4) == 500 + 1500  # for each of four


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    rows = [{"id": "short", "prompt": "abc"}, {"id": "long", "prompt": "x" * 900}, {"id": "open", "prompt": "abcd"}]
    rows[2] |= {"max_tokens": 996, "ignore_eos": True}
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = checkpoint(folder / "model", max_position_embeddings=1000, num_hidden_layers=1)
    return folder, path


def three_pages(path, slots):
    """A budget for 768 tokens."""
    m = LLM(path, max_batch=slots).engine.store.memory
    return m.weights + m.slots + 4 * m.page


@pytest.mark.slow
def test_a_job_states_its_memory_and_keeps_to_it(files, capsys):
    folder, path = files
    budget = three_pages(path, 2)
    command = [
        "batch",
        "--model",
        str(path),
        "--input",
        str(folder / "in.jsonl"),
        "--output",
        str(folder / "out.jsonl"),
    ]
    command += ["--max-batch", "2", "--max-tokens", "3", "--progress-seconds", "0", "--ordered"]
    assert main([*command, "--memory", str(budget), "--dry-run"]) == 1
    shown = capsys.readouterr()
    assert "1 cannot (0 of them too long for the context, 1 for the memory)" in shown.out
    assert "1 row may outgrow the memory" in shown.out
    assert "line 2: memory: 901 tokens of one row take" in shown.out
    stated = LLM(path, max_batch=2, memory=budget).engine.store.memory.describe()
    assert "(768 tokens of 0.1 kB)" in stated
    assert f"memory         {stated}" in shown.out
    assert main([*command, "--memory", str(budget)]) == 1
    assert capsys.readouterr().err.startswith(f"llmjax: memory: {stated}\n")
    short, long, opened = (json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines())
    assert len(short["token_ids"]) == 3
    assert long["error"].startswith("memory: 901 tokens of one row take") and "line" not in long
    assert opened["error"].startswith("memory: 769 tokens")
    # A budget fixes no bit: the job goes on under another, and does again what failed.
    assert main([*command, "--retry-errors"]) == 0
    again, long, opened = (json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines())
    assert again == short and len(long["token_ids"]) == 3 and len(opened["token_ids"]) == 996


def test_each_verb_has_a_budget(files, capsys):
    _, path = files
    budget = three_pages(path, 1)
    told = "llmjax: memory: the budget is 0.0 MB, and this model needs "
    (path.parent / "texts.jsonl").write_text(json.dumps({"id": 1, "text": "x" * 900}) + "\n")
    files_ = ["--input", str(path.parent / "texts.jsonl"), "--output", "-"]
    for verb in (["generate", "--prompt", "x"], ["chat"], ["batch", *files_], ["score", *files_]):
        assert main([*verb, "--model", str(path), "--memory", "1000"]) == 2
        assert told in capsys.readouterr().err
    assert main(["score", *files_, "--model", str(path), "--memory", str(budget)]) == 1
    assert json.loads(capsys.readouterr().out)["error"].startswith("memory: 900 tokens of one row take")
    assert main(["generate", "--prompt", "x" * 900, "--model", str(path), "--memory", str(budget)]) == 2
    assert capsys.readouterr().err.startswith("llmjax: memory: 901 tokens of one row take")


@pytest.mark.parametrize(
    ("answer", "kept", "left"), [(20, 180, 20), (25, 175, 25), (26, 175, 25), (200, 175, 25), (None, 175, 25)]
)
def test_a_prompt_that_is_cut_short_keeps_most_and_the_answer_is_clipped(answer, kept, left):
    llm = LLM(random_model(), max_batch=1, truncate_prompt=True)  # a context of 200
    request = llm.request(list(range(300)), SamplingParams(max_tokens=answer))
    assert request.ids == list(range(300 - kept, 300))
    assert (request.truncated, request.params.max_tokens) == (300 - kept, left)
    whole = llm.request(list(range(199)), SamplingParams(max_tokens=500))
    assert (whole.ids, whole.truncated, whole.params.max_tokens) == (list(range(199)), 0, 1)


@pytest.mark.slow
def test_a_row_says_how_much_was_dropped(files, tmp_path, capsys):
    _, path = files
    llm = LLM(path, max_batch=4, truncate_prompt=True)
    text = "x" * 1500
    (output,) = llm.generate(text, SamplingParams(max_tokens=2))
    assert (output.truncated_prompt_tokens, len(output.prompt_token_ids)) == (502, 998)
    openai = {
        "custom_id": "o",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": text, "max_tokens": 5000},
    }
    rows = [{"id": "n", "prompt": text}, {"id": "fits", "prompt": "x"}, openai]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = dryrun.run(lambda: llm, str(source), str(target), SamplingParams(max_tokens=2))
    assert report.truncated == 2
    job.run(lambda: llm, str(source), str(target), SamplingParams(max_tokens=2), job.Options(True, progress_seconds=0))
    native, fits, form = (json.loads(line) for line in target.read_text().splitlines())
    assert native["truncated_prompt_tokens"] == 502 and native["usage"]["prompt_tokens"] == 998
    assert "truncated_prompt_tokens" not in fits
    assert form["llmjax"]["truncated_prompt_tokens"] == 625 and form["llmjax"]["params"]["max_tokens"] == 125
    command = ["generate", "--model", str(path), "--prompt", text, "--truncate-prompt", "--max-tokens", "2"]
    assert main(command) == 0
    assert "warning: the prompt's first 502 tokens were dropped, 998 are left" in capsys.readouterr().err
