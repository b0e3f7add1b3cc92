"""Jobs at their edges: inputs of other kinds, open pipes, what rows bring and leave out, texts that are scored."""

import json
import os
import threading
import time

import numpy as np
import pytest

import llmjax
from llmjax import LLM, SamplingParams
from llmjax.batch import dryrun, job, openai
from llmjax.batch.index import Totals
from llmjax.batch.job import Options
from llmjax.batch.reading import open_lines
from llmjax.batch.rows import Shard
from llmjax.batch.scoring import Scoring
from llmjax.errors import ConfigError, RequestError, ResumeError
from llmjax.runtime.generation import sampling_defaults
from tests import tiny

PARAMS = SamplingParams(max_tokens=4, temperature=0)
QUIET = Options(ordered=True, progress_seconds=0)
REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{{ mood }}>"
)
TALK = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.checkpoint(tmp_path_factory.mktemp("tiny"))
    (folder / "chat_template.jinja").write_text(REFUSING)
    (folder / "generation_config.json").write_text(
        '{"do_sample": false, "top_k": 7, "top_p": 0.5, "max_new_tokens": 3, "eos_token_id": 256, "min_p": null}'
    )
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return tiny.roomy(LLM(folder, max_batch=4, chunk=16, block=16))


def answers(llm, folder, rows, params=PARAMS, **options):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / "in.jsonl").write_text(text, encoding="utf-8")
    job.run(lambda: llm, str(folder / "in.jsonl"), str(folder / "out.jsonl"), params, QUIET, **options)
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_what_a_row_brings_and_leaves_out(llm, tmp_path):
    body = {"prompt": "ab", "metadata": {"b": 2}, "max_tokens": 2, "prompt_logprobs": 0}
    rows = [
        {"id": 7, "prompt": "ab", "metadata": {"a": [1, None]}, "temperature": None, "messages": None, "lora": None},
        {"custom_id": 9, "url": openai.COMPLETIONS, "method": "POST", "body": body},
        {"id": "bad", "prompt": "ab", "metadata": 3, "n": 0},
        '{"id": "twice", "prompt": "ab", "prompt": "cd"}',
        '{"id": "deep", "messages": [{"role": "user", "role": "system", "content": "x"}]}',
        '{"id": "odd", "prompt": "ab", "metadata": NaN}',
    ]
    own, other, bad, twice, deep, odd = answers(llm, tmp_path, rows)
    assert own["id"] == 7 and own["metadata"] == {"a": [1, None]} and own["model"] == llm.model.path.name
    assert own["text"] == llm.generate("ab", PARAMS)[0].outputs[0].text and "token_texts" not in own
    assert other["custom_id"] == 9 and other["llmjax"]["metadata"] == {"b": 2}
    assert other["llmjax"]["token_texts"] == {str(llm.tokenizer.encode("b")[0]): "b"}
    assert bad["metadata"] == 3 and "n: expected" in bad["error"]
    assert twice["error"] == "line 4: key 'prompt' is there twice" and "'role' is there twice" in deep["error"]
    assert "metadata: cannot be written as JSON" in odd["error"]
    before = (tmp_path / "out.jsonl").read_bytes()
    assert answers(llm, tmp_path, [rows[0] | {"metadata": {"a": 2}}, *rows[1:]])[0]["metadata"] == {"a": 2}
    answers(llm, tmp_path, rows)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_texts_of_the_tokens_beside_their_probabilities(llm, tmp_path):
    (row,) = answers(llm, tmp_path, [{"prompt": "aé", "logprobs": 2, "prompt_logprobs": 1}])
    named = {token for step in (*row["logprobs"], *row["prompt_logprobs"][1:]) for token in step}
    assert row["token_texts"].keys() == named
    ids = llm.tokenizer.encode("aé")
    assert row["token_texts"][str(ids[1])] == r"bytes:\xc3" and row["token_texts"][str(ids[2])] == r"bytes:\xa9"
    output = llm.generate("aé", SamplingParams(max_tokens=4, temperature=0, logprobs=2, prompt_logprobs=1))[0]
    assert {str(token): text for token, text in output.token_texts.items()} == row["token_texts"]
    assert output.model == llm.model.path.name


def test_the_first_failures_are_named(llm, tmp_path):
    answers(llm, tmp_path, [{"id": i, "prompt": "a", "n": 0} for i in range(5)])
    summary = job.run(lambda: llm, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), PARAMS, QUIET)
    wrong = "n: expected an integer from 1 to 16384, found 0"
    assert summary.failures == [f"id {i}: line {i + 1}: {wrong}" for i in range(3)] and summary.kept == 5


OTHER_KINDS = [
    (b"id,prompt\n1,hello\n", "this is CSV, whose first line is 'id,prompt'"),
    (b"\xef\xbb\xbfid;prompt\n1;hello\n", "this is CSV, whose first line is 'id;prompt'"),
    (b"id\tprompt\n1\thello\n", "this is TSV"),
    (b"hello\nworld\n", "this is plain text or CSV, whose first line is 'hello'"),
    (b"PAR1\x15\x04\x15", "this is a Parquet file"),
    (b'[{"prompt": "a"},\n{"prompt": "b"}]\n', "this is one JSON array (jq -c '.[]' makes lines of it)"),
    (b'[{"prompt": "a"}]', "this is one JSON array"),
    (b'{\n  "prompt": "a"\n}\n', "this is one JSON object over several lines"),
    ('{"prompt": "a"}\n'.encode("utf-16"), "this is UTF-16 text"),
    (b"\x28\xb5\x2f\xfd\x04", "this is a zstd file"),
    ('{"prompt": "a"}\n'.encode("utf-16-le"), "this is UTF-16 text without a byte order mark, or a binary file"),
    ('{"prompt": "a"}\n'.encode("utf-16-be"), "this is UTF-16 text without a byte order mark, or a binary file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n", "this is a git-lfs pointer, not the"),
]


@pytest.mark.parametrize(("data", "message"), OTHER_KINDS)
def test_an_input_that_is_no_jsonl(tmp_path, data, message):
    """Told before the model is loaded, and no output is made."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(data)
    for work in (lambda: job.run(None, str(source), str(output)), lambda: dryrun.run(None, str(source), str(output))):
        with pytest.raises(RequestError) as found:
            work()
        assert str(found.value).startswith(f"{source}: {message}") and "expected JSONL: UTF-8" in str(found.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("data", ["", "\n \n", "\ufeff"])
def test_an_input_without_rows_is_told(llm, tmp_path, data):
    (tmp_path / "in.jsonl").write_text(data)
    for work in (job.Generating, Scoring):
        with pytest.warns(UserWarning, match=f"^{tmp_path}/in.jsonl: no rows in it, so there was nothing to do$"):
            summary = job.run(lambda: llm, f"{tmp_path}/in.jsonl", f"{tmp_path}/{work.__name__}", work=work)
        assert summary.status == "complete" and summary.totals == Totals(0, 0, 0, 0)
    with pytest.warns(UserWarning, match="no rows of this shard in it"):
        job.run(lambda: llm, f"{tmp_path}/in.jsonl", f"{tmp_path}/s", None, Options(shard=Shard(1, 2)))


def test_a_summary_tells_speeds_of_what_ran():
    run = {"seconds": 3.0, "compile_seconds": 1.0, "load_seconds": 0.5, "busy": 0.25}
    run |= {"prefill_tokens": 0, "prefill_seconds": 0.0, "decode_tokens": 0, "decode_seconds": 0.0}
    rest = "load 0.5 s, compile 1.0 s, generate 2.0 s"
    assert job.Summary(run=run).describe() == f"0 rows answered, 0 failed; 0 prompt tokens; {rest}"
    run |= {"prefill_tokens": 40, "prefill_seconds": 2.0}
    scored = job.Summary(totals=Totals(3, 1, 40, 0), run=run).describe("scored")
    assert scored == f"2 rows scored, 1 failed; 40 prompt tokens; prefill 20 tok/s; {rest}"
    run |= {"decode_tokens": 9, "decode_seconds": 1.0}
    assert job.Summary(totals=Totals(3, 1, 40, 9), run=run).describe() == (
        "2 rows answered, 1 failed; 40 prompt and 9 answer tokens; "
        f"prefill 20 tok/s, decode 9 tok/s in 25% of the slots; {rest}"
    )
    one = job.Summary(totals=Totals(1, 0, 2000, 1), run=run).describe()
    assert one.startswith("1 row answered, 0 failed; 2,000 prompt and 1 answer token; ")


def test_a_byte_order_mark(tmp_path):
    (tmp_path / "in.jsonl").write_bytes('{"prompt": "a"}\n{"prompt": "b"}'.encode("utf-8-sig"))
    with open_lines(str(tmp_path / "in.jsonl")) as lines:
        assert list(lines) == ['{"prompt": "a"}\n', '{"prompt": "b"}']
        assert list(lines.arriving(lambda: True)) == list(lines)


def test_what_comes_of_a_pipe_line_by_line():
    """Nothing is waited for while there is other work, and a line may come in pieces."""
    read, write = os.pipe()
    os.write(write, b'\xef\xbb\xbf{"a": 1}\n{"b')
    with open_lines(f"/dev/fd/{read}") as lines:
        found = lines.arriving(lambda: False)
        assert [next(found), next(found), next(found)] == ['{"a": 1}\n', None, None]
        os.write(write, '": "é"}\n\xff'.encode())
        os.close(write)
        assert [line for line in found if line is not None] == ['{"b": "é"}\n', "\xff"]
    os.close(read)


def test_a_line_of_an_open_pipe_is_answered_at_once(llm, tmp_path):
    read, write = os.pipe()
    output = tmp_path / "out.jsonl"
    arguments = (lambda: llm, f"/dev/fd/{read}", str(output), PARAMS, QUIET)
    work = threading.Thread(target=job.run, args=arguments)
    os.write(write, b'{"id": "a", "prompt": "ab"}\n')
    work.start()
    for row in (b'{"id": "b", "prompt": "abc"}\n', b""):
        end = time.monotonic() + 300
        before = 1 if row else 2
        while (not output.exists() or output.read_text().count("\n") < before) and time.monotonic() < end:
            time.sleep(0.01)
        assert work.is_alive() and [json.loads(line)["id"] for line in output.read_text().splitlines()] == (
            ["a"] if row else ["a", "b"]
        )
        os.write(write, row) if row else os.close(write)
    work.join(60)
    assert not work.is_alive()
    os.close(read)


def test_texts_are_scored_resumed_and_never_overwritten(llm, tmp_path):
    texts = ["abcd", "the quick brown fox jumps over", "xy", "z", "abcde", "ab", "dcba", "abcd"]
    rows = [{"id": f"t{i}", "text": text} for i, text in enumerate(texts)]
    rows.insert(3, {"token_ids": "abc", "metadata": 1})
    found = answers(llm, tmp_path, rows[:4], None, work=Scoring)
    output = tmp_path / "out.jsonl"
    summary = job.run(lambda: llm, str(tmp_path / "in.jsonl"), str(output), None, QUIET, work=Scoring)
    assert summary.kept == 4
    found = answers(llm, tmp_path, rows, None, work=Scoring)
    assert [row["id"] for row in found] == ["t0", "t1", "t2", 4, "t3", "t4", "t5", "t6", "t7"]
    bad = found.pop(3)
    assert bad["metadata"] == 1 and bad["error"] == "line 4: token_ids: expected a list, found 'abc'"
    plain = llm.model.logits([llm.tokenizer.encode(text) for text in texts])
    for text, row, logits in zip(texts, found, plain, strict=True):
        ids = llm.tokenizer.encode(text)
        expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
        assert row["token_ids"] == ids and row["tokens"] == list(text) and row["logprobs"][0] is None
        np.testing.assert_allclose(row["logprobs"][1:], expected[np.arange(len(ids) - 1), ids[1:]], atol=2e-5)
        assert row["top1"][1:] == expected[:-1].argmax(-1).tolist()
        assert llm.score(text)[0].logprobs == row["logprobs"]  # the same bits alone, and wherever it stands
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    scored = [p for row in found for p in row["logprobs"][1:]]
    assert manifest["summary"]["tokens"] == len(scored) and manifest["summary"]["rows"] == 8
    assert manifest["summary"]["nll"] == pytest.approx(-np.mean(scored), rel=1e-12)
    before = output.read_bytes()
    with pytest.raises(ResumeError, match="was begun with other settings"):
        job.run(lambda: llm, str(tmp_path / "in.jsonl"), str(output), PARAMS, QUIET)
    (tmp_path / "out.jsonl.manifest.json").unlink()
    with pytest.raises(ResumeError, match="holds something already"):
        job.run(lambda: llm, str(tmp_path / "in.jsonl"), str(output), None, QUIET, work=Scoring)
    assert output.read_bytes() == before


def test_short_texts_are_computed_together(llm):
    calls = []
    real = llm.engine.score_texts
    llm.engine.score_texts = lambda *args: calls.append(1) or real(*args)
    try:
        llm.score([[i, i + 1, i + 2] for i in range(10)])
    finally:
        del llm.engine.score_texts
    assert len(calls) == 3  # four at a time


def test_the_models_own_sampling_settings(llm, folder, tmp_path):
    """Where nobody says otherwise, by fields; a whole ``SamplingParams`` says everything."""
    own = {"temperature": 0.0, "top_k": 7, "top_p": 0.5, "max_tokens": 3}
    assert llm.generation == own
    for given in (None, {}, {"top_k": 2, "top_p": None}):
        expected = SamplingParams(**{**own, **{k: v for k, v in (given or {}).items() if v is not None}})
        assert llm.sampling_params(given) == expected
        (output,) = llm.generate("ab", given)
        assert output.params == expected and len(output.outputs[0].token_ids) == 3
    assert llm.sampling_params(SamplingParams()) == SamplingParams()
    plain = tiny.roomy(LLM(llm.model, max_batch=4, chunk=16, block=16, generation_config="none"))
    assert plain.sampling_params() == SamplingParams()
    (row,) = answers(llm, tmp_path, [{"prompt": "ab", "top_p": 0.25}], {"max_tokens": 2})
    expected = SamplingParams(temperature=0.0, top_k=7, top_p=0.25, max_tokens=2).to_dict()
    assert row["params"] == json.loads(json.dumps(expected))


def test_settings_of_a_generation_config():
    def defaults(config):
        return sampling_defaults(config, 64, "f")

    own = {"temperature": 0.6, "do_sample": True, "stop_strings": ["x"]}
    assert defaults(own) == {"temperature": 0.6, "stop": ["x"]}
    neutral = {"num_beams": 1, "typical_p": 1.0, "min_length": 0, "transformers_version": "5", "bos_token_id": 1}
    for longest in (20, 64, 4096):  # what transformers has for none, the context, and more
        assert defaults(neutral | {"max_length": longest}) == {}
    with pytest.warns(UserWarning, match="f: not heeded, for llmjax does not do it: num_beams, no_repeat_ngram_size"):
        defaults({"num_beams": 4, "no_repeat_ngram_size": 3})
    with pytest.warns(UserWarning, match="not heeded, for llmjax does not do it: min_length, max_length"):
        defaults({"min_length": 9, "max_length": 40})
    for wrong in ({"temperature": -1}, {"do_sample": "yes"}, {"top_p": "x"}):
        with pytest.raises(ConfigError, match=f"^f: {next(iter(wrong))}: expected .*; correct it, or take the plain"):
            defaults(wrong)


def test_settings_in_config_json(tmp_path):
    """Where transformers finds them, too, without a generation_config.json."""
    path = tiny.checkpoint(tmp_path / "m", repetition_penalty=1.5, suppress_tokens=[3, 4], do_sample=False)
    llm = LLM(path)
    assert (llm.generation, llm.suppressed) == ({"repetition_penalty": 1.5, "temperature": 0.0}, (3, 4))
    copy = LLM(llmjax.convert(path, tmp_path / "copy", to="hf", config={"eos_token_id": 7}))  # which hides none of them
    assert (copy.generation, copy.suppressed, 7 in copy.model.eos_ids) == (llm.generation, (3, 4), True)
    (path / "generation_config.json").write_text('{"top_k": 3}')
    assert LLM(path).generation == {"top_k": 3}
    for file in ("generation_config.json", "config.json"):  # messages name the one that says so
        tiny.checkpoint(path, do_sample="yes")
        (path / "generation_config.json").unlink(missing_ok=True)
        if file == "generation_config.json":
            (path / file).write_text('{"do_sample": "yes"}')
        with pytest.raises(ConfigError, match=f"m: {file}: do_sample: expected true or false, found 'yes'; correct it"):
            LLM(path)


def test_a_system_message_where_the_template_has_no_place_for_it(llm, tmp_path):
    with pytest.raises(RequestError, match=r"System role not supported; fold_system \(--fold-system\) puts"):
        llm.rendered(TALK)
    folded = "[user]be\n\nhi>"
    assert llm.rendered(TALK, fold_system=True) == folded
    assert LLM(llm.model, max_batch=4, chunk=16, block=16, fold_system=True).rendered(TALK) == folded
    parts = [
        TALK[0],
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    assert llm.rendered(parts, fold_system=True) == "[assistant]yes[user]be\n\nhi>"
    assert llm.rendered(TALK[:1], fold_system=True) == "[user]be>"
    chat = {"custom_id": "c", "method": "POST", "url": openai.CHAT}
    more = {"fold_system": True, "chat_template_kwargs": {"mood": "!"}}
    a, b, c, d = answers(
        llm,
        tmp_path,
        [
            {"id": "a", "messages": TALK, **more},
            chat | {"body": {"messages": TALK, **more}},
            {"id": "e", "prompt": "x", **more},
            {"id": "d", "messages": TALK[1:], "chat_template": "<{{ messages[0].content }}>"},
        ],
    )
    ids = llm.tokenizer.encode("[user]be\n\nhi!>")
    assert a["usage"]["prompt_tokens"] == b["response"]["body"]["usage"]["prompt_tokens"] == len(ids)
    (expected,) = llm.generate(ids, PARAMS)
    assert a["text"] == b["response"]["body"]["choices"][0]["message"]["content"] == expected.outputs[0].text
    assert c["error"] == "line 3: chat_template_kwargs, fold_system: goes with messages, found prompt"
    assert d["text"] == llm.generate("<hi>", PARAMS)[0].outputs[0].text
