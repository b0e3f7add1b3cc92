"""Where two tokenizers part: the shortest text that shows it, cut as the library itself cuts it."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from llmjax.text.disagreement import disagreement
from llmjax.text.reading import from_huggingface

DATA = Path(__file__).parents[1] / "data"


def _pop(merge):
    return lambda t: t["model"]["merges"].remove(merge)


CHANGES = {
    "a merge that is gone": ("llama", "ini", _pop(["i", "n"])),
    "a letter and its mark": ("qwen2", "e\u0301", lambda t: t.update(normalizer=None)),
    "spaces before a special token": ("llama", " <|eot_id|>", lambda t: t["added_tokens"][2].update(lstrip=True)),
    "bytes that are unknown": ("gemma_2b", "\r", lambda t: t["model"].update(byte_fallback=False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_shortest_text(tmp_path, change):
    name, text, mutate = CHANGES[change]
    source = DATA / "tokenizers" / name
    copy = shutil.copytree(source, tmp_path / "copy")
    values = json.loads((source / "tokenizer.json").read_text())
    mutate(values)
    (copy / "tokenizer.json").write_text(json.dumps(values))
    config = json.loads((source / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)  # which would win
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    here, there = map(from_huggingface, (copy, source))
    assert disagreement(here, here) is None
    found = disagreement(here, there)
    assert (found.of, found.text) == ("encode", text)
    for folder, tokens in ((copy, found.here), (source, found.there)):
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = backend.encode(text, add_special_tokens=False).ids
        assert tokens == tuple((i, backend.id_to_token(i)) for i in ids)


def test_a_decoder(tmp_path):
    source = DATA / "tokenizers" / "gemma_2b"
    copy = shutil.copytree(source, tmp_path / "copy")
    values = json.loads((source / "tokenizer.json").read_text())
    values["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    (copy / "tokenizer.json").write_text(json.dumps(values))
    found = disagreement(*map(from_huggingface, (copy, source)))
    assert (found.of, found.text, found.here, found.there) == ("decode", " ", "", " ")
