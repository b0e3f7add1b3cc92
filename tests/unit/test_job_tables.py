"""Tables in and out of jobs, and files by URL: what JSONL here says of the same rows, they say."""

import csv
import io
import json
from decimal import Decimal

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from llmjax import LLM
from llmjax.batch import job, reading, results, rows, scoring, tables
from llmjax.batch.datasets import Answers
from llmjax.batch.ray import build
from llmjax.cli.main import main
from llmjax.errors import OutputError, RequestError
from llmjax.outside import urls
from tests import tiny

ROWS = [
    {
        "id": f"r{i}",
        "question": "ab" * (i + 1),
        "max_tokens": 3 + i % 2,
        "year": 2000 + i,
        "note": None if i else "x, y",
    }
    for i in range(6)
]
PARAMS = {"temperature": 0, "max_tokens": 4}
NAMED = job.Options(columns={"prompt": "question"})


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return tiny.roomy(LLM(tiny.checkpoint(tmp_path_factory.mktemp("tiny")), max_batch=4, chunk=16, block=16))


@pytest.fixture
def folder(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "in.parquet", row_group_size=2)
    with open(tmp_path / "in.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    lines = []
    for row in ROWS:
        along = {name: row[name] for name in ("year", "note") if row[name] is not None}
        lines.append(json.dumps({"id": row["id"], "prompt": row["question"], "max_tokens": row["max_tokens"],
                                 "metadata": along}))  # fmt: skip
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    return tmp_path


def run(llm, source, output, options=NAMED, **more):
    return job.run(lambda: llm, str(source), str(output), PARAMS, options, **more)


def test_a_table_is_the_jsonl_that_it_stands_for(llm, folder):
    run(llm, folder / "in.jsonl", folder / "out.jsonl", job.Options(ordered=True))
    expected = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    run(llm, folder / "in.parquet", folder / "out.parquet")
    assert (folder / "out.parquet.jsonl").read_bytes() == (folder / "out.jsonl").read_bytes()
    found = pyarrow.parquet.read_table(folder / "out.parquet")
    assert found.schema.field("token_ids").type == pyarrow.list_(pyarrow.int64())
    assert found["id"].to_pylist() == [row["id"] for row in ROWS]
    for name in ("text", "token_ids", "finish_reason", "seed_text"):
        assert found[name].to_pylist() == [row[name] for row in expected]
    assert found["seed"].to_pylist() == [row["seed"] for row in expected]
    assert found["prompt_tokens"].to_pylist() == [row["usage"]["prompt_tokens"] for row in expected]
    assert (found["year"].to_pylist(), found["note"].to_pylist()) == ([r["year"] for r in ROWS], ["x, y"] + [None] * 5)
    assert json.loads(found["params"][0].as_py()) == expected[0]["params"]


def test_csv_in_and_out(llm, folder):
    run(llm, folder / "in.jsonl", folder / "out.jsonl", job.Options(ordered=True))
    expected = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    run(llm, folder / "in.csv", folder / "out.csv")
    with open(folder / "out.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["text"] for row in found] == [row["text"] for row in expected]
    assert [json.loads(row["token_ids"]) for row in found] == [row["token_ids"] for row in expected]
    assert [(row["year"], row["note"]) for row in found] == [(str(r["year"]), r["note"] or "") for r in ROWS]


def test_a_cell_of_csv_in_which_a_key_is_there_twice_is_no_object(llm, tmp_path):
    (tmp_path / "in.csv").write_text('id,prompt,logit_bias\na,x,"{""5"": 1, ""5"": 2}"\n')
    run(llm, tmp_path / "in.csv", tmp_path / "out.jsonl", job.Options())
    error = json.loads((tmp_path / "out.jsonl").read_text())["error"]
    assert error.startswith("line 1: logit_bias: expected token ids with numbers") and 'found \'{"5": 1' in error


def test_an_interrupted_job_goes_on_and_has_its_table_at_the_end(llm, folder, monkeypatch):
    run(llm, folder / "in.parquet", folder / "whole.parquet")
    answered = llm.outputs

    def few(*args, **kwargs):
        outputs = answered(*args, **kwargs)
        yield from (next(outputs) for _ in range(2))
        outputs.close()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm, "outputs", few)
        with pytest.raises(KeyboardInterrupt):
            run(llm, folder / "in.parquet", folder / "out.parquet")
    assert not (folder / "out.parquet").exists()
    assert run(llm, folder / "in.parquet", folder / "out.parquet").kept == 2
    same = [pyarrow.parquet.read_table(folder / f"{name}.parquet") for name in ("whole", "out")]
    assert same[0].equals(same[1])


def test_texts_are_scored(llm, folder):
    options = job.Options(columns={"text": "question"})
    job.run(lambda: llm, str(folder / "in.csv"), str(folder / "s.parquet"), None, options, work=scoring.Scoring)
    found = pyarrow.parquet.read_table(folder / "s.parquet")
    for text, logprobs in zip((row["question"] for row in ROWS), found["logprobs"].to_pylist(), strict=True):
        (score,) = llm.score([text])
        assert logprobs == [None if p is None else pytest.approx(p) for p in score.to_dict()["logprobs"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no column holds what to read; its columns are 'id', 'question', .* say which one does: --column prompt="),
        ({"prompt": "Question"}, "no column 'Question'; it has 'id', 'question'"),
        ({"prompt": "question", "id": "question"}, "'question' is named for two keys; a column can be one"),
        ({"promt": "question"}, "a row has no key 'promt'; its keys: id, custom_id, prompt"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_what_a_column_is_must_be_clear(folder, options, message, kind):
    with pytest.raises(RequestError, match=message):
        job.run(None, str(folder / f"in.{kind}"), str(folder / "out.parquet"), options=job.Options(columns=options))
    assert sorted(p.name for p in folder.iterdir()) == ["in.csv", "in.jsonl", "in.parquet"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"PAR1 no more", "cannot be read as parquet"),
        ("x.csv", b"", "it is empty; expected a line with the names of its columns"),
        ("x.csv", b"prompt,prompt\na,b\n", "two columns are named 'prompt'"),
        ("x.csv", b"prompt,id\na,1\nb\n", "line 3: expected 2 cells, as there are columns, found 1"),
        ("x.csv", b'prompt\n"a\n', "cannot be read as csv"),
        ("x.csv", "prompt\na\n".encode("utf-16"), "this is UTF-16 text; expected CSV in UTF-8"),
        ("x.csv", b"PAR1 no more", "this is a Parquet file; expected CSV"),
        ("x.csv", b"id;prompt\n1;a\n", "no column holds what to read; .*cells of CSV have commas between them"),
        ("y.csv", None, "cannot read the input: No such file"),
        ("y.parquet", None, "cannot read the input: No such file"),
    ],
)
def test_what_is_no_such_table(llm, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        run(llm, tmp_path / name, tmp_path / "out.jsonl", job.Options())


@pytest.mark.parametrize("name", ["out.tsv", "out.CSV.gz", "memory://out.arrow", "out.jsonl.zst"])
def test_rows_do_not_go_by_the_name_of_another_kind_of_table(folder, name):
    with pytest.raises(RequestError, match="tables are written as"):
        job.run(None, str(folder / "in.jsonl"), name if "://" in name else str(folder / name))
    assert not list(folder.glob("out*"))


def test_a_file_that_no_job_made_stays(folder, capsys):
    (folder / "out.csv").write_text("mine")
    with pytest.raises(RequestError, match="it is there, without the out.csv.jsonl of a job that made it"):
        run(None, folder / "in.csv", folder / "out.csv")
    with pytest.raises(RequestError, match="the output is the input file"):
        run(None, folder / "in.csv", folder / "in.csv")
    assert (folder / "out.csv").read_text() == "mine"
    flags = ["--model", "m", "--input", str(folder / "in.jsonl"), "--output", "x.jsonl", "--column", "prompt=question"]
    assert main(["batch", *flags]) == 2
    assert "columns are named, and it is no table" in capsys.readouterr().err


def test_types_of_columns(tmp_path):
    rows = [
        {"a": 1, "b": [1, 2], "c": True, "d": 2**63, "e": {"x": 1}, "metadata": {"a": "kept", "f": 1}},
        {"a": 1.5, "b": [1.5, None], "c": None, "d": 1, "e": "y", "metadata": 7},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results.write(tmp_path / "x.jsonl", str(tmp_path / "x.parquet"))
    found = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert {f.name: str(f.type) for f in found.schema} == {
        "a": "double", "b": "list<element: double>", "c": "bool", "d": "uint64", "e": "string",
        "metadata.a": "string", "f": "int64", "metadata": "int64",
    }  # fmt: skip
    assert found["e"].to_pylist() == ['{"x": 1}', '"y"'] and found["d"].to_pylist() == [2**63, 1]
    # Integers that no type of Arrow's holds, or no float: their digits; halves of characters: JSON's escapes.
    rows = [
        {"id": -1, "a": 2**63, "b": -(2**63), "c": [0.5, 2**60 + 1], "d": 2**60 + 1, "e": [1, None], "f": "\ud800"},
        {"id": "x", "a": -1, "b": 2**63 - 1, "c": [2], "d": 0.5, "e": [], "f": "y", "metadata": {"\udc00": 2**70}},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("x.csv", "x.parquet"):
        results.write(tmp_path / "x.jsonl", str(tmp_path / name))
    found = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert [found[name].to_pylist() for name in "bcdef"] == [
        [-(2**63), 2**63 - 1], [f"[0.5, {2**60 + 1}]", "[2]"], [str(2**60 + 1), "0.5"], [[1, None], []],
        ["\\ud800", "y"],
    ]  # fmt: skip
    with open(tmp_path / "x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name, texts in (("id", ["-1", "x"]), ("a", [str(2**63), "-1"]), ("\\udc00", [None, str(2**70)])):
        assert found[name].to_pylist() == texts and [row[name] for row in rows] == [text or "" for text in texts]


def test_a_dataset_is_answered_as_a_job_answers(llm, folder):
    run(llm, folder / "in.jsonl", folder / "out.jsonl", job.Options(ordered=True))
    expected = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    answers = Answers(lambda: llm, PARAMS, {"prompt": "question"}, "2026-01-31")
    table = pyarrow.parquet.read_table(folder / "in.parquet")
    parts = [answers(table.slice(at, size)).to_pylist() for at, size in ((2, 3), (0, 2), (5, 1))]
    found = [*parts[1], *parts[0], *parts[2]]
    for row, answer, before in zip(found, expected, ROWS, strict=True):
        del answer["metadata"], answer["hash"]  # other columns stay columns
        assert {n: v for n, v in json.loads(row["row"]).items() if n != "hash"} == answer
        assert (row["generated_text"], row["generated_tokens"]) == (answer["text"], answer["token_ids"])
        assert row["finish_reason"] == answer["finish_reason"] and row["error"] is None
        assert {name: row[name] for name in before} == before
    bad = [{"id": "a", "question": "x"}, {"id": "a", "question": "y"}, {"id": None, "question": "x"}]
    errors = [row["error"] for row in answers(pyarrow.Table.from_pylist(bad)).to_pylist()]
    assert (
        errors[0] is None and errors[1].startswith("id 'a' was used") and errors[2].startswith("id: expected a string")
    )
    for names, message in (
        (("no", "question"), "no column holds ids"),
        (("id", "text"), "no column 'question'; it has 'id', 'text'"),
        (("id", "question", "row"), "has a column 'row' already"),
    ):
        with pytest.raises(RequestError, match=message):
            answers(pyarrow.table({name: ["x"] for name in names}))


def test_a_pipelines_step_is_checked_where_it_is_made():
    """Without Ray, whose actors would say it much later."""
    with pytest.raises(RequestError, match="max_tokens: expected a positive integer"):
        build("m", {"max_tokens": 0})
    with pytest.raises(RequestError, match="unknown sampling parameter max_token;"):
        build("m", {"max_token": 3})
    with pytest.raises(RequestError, match="columns: a row has no key 'question'; its keys: id, "):
        build("m", columns={"question": "prompt"})
    assert callable(build("m", PARAMS, columns={"prompt": "question"}))


def test_what_a_table_holds_is_counted_without_reading_its_cells(folder, monkeypatch):
    monkeypatch.setattr(tables, "row_of", None)
    for name in ("in.csv", "in.parquet"):
        with reading.open_lines(str(folder / name), {"prompt": "question"}, ("prompt",)) as lines:
            assert rows.count_rows(lines, rows.Generating) == 6


def answers_of(llm, folder, table, name="x.parquet"):
    """A table's answers, by a job."""
    for old in folder.glob("o.*"):
        old.unlink()
    if isinstance(table, str):
        (folder / name).write_text(table)
    else:
        pyarrow.parquet.write_table(table, folder / name)
    run(llm, folder / name, folder / "o.parquet", job.Options())
    return pyarrow.parquet.read_table(folder / "o.parquet")


def test_a_row_without_an_id_takes_no_other_rows(llm, tmp_path):
    kinds = pyarrow.int64(), pyarrow.float64()  # pandas writes the second, for a cell is empty
    tables = [{"id": pyarrow.array([7, None, 2], kind), "n": pyarrow.array([1, 1, None], kind)} for kind in kinds]
    tables = [pyarrow.table({"prompt": ["a", "b", "c"], **columns}) for columns in tables]
    for table in (*tables, "id,prompt,n\n7,a,1.0\n,b,\n2,c,\n"):
        found = answers_of(llm, tmp_path, table, "x.csv" if isinstance(table, str) else "x.parquet")
        ids, errors = found["id"].to_pylist(), found["error"].to_pylist()
        assert ids == [7, None, 2] or ids == ["7", None, "2"]
        assert errors[::2] == [None, None] and "id: expected a string or an integer, found" in errors[1]


def test_columns_of_the_input_never_pass_for_answers(llm, tmp_path):
    brought = {"error": ["e"] * 2, "model": ["m"] * 2, "metadata.model": ["n"] * 2, "prompt_tokens": [9, 9]}
    found = answers_of(llm, tmp_path, pyarrow.table({"prompt": ["a", None], **brought}))
    assert found["error"].to_pylist()[0] is None and "expected exactly one of" in found["error"][1].as_py()
    assert found["prompt_tokens"].to_pylist() == [1, None]
    for name, values in brought.items():
        there = "metadata.metadata.model" if name == "metadata.model" else f"metadata.{name}"
        assert found[there].to_pylist() == values
    assert "error" not in answers_of(llm, tmp_path, pyarrow.table({"prompt": ["a"], "error": ["e"]})).column_names


def test_values_of_every_type(llm, tmp_path):
    nanoseconds = pyarrow.array([1, None, 10**9 * 60], pyarrow.timestamp("ns"))
    columns = {
        "id": pyarrow.array(["a", "b", "c"]).dictionary_encode(),
        "prompt": pyarrow.array(["x", "yy", "x"], pyarrow.large_string()).dictionary_encode(),
        "at": nanoseconds,
        "for": pyarrow.array([3_000_000_000] * 3, pyarrow.duration("ns")),
        "big": pyarrow.array([2**63 + 1] * 3, pyarrow.uint64()),
    }
    found = answers_of(llm, tmp_path, pyarrow.table(columns))
    assert found["prompt_tokens"].to_pylist() == [1, 2, 1] and found["id"].to_pylist() == ["a", "b", "c"]
    assert found["at"].to_pylist() == ["1970-01-01T00:00:00.000000001", None, "1970-01-01T00:01:00"]
    assert found["for"].to_pylist() == ["0:00:03"] * 3 and found["big"].to_pylist() == [2**63 + 1] * 3
    # Bytes that are no text are no prompt, but go along.
    raw = pyarrow.array([b"x", b"\xff"])
    found = answers_of(llm, tmp_path, pyarrow.table({"prompt": raw, "raw": raw}))
    assert "half a surrogate pair" in found["error"][1].as_py() and found["raw"].to_pylist() == ["x", "\\xff"]


def test_decimals(llm, tmp_path):
    """What SQL makes of numbers with a point, and of integers that are counted or too wide for 64 bits."""
    decimals = [
        ("temperature", ["0.7", "1.0"], 2, 1),
        ("max_tokens", ["2", "3"], 38, 0),
        ("seed", [str(2**64 - 1), "7"], 20, 0),
        ("id", ["10", "11"], 38, 0),
        ("price", ["1.50", None], 5, 2),
    ]
    columns = {
        name: pyarrow.array([v and Decimal(v) for v in values], pyarrow.decimal128(digits, scale))
        for name, values, digits, scale in decimals
    }
    found = answers_of(llm, tmp_path, pyarrow.table({"prompt": ["a", "b"], **columns}))
    params = [json.loads(text) for text in found["params"].to_pylist()]
    assert [(p["temperature"], p["max_tokens"], p["seed"]) for p in params] == [(0.7, 2, 2**64 - 1), (1.0, 3, 7)]
    assert found["id"].to_pylist() == ["10", "11"] and found["price"].to_pylist() == ["1.50", None]


def test_blank_lines_and_tables_without_rows(llm, tmp_path):
    found = answers_of(llm, tmp_path, "prompt,id\nabc,2\n\nab,1\n\n", "x.csv")
    assert (found["id"].to_pylist(), found["prompt_tokens"].to_pylist()) == (["2", "1"], [3, 2])
    with reading.open_lines(str(tmp_path / "x.csv"), {}, ("id", "prompt")) as lines:
        assert lines.count() == 2
    for table, name in (
        ("prompt\n", "x.csv"),
        (pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), "x.parquet"),
    ):
        with pytest.warns(match="no rows in it"):
            found = answers_of(llm, tmp_path, table, name)
        assert (found.num_rows, found.column_names) == (0, ["id"])


# By URL.
SENT = [{"id": f"r{i}", "prompt": "ab" * (i + 1), "max_tokens": 2} for i in range(4)]
PLAIN = job.Options(ordered=True, progress_seconds=0)
MEMORY = fsspec.filesystem("memory")


@pytest.fixture
def expected(llm, tmp_path, monkeypatch):
    """The rows' answers; the inputs are in memory, and the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    text = "".join(json.dumps(row) + "\n" for row in SENT).encode()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "in put.jsonl").write_bytes(text)
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(SENT), table)
    MEMORY.store.clear()
    MEMORY.pipe({"/a/in.jsonl": text, "/a/in.parquet": table.getvalue()})
    MEMORY.pipe(
        "/a/in.csv",
        b"id,prompt,max_tokens\n" + b"".join(b"%s,%s,2\n" % (r["id"].encode(), r["prompt"].encode()) for r in SENT),
    )
    sent(llm, "here/in put.jsonl", "here/out.jsonl")
    return (tmp_path / "here" / "out.jsonl").read_bytes()


def sent(llm, source, output):
    return job.run(lambda: llm, source, output, {"temperature": 0}, PLAIN)


@pytest.mark.parametrize("kind", tiny.some(["parquet"], ["jsonl", "parquet", "csv"]))
def test_rows_come_from_urls_and_go_to_them(llm, expected, tmp_path, kind):
    sent(llm, f"memory://a/in.{kind}", "memory://a/b/answers.jsonl")
    assert MEMORY.cat("/a/b/answers.jsonl") == expected == (tmp_path / "answers.jsonl").read_bytes()
    assert sent(llm, f"memory://a/in.{kind}", "memory://a/b/answers.jsonl").kept == 4
    sent(llm, f"memory://a/in.{kind}", "memory://a/answers.parquet")
    found = pyarrow.parquet.read_table(MEMORY.open("/a/answers.parquet"))
    assert found["text"].to_pylist() == [json.loads(line)["text"] for line in expected.splitlines()]
    assert (tmp_path / "answers.parquet.jsonl").read_bytes() == expected


def test_file_urls_are_paths(llm, expected, tmp_path):
    sent(llm, (tmp_path / "here" / "in put.jsonl").as_uri(), (tmp_path / "here" / "o.jsonl").as_uri())
    assert (tmp_path / "here" / "o.jsonl").read_bytes() == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here"]


def test_what_cannot_be_read_or_written_is_told_without_secrets(llm, expected, monkeypatch, tmp_path, capsys):
    with pytest.raises(RequestError, match=r"^memory://a/no.jsonl: cannot read the input: No such file$"):
        sent(llm, "memory://a/no.jsonl", "x.jsonl")
    with pytest.raises(RequestError, match="the output is the input file"):
        sent(llm, "memory://a/in.jsonl", "memory://a/in.jsonl")
    with pytest.raises(RequestError, match="memory://a/in.csv: it is there, without the in.csv.jsonl of a job"):
        sent(llm, "memory://a/in.jsonl", "memory://a/in.csv")
    with pytest.raises(RequestError, match="expected a URL that ends in the name of a file"):
        sent(llm, "memory://a/in.jsonl", "memory://")
    secret = "foo://user:hunter22@host/in.jsonl?signature=abcdefgh"
    assert main(["batch", "--model", "m", "--input", secret, "--output", "x.jsonl"]) == 2
    assert (
        "foo://***@host/in.jsonl?***: cannot read the input: ValueError: Protocol not known" in capsys.readouterr().err
    )

    def refused(*args):
        raise PermissionError("no hunter22 with abcdefgh")

    monkeypatch.setattr(type(MEMORY), "put_file", refused)
    with pytest.raises(
        OutputError, match="cannot write the output: no hunter22.*all rows are in .*o.jsonl, and the same"
    ):
        sent(llm, "memory://a/in.jsonl", "memory://a/o.jsonl")
    assert (tmp_path / "o.jsonl").read_bytes() == expected
    with pytest.raises(OSError, match=r"^no \*\*\* with \*\*\*$"):
        urls.put(tmp_path / "o.jsonl", "memory://user:hunter22@a/o.jsonl?signature=abcdefgh")


def test_storage_that_breaks_off_ends_the_rows_before(llm, expected, monkeypatch, tmp_path):
    read = urls._Remote.readinto
    monkeypatch.setattr(urls, "_BUFFER", 64)

    def breaking(self, buffer):
        if self.tell() > 100:
            raise OSError("connection lost")
        return read(self, buffer)

    monkeypatch.setattr(urls._Remote, "readinto", breaking)
    with pytest.raises(RequestError, match="memory://a/in.jsonl: .*connection lost"):
        sent(llm, "memory://a/in.jsonl", "o.jsonl")
