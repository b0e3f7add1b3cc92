"""Test vectors: each shows a mistake that the others do not, and ``compare`` takes what a runtime makes of them."""

import json
import shutil

import numpy as np
import pytest

import llmjax
from llmjax.cli.main import main
from llmjax.oracle import vectors
from tests import tiny

# A window, and rows of the embedding, that no ordinary text reaches.
WINDOW, ROWS = 260, 264


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    changes = {"model_type": "mistral", "sliding_window": WINDOW, "vocab_size": ROWS, "max_position_embeddings": 400}
    return tiny.checkpoint(tmp_path_factory.mktemp("vectors") / "source", **changes)


@pytest.fixture(scope="module")
def written(source):
    """The command line's, in the order of its index."""
    folder = source.parent / "vectors"
    assert main(["vectors", "--model", str(source), "--output", str(folder)]) == 0
    index = json.loads((folder / "vectors.json").read_text())
    assert index["left_out"] == []
    return folder, [v["name"] for v in index["vectors"]]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_which_there_are(source, written):
    folder, names = written
    assert sorted(names) == ["drawn", "ends", "far", "first", "hard", "repeated", "text", f"window_{WINDOW}"]
    assert sorted(names) == sorted(p.name for p in folder.iterdir() if p.is_dir())
    model = llmjax.load(source)
    for name in ("text", "hard"):
        facts = manifest(folder / name)
        assert model.tokenizer.encode(facts["text"]) == facts["token_ids"]
    report = llmjax.compare(model, folder, texts=2)
    assert (report.verdict, report.coverage["texts"]) == ("identical", [2, 8])
    assert report.subject["verdicts"] == {"drawn": "identical", "ends": "identical"}


def test_what_was_drawn(source, written):
    facts = manifest(written[0] / "drawn")
    ids, drawn = facts["token_ids"], facts["drawn"]
    (logits,) = llmjax.load(source).logits([ids])
    before = logits[len(ids) - drawn - 1 : -1]
    assert drawn == 24 and ids[-drawn:] == before.argmax(-1).tolist()
    ranked = np.sort(before, -1)
    np.testing.assert_allclose(facts["margins"], ranked[:, -1] - ranked[:, -2], atol=1e-5)


@pytest.mark.parametrize(
    ("mistake", "shown"),
    [("window", {"far", f"window_{WINDOW}"}), ("row", {"ends"}), ("none", set())],
)
def test_where_mistakes_show(source, written, mistake, shown):
    folder, names = written
    model = llmjax.load(source, config={"sliding_window": WINDOW + 1} if mistake == "window" else None)
    if mistake == "row":
        table = model.params["embed"]["weight"]
        model.params["embed"]["weight"] = table.at[ROWS - 1].add(1.0)
    rows = [manifest(folder / name)["token_ids"] for name in names]
    ours = [llmjax.load(source).logits(rows), model.logits(rows)]
    found = {name for name, a, b in zip(names, *ours, strict=True) if np.abs(a - b).max() > 1e-3}
    assert found == shown


def test_a_runtime_that_did_some(source, written, tmp_path, capsys):
    """What it lacks is counted; what it did of no known name is refused."""
    folder, _ = written
    for name in ("first", "ends"):
        shutil.copytree(folder / name, tmp_path / "theirs" / name)
    assert main(["compare", str(folder), str(tmp_path / "theirs")]) == 0
    text = capsys.readouterr().out
    assert "of all 2 texts, " in text and ", 2 of 8 texts" in text
    (tmp_path / "theirs/first").rename(tmp_path / "theirs/second")
    assert main(["compare", str(folder), str(tmp_path / "theirs")]) == 2
    assert "second: expected one of the reference's names (drawn, ends, " in capsys.readouterr().err


def test_none_too_long(source, tmp_path, capsys):
    index = vectors.write(llmjax.load(source), tmp_path / "short", longest=30)
    assert {v["name"] for v in index["vectors"]} == {"first", "ends"}
    assert {v["name"]: v["tokens"] for v in index["left_out"]}[f"window_{WINDOW}"] == WINDOW + 32
