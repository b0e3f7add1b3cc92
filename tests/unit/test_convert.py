"""Checkpoints into other forms: whole or not at all, and nothing lost on the way."""

import errno
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmjax
from llmjax import CheckpointError, ConfigError, LlmjaxError
from llmjax.checkpoint import weight_error as error
from llmjax.cli.main import main
from llmjax.errors import OutputError
from llmjax.quant.qtensor import QTensor
from tests.parity import golden
from tests.parity.golden import arrays
from tests.tiny import slow

TOKENIZERS = Path(__file__).parents[1] / "data" / "tokenizers"


def folder(path, name="llama", dtype="float32"):
    return golden.write(name, path / name, dtype)


def ids(name):
    return [arrays(name)["ids"][:24].tolist()] if "ids" in arrays(name) else [list(range(3, 27))]


@pytest.mark.parametrize("name", golden.some({"falcon_40b", "gemma3_multimodal", "mistral", "phi3"}, golden.ONE_EACH))
def test_back_to_hugging_face_every_byte_is_the_same(tmp_path, name):
    """Through packed directories of floats; fused tensors are put together again."""
    source = folder(tmp_path, name, "bfloat16")
    llmjax.convert(source, tmp_path / "own")
    llmjax.convert(tmp_path / "own", tmp_path / "hf", to="hf")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert not set(after) - set(before)
    for tensor, value in after.items():
        assert value.tobytes() == before[tensor].tobytes() and value.shape == before[tensor].shape, tensor
    assert not llmjax.inspect(tmp_path / "hf").problems


@pytest.mark.parametrize("name", golden.some({"phi3"}, golden.ONE_EACH))
def test_every_architecture_quantizes(tmp_path, name):
    """Its quantized weights mean their dequantized values, whatever rows they were cut from."""
    source = folder(tmp_path, name)
    recipe = {"attention": "int8", "feed_forward": "int4-asym", "embedding": "int8-asym"}
    llmjax.convert(source, tmp_path / "q", quantize=recipe)
    packed, exact = llmjax.load(tmp_path / "q"), llmjax.load(tmp_path / "q", dtype="float32")
    quantized = [x for x in jax.tree.leaves(packed.params, is_leaf=is_packed) if is_packed(x)]
    assert len(quantized) >= 6 * packed.config.num_hidden_layers + 1
    a, b = (m.logits(ids(name))[0] for m in (packed, exact))
    assert np.abs(a - b).max() <= golden.TOLERANCE * np.abs(b).max()


def is_packed(x):
    return isinstance(x, QTensor)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [slow("llama", "int8"), slow("falcon_40b", "mixed-8-4-8"), ("phi", {"attention": "int4-asym", "head": "int4"})],
)
def test_a_directory_is_the_model_quantized_in_memory(tmp_path, name, scheme):
    source = folder(tmp_path, name)
    llmjax.convert(source, tmp_path / "q", quantize=scheme)
    stored, made = llmjax.load(tmp_path / "q"), llmjax.load(source, quantize=scheme)
    np.testing.assert_array_equal(stored.logits(ids(name))[0], made.logits(ids(name))[0])
    report = llmjax.inspect(tmp_path / "q")
    assert report.supported and report.format == "llmjax"
    q = next(t for t in report.tensors if t["name"] == "layers.0.attn.q.weight")
    assert q["kept"] == "packed" and q["shape"] == list(made.params["layers_0"]["attn"]["q"]["weight"].shape)
    # the official library opens the file
    weights = load_file(tmp_path / "q" / "model.safetensors")
    assert weights["layers.0.attn.q.weight.values"].dtype in (np.int8, np.uint8)


def test_a_dtype_expands(tmp_path):
    source = folder(tmp_path)
    llmjax.convert(source, tmp_path / "q", quantize="int8")
    llmjax.convert(tmp_path / "q", tmp_path / "hf", to="hf", dtype="bfloat16")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    expanded = llmjax.load(tmp_path / "q", dtype="float32")
    packed = llmjax.load(tmp_path / "q")
    a, b = (m.logits(ids("llama"))[0] for m in (expanded, packed))
    assert np.abs(a - b).max() <= 3e-5 * np.abs(a).max()


def test_tokenizer_files_come_along(tmp_path, smollm2_path):
    llmjax.convert(smollm2_path, tmp_path / "q")
    before, after = (_tokenizer(p) for p in (smollm2_path, tmp_path / "q"))
    for text in ("Hello, wörld! 1234 <|im_end|>", "def f(x):\n    return x**2", "日本語 🙂"):
        assert before.encode(text) == after.encode(text)
    chat = [{"role": "user", "content": "hi"}]
    assert before.render_chat(chat) == after.render_chat(chat) and before.eos_ids == after.eos_ids


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id: expected a token id or a list of them"),
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer_config.json", '{"chat_template": 1}', "chat_template: expected a string, found int"),
        ("special_tokens_map.json", '{"bos_token": 1}', "bos_token: expected a token's string"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: expected UTF-8 text"),
    ],
)
def test_what_could_not_be_loaded_is_not_copied(tmp_path, file, content, message):
    """The same error as of loading, before any weight is written."""
    source = folder(tmp_path)
    for part in (TOKENIZERS / "llama").iterdir():
        shutil.copyfile(part, source / part.name)
    llmjax.convert(source, tmp_path / "good")
    (source / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LlmjaxError, match=message) as loading:
        llmjax.load(source)
    for to in ("llmjax", "hf"):
        with pytest.raises(LlmjaxError) as converting:
            llmjax.convert(source, tmp_path / "bad", to=to, report=lambda *_: pytest.fail("too late"))
        assert str(converting.value) == str(loading.value)
        assert not (tmp_path / "bad").exists()


def _tokenizer(path):
    from converters.readers.opening import open_source
    from llmjax.checkpoint.loading import read_tokenizer

    source = open_source(path)
    try:
        return read_tokenizer(source)
    finally:
        source.close()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    source = folder(tmp_path)

    def full(self, name, array):
        if "layers.1" in name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmjax.checkpoint.safetensors_writer.SafetensorsWriter.write", full)
    with pytest.raises(OutputError, match="No space left on device; nothing is left behind"):
        llmjax.convert(source, tmp_path / "q", quantize="int8")
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_nothing_is_overwritten(tmp_path):
    source = folder(tmp_path)
    with pytest.raises(CheckpointError, match="exists; expected a new directory"):
        llmjax.convert(source, source, quantize="int8")
    (tmp_path / "empty").mkdir()
    llmjax.convert(source, tmp_path / "empty", quantize="int8")
    assert llmjax.inspect(tmp_path / "empty").supported


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "gguf"}, "unknown 'gguf'; expected one of llmjax, hf"),
        ({"to": "hf", "quantize": "int8"}, "holds floats"),
        ({"quantize": {"attention": "int4-g32"}}, "56 inputs are not a multiple of the group 32"),
        ({"dtype": "float64"}, "dtype: unknown 'float64'"),
    ],
)
def test_what_is_refused(tmp_path, arguments, message):
    source = folder(tmp_path)
    with pytest.raises(ConfigError, match=message):
        llmjax.convert(source, tmp_path / "q", **arguments)
    assert not (tmp_path / "q").exists()


def test_int4_embeddings_warn(tmp_path):
    with pytest.warns(UserWarning, match="int4 for the embedding, which is also the head here, costs more"):
        llmjax.load(folder(tmp_path, "gemma2"), quantize="int4")


def test_quantizing_twice_is_refused(tmp_path):
    llmjax.convert(folder(tmp_path), tmp_path / "q", quantize="int8")
    with pytest.raises(ConfigError, match="quantized already"):
        llmjax.load(tmp_path / "q", quantize="int4")


def _metadata(path):
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]


def test_schemes_and_tensors_that_disagree(tmp_path):
    llmjax.convert(folder(tmp_path), tmp_path / "q", quantize="int8")
    file = tmp_path / "q" / "model.safetensors"
    metadata, tensors = _metadata(file), load_file(file)
    name = "layers.0.attn.q.weight"

    def load_with(change, edit=lambda tensors: None):
        schemes = json.loads(metadata["quantization"])
        changed = dict(tensors)
        change(schemes)
        edit(changed)
        save_file(changed, file, metadata | {"quantization": json.dumps(schemes)})
        with pytest.raises(CheckpointError) as caught:
            llmjax.load(tmp_path / "q")
        return str(caught.value)

    assert "values: expected U8" in load_with(lambda s: s[name].update(bits=4))
    assert "group 5: no such scheme" in load_with(lambda s: s[name].update(group=5))
    assert "scales: expected F32 or F16 [56, 7], found F32 [56, 1]" in load_with(lambda s: s[name].update(group=8))
    assert "is not part of a llama model" in load_with(lambda s: s.pop(name))
    assert "expected values of two or three dimensions" in load_with(lambda s: None, lambda t: t.pop(f"{name}.values"))
    extra = {f"{name}.fifth": np.zeros((56, 7), np.uint8)}
    assert "fifth: not part of this scheme" in load_with(lambda s: None, lambda t: t.update(extra))
    save_file(tensors, file, metadata | {"quantization": "[]"})
    with pytest.raises(CheckpointError, match="metadata 'quantization': expected bits, zero and group"):
        llmjax.load(tmp_path / "q")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        llmjax.load(tmp_path / "q")


def test_a_later_version_is_refused(tmp_path):
    llmjax.convert(folder(tmp_path), tmp_path / "q", quantize="int8")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization"]["version"] = 2
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected 1, found 2"):
        llmjax.load(tmp_path / "q")


def test_errors_against_the_source(tmp_path):
    source = folder(tmp_path)
    llmjax.convert(source, tmp_path / "q", quantize="mixed-8-4-8")
    found = error.errors(tmp_path / "q", source)
    by_name = {e.name: e for e in found}
    model, exact = llmjax.load(tmp_path / "q", dtype="float32"), llmjax.load(source)
    for module in ("q", "o"):
        a, b = (np.asarray(m.params["layers_1"]["attn"][module]["weight"], np.float64) for m in (model, exact))
        e = by_name[f"layers.1.attn.{module}.weight"]
        np.testing.assert_allclose(e.max, np.abs(a - b).max(), rtol=1e-6)
        np.testing.assert_allclose(e.rms, np.sqrt(np.mean((a - b) ** 2)), rtol=1e-6)
        np.testing.assert_allclose(e.sqnr_db, 10 * np.log10(np.mean(b**2) / np.mean((a - b) ** 2)), rtol=1e-6)
    roles = {e.name: e for e in error.by_role(found)}
    assert roles["attention"].sqnr_db > 35 > roles["feed_forward"].sqnr_db > 10
    assert roles["other"].sqnr_db == np.inf and roles["other"].kept == "float32"
    assert "error of each role" in error.to_text(found)
    assert error.to_dict(found)["roles"][0]["name"] in roles
    with pytest.raises(ConfigError, match="are not the same model"):
        error.errors(tmp_path / "q", folder(tmp_path, "phi"))


@pytest.mark.filterwarnings("default")
def test_the_verbs(tmp_path, capsys):
    source = folder(tmp_path)
    assert main(["convert", str(source), str(tmp_path / "q"), "--to", "llmjax", "--bits", "4"]) == 0
    assert "int4 for the embedding" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "q"), "--against", str(source)]) == 0
    assert "SQNR dB" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "q"), "--against", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"]["roles"]
    for extra, message in (
        (["--bits", "4", "--quantize", "int8"], "say the same"),
        (["--group-size", "32"], "--group-size goes with --bits"),
        (["--bits", "4", "--group-size", "5"], "expected a group of 32, 64 or 128"),
    ):
        assert main(["convert", str(source), str(tmp_path / "x"), "--to", "llmjax", *extra]) == 2
        assert message in capsys.readouterr().err


def test_dynamic_int8_wants_quantized_weights(tmp_path):
    with pytest.raises(ConfigError, match="there are none; add quantize"):
        llmjax.load(folder(tmp_path), numerics="dynamic_int8")
