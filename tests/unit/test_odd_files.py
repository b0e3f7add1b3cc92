"""Files that are not what their names say, or say something nobody reads: told, or heeded, never passed over."""

import json
import os
import shutil
import socket
import warnings
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

import llmjax
from converters.readers.peft import open_adapter
from llmjax.errors import CheckpointError, ConfigError, LlmjaxError, TokenizerError
from llmjax.oracle.dump import open_dump
from llmjax.oracle.dumps.opening import opened
from llmjax.runtime.asking import warn_of_two_starts
from llmjax.text.reading import from_huggingface
from tests import tiny

GEMMA = Path(__file__).parents[1] / "data" / "tokenizers" / "gemma_2b"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234567\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "m")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "generation_config.json"])
def test_git_lfs_pointers(copied, name):
    (copied / name).write_text(POINTER)
    with pytest.raises(LlmjaxError, match=rf"^{copied / name}: a git-lfs pointer, .* git lfs pull"):
        llmjax.load(copied)


@pytest.mark.parametrize("target", ["gone", "itself"])
@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "tokenizer.json", "config.json", "generation_config.json"),
        *("tokenizer_config.json", "chat_template.jinja"),
    ],
)
def test_links_that_lead_nowhere(copied, name, target):
    """As in a cache that lost a part: not the same as a file that a checkpoint does not have."""
    (copied / name).unlink(missing_ok=True)
    (copied / name).symlink_to(name if target == "itself" else "../blobs/gone")
    with pytest.raises(LlmjaxError, match=rf"^{copied / name}: .*(not there|No such file|Too many levels)"):
        llmjax.load(copied)
    path = copied / "m.gguf"
    path.symlink_to("gone")
    with pytest.raises(CheckpointError, match="m.gguf: a link to 'gone', which is not there; expected a model"):
        llmjax.load(path)


def test_a_vocabulary_that_nothing_needs(copied):
    """A clone, or a cache, of which the weights and tokenizer.json alone are there."""
    (copied / "tokenizer.model").write_text(POINTER)
    assert llmjax.load(copied).tokenizer.encode("a") == [64]
    (copied / "tokenizer.model").unlink()
    (copied / "tokenizer.model").symlink_to("../blobs/gone")
    assert llmjax.load(copied).tokenizer.encode("a") == [64]


def test_git_lfs_pointers_of_other_formats(copied):
    for name in ("m.gguf", "m.bin", "pytorch_model.bin"):
        (copied / "model.safetensors").unlink(missing_ok=True)
        (copied / name).write_text(POINTER)
        with pytest.raises(CheckpointError, match=rf"{name}: a git-lfs pointer, not the file itself"):
            llmjax.load(copied if name == "pytorch_model.bin" else copied / name)
        (copied / name).unlink()


@pytest.mark.parametrize(
    "door", [llmjax.load, lambda path: open_adapter(Path(path)), open_dump, lambda path: opened(path, None)]
)
def test_what_is_neither_a_file_nor_a_directory(door, tmp_path, monkeypatch):
    """``<(zcat base.kld.gz)``, say: no reader waits for it, or calls it missing."""
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for path, found in {"pipe": "a pipe, .* to a file first", "socket": "a socket", "none": "no such file"}.items():
            with pytest.raises(LlmjaxError, match=rf"^{path}: {found}.*; expected a"):
                door(path)


def test_byte_order_marks(copied):
    (copied / "recipe.toml").write_text('attention = "int8"\n', encoding="utf-8-sig")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        text = (copied / name).read_text(encoding="utf-8")
        (copied / name).write_text(text, encoding="utf-8-sig")
    (copied / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8-sig")
    model = llmjax.load(copied, quantize=copied / "recipe.toml")
    assert model.eos_ids == (256,) and model.tokenizer.encode("a") == [64]
    assert model.tokenizer.render_chat([{"role": "user", "content": "x"}]) == "x"


def test_how_transformers_computed_attention_changes_nothing(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(
        json.dumps(config | {"_attn_implementation": "sdpa", "attn_implementation": "x"})
    )
    assert llmjax.load(copied).config == llmjax.load(copied, config={"rms_norm_eps": 1e-5}).config


@pytest.mark.parametrize(("span", "shown"), [("2", "2"), ("0-7", "0-7"), ("5-6", "5-6")])
def test_a_recipe_for_layers_that_are_not_there(folder, tmp_path, span, shown):
    recipe = {"attention": "int8", "layers": {span: {"attention": "int4-g32"}}}
    wrong = f"^quantize: layers '{shown}': the model's are 0 to 1$"
    with pytest.raises(ConfigError, match=wrong):
        llmjax.load(folder, quantize=recipe)
    with pytest.raises(ConfigError, match=wrong):
        llmjax.convert(folder, tmp_path / "out", to="llmjax", quantize=recipe)
    assert not (tmp_path / "out").exists()


def byte_level(folder, config, added=(), prefix=False, normalizer=None):
    """A tokenizer whose tokens are the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens(list(added))
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return from_huggingface(folder)


@pytest.mark.parametrize("name", ["additional_special_tokens", "extra_special_tokens"])
def test_letters_are_no_special_tokens(tmp_path, name):
    with pytest.raises(TokenizerError, match=f"{name}: expected a list of tokens, found '<x>'"):
        byte_level(tmp_path, {name: "<x>"})
    assert byte_level(tmp_path, {name: ["<x>"]}).special_tokens == {"<x>": 256}


@pytest.mark.parametrize(("wanted", "name"), [(True, "GPT2Tokenizer"), (False, "CodeGenTokenizerFast")])
def test_a_space_before_the_text(tmp_path, wanted, name):
    """As these classes of transformers 5 have it, which make their own pre-tokenizer; others keep the file's."""
    space = [220] * wanted
    made = byte_level(tmp_path, {"tokenizer_class": name, "add_prefix_space": wanted}, prefix=not wanted)
    assert made.encode("ab") == [*space, 64, 65] and made.decode(made.encode("ab")) == " " * wanted + "ab"
    with pytest.warns(UserWarning, match=f"add_prefix_space {str(wanted).lower()}: not heeded"):
        kept = byte_level(tmp_path, {"add_prefix_space": wanted}, prefix=not wanted)
    assert kept.encode("ab") == [220][wanted:] + [64, 65]


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "has"),
    [
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="first"), True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never"), False),
    ],
)
def test_a_space_before_the_text_that_the_file_has_otherwise(tmp_path, normalizer, pre_tokenizer, has):
    """SentencePiece's; the file wins, and that is said."""
    backend = tokenizers.Tokenizer(models.BPE({"▁": 0, "a": 1}, []))
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.save(str(tmp_path / "tokenizer.json"))
    for wanted in (has, not has):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": wanted}))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert from_huggingface(tmp_path).encode("a") == [0][not has :] + [1]
        found = [str(warning.message) for warning in said]
        assert all("not heeded, for tokenizer.json says otherwise" in text for text in found)
        assert len(found) == (wanted != has)


def test_a_stream_shows_what_decode_does(tmp_path):
    """A special token whose text the normalizer changes is not left out by the library, whatever its flag says."""
    token = tokenizers.AddedToken("<a b>", normalized=True, special=True)
    tokenizer = byte_level(tmp_path, {}, [token, "</s>"], normalizer=normalizers.Replace(" ", "Ġ"))
    ids = [64, 256, 65, 257]
    stream = tokenizer.detokenizer()
    text = "".join(map(stream.push, ids)) + stream.flush()
    assert text == tokenizer.decode(ids) == tokenizer.backend.decode(ids) == "a<a b>b"
    assert tokenizer.special_tokens.keys() == {"</s>"}


def gemma(folder, **changes):
    """A small SentencePiece model of Gemma's kind."""
    shutil.copy(GEMMA / "tokenizer.model", folder)
    config = json.loads((GEMMA / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return from_huggingface(folder)


def test_a_token_that_is_null_is_none(tmp_path):
    assert gemma(tmp_path).encode("")[:1] == [2]
    assert gemma(tmp_path, bos_token=None, add_bos_token=True).encode("") == []
    assert gemma(tmp_path, bos_token=None).bos_id is None and gemma(tmp_path, eos_token=None).eos_ids == ()


def test_a_bos_that_is_typed(tmp_path):
    tokenizer = gemma(tmp_path)
    with pytest.warns(UserWarning, match="the text begins with '<bos>', which is put before every text"):
        warn_of_two_starts(tokenizer.encode("<bos>hi"), tokenizer)
    warn_of_two_starts(tokenizer.encode("hi<bos>"), tokenizer)  # warnings are errors here
    warn_of_two_starts(tokenizer.encode("<bos>hi", add_bos=False), tokenizer)
