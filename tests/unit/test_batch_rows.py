"""Rows of a batch: the forms they may have, what their answers look like, and how they are shared out."""

import errno
import gzip
import io
import json
import os
import sys
import threading
import types
from pathlib import Path

import pytest

from llmjax import LLM, SamplingParams
from llmjax.batch import dryrun, job, openai, scoring
from llmjax.batch.index import Index
from llmjax.batch.job import Options
from llmjax.batch.progress import Count, Reporter
from llmjax.batch.question import PARAMS as PARAM_NAMES
from llmjax.batch.reading import open_lines
from llmjax.batch.rows import Generating, Shard, count_rows, read_rows
from llmjax.cli import training
from llmjax.errors import RequestError
from tests import tiny

PARAMS = SamplingParams(max_tokens=4, temperature=0)
QUIET = Options(ordered=True, progress_seconds=0)
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tiny.checkpoint(tmp_path_factory.mktemp("tiny"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return tiny.roomy(LLM(folder, max_batch=4, chunk=16, block=16))


def answers(llm, folder, rows, options=QUIET):
    source = folder / "in.jsonl"
    source.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    job.run(lambda: llm, str(source), str(folder / "out.jsonl"), PARAMS, options)
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def chat(body, **row):
    return {"custom_id": "c", "method": "POST", "url": openai.CHAT, "body": body} | row


def completion(body, **row):
    return {"custom_id": "c", "method": "POST", "url": openai.COMPLETIONS, "body": body} | row


HI = [{"role": "user", "content": "hi"}]


def test_openai_rows_are_answered_in_openai_form(llm, tmp_path):
    (plain,) = llm.generate(["abc"], PARAMS)
    (talk,) = llm.chat([HI], PARAMS)
    rows = [
        completion({"model": "m", "prompt": "abc", "logprobs": 2, "user": "me"}, custom_id="a"),
        chat({"messages": HI, "logprobs": True, "top_logprobs": 2, "stream": False}, custom_id="b"),
        chat({"messages": HI, "max_completion_tokens": 2, "temperature": 1, "top_k": 5, "seed": 7}, custom_id="c"),
    ]
    a, b, c = answers(llm, tmp_path, rows)
    assert set(a) == {"id", "custom_id", "response", "error", "llmjax"} and a["error"] is None
    assert a["response"]["status_code"] == 200 and a["custom_id"] == "a"
    body = a["response"]["body"]
    assert body["object"] == "text_completion" and body["model"] == "m"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    (choice,) = body["choices"]
    assert choice["text"] == plain.outputs[0].text and choice["finish_reason"] == "length" and choice["index"] == 0
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(plain.outputs[0].token_logprobs)
    assert [len(step) for step in choice["logprobs"]["top_logprobs"]] <= [2] * 4
    body = b["response"]["body"]
    assert body["object"] == "chat.completion" and body["choices"][0]["message"]["role"] == "assistant"
    assert body["choices"][0]["message"]["content"] == talk.outputs[0].text
    steps = body["choices"][0]["logprobs"]["content"]
    assert len(steps) == 4 and all(s["top_logprobs"][0]["logprob"] >= s["top_logprobs"][1]["logprob"] for s in steps)
    assert c["llmjax"]["params"] | {"temperature": 1, "max_tokens": 2, "top_k": 5} == c["llmjax"]["params"]
    assert c["llmjax"]["seed"] == 7 and c["response"]["body"]["choices"][0]["logprobs"] is None


def test_content_may_be_parts_in_every_form(llm, tmp_path):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    string, listed, refused = ([{"role": "user", "content": content}] for content in ("h\ni", parts, image))
    rows = [
        {"id": "a", "messages": listed},
        chat({"messages": listed}, custom_id="b"),
        {"id": "c", "messages": refused},
        chat({"messages": refused}, custom_id="d"),
    ]
    native, openai_row, *errors = answers(llm, tmp_path, rows)
    (expected,) = llm.chat([string], PARAMS)
    assert llm.chat([listed], PARAMS) == [expected]
    assert expected.prompt_token_ids == llm.tokenizer.encode("[user]h\ni>")
    assert (native["text"], native["usage"]["prompt_tokens"]) == (expected.outputs[0].text, 10)
    assert openai_row["response"]["body"]["choices"][0]["message"]["content"] == expected.outputs[0].text
    assert openai_row["response"]["body"]["usage"]["prompt_tokens"] == 10
    message = r"messages[0].content[2].type: expected 'text', all that the model reads, found 'image_url'"
    assert message in errors[0]["error"] and message in errors[1]["error"]["message"]


def test_a_stop_string_that_is_a_special_token(llm, tmp_path):
    row = {"prompt": "abc", "stop": ["</s>"], "ignore_eos": True, "allowed_token_ids": [256], "max_tokens": 9}
    plain, late, other = answers(llm, tmp_path, [row, row | {"min_tokens": 3}, row | {"stop": ["</s"]}])
    assert [(r["token_ids"], r["finish_reason"], r["stop_reason"], r["text"]) for r in (plain, late, other)] == [
        ([256], "stop", "</s>", ""),
        ([256] * 4, "stop", "</s>", ""),
        ([256] * 9, "length", None, ""),
    ]


def test_several_samples_and_the_prompts_logprobs(llm, tmp_path):
    several = {"n": 3, "temperature": 1, "prompt_logprobs": 1}
    rows = [{"id": "a", "prompt": "abc", **several}, completion({"prompt": "abc", **several}, custom_id="b")]
    a, b = answers(llm, tmp_path, rows)
    assert [c["index"] for c in a["outputs"]] == [0, 1, 2] and "text" not in a
    assert len({c["seed"] for c in a["outputs"]}) == 3 and a["outputs"][0]["seed"] == a["seed"]
    assert a["usage"] == {"prompt_tokens": 3, "completion_tokens": 12}
    assert a["prompt_logprobs"][0] is None and len(a["prompt_logprobs"]) == 3
    assert [c["index"] for c in b["response"]["body"]["choices"]] == [0, 1, 2]
    assert b["llmjax"]["prompt_logprobs"] == a["prompt_logprobs"]


BAD = [
    (chat({"messages": HI, "tools": []}), "body.tools: not supported; leave it out, or give it to the template"),
    (chat({"messages": HI, "stream": True}), "body.stream: only False is supported, found True"),
    (chat({"messages": HI, "top_logprobs": 2}), "body.top_logprobs: expected logprobs true"),
    (chat({"messages": HI, "logprobs": 2}), "body.logprobs: expected true or false, found 2"),
    (chat({"messages": HI, "max_tokens": 2, "max_completion_tokens": 3}), "differ; give one"),
    (chat({"messages": []}), "messages: expected a non-empty list"),
    (chat({"prompt": "x"}), "body: expected messages, found prompt"),
    (completion({"prompt": ["a", "b"]}), "expected one prompt"),
    (completion({"prompt": "x", "temperature": "hot"}), "temperature: expected a number"),
    (completion({"prompt": "x", "max_completion_tokens": 3}), "max_completion_tokens: not supported"),
    (completion({"prompt": "x"}, url="/v1/embeddings"), "url: expected /v1/chat/completions"),
    (completion({"prompt": "x"}, method="GET"), "method: expected POST"),
    (completion({"prompt": "x"}, extra=1), "unknown key extra"),
    (completion("x"), "body: expected an object, found str"),
    ({"url": openai.CHAT, "body": {"messages": HI}}, "custom_id: expected a string"),
    ({"id": "x", "custom_id": "y", "prompt": "z"}, "expected id or custom_id, found both"),
    ({"id": None, "prompt": "z"}, "id: expected a string or an integer, found None"),
    ({"id": True, "prompt": "z"}, "id: expected a string or an integer, found True"),
    ({"id": "\ud800", "prompt": "z"}, "half a surrogate pair"),
    ({"id": "x", "prompt": "z", "lora": "a"}, "lora: no adapter named 'a'; resident are none"),
]


def test_bad_rows_say_why(llm, tmp_path):
    rows = [row | ({"custom_id": str(i)} if row.get("custom_id") == "c" else {}) for i, (row, _) in enumerate(BAD)]
    found = answers(llm, tmp_path, [*rows, {"id": "last", "prompt": "x"}])
    assert "text" in found.pop()
    for (_, expected), row in zip(BAD, found, strict=True):
        message = row["error"]["message"] if "custom_id" in row else row["error"]
        assert expected in message, (expected, message)


def test_ids_may_be_numbers_and_default_to_the_line(llm, tmp_path):
    rows = [{"id": 7, "prompt": "x"}, "", {"prompt": "x"}, {"id": "3", "prompt": "x"}]
    rows += [{"id": "bad", "prompt": "x", "metadata": float("nan")}, {"id": "bad", "prompt": "x"}]
    found = answers(llm, tmp_path, rows)
    assert [row["id"] for row in found] == [7, "3", "3", "bad", "bad"]
    assert all("was used by an earlier row" in row["error"] for row in found[2::2])


def test_shards_share_the_rows_out(llm, tmp_path):
    rows = [{"id": f"r{i % 17}", "prompt": "x"} for i in range(20)] + ["{bad", {"prompt": "y"}]
    path = tmp_path / "in.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))

    work = Generating(llm, PARAMS)

    def read(shard):
        index = Index()
        try:
            with open_lines(str(path)) as lines:
                return [(r.line, str(r.error)) for r in read_rows(lines, work, index, shard)]
        finally:
            index.close()

    shards = [Shard(i, 3) for i in (1, 2, 3)]
    parts = [read(shard) for shard in shards]
    assert sorted(sum(parts, [])) == read(Shard(1, 1)) and all(parts)
    with open_lines(str(path)) as lines:
        assert [count_rows(lines, work, shard) for shard in shards] == [len(part) for part in parts]
    for text in ("0/2", "3/2", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(RequestError, match="shard: expected i/n"):
            Shard.parse(text)


@pytest.mark.parametrize("ordered", [True, False])
def test_to_stdout(llm, tmp_path, capsysbinary, ordered):
    rows = [{"id": i, "prompt": "x", "max_tokens": 50 if i == 0 else 1} for i in range(4)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = Options(ordered=ordered, progress_seconds=0)
    job.run(lambda: llm, str(tmp_path / "in.jsonl"), "-", PARAMS, options)
    ids = [json.loads(line)["id"] for line in capsysbinary.readouterr().out.splitlines()]
    assert sorted(ids) == [0, 1, 2, 3] and ids[0] == 0 if ordered else ids[-1] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_dry_run_counts_and_writes_nothing(llm, tmp_path):
    rows = [{"prompt": "abc"}, {"prompt": "x" * 300}, {"prompt": 5}, {"prompt_token_ids": [1] * 9, "max_tokens": 2}]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    report = dryrun.run(lambda: llm, str(source), str(output), PARAMS)
    assert (report.rows, report.bad, report.too_long, report.prompt_tokens, report.answer_tokens) == (2, 2, 1, 12, 6)
    assert report.longest == 9 and "from a calibration: prefill" in report.estimate
    assert "line 2: prompt: 300 tokens, longer than the model's context" in report.describe()
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    job.run(lambda: llm, str(source), str(output), PARAMS, QUIET)
    report = dryrun.run(lambda: llm, str(source), str(output), PARAMS)
    assert report.estimate.startswith("about 0:00 for the 0 rows not done yet, from the 4")


def test_a_calibrations_prompts_are_none_to_be_warned_of():
    """They begin with BOS, which some models want."""
    asked = []
    model = types.SimpleNamespace(
        context_length=99, config=types.SimpleNamespace(vocab_size=9), tokenizer=types.SimpleNamespace(bos_id=20)
    )
    engine = types.SimpleNamespace(slots=2, compile_seconds=0.0)
    llm = types.SimpleNamespace(model=model, engine=engine, generate=lambda prompts, params: asked.extend(prompts))
    dryrun._from_calibration(llm, dryrun.Forecast(rows=1, prompt_tokens=3))
    assert {(ids[0], len(ids)) for ids in asked} == {(20, 3)}


def test_progress_says_what_is_left(llm):
    """Of 10 rows 2 are answered and 2 under way, their prompts 400 tokens: all have 1,000.  120 tokens are two answers
    and what others have so far: 60 an answer, for 8 of them."""
    count = Count(total=10, begun=4, done=2, under_way=2, prompt_tokens=400, most_tokens=4000)
    reporter = Reporter(llm.engine, count, lambda: None, seconds=0)
    assert reporter.line() == "2/10 rows · 2/4 slots"
    counted = reporter._meter._counted
    counted["prefill_tokens"] -= 300
    counted["prefill_seconds"] -= 30
    assert reporter.line() == "2/10 rows · prefill 10 tok/s · 2/4 slots · over 1:10 left"
    counted["prefill_tokens"] -= 700
    assert reporter.line() == "2/10 rows · prefill 33 tok/s · 2/4 slots"  # not: over 0:00 left
    counted["prefill_tokens"] += 700
    counted["decode_tokens"] -= 120
    counted["decode_seconds"] -= 6
    count.answered, count.answer_tokens = 2, 100
    assert reporter.line() == "2/10 rows · prefill 10 tok/s · decode 20 tok/s · 2/4 slots · 1:34 left"
    count.done, count.under_way, count.begun, count.answered = 9, 1, 10, 9  # the last has more than the others' mean
    count.most_tokens, count.prompt_tokens, count.answer_tokens = 1000, 300, 45
    assert reporter.line().endswith(" · 0:01 left")  # of 13 tokens, at 20 a second
    count.most_tokens = 760
    assert reporter.line().endswith(" · 0:00 left")  # one token more, at the most


def test_a_terminal_that_is_closed_ends_nothing(llm, monkeypatch):
    """Nor a pipe whose reader left: a job, or a training run, of hours would be lost for a line nobody reads."""

    class Closed(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Closed())
    with Reporter(llm.engine, Count(total=2), lambda: None):
        pass
    values = {"loss": 1.0, "tokens": 8, "seconds": 1.0}
    training._Progress()(types.SimpleNamespace(values=values, step=1, steps=1, seconds_left=0.0))


def through(pipe, data):
    """Writes into a pipe from a thread of its own."""
    writer = threading.Thread(target=lambda: Path(pipe).write_bytes(data), daemon=True)
    writer.start()
    return writer


@pytest.mark.parametrize("packed", [False, True])
def test_a_pipe_is_read_but_once(llm, tmp_path, packed, monkeypatch):
    rows = [{"id": f"r{i}", "prompt": "abc"} for i in range(6)]
    expected = answers(llm, tmp_path, rows)
    data = (tmp_path / "in.jsonl").read_bytes()
    data = gzip.compress(data) if packed else data
    named, output = tmp_path / "fifo", str(tmp_path / "out2.jsonl")
    os.mkfifo(named)
    for kept in (0, 6):
        through(named, data)
        summary = job.run(lambda: llm, str(named), output, PARAMS, QUIET)
        assert (summary.totals.rows, summary.kept, summary.status) == (6, kept, "complete")
        assert [json.loads(line) for line in Path(output).read_text().splitlines()] == expected
    through(named, data)
    assert dryrun.run(lambda: llm, str(named), output, PARAMS).rows == 6
    read, write = os.pipe()
    with open(read, "rb") as source, open(write, "wb") as sink:
        sink.write(data)
        sink.close()
        assert job.run(lambda: llm, f"/dev/fd/{source.fileno()}", output, PARAMS, QUIET).kept == 6
    with open(tmp_path / "in.jsonl") as plain:
        for stdin in (io.TextIOWrapper(io.BytesIO(data)), plain):
            monkeypatch.setattr(sys, "stdin", stdin)
            assert job.run(lambda: llm, "-", output, PARAMS, QUIET).kept == 6


def test_a_pipe_is_scored(llm, tmp_path):
    named = tmp_path / "fifo"
    os.mkfifo(named)
    through(named, b'{"text": "abc"}\n{"text": "abd"}\n')
    output = tmp_path / "out.jsonl"
    summary = job.run(lambda: llm, str(named), str(output), options=QUIET, work=scoring.Scoring)
    assert summary.totals.rows == 2
    assert [json.loads(line)["token_ids"] for line in output.read_text().splitlines()] == [[64, 65, 66], [64, 65, 67]]


def test_a_seed_goes_round_as_text(llm, tmp_path):
    """Readers that know but floats make another number of it."""
    warm = {"prompt": "abc", "temperature": 1, "max_tokens": 8}
    rows = [{"id": "a", **warm}, {"id": "b", **warm, "n": 2}, completion(warm, custom_id="c")]
    a, b, c = answers(llm, tmp_path, rows)
    c = c["llmjax"] | {"token_ids": c["llmjax"]["token_ids"][0]}
    for answer in (a, b, *b["outputs"], c):
        assert answer["seed_text"] == str(answer["seed"]) and float(answer["seed"]) != answer["seed"]
    before = [a, *b["outputs"], c]
    replay = [{"id": f"{i}", **warm, "seed": answer["seed_text"]} for i, answer in enumerate(before)]
    replay.append(completion(warm | {"seed": a["seed_text"]}, custom_id="o"))
    *after, last = answers(llm, tmp_path, replay)
    assert [answer["token_ids"] for answer in after] == [answer["token_ids"] for answer in before]
    assert last["llmjax"]["token_ids"] == [a["token_ids"]]


HOSTILE = [
    *("null", "true", "-1", "1.5", "NaN", "-Infinity", "1e400", "1e39", "3000000000", "9" * 400, "9" * 5000),
    *('""', '"a"', '"\\ud800"', "[]", "{}", "[null]", "[true, 1]", "[[1], 2]", f"[{'9' * 400}]", "[3000000000]"),
    *(
        '{"a": null}',
        f'{{"{"9" * 5000}": 1}}',
        '{"5": 1e400}',
        f"{'[' * 900}{']' * 900}",
        f"{'[' * 99999}{']' * 99999}",
    ),
    *('[{"role": "user", "content": null}]', f'[{{"role": "user", "content": {"[" * 900}{"]" * 900}}}]'),
]
OPENAI_FIELDS = ("model", "max_completion_tokens", "top_logprobs", "stream", "response_format", "tools", "messages")


def test_no_row_ends_a_job(llm, tmp_path):
    """Every field with values of every kind: each row is answered or says why not, and those between are answered."""
    rows = []
    for field in (*PARAM_NAMES, "lora", "id", "custom_id", "messages", "prompt_token_ids", "url", "body", "other"):
        prompt = {} if field in ("messages", "prompt_token_ids") else {"prompt": "ab"}
        base = {} if field in ("id", "custom_id") else {"id": f"{field} "}
        rows += [_with(base | prompt, field, value, i) for i, value in enumerate(HOSTILE)]
    for field in (*PARAM_NAMES, *OPENAI_FIELDS):
        base = {} if field == "messages" else {"messages": HI}
        for i, value in enumerate(HOSTILE):
            body = _with(base, field, value)
            rows.append(_with({"method": "POST", "url": openai.CHAT, "custom_id": f"o{field} "}, "body", body, i))
    rows += HOSTILE
    rows = [
        row
        for i, hostile in enumerate(rows)
        for row in (hostile, {"id": f"good{i}", "prompt": "a"})[: 1 + (i % 50 == 0)]
    ]
    found = answers(llm, tmp_path, rows)
    assert len(found) == len(rows)
    assert {r["id"] for r in found if str(r["id"]).startswith("good")} >= {f"good{i}" for i in range(0, 900, 50)}
    assert not [r for r in found if str(r["id"]).startswith("good") and "text" not in r]
    before = (tmp_path / "out.jsonl").read_bytes()
    job.run(lambda: llm, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), PARAMS, QUIET)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert dryrun.run(lambda: llm, str(tmp_path / "in.jsonl"), "-", PARAMS).bad == sum(
        "error" in r and r["error"] is not None for r in found
    )


def _with(row, field, value, number=None):
    """A row's JSON with one more field, whose JSON is given."""
    row = {k: f"{v}{number}" if k in ("id", "custom_id") else v for k, v in row.items()}
    return f"{json.dumps(row | {field: 0})[:-2]}{value}}}"


def test_an_empty_id_is_no_other(llm, tmp_path):
    """One prompt, two ids: their draws differ."""
    a, b = answers(llm, tmp_path, [{"id": "", "prompt": "abc"}, {"id": "0", "prompt": "abc"}])
    assert (a["id"], b["id"]) == ("", "0") and a["seed"] != b["seed"]
