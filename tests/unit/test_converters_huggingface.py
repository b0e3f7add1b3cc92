"""Finding a checkpoint by its path, and directories whose files do not fit together."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from gguf import GGUFWriter

from converters.readers.opening import open_source
from converters.readers.source import TensorSpec
from llmjax.errors import CheckpointError

TORCH_FILE = Path(__file__).parents[1] / "data/torchbin/tiny.bin"
A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float16)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def shards(directory, weight_map=None, **files):
    for name, tensors in files.items():
        safetensors.numpy.save_file(tensors, directory / f"{name}.safetensors")
    if weight_map is not None:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def ggufs(directory, *names):
    for name in names:
        writer = GGUFWriter(directory / name, "llama")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()


def refused(path):
    """The lines of the message, whose first begins with a path."""
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    return str(caught.value).split("\n  ")


def test_one_file(model):
    shards(model, model={"a": A, "b": B})
    for path in (model, str(model), model / "model.safetensors", model / "*.safetensors"):
        source = open_source(path)
        assert source.format == "huggingface" and source.path == Path(path) and source.directory == model
        assert source.config == {"model_type": "llama"} and source.generation_config is None
        assert source.names() == ["a", "b"]
        assert source.spec("a") == TensorSpec("a", (2, 3), "F32", 24, model / "model.safetensors")
        np.testing.assert_array_equal(source.read("a"), A)
        source.release("a")
        source.close()
    (model / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert open_source(model).generation_config == {"eos_token_id": 2}


def test_shards_with_an_index(model):
    shards(model, {"b": "s2.safetensors", "a": "s1.safetensors"}, s1={"a": A}, s2={"b": B})
    for path in (model, model / "model.safetensors.index.json", model / "s?.safetensors"):
        source = open_source(path)
        assert sorted(source.names()) == ["a", "b"]
        assert source.spec("b").file.name == "s2.safetensors"
        np.testing.assert_array_equal(source.read("b"), B)


def test_torch_files(model):
    (model / "pytorch_model.bin").write_bytes(TORCH_FILE.read_bytes())
    assert "transposed" in open_source(model).names()
    (model / "pytorch_model.bin").rename(model / "s1.bin")
    names = open_source(model / "s1.bin").names()
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "s1.bin")}))
    assert open_source(model).names() == names


def test_weights_are_preferred_as_transformers_does(model):
    (model / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(open_names(TORCH_FILE, model), "t.bin")})
    )
    (model / "t.bin").write_bytes(TORCH_FILE.read_bytes())
    ggufs(model, "model.gguf")
    assert "bf16" in open_source(model).names()
    safetensors.numpy.save_file({"st": A}, model / "x.safetensors")
    (model / "pytorch_model.bin").write_bytes(TORCH_FILE.read_bytes())
    (model / "t.bin").unlink()
    assert "bf16" in open_source(model).names()
    shards(model, {"st": "x.safetensors"})
    assert open_source(model).names() == ["st"]
    shards(model, model={"one": A})
    assert open_source(model).names() == ["one"]


def open_names(file, model):
    (model / "pytorch_model.bin").write_bytes(file.read_bytes())
    names = open_source(model).names()
    (model / "pytorch_model.bin").unlink()
    return names


def test_gguf_directories(tmp_path):
    ggufs(tmp_path, "a.gguf")
    assert open_source(tmp_path).path == tmp_path / "a.gguf"
    (tmp_path / "config.json").write_text("{}")  # as repositories of GGUF files have
    assert open_source(tmp_path).format == "gguf"
    assert open_source(tmp_path / "a.*").format == "gguf"
    (tmp_path / "a.gguf").rename(tmp_path / "renamed")
    assert open_source(tmp_path / "renamed").format == "gguf"
    (tmp_path / "renamed").rename(tmp_path / "a.gguf")
    ggufs(tmp_path, "b.gguf")
    assert refused(tmp_path) == [f"{tmp_path}: holds several GGUF files, name one of them:", "a.gguf", "b.gguf"]
    (message,) = refused(tmp_path / "*.gguf")
    assert "expected one *.gguf file, or weights files in one directory; the 2 matches include a.gguf" in message


def test_paths_that_are_no_checkpoint(tmp_path, model):
    assert refused(tmp_path / "none") == [
        f"{tmp_path}/none: no such file or directory; expected a model directory, a *.gguf file or weights files"
    ]
    (message,) = refused("google/gemma-2b")
    assert message.endswith("; llmjax downloads nothing, 'hf download google/gemma-2b --local-dir FOLDER' does")
    (message,) = refused("~/gemma-2b")
    assert message.endswith("weights files; '~' is for a shell to replace, which it does at the beginning of a word: "
                            "write the folder out")  # fmt: skip
    (message,) = refused(model / "config.json")
    assert message.endswith("it is no index of weights: name the model's directory")
    assert "no file matches this pattern" in refused(tmp_path / "*.safetensors")[0]
    (tmp_path / "x.txt").write_text("x")
    (message,) = refused(tmp_path / "x.txt")
    assert "x.txt: unknown kind of weights file; expected *.safetensors, *.bin, *.gguf, *.litertlm, *.task" in message
    for name in ("m1", "m2"):
        (tmp_path / name).mkdir()
        shards(tmp_path / name, model={"a": A})
    assert "the 2 matches lie in 2 directories" in refused(tmp_path / "m?/*.safetensors")[0]


def test_a_pattern_may_name_a_directory(tmp_path, model):
    shards(model, model={"a": A})
    assert open_source(f"{tmp_path.parent}/{tmp_path.name[:-1]}[{tmp_path.name[-1]}]").names() == ["a"]


def test_no_weights(model):
    looked = "looked for model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index"
    (message,) = refused(model)
    assert message.startswith(f"{model}: no weights; {looked}") and "found" not in message
    shards(model, adapter_model={"a": A})
    assert "; found adapter_model.safetensors: name the file, or a pattern" in refused(model)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: no such file; expected a Hugging Face model directory"),
        ("{", "config.json: not valid JSON"),
        ('"a"', "config.json: expected a JSON object, found str"),
        ("{}", "config.json: expected model_type, a string"),
        ('{"model_type": ["llama"]}', "config.json: expected model_type, a string"),
        ('{"model_type": "a", "model_type": "b"}', "not valid JSON: model_type is there twice"),
        ('{"model_type": "\\ud800"}', "not valid JSON: a string holds half a surrogate pair"),
        ("\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_configs(model, content, message):
    shards(model, model={"a": A})
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_text(content, encoding="latin-1")
    (line,) = refused(model)
    assert message in line


def test_problems_of_all_files_come_together(model):
    (model / "config.json").write_text("{")
    (model / "generation_config.json").write_text("[]")
    names = {"a": "s1.safetensors", "b": "s2.safetensors", "c": "s3.safetensors", "d": "s4.safetensors"}
    shards(model, names, s1={"a": A}, s2={"other": B}, s3={"c": A})
    (model / "s3.safetensors").write_bytes(b"broken")
    lines = refused(model)
    assert lines[0] == f"{model}: cannot read the checkpoint:"
    for expected in (
        "/config.json: not valid JSON",
        "generation_config.json: expected a JSON object, found list",
        "s3.safetensors: truncated or damaged safetensors file",
        "s4.safetensors: cannot read the file: No such file or directory",
        "tensor other in s2.safetensors is not in the index",
    ):
        assert sum(expected in line for line in lines) == 1, expected
    assert len(lines) == 6  # and nothing of the tensors in the two shards that could not be read


def test_indexes_that_contradict_the_shards(model):
    shards(model, {"a": "s2.safetensors", "b": "s2.safetensors"}, s1={"a": A}, s2={"b": B})
    source = open_source(model)  # which the model may not need
    assert source.names() == ["b"] and source.absent == {"a": "s2.safetensors"}
    shards(model, {"a": "s2.safetensors", "b": "s1.safetensors"})
    assert "tensor a is in s1.safetensors; the index says s2.safetensors" in refused(model)[1]
    shards(model, {"a": "s1.safetensors", "b": "s2.safetensors"}, s2={"a": A, "b": B})
    assert "s2.safetensors: tensor a is in s1.safetensors, too" in refused(model)[0]


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "C:x", "a\0"]
)
def test_shards_outside_the_directory(model, shard):
    shards(model, {"a": shard})
    (line,) = refused(model)
    assert "model.safetensors.index.json: expected names of files beside the index, found: " in line


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{"]
)
def test_bad_indexes(model, content):
    (model / "model.safetensors.index.json").write_text(content)
    (line,) = refused(model)
    assert line.startswith(f"{model}/model.safetensors.index.json: ")


def test_an_index_that_names_a_tensor_twice(model):
    shards(model, s1={"a": A})
    (model / "model.safetensors.index.json").write_text('{"weight_map":{"a":"s1.safetensors","a":"s1.safetensors"}}')
    assert "a is there twice" in refused(model)[0]


def test_importing_is_light():
    """Readers know NumPy only, and the package itself not even that."""
    code = (
        "import sys, converters; assert 'numpy' not in sys.modules; from converters import open_source\n"
        "import converters.readers.gguf, converters.readers.safetensors, converters.readers.torch.archive\n"
        "print([m for m in ('jax', 'flax', 'torch', 'transformers', 'gguf', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    import converters

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        converters.nothing  # noqa: B018
