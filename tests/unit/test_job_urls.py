"""Inputs and outputs of jobs by URL."""

import io
import json

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from llmjax import LLM
from llmjax.batch import job
from llmjax.cli.main import main
from llmjax.errors import OutputError, RequestError
from llmjax.outside import urls
from tests import tiny

ROWS = [{"id": f"r{i}", "prompt": "ab" * (i + 1), "max_tokens": 2} for i in range(4)]
QUIET = job.Options(ordered=True, progress_seconds=0)
MEMORY = fsspec.filesystem("memory")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return tiny.roomy(LLM(tiny.checkpoint(tmp_path_factory.mktemp("tiny")), max_batch=4, chunk=16, block=16))


@pytest.fixture
def expected(llm, tmp_path, monkeypatch):
    """The rows' answers; the inputs are in memory, and the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "in put.jsonl").write_bytes(text)
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    MEMORY.store.clear()
    MEMORY.pipe({"/a/in.jsonl": text, "/a/in.parquet": table.getvalue()})
    MEMORY.pipe(
        "/a/in.csv",
        b"id,prompt,max_tokens\n" + b"".join(b"%s,%s,2\n" % (r["id"].encode(), r["prompt"].encode()) for r in ROWS),
    )
    run(llm, "here/in put.jsonl", "here/out.jsonl")
    return (tmp_path / "here" / "out.jsonl").read_bytes()


def run(llm, source, output):
    return job.run(lambda: llm, source, output, {"temperature": 0}, QUIET)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_rows_come_from_urls_and_go_to_them(llm, expected, tmp_path, kind):
    run(llm, f"memory://a/in.{kind}", "memory://a/b/answers.jsonl")
    assert MEMORY.cat("/a/b/answers.jsonl") == expected == (tmp_path / "answers.jsonl").read_bytes()
    assert run(llm, f"memory://a/in.{kind}", "memory://a/b/answers.jsonl").kept == 4
    run(llm, f"memory://a/in.{kind}", "memory://a/answers.parquet")
    found = pyarrow.parquet.read_table(MEMORY.open("/a/answers.parquet"))
    assert found["text"].to_pylist() == [json.loads(line)["text"] for line in expected.splitlines()]
    assert (tmp_path / "answers.parquet.jsonl").read_bytes() == expected


def test_file_urls_are_paths(llm, expected, tmp_path):
    run(llm, (tmp_path / "here" / "in put.jsonl").as_uri(), (tmp_path / "here" / "o.jsonl").as_uri())
    assert (tmp_path / "here" / "o.jsonl").read_bytes() == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here"]


def test_what_cannot_be_read_or_written_is_told_without_secrets(llm, expected, monkeypatch, tmp_path, capsys):
    with pytest.raises(RequestError, match=r"^memory://a/no.jsonl: cannot read the input: No such file$"):
        run(llm, "memory://a/no.jsonl", "x.jsonl")
    with pytest.raises(RequestError, match="the output is the input file"):
        run(llm, "memory://a/in.jsonl", "memory://a/in.jsonl")
    with pytest.raises(RequestError, match="memory://a/in.csv: it is there, without the in.csv.jsonl of a job"):
        run(llm, "memory://a/in.jsonl", "memory://a/in.csv")
    with pytest.raises(RequestError, match="expected a URL that ends in the name of a file"):
        run(llm, "memory://a/in.jsonl", "memory://")
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
        run(llm, "memory://a/in.jsonl", "memory://a/o.jsonl")
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
        run(llm, "memory://a/in.jsonl", "o.jsonl")
