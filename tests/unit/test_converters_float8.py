"""Checkpoints of 8-bit floats: a weight is its float times the scale of its block, as the format says."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import llmjax
from converters.readers.opening import open_source
from llmjax.errors import CheckpointError
from tests.parity import checkpoints, golden

SETTINGS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [4, 8]}


def write(folder, settings=None, **tensors):
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "quantization_config": {**SETTINGS, **(settings or {})}}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def weight():
    return np.random.default_rng(0).integers(-8, 8, (8, 24)).astype(ml_dtypes.float8_e4m3fn)


def test_each_block_has_its_scale(weight, tmp_path):
    scales = np.arange(1, 7).reshape(2, 3).astype(ml_dtypes.bfloat16) / 64
    one = np.array(0.375, np.float32)
    static = {"activation_scheme": "static", "modules_to_not_convert": ["lm_head"], "dequantize": False}
    floats = np.ones((2, 2), np.float32)
    tensors = {"b.weight": weight, "b.weight_scale_inv": one, "b.activation_scale": one, "c.weight": floats}
    tensors |= {"d.weight": weight, "d.weight_scale": one.reshape(1), "d.input_scale": one.reshape(1)}  # AutoFP8's
    source = open_source(write(tmp_path, static, **{"a.weight": weight, "a.weight_scale_inv": scales}, **tensors))
    assert sorted(source.names()) == [f"{x}.weight" for x in "abcd"] and "quantization_config" not in source.config
    expected = [[float(weight[i, j]) * float(scales[i // 4, j // 8]) for j in range(24)] for i in range(8)]
    found = source.read("a.weight")
    assert found.dtype == np.float32 and source.spec("a.weight").dtype == "F8_E4M3"
    np.testing.assert_array_equal(found, np.float32(expected))
    for name in ("b.weight", "d.weight"):
        np.testing.assert_array_equal(source.read(name), weight.astype(np.float32) * np.float32(0.375))
    assert source.read("c.weight").sum() == 4


def test_other_floats_of_8_bits_are_refused(weight, tmp_path):
    weight, scale = weight.astype(ml_dtypes.float8_e5m2), np.ones((), np.float32)
    with pytest.raises(CheckpointError, match="tensor a.weight: type F8_E5M2 is not supported, expected F8_E4M3$"):
        open_source(write(tmp_path, {}, **{"a.weight": weight, "a.weight_scale_inv": scale}))


@pytest.mark.parametrize(
    ("settings", "scales", "message"),
    [
        ({}, None, "m: tensor a.weight_scale_inv: missing, beside a weight of F8_E4M3"),
        ({}, np.ones((2, 4), np.float32), r"scales \[2, 4\] do not fit a weight \[8, 24\] in blocks of \[4, 8\]"),
        ({"weight_block_size": None}, np.ones((2, 3), np.float32), "of blocks, but weight_block_size is None"),
        ({}, np.ones((2, 3), np.uint8), "scales of type U8 are not supported"),
        ({"scale_fmt": "ue8m0"}, np.ones((2, 3), np.float32), "quantization_config.scale_fmt: 'ue8m0' is not"),
        ({"mystery": 7}, np.ones((2, 3), np.float32), "quantization_config.mystery: 7 is not supported"),
    ],
)
def test_what_does_not_fit_is_refused(weight, settings, scales, message, tmp_path):
    more = {} if scales is None else {"a.weight_scale_inv": scales}
    with pytest.raises(CheckpointError, match=message):
        open_source(write(tmp_path / "m", settings, **{"a.weight": weight}, **more))


@pytest.mark.slow
@pytest.mark.parametrize("block", [8, None])
def test_logits_are_those_of_transformers(block, tmp_path):
    torch = pytest.importorskip("torch", reason="parity extra not installed")
    pytest.importorskip("accelerate", reason="transformers wants it for these")
    reference = pytest.importorskip("tests.parity.reference")
    m = golden.meta("qwen3")
    config = m["config"] | {"hidden_size": 56, "intermediate_size": 104}
    settings = SETTINGS | {"weight_block_size": block and [block, block]}
    tensors = {}
    for name, shape in m["shapes"].items():
        x = checkpoints.values(name, tuple(shape), 3)
        if len(shape) == 2 and ".layers." in name:
            rows, columns = (n // block if block else 1 for n in shape)
            scales = np.abs(x).reshape(rows, shape[0] // rows, columns, -1).max((1, 3)) / 448
            whole = np.repeat(np.repeat(scales, shape[0] // rows, 0), shape[1] // columns, 1)
            x = (x / whole).astype(ml_dtypes.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales if block else scales.reshape(())
        tensors[name] = x
    folder = write(tmp_path, **tensors)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    theirs, ids = reference.load(folder, "qwen3").to(torch.float32), list(range(3, 25))
    assert golden.error(llmjax.load(folder).logits([ids])[0], reference.logits(theirs, ids)) <= golden.TOLERANCE
