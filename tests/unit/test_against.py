"""``inspect Q --against SRC`` and ``diff A B``: what differs is named, and shows in the exit code."""

import json
import lzma
import shutil
from collections import Counter
from pathlib import Path

import pytest

import llmjax
from converters.readers.gguf import GgufSource
from llmjax.checkpoint import against
from llmjax.cli.main import main
from tests import gguf_files, tiny

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def source(tmp_path):
    return tiny.checkpoint(tmp_path / "source")


def other(source, name, file, change):
    copy = source.parent / name
    shutil.copytree(source, copy)
    values = json.loads((copy / file).read_text())
    change(values)
    (copy / file).write_text(json.dumps(values))
    return copy


def test_a_configuration(source, capsys):
    changes = {"model_type": "mistral", "sliding_window": 8, "rms_norm_eps": 0.01}
    copy = other(source, "copy", "config.json", lambda c: c.update(changes))
    assert against.differences(copy, source) == {"rms_norm_eps": (0.01, 1e-5), "windows": ([8, 8], [None, None])}
    assert main(["inspect", str(copy), "--against", str(source)]) == 1
    text = capsys.readouterr().out
    assert "differs in\n  rms_norm_eps  0.01, not 1e-05\n  windows       [8, 8], not [null, null]\n" in text
    assert main(["inspect", str(copy), "--against", str(source), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["differences"]["rms_norm_eps"] == {"value": 0.01, "reference": 1e-5}
    assert all(e["max"] == 0 for e in found["error"]["tensors"])
    assert main(["inspect", str(source), "--against", str(source)]) == 0
    assert capsys.readouterr().out.endswith("\nconfiguration and tokenizer: the same\n")


def test_a_rotation_and_a_context(source):
    rope = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "max_position_embeddings": 100}
    copy = other(source, "copy", "config.json", lambda c: c.update(rope))
    assert against.differences(copy, source) == {"rope.linear": (4.0, 1.0), "max_position_embeddings": (100, 200)}


def test_another_way_to_say_the_same(source):
    """Mistral without a window is Llama; 24 bits of a number are all that GGUF and MediaPipe's files hold."""
    changes = {"model_type": "mistral", "sliding_window": None, "rms_norm_eps": 9.999999747378752e-06}
    copy = other(source, "copy", "config.json", lambda c: c.update(changes))
    assert against.differences(copy, source) == {}


def test_a_tokenizer(source):
    def swap(t):
        vocabulary = t["model"]["vocab"]
        vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]

    copy = other(source, "copy", "tokenizer.json", swap)
    ids = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    assert against.differences(copy, source) == {
        "tokenizer.vocabulary": ({"A": ids["B"]}, {"A": ids["A"]}),
        "tokenizer.encode": ({"A": ((ids["B"], "A"),)}, {"A": ((ids["A"], "A"),)}),
    }
    first, second = (
        other(source, name, "tokenizer_config.json", lambda c, n=name: c.update({"chat_template": n})) for name in "xy"
    )
    assert against.differences(first, second) == {"tokenizer.chat_template": ("x", "y")}
    assert against.differences(first, source) == {}  # a form without templates loses none


def test_a_normalizer(source, capsys):
    """The vocabulary is the same and the texts are not: the second of these two letters is a mark on the first."""
    copy = other(source, "copy", "tokenizer.json", lambda t: t.update(normalizer={"type": "NFC"}))
    assert main(["inspect", str(copy), "--against", str(source)]) == 1
    here, there = '[[127, "Ã"], [102, "©"]]', '[[68, "e"], [136, "Ì"], [223, "ģ"]]'
    assert f'  tokenizer.encode  {{"e\u0301": {here}}}, not {{"e\u0301": {there}}}\n' in capsys.readouterr().out


def test_tokens_that_end_a_text(source):
    end = other(source, "end", "config.json", lambda c: c.update(eos_token_id=[256, 3]))
    assert against.differences(source, end) == {"tokenizer.eos_ids": ((256,), (3, 256))}
    assert against.differences(end, source) == {}  # one more is what GGUF says of a vocabulary by itself


def test_rounding_is_no_difference(source, tmp_path):
    for to, quantize in (("llmjax", "int8"), ("hf", None)):
        llmjax.convert(source, tmp_path / to, to=to, quantize=quantize)
        assert main(["inspect", str(tmp_path / to), "--against", str(source)]) == 0


def test_two_checkpoints(source, tmp_path, capsys):
    """Neither was made from the other: whatever one of them lacks is a difference, and so is rounding."""
    assert main(["diff", str(source), str(source)]) == 0
    assert "21 tensors are equal" in capsys.readouterr().out
    llmjax.convert(source, tmp_path / "q", to="llmjax", quantize="int8")
    assert main(["diff", str(tmp_path / "q"), str(source), "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["differences"] == {} and not values["same"]
    assert max(e["max"] for e in values["error"]["tensors"] if e["kept"] == "int8") > 0
    end = other(source, "end", "config.json", lambda c: c.update(eos_token_id=[256, 3]))
    talk = other(source, "talk", "tokenizer_config.json", lambda c: c.update(chat_template="x"))
    (bare := shutil.copytree(source, tmp_path / "bare") / "tokenizer.json").unlink()
    for name, copy, values in (
        ("tokenizer.eos_ids", end, ((3, 256), (256,))),
        ("tokenizer.chat_template", talk, ("x", None)),
        ("tokenizer", bare.parent, (None, repr(llmjax.load(source).tokenizer))),
    ):
        assert against.differences(copy, source, either=True) == {name: values}
        assert against.differences(copy, source) == {}
        assert main(["diff", str(copy), str(source)]) == 1


def test_two_gguf_files(source, tmp_path, capsys, monkeypatch):
    """Each is opened once for its settings and weights, which are long to find in some forms."""
    paths = []
    for kind, eps in (("F32", 1e-5), ("Q8_0", 0.01)):
        copy = other(source, kind, "config.json", lambda c, eps=eps: c.update(rope_theta=1e4, rms_norm_eps=eps))
        paths.append(str(gguf_files.write(copy, tmp_path / f"{kind}.gguf", kind)))
    count, right = Counter(), GgufSource.__init__
    monkeypatch.setattr(GgufSource, "__init__", lambda s, p: count.update([str(p)]) or right(s, p))
    assert main(["diff", *paths, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["differences"] == {"rms_norm_eps": {"value": 1e-05, "reference": 0.01}}
    assert main(["inspect", paths[1], "--against", paths[0]]) == 1
    assert main(["diff", paths[0], paths[0]]) == 0
    assert count == {paths[0]: 4, paths[1]: 3}  # inspect's own look is one more


def test_other_models(source, tmp_path, capsys):
    short = tiny.checkpoint(tmp_path / "short", num_hidden_layers=1)
    assert main(["diff", str(short), str(source)]) == 1
    text = capsys.readouterr().out
    assert "  num_hidden_layers  1, not 2\n" in text and "are not the same model: 9 parameters differ" in text


def test_tokenizers_alone(source, tmp_path, capsys):
    """Of directories without weights, and of a bundle with an architecture whose weights stay in it."""
    first = shutil.copytree(DATA / "tokenizers/llama", tmp_path / "first")
    second = shutil.copytree(DATA / "tokenizers/qwen2", tmp_path / "second")
    assert main(["diff", str(first), str(first), "--tokenizer"]) == 0
    assert capsys.readouterr().out == "tokenizer: the same\n"
    assert main(["diff", str(first), str(second), "--tokenizer"]) == 1
    assert "  tokenizer.vocabulary " in capsys.readouterr().out
    assert main(["diff", str(first), str(tmp_path), "--tokenizer"]) == 2
    assert "no weights; looked for" in capsys.readouterr().err
    bundle = tmp_path / "gemma4.litertlm"
    bundle.write_bytes(lzma.decompress((DATA / "litert/gemma4.litertlm.xz").read_bytes()))
    assert main(["diff", str(bundle), str(bundle), "--tokenizer"]) == 0
    assert main(["diff", str(bundle), str(first), "--tokenizer"]) == 1
