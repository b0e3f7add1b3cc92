"""The converter against files of MediaPipe's own."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as proto

import llmjax
from converters import ConversionConfig, convert_checkpoint
from converters.mediapipe import job, weight_files, writer
from converters.mediapipe.bin_file import BinWriter
from converters.readers.mediapipe import layout
from converters.readers.mediapipe.container import VOCABULARY, BinFile
from converters.readers.safetensors import SafetensorsFile
from llmjax.checkpoint import mediapipe_config
from llmjax.checkpoint.safetensors_writer import SafetensorsWriter
from llmjax.cli.main import main
from llmjax.errors import CheckpointError, ConfigError, LlmjaxError, OutputError, TokenizerError
from tests.mediapipe_files import BINS, DATA, GEMMA, config, converted, differences, digest, facts, vocabulary


@pytest.mark.parametrize("path", BINS, ids=lambda path: path.stem)
def test_equal_to_the_real_converters(path, tmp_path):
    ours = converted(path, tmp_path)
    assert differences(ours, path) == []
    kind, backend, bits = facts(path)
    again = tmp_path / "again.bin"
    convert_checkpoint(
        config(
            kind,
            backend,
            tmp_path,
            bits,
            combine_file_only=True,
            output_tflite_file=str(again),
            input_ckpt=str(DATA / kind),
        )
    )
    assert again.read_bytes() == ours.read_bytes()
    left = {p.name for p in (tmp_path / "out").iterdir()} | {p.name for p in tmp_path.iterdir()}
    assert not [name for name in left if "partial" in name]


BROKEN = {
    "blocks": (layout, "to_blocks", lambda values, shape, bits: np.roll(_TO_BLOCKS(values, shape, bits), 1)),
    "sums": (layout, "row_sums", lambda values, bits: _ROW_SUMS(values, bits) + np.int32(1)),
    "order": (writer, "_order", lambda *args: _ORDER(*args)[::-1]),
    "kv_heads": (mediapipe_config, "parameters", lambda config, kind, backend: _without_kv(config, kind, backend)),
    "types": (writer, "MODEL_TYPE", "odml.infra.LlmModelTypes"),
}  # fmt: skip
_TO_BLOCKS, _ROW_SUMS, _ORDER, _PARAMETERS = (
    layout.to_blocks,
    layout.row_sums,
    writer._order,
    mediapipe_config.parameters,
)


def _without_kv(*args):
    found = _PARAMETERS(*args)
    found.transformer_parameters.ClearField("num_kv_heads")
    return found


@pytest.mark.parametrize("name", BROKEN)
def test_the_comparison_sees(name, monkeypatch, tmp_path):
    monkeypatch.setattr(*BROKEN[name])
    try:
        assert differences(converted(GEMMA, tmp_path), GEMMA)
    except (KeyError, ConfigError):  # noticed before anything was compared
        assert name in ("types", "kv_heads")


def test_the_comparison_sees_alignment(monkeypatch, tmp_path):
    monkeypatch.setattr("converters.mediapipe.bin_file._PAGE", 1 << 15)
    assert "bytes after the header" in differences(converted(GEMMA, tmp_path), GEMMA)


def test_weight_files_are_those_of_the_real_converter(tmp_path):
    """Digests of all raw files and ``layer_info.txt`` that MediaPipe 0.10.21 wrote."""
    for case, expected in json.loads((DATA / "weight_files.json").read_text()).items():
        kind, *options = case.split()
        if options == ["lora"]:  # in test_mediapipe_lora
            continue
        backend, symmetry, *bits = options
        folder = tmp_path / case
        folder.mkdir()
        convert_checkpoint(config(kind, backend, folder, tuple(map(int, bits)), is_symmetric=symmetry == "symmetric"))
        assert digest(folder / "out") == expected, case


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-asym", "int4-asym", "mixed"])
def test_back_and_forth_is_the_identity(scheme, tmp_path):
    """Hugging Face, .bin, llmjax directory, .bin; and from the gpu's layout to the cpu's and back."""
    quantize = {"attention": "int4", "feed_forward": "int8", "embedding": "int4"} if scheme == "mixed" else scheme
    first, folder, second = tmp_path / "a.bin", tmp_path / "packed", tmp_path / "b.bin"
    options = {"to": "mediapipe", "backend": "gpu"}
    llmjax.convert(DATA / "FALCON_RW_1B", first, quantize=quantize, vocab=vocabulary(tmp_path), **options)
    llmjax.convert(first, folder)
    llmjax.convert(folder, second, **options)
    assert second.read_bytes() == first.read_bytes()
    if "asym" not in scheme:
        llmjax.convert(folder, tmp_path / "cpu.bin", to="mediapipe", backend="cpu")
        llmjax.convert(tmp_path / "cpu.bin", tmp_path / "c.bin", **options)
        assert (tmp_path / "c.bin").read_bytes() == first.read_bytes()


def test_zero_points_are_of_the_integers(tmp_path):
    """In gpu files; raw files have them times the scale."""
    convert_checkpoint(config("GEMMA_2B", "gpu", tmp_path, is_symmetric=False))
    out = tmp_path / "out"
    name = "params.lm.transformer.x_layers_0.self_attention.q.w"
    raw = {part: np.fromfile(out / (name + part), np.float32) for part in ("_quantized_scale", "_quantized_zp")}
    stored = BinFile(out / "model.tflite").raw(name + "_quantized_zp").view(np.float32)
    assert np.array_equal(stored, raw["_quantized_zp"] / raw["_quantized_scale"])
    source = SafetensorsFile(DATA / "GEMMA_2B" / "model.safetensors")
    w = source.read("model.layers.0.self_attn.q_proj.weight").astype(np.float32)
    q = np.fromfile(out / name, np.int8).reshape(32, 32).T
    back = (q - stored[:, None]) * raw["_quantized_scale"][:, None]
    assert np.abs(back - w).max() <= 0.51 * raw["_quantized_scale"].max()
    loaded = llmjax.load(out / "model.tflite", dtype="float32").params["layers_0"]["attn"]["q"]["weight"]
    np.testing.assert_allclose(loaded, back, atol=1e-6)


def test_the_cpu_has_no_zero_points(tmp_path):
    convert_checkpoint(config("GEMMA_2B", "cpu", tmp_path, is_symmetric=False))
    assert not [n for n in BinFile(tmp_path / "out" / "model.tflite").entries if n.endswith("_zp")]
    llmjax.convert(DATA / "GEMMA_2B", tmp_path / "packed", quantize="int8-asym")
    with pytest.raises(ConfigError, match=r"(?s)embed.weight: int8-asym: MediaPipe's cpu files have no zero points"):
        llmjax.convert(
            tmp_path / "packed", tmp_path / "x.bin", to="mediapipe", backend="cpu", vocab=vocabulary(tmp_path)
        )


@pytest.mark.parametrize("shape", [(8, 12), (7, 10), (5, 6), (1, 2), (4, 4), (1025, 4098)])
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_layouts(shape, bits):
    rng = np.random.default_rng(0)
    out, width = shape
    if bits == 32:
        values = rng.random(shape, np.float32)
    else:
        values = rng.integers(0, 256, (out, width // 2 if bits == 4 else width), np.uint8)
        values = values.view(np.int8) if bits == 8 else values
    raw = layout.to_blocks(values, shape, bits)
    assert len(raw) == layout.stored_bytes(shape, bits, "gpu")
    assert np.array_equal(layout.from_blocks(raw, shape, bits), values)
    assert np.array_equal(layout.from_columns(layout.to_columns(values, bits), shape, bits), values)
    if bits == 8:  # what fills the blocks up means zero
        blocks = raw.reshape(-(-width // 4), -(-out // 4), 4, 4)
        assert (blocks[-1, -1, (width - 1) % 4 + 1 :] == 128).all()


def test_widths_that_blocks_do_not_divide(tmp_path):
    """A model of such dimensions, through a gpu file."""
    rng = np.random.default_rng(0)
    facts_ = json.loads((DATA / "STABLELM_4E1T_3B" / "config.json").read_text())
    changes = {"hidden_size": 18, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 22}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(facts_ | changes | {"vocab_size": 131}))
    file = SafetensorsWriter(tmp_path / "hf" / "model.safetensors", 64)
    source = SafetensorsFile(DATA / "STABLELM_4E1T_3B" / "model.safetensors")
    sizes = {32: 18, 64: 22, 128: 131}
    for name in source.names():
        file.write(name, rng.normal(size=[sizes[n] for n in source.spec(name).shape]).astype(np.float32))
    file.close({})
    for scheme in ("int8", "int4"):
        path = tmp_path / f"{scheme}.bin"
        options = {"to": "mediapipe", "backend": "gpu", "quantize": scheme, "vocab": vocabulary(tmp_path)}
        llmjax.convert(tmp_path / "hf", path, **options)
        ours = llmjax.load(path)
        with pytest.warns(UserWarning, match="int4 for the embedding") if scheme == "int4" else _nothing():
            theirs = llmjax.load(tmp_path / "hf", quantize=scheme)
        assert all(map(np.array_equal, jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params)))


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_a_tied_head_is_written_twice(tmp_path):
    """Falcon-RW-1B ties head and embedding; the format has a table for each."""
    source = tmp_path / "hf"
    shutil.copytree(DATA / "GEMMA_2B", source)
    facts_ = json.loads((DATA / "FALCON_RW_1B" / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(facts_ | {"tie_word_embeddings": True}))
    from converters.readers.torch.archive import TorchFile

    torch_file = TorchFile(DATA / "FALCON_RW_1B" / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    file = SafetensorsWriter(source / "model.safetensors", 64)
    for name in torch_file.names():
        if name != "lm_head.weight":
            file.write(name, torch_file.read(name))
    file.close({})
    command = ["convert", str(source), str(tmp_path / "x.bin"), "--to", "mediapipe", "--backend", "cpu"]
    assert main([*command, "--vocab", str(vocabulary(tmp_path))]) == 0
    found = BinFile(tmp_path / "x.bin")
    assert np.array_equal(found.raw("params.lm.softmax.logits_ffn.w"), found.raw("params.lm.token_embedding.w"))


def test_checkpoints_by_file_and_pattern(tmp_path):
    whole = converted(GEMMA, tmp_path).read_bytes()
    for ckpt in ("model.safetensors", "*.safetensors"):
        again = config("GEMMA_2B", "gpu", tmp_path, input_ckpt=str(DATA / "GEMMA_2B" / ckpt))
        convert_checkpoint(again)
        assert (tmp_path / "out" / "model.tflite").read_bytes() == whole


@pytest.mark.parametrize("option", ["input_ckpt", "vocab_model_file", "lora_ckpt"])
def test_what_is_read_is_not_written_over(option, tmp_path):
    """As MediaPipe, an output replaces what is there; the checkpoint itself was lost."""
    shutil.copytree(DATA / "GEMMA_2B", tmp_path / "m")
    options = {"input_ckpt": str(tmp_path / "m" / "model.safetensors")}
    options["vocab_model_file"] = config("GEMMA_2B", "gpu", tmp_path).vocab_model_file
    written = "output_tflite_file"
    if option == "lora_ckpt":
        written = "lora_output_tflite_file"
        shutil.copy(DATA / "GEMMA_2B_lora" / "adapter_model.safetensors", tmp_path / "lora.safetensors")
        options |= {"lora_ckpt": str(tmp_path / "lora.safetensors"), "lora_rank": 4}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=f"^{written}: .* is what is read, and would be lost; give another name"):
        convert_checkpoint(config("GEMMA_2B", "gpu", tmp_path, **options, **{written: options[option]}))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_bits_of_numpy(tmp_path):
    assert config("GEMMA_2B", "gpu", tmp_path, bits=(8, 8, np.int64(4))).embedding_quant_bits == 4


WRONG = {
    "ckpt_format: expected 'safetensors' or 'pytorch', found 'gguf'": {"ckpt_format": "gguf"},
    "'GEMMA2_2B' or 'PHI_2' or 'FALCON_RW_1B' or 'STABLELM_4E1T_3B', found 'GEMMA3_1B'": {"model_type": "GEMMA3_1B"},
    "backend: expected 'cpu' or 'gpu', found 'tpu'": {"backend": "tpu"},
    "attention_quant_bits: expected 4 or 8, found 5": {"attention_quant_bits": 5},
    "embedding_quant_bits: expected 4 or 8, found True": {"embedding_quant_bits": True},
    "is_symmetric: expected true or false, found 1": {"is_symmetric": 1},
    "output_dir: expected a directory, found nothing": {"output_dir": ""},
    "output_dir: expected a path that a file can have, found 5": {"output_dir": 5},
    "output_tflite_file: expected a path that a file can have, or None, found 5": {"output_tflite_file": 5},
    "lora_ckpt and lora_rank: expected both or none": {"lora_rank": 4},
    "MediaPipe's cpu backend has no LoRA": {"lora_rank": 4, "lora_ckpt": "x", "lora_output_tflite_file": "y"},
    "lora_output_tflite_file: y is the output_tflite_file": {
        **{"lora_rank": 4, "lora_ckpt": "x", "lora_output_tflite_file": "y", "output_tflite_file": "y"},
        "backend": "gpu",
    },
    "lora_output_tflite_file: /: expected a file, found a directory": {
        **{"lora_rank": 4, "lora_ckpt": "x", "lora_output_tflite_file": "/", "backend": "gpu"},
    },
    "fp16_scale: 0.5 is not supported: MediaPipe's converter ignores it": {"fp16_scale": 0.5},
    "obfuscate: True is not supported": {"obfuscate": True},
    "is_quantized: True is not supported: of MediaPipe 0.10.30": {"is_quantized": True},
    "block_size: 32 is not supported: of MediaPipe 0.10.32": {"block_size": 32},
    "use_dynamic_ple: False is not supported": {"use_dynamic_ple": False},
    "submodel_type: 'GEMMA_2B' is not supported": {"submodel_type": "GEMMA_2B"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options(message, tmp_path):
    options = {"input_ckpt": "x", "ckpt_format": "safetensors", "model_type": "GEMMA_2B", "backend": "cpu"}
    with pytest.raises(ConfigError) as error:
        ConversionConfig(**{**options, "output_dir": str(tmp_path), **WRONG[message]})
    assert message in str(error.value)


def test_options_are_mediapipes():
    """Order and defaults of 0.10.21."""
    import inspect

    found = list(inspect.signature(ConversionConfig).parameters.values())
    positional = [(p.name, p.default) for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [name for name, default in positional if default is inspect.Parameter.empty] == [
        "input_ckpt",
        "ckpt_format",
        "model_type",
        "backend",
        "output_dir",
    ]
    assert positional[5:] == [
        ("is_symmetric", True),
        ("attention_quant_bits", 8),
        ("feedforward_quant_bits", 8),
        ("embedding_quant_bits", 8),
        ("combine_file_only", False),
        ("vocab_model_file", ""),
        ("obfuscate", False),
        ("output_tflite_file", None),
        ("fp16_scale", None),
        ("lora_ckpt", None),
        ("lora_rank", None),
        ("lora_output_tflite_file", None),
        ("image_encoder_file", None),
        ("image_adapter_file", None),
        ("submodel_type", None),
        ("use_fake_weights", False),
    ]


def _checkpoint(folder: Path, change) -> Path:
    shutil.copytree(DATA / "GEMMA_2B", folder / "hf")
    found = json.loads((folder / "hf" / "config.json").read_text())
    change(folder / "hf", found)
    return folder / "hf"


BAD = {
    "published dimensions of": (CheckpointError, lambda hf, c: (hf / "config.json").unlink()),
    "expected shape [64, 32], found [32, 32]": (CheckpointError, lambda hf, c: _swap(hf)),
    "rope: GEMMA_2B has": (ConfigError, lambda hf, c: _json(hf, c, rope_theta=5.0)),
    "rms_norm_eps: GEMMA_2B has 1e-06, this model 1e-05": (ConfigError, lambda hf, c: _json(hf, c, rms_norm_eps=1e-5)),
    "not part of a gemma model": (CheckpointError, lambda hf, c: _extra(hf)),
    "no safetensors weights": (CheckpointError, lambda hf, c: (hf / "model.safetensors").unlink()),
    "only 90 rows": (LlmjaxError, lambda hf, c: _json(hf, c, vocab_size=90)),
    "expected a model of architecture gemma for GEMMA_2B": (ConfigError, lambda hf, c: _other(hf)),
}


def _json(hf, c, **changes):
    (hf / "config.json").write_text(json.dumps(c | changes))
    if "vocab_size" in changes:
        _rewrite(hf, lambda n, x: x[:90] if "embed" in n else x)


def _rewrite(hf, change, extra=()):
    source = SafetensorsFile(hf / "model.safetensors")
    values = {name: change(name, np.array(source.read(name))) for name in source.names()} | dict(extra)
    (hf / "model.safetensors").unlink()
    file = SafetensorsWriter(hf / "model.safetensors", 64)
    for name, value in values.items():
        file.write(name, value)
    file.close(source.metadata)


def _swap(hf):
    _rewrite(hf, lambda n, x: x[:32] if "layers.1.mlp.up" in n else x)


def _extra(hf):
    _rewrite(hf, lambda n, x: x, {"model.extra": np.zeros(3, np.float32)})


def _other(hf):
    shutil.rmtree(hf)
    shutil.copytree(DATA / "STABLELM_4E1T_3B", hf)


@pytest.mark.parametrize("message", BAD)
def test_wrong_checkpoints(message, tmp_path):
    kind, change = BAD[message]
    source = _checkpoint(tmp_path, change)
    with pytest.raises(kind) as error:
        convert_checkpoint(config("GEMMA_2B", "gpu", tmp_path, input_ckpt=str(source)))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_wrong_vocabularies(tmp_path):
    bad = tmp_path / "bad.model"
    bad.write_bytes(b"nothing of the kind")
    for path, kind, message in (
        (bad, TokenizerError, "not a SentencePiece model"),
        (tmp_path / "missing", ConfigError, "cannot read it"),
    ):
        with pytest.raises(kind, match=message):
            convert_checkpoint(config("GEMMA_2B", "gpu", tmp_path, vocab_model_file=str(path)))
    with pytest.raises(ConfigError, match="give vocab_model_file"):
        convert_checkpoint(config("GEMMA_2B", "gpu", tmp_path, vocab_model_file=""))


def test_weight_files_that_do_not_fit(tmp_path):
    """A weight of half the size is not one of half the bits."""
    convert_checkpoint(config("GEMMA_2B", "gpu", tmp_path))
    out = tmp_path / "out"
    name = "params.lm.transformer.x_layers_0.self_attention.k.w"
    combine = config("GEMMA_2B", "gpu", tmp_path, combine_file_only=True)
    whole = (out / "model.tflite").read_bytes()
    data, info = (out / name).read_bytes(), (out / "layer_info.txt").read_text()
    (out / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="k.w: expected 512 bytes, found 256"):
        convert_checkpoint(combine)
    (out / "layer_info.txt").write_text(info.replace(f"{name}.int8.32_16", f"{name}.int8.32_8"))
    with pytest.raises(
        CheckpointError, match=r"expected float32 or int8 \[32, 16\], or 4 bits of it, found int8 \[32, 8\]"
    ):
        convert_checkpoint(combine)
    (out / "layer_info.txt").write_text("what is this")
    with pytest.raises(CheckpointError, match="expected lines mdl_vars"):
        convert_checkpoint(combine)
    (out / "layer_info.txt").unlink()
    with pytest.raises(CheckpointError, match="convert without combine_file_only first"):
        convert_checkpoint(combine)
    assert (out / "model.tflite").read_bytes() == whole


def test_another_conversion_was_quicker(tmp_path):
    path = tmp_path / "x.bin"
    options = {"to": "mediapipe", "backend": "gpu", "vocab": vocabulary(tmp_path)}
    with pytest.raises(CheckpointError, match="exists; expected a new file"):
        llmjax.convert(DATA / "GEMMA_2B", path, announce=lambda line: path.write_bytes(b"theirs"), **options)
    assert path.read_bytes() == b"theirs" and {p.name for p in tmp_path.iterdir()} == {"x.bin", "spm.model"}


def test_nothing_is_left_of_a_full_disk(monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.tflite").write_bytes(b"from before")
    written = BinWriter.write

    def full(self, name, data):
        if "final_ln" in name:
            raise OSError(28, "No space left on device")
        written(self, name, data)

    monkeypatch.setattr(BinWriter, "write", full)
    with pytest.raises(OutputError, match="No space left on device; nothing is left behind"):
        convert_checkpoint(config("GEMMA_2B", "gpu", tmp_path))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.tflite"]
    assert (tmp_path / "out" / "model.tflite").read_bytes() == b"from before"


def test_schemes_without_a_place(tmp_path):
    options = {"to": "mediapipe", "backend": "gpu", "vocab": vocabulary(tmp_path)}
    for scheme in ("int4-g32", "int8-mse"):
        with pytest.raises(ConfigError, match=f"weight: {scheme}: expected int4 or int8"):
            llmjax.convert(DATA / "GEMMA_2B", tmp_path / "x.bin", quantize={"feed_forward": scheme}, **options)
        llmjax.convert(DATA / "GEMMA_2B", tmp_path / scheme, quantize={"feed_forward": scheme})
    _rewrite(tmp_path / "int8-mse", lambda n, x: -x if n == "layers.0.mlp.up.weight.scales" else x)
    for scheme, message in (
        ("int4-g32", "int4-g32, expected int4 or int8 with a scale for each output channel"),
        ("int8-mse", "layers.0.mlp.up.weight: scales that are not positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            llmjax.convert(tmp_path / scheme, tmp_path / "x.bin", **options)
    with pytest.raises(ConfigError, match="quantized already"):
        llmjax.convert(GEMMA, tmp_path / "x.bin", quantize="int4", **options)
    with pytest.raises(CheckpointError, match="exists; expected a new file"):
        llmjax.convert(DATA / "GEMMA_2B", GEMMA, **options)
    assert not (tmp_path / "x.bin").exists()


def test_command_line(tmp_path, capsys):
    path = tmp_path / "x.bin"
    spm = str(vocabulary(tmp_path))
    command = ["convert", str(DATA / "GEMMA_2B"), str(path), "--to", "mediapipe", "--vocab", spm]
    assert main(command) == 2
    assert "needs --backend" in capsys.readouterr().err
    assert main([*command, "--backend", "gpu", "--model-type", "GEMMA_2B", "--feed-forward-bits", "4"]) == 0
    text = capsys.readouterr().err
    plan, error = text.index("GEMMA_2B for gpu: V 128  D 32"), text.index("error of each role")
    assert plan < error and "feed_forward      int4" in text
    assert main(["convert", str(path), str(tmp_path / "hf"), "--to", "hf"]) == 0
    rescued = SafetensorsFile(tmp_path / "hf" / "model.safetensors")
    assert set(rescued.names()) == set(SafetensorsFile(DATA / "GEMMA_2B" / "model.safetensors").names())
    assert main(["convert", str(path), str(tmp_path / "p"), "--to", "llmjax", "--backend", "gpu"]) == 2
    assert "only with --to mediapipe" in capsys.readouterr().err
    tokens = [llmjax.load(p).tokenizer.encode("the quick brown fox") for p in (path, tmp_path / "hf")]
    assert tokens[0] == tokens[1] == [2, 27, 26, 50, 59, 56, 21, 19]


@pytest.mark.parametrize("other", [False, True])
def test_a_vocabulary_that_cuts_texts_otherwise_is_told(other, tmp_path, caplog):
    """The one that is given may be another model's."""
    hf, path = tmp_path / "hf", tmp_path / "x.bin"
    shutil.copytree(DATA / "GEMMA_2B", hf)
    own = BinFile(GEMMA).blob(VOCABULARY)
    (hf / "tokenizer.model").write_bytes(own)
    model = proto.ModelProto.FromString(own)
    if other:  # its letters are left
        del model.pieces[40:]
    (tmp_path / "given.model").write_bytes(model.SerializeToString())
    llmjax.convert(hf, path, to="mediapipe", backend="gpu", vocab=tmp_path / "given.model")
    told = f"{tmp_path / 'given.model'}: as a SentencePiece model it cuts 3 of 3 sample texts into other tokens than"
    assert (told in caplog.text) == other
    text = "The quick brown fox jumps over the lazy dog."
    ids = [llmjax.load(p).tokenizer.encode(text) for p in (path, hf)]
    assert (ids[0] != ids[1]) == other


def test_model_types_are_inferred():
    from converters.readers.opening import open_source

    for folder in ("PHI_2", "FALCON_RW_1B", "STABLELM_4E1T_3B", "GEMMA_2B", "GEMMA2_2B"):
        assert job.infer(open_source(DATA / folder)).name == folder
    changed = {"num_key_value_heads": 2}
    assert job.infer(open_source(DATA / "GEMMA_2B"), changed).name == "GEMMA_7B"


def test_weight_files_of_a_tied_head_are_the_heads(tmp_path):
    """Those of a head that is the embedding's copy: for the cpu the two lie the other way round."""
    source = tmp_path / "tied"
    shutil.copytree(DATA / "STABLELM_4E1T_3B", source)
    table = SafetensorsFile(source / "model.safetensors").read("model.embed_tokens.weight").copy()
    _rewrite(source, lambda name, x: table if name == "lm_head.weight" else x)
    settings = json.loads((source / "config.json").read_text())

    def convert(tied, folder, **options):
        (source / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": tied}))
        folder.mkdir(exist_ok=True)
        convert_checkpoint(config("STABLELM_4E1T_3B", "cpu", folder, (4, 4, 4), input_ckpt=str(source), **options))
        return folder / "out"

    tied, own = (convert(value, tmp_path / str(value)) for value in (True, False))
    assert digest(tied) == digest(own)
    model = (tied / "model.tflite").read_bytes()
    (tied / "model.tflite").unlink()
    convert(True, tmp_path / "True", combine_file_only=True)
    assert (tied / "model.tflite").read_bytes() == model
    head = tied / "params.lm.softmax.logits_ffn.w"
    head.write_bytes(head.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match="token_embedding.w differs from .*logits_ffn.w, but the .* ties them"):
        convert(True, tmp_path / "True", combine_file_only=True)


def test_transposed_weight_files():
    """As the mappers of MediaPipe's converter have them."""
    kinds = mediapipe_config.MODEL_TYPES
    found = {
        (name, backend, role)
        for name, kind in kinds.items()
        for backend in ("cpu", "gpu")
        for role in ("layers.0.attn.q", "layers.0.attn.o", "embed", "head")
        if weight_files.is_transposed(f"{role}.weight", kind, backend)
    }
    gemmas = {(name, b, "layers.0.attn.o") for name in kinds if name.startswith("GEMMA") for b in ("cpu", "gpu")}
    others = {(name, "cpu", r) for name in kinds if "GEMMA" not in name for r in ("layers.0.attn.o", "embed")}
    assert found == gemmas | others
