"""Weights that a dtype would make infinite are refused, all by name, and nothing is written."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmjax
from converters.mediapipe import lora
from converters.readers.mediapipe.lora import PLACES, Factors
from llmjax.cli.main import main
from llmjax.errors import CheckpointError, ConfigError, LoraError
from llmjax.quant.rounding import quantize
from llmjax.quant.schemes import Scheme
from tests import tiny

EXPECTED = "expected at most 65504 for float16, found"
MESSAGE = f"""values that their dtype would make infinite; float32 and bfloat16 hold the most (dtype):
  head.weight (from lm_head.weight): {EXPECTED} 65520
  layers.1.mlp.down.weight (from model.layers.1.mlp.down_proj.weight): {EXPECTED} 70000"""


def changed(folder, dtype=None, **values):
    tensors = load_file(folder / "model.safetensors")
    for name, value in values.items():
        tensors[name.replace("__", ".")].reshape(-1)[-1] = value
    save_file({n: t.astype(dtype or t.dtype) for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path):
    large = {
        "model__layers__1__mlp__down_proj__weight": -7e4,
        "lm_head__weight": 65520.0,
        "model__norm__weight": 65519.0,
    }
    return changed(tiny.checkpoint(tmp_path / "m"), **large)


@pytest.mark.parametrize("to", ["hf", "llmjax"])
def test_convert(folder, tmp_path, to, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(folder), str(out), "--to", to, "--dtype", "float16"]) == 2
    assert MESSAGE in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    llmjax.convert(folder, out, to=to, dtype="bfloat16")
    kept = np.asarray(llmjax.load(out).params["layers_1"]["mlp"]["down"]["weight"])
    assert kept[-1, -1] == ml_dtypes.bfloat16(-7e4)


def test_load(folder):
    with pytest.raises(ConfigError) as refused:
        llmjax.load(folder, dtype="float16")
    assert MESSAGE in str(refused.value)
    # What is quantized is not stored as float16: the norm alone is, and fits (65519 rounds to the largest).
    model = llmjax.load(folder, dtype="float16", quantize="int8")
    assert model.params["final_norm"]["weight"][-1] == 65504


def test_infinity_in_the_file_is_not_of_our_making(tmp_path):
    source = changed(tiny.checkpoint(tmp_path / "m"), model__norm__weight=np.inf)
    assert np.isinf(llmjax.load(source, dtype="float16").params["final_norm"]["weight"][-1])
    with pytest.raises(CheckpointError, match="NaN or infinite values in:\n  final_norm.weight"):
        llmjax.load(source, dtype="float16", check_finite=True)


@pytest.mark.parametrize(("name", "place"), [("model__norm__weight", "final_norm"), ("lm_head__weight", "head")])
def test_a_graph_that_is_not_run_holds_no_infinity_either(name, place, tmp_path):
    source = changed(tiny.checkpoint(tmp_path / "m"), **{name: np.inf})
    with pytest.raises(CheckpointError, match=f"{place}.weight: NaN or infinite weights"):
        llmjax.convert(source, tmp_path / "x.tflite", to="tflite", verify=False, context=8, prefill_lengths=[4])
    assert not (tmp_path / "x.tflite").exists()


def test_bfloat16_ends_before_float32(tmp_path):
    source = changed(tiny.checkpoint(tmp_path / "m"), lm_head__weight=3.4e38)
    with pytest.raises(ConfigError, match=r"expected at most 3.38953e\+38 for bfloat16, found 3.4e\+38"):
        llmjax.load(source, dtype="bfloat16")


def test_float64_is_computed_with_as_float32(tmp_path):
    source = changed(tiny.checkpoint(tmp_path / "m"), np.float64, model__norm__weight=0.1)
    norm = llmjax.load(source).params["final_norm"]["weight"]
    assert norm.dtype == np.float32 and norm[-1] == np.float32(0.1)
    changed(source, np.float64, model__norm__weight=-1e39)
    for scheme in (None, "int8"):
        with pytest.raises(ConfigError, match=r"final_norm.weight .*at most 3.40282e\+38 for float32, found 1e\+39"):
            llmjax.load(source, quantize=scheme)
    changed(source, np.float64, model__norm__weight=1, lm_head__weight=1e39)
    with pytest.raises(CheckpointError, match="head.weight: NaN or infinite weights cannot be quantized"):
        llmjax.load(source, quantize="int8")


def rank_one(folder, module, out, value, alpha=1):
    """An adapter whose B . A is ``value`` everywhere."""
    folder.mkdir()
    factors = {"A": np.ones((1, 48), np.float32), "B": np.full((out, 1), value, np.float32)}
    names = {f"base_model.model.model.{module}.lora_{side}.weight": factor for side, factor in factors.items()}
    save_file(names, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": alpha, "target_modules": [module]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def test_an_adapter_merged_into_float16(tmp_path):
    base = changed(tiny.checkpoint(tmp_path / "m"), np.float16, model__layers__0__self_attn__q_proj__weight=6e4)
    rank_one(tmp_path / "a", "layers.0.self_attn.q_proj", 48, 1e4)
    refused = r"layers.0.attn.q.weight \(from .*\): expected at most 65504 for float16, found 70000"
    for call in (
        lambda: llmjax.load(base, lora=tmp_path / "a", numerics="hf"),
        lambda: llmjax.convert(base, tmp_path / "out", to="hf", lora=tmp_path / "a"),
    ):
        with pytest.raises(ConfigError, match=refused):
            call()
    assert llmjax.load(base, lora=tmp_path / "a").params["layers_0"]["attn"]["q"]["weight"][-1, -1] == 7e4


def test_an_adapter_beyond_float32(tmp_path):
    base = tiny.checkpoint(tmp_path / "m")
    rank_one(tmp_path / "a", "layers.1.mlp.up_proj", 96, 3e38, alpha=2)
    refused = r"^.*/a/adapter_model.safetensors: layers.1.mlp.up.weight: the weight with scale .* beyond float32"
    for options in ({}, {"dtype": "bfloat16"}, {"quantize": "int8", "lora_mode": "merged"}):
        with pytest.raises(LoraError, match=refused):
            llmjax.load(base, lora=tmp_path / "a", **options)
    with pytest.raises(LoraError, match=refused):
        llmjax.convert(base, tmp_path / "out", to="hf", lora=tmp_path / "a")
    llmjax.convert(base, tmp_path / "packed", quantize="int8")
    with pytest.raises(LoraError, match=refused):
        llmjax.load(tmp_path / "packed", lora=tmp_path / "a", lora_mode="merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "m", "packed"]


def test_mediapipes_lora_files_are_float16():
    one = np.ones((2, 8), np.float32)
    factors = {(0, module): Factors(one, one.T) for module in PLACES} | {(0, "k"): Factors(one * 7e4, one.T)}
    with pytest.raises(LoraError, match=r"at most 65504.*\n  layers.0.attn.k: 70000$"):
        list(lora.tensors(factors, "GEMMA_2B"))
    assert len(list(lora.tensors(factors, "PHI_2"))) == 8


def test_a_range_that_float32_does_not_hold():
    w = np.array([[3e38, -3e38]], np.float32)
    with pytest.raises(CheckpointError, match="x: int8-asym: weights of a range"):
        quantize(lambda a, b: w[a:b], (1, 2), Scheme(8, symmetric=False), "x")


@pytest.mark.parametrize(("dtype", "told"), [("i4", "I32"), ("u1", "U8"), ("?", "BOOL"), ("i8", "I64")])
def test_whole_numbers_are_no_weights(tmp_path, dtype, told):
    source = tiny.checkpoint(tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(dtype)
    save_file(tensors, source / "model.safetensors")
    for options in ({}, {"dtype": "float32"}, {"quantize": "int8"}):
        with pytest.raises(CheckpointError, match=rf"norm.weight: expected floats, found whole numbers \({told}\)"):
            llmjax.load(source, **options)
    assert not llmjax.inspect(source).supported
