"""Test vectors: each shows a mistake that the others do not, and ``compare`` takes what a runtime makes of them."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import llmjax
from llmjax.cli.main import main
from llmjax.oracle import vectors
from llmjax.oracle.comparison import Comparison
from llmjax.oracle.dump import from_arrays
from llmjax.oracle.texts import together
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
    assert sorted(names) == ["drawn", "ends", "far", "first", "hard", "repeated", "scripts", "text", f"window_{WINDOW}"]
    assert sorted(names) == sorted(p.name for p in folder.iterdir() if p.is_dir())
    model = llmjax.load(source)
    for name in ("text", "hard", "scripts"):
        facts = manifest(folder / name)
        assert model.tokenizer.encode(facts["text"]) == facts["token_ids"]
    report = llmjax.compare(model, folder, texts=2)
    assert (report.verdict, report.coverage["texts"]) == ("identical", [2, 9])
    assert report.subject["verdicts"] == {"drawn": "identical", "ends": "identical"}


@pytest.mark.parametrize(("longest", "drawn"), [(40, 8), (1, 0)])
def test_how_many_there_are_is_told_before(source, tmp_path, longest, drawn):
    """The one that is drawn among them, where there is room for it."""
    told = []
    index = vectors.write(llmjax.load(source), tmp_path / "v", longest=longest, progress=told.append)
    count, *each = len(index["vectors"]), *told[1:]
    assert len(each) == count and told[0].startswith(f"{count} text{'s' * (count > 1)}: up to ")
    assert sum(v["drawn"] for v in index["vectors"]) == drawn


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
    page = tmp_path / "page.html"
    assert main(["compare", str(folder), str(tmp_path / "theirs"), "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert "of all 2 texts, " in text and ", 2 of 9 texts" in text
    assert (
        "texts:\n  ends                  identical\n  first " in text
        and "<div>ends<b>identical</b>" in page.read_text()
    )
    (tmp_path / "theirs/first").rename(tmp_path / "theirs/second")
    assert main(["compare", str(folder), str(tmp_path / "theirs")]) == 2
    assert "second: expected one of the reference's names (drawn, ends, " in capsys.readouterr().err
    (tmp_path / "theirs/second/manifest.json").unlink()
    assert main(["compare", str(folder), str(tmp_path / "theirs")]) == 2
    assert "second: manifest.json is missing" in capsys.readouterr().err


def test_none_too_long(source, tmp_path, capsys):
    index = vectors.write(llmjax.load(source), tmp_path / "short", longest=30)
    assert {v["name"] for v in index["vectors"]} == {"first", "ends"}
    assert {v["name"]: v["tokens"] for v in index["left_out"]}[f"window_{WINDOW}"] == WINDOW + 32


def test_what_is_told_of_several():
    """A mean is of all texts' tokens at once, coverage of the text that shows least, the order of the one that shows
    most; a text that cannot be compared is named."""
    texts = [from_arrays(name, {}, np.arange(2), {}) for name in ("x", "y")]
    tap = {"name": "logits", "error": 1e-7, "floor": 1e-6}
    logits = dict.fromkeys(("kl_mean", "kl_max", "flips"), 0)
    short, long = (
        Comparison("identical", None, "", {"taps": n, "of": 2, "tokens": tokens}, logits | {"nll": [nll, nll]}, taps)
        for n, tokens, nll, taps in ((1, 2, 3.0, [tap]), (2, 4, 7.0, [tap | {"name": "embed"}, tap]))
    )

    def told(*found):
        rest = iter(found)
        return together(texts, None, 2, lambda *a: next(rest), lambda line: None)

    both = told(short, long)
    assert both.logits["nll"] == [(1 * 3 + 3 * 7) / 4] * 2
    assert both.coverage == {"taps": 1, "of": 2, "tokens": 6, "positions": 6, "texts": [2, 2]}
    assert [t["name"] for t in both.taps] == ["embed", "logits"]
    assert told(short, Comparison("not_comparable", None, "no", {})).reason == "y: no"


def test_small_contexts_and_many_names(source):
    model = llmjax.load(source)
    special = {"special_tokens": {str(i): i for i in range(200)}, "eos_ids": (256,), "prefix_ids": (256,)}
    many = SimpleNamespace(**special, vocab_size=ROWS, encode=lambda text: [256, 201])
    ends = {
        v.name: v.ids
        for v in vectors.vectors(SimpleNamespace(tokenizer=many, config=model.config, context_length=400, eos_ids=()))
    }["ends"]
    assert len(ends) < 80 and {256, 0, 199, ROWS - 1} <= {*ends}
    bare = SimpleNamespace(tokenizer=None, config=model.config, context_length=16, eos_ids=(256,))
    assert {v.name: len(v.ids) for v in vectors.vectors(bare)} == {"first": 1, "ends": 9, "text": 16}
