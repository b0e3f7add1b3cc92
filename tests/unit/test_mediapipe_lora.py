"""MediaPipe's LoRA files, against the real converter's."""

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmjax
from converters import convert_checkpoint
from converters.mediapipe import lora
from converters.readers.mediapipe.container import LORA_RANK, BinFile
from llmjax import LoraError, TrainConfig
from llmjax.cli.main import main
from llmjax.errors import ConfigError
from llmjax.lora.adapter import LoraSource, read_adapter
from llmjax.training.adapter import new_adapter
from llmjax.training.files import save_adapter
from tests.mediapipe_files import DATA, GEMMA, config, digest
from tests.tiny import slow

REAL = sorted(DATA.glob("*_lora_*.bin"))
IDS = [2, 27, 26, 50, 59, 56, 21, 19]


def written(kind: str, folder: Path, **options) -> Path:
    path = folder / "lora.bin"
    settings = {"lora_ckpt": str(DATA / f"{kind}_lora"), "lora_rank": 4, "lora_output_tflite_file": str(path)}
    convert_checkpoint(config(kind, "gpu", folder, (8, 8, 8), **settings | options))
    return path


def same(ours: Path, theirs: Path) -> bool:
    a, b = BinFile(ours), BinFile(theirs)
    names = [list(f.entries.items()) for f in (a, b)]
    blobs = [
        [f.name, f.numbers[LORA_RANK], *map(f.blob, ("odml.infra.proto.LlmParameters", "backend"))] for f in (a, b)
    ]
    return names[0] == names[1] and blobs[0] == blobs[1] and all(np.array_equal(a.raw(n), b.raw(n)) for n in a.entries)


@pytest.mark.parametrize("real", REAL, ids=lambda path: path.stem)
def test_equal_to_the_real_converters(real, tmp_path):
    kind = real.name.split("_gpu")[0]
    assert same(written(kind, tmp_path), real)
    assert digest(tmp_path / "out") == json.loads((DATA / "weight_files.json").read_text())[f"{kind} lora"]
    (tmp_path / "b").mkdir()
    assert not same(written(kind, tmp_path / "b", lora_o_proj="right"), real)


@pytest.mark.parametrize("kind", ["GEMMA_2B", slow("GEMMA2_2B"), slow("PHI_2")])
def test_round_trip(kind, tmp_path):
    """o in order, or scrambled and restored, is the adapter itself, to the rounding of the file."""
    file = next(DATA.joinpath(f"{kind}_lora").iterdir())
    models = [llmjax.load(DATA / kind, lora=LoraSource(file, alpha=4.0))]
    for o_proj in lora.O_PROJ:
        (tmp_path / o_proj).mkdir()
        path = written(kind, tmp_path / o_proj, lora_o_proj=o_proj)
        source = LoraSource(path, alpha=4.0, restore_o=o_proj == "mediapipe")
        models.append(llmjax.load(DATA / kind, lora=source))
        stored = llmjax.load(DATA / kind, lora=LoraSource(path, alpha=4.0))
    expected, scrambled, right = (m.logits([IDS])[0] for m in models)
    np.testing.assert_array_equal(scrambled, right)
    assert np.abs(right - expected).max() <= (1e-5 if kind == "PHI_2" else 2e-2) * np.abs(expected).max()
    np.testing.assert_array_equal(stored.logits([IDS])[0], right)
    wrong = llmjax.load(DATA / kind, lora=LoraSource(tmp_path / "mediapipe" / "lora.bin", alpha=4.0))
    assert np.abs(wrong.logits([IDS])[0] - expected).max() > 0.05 * np.abs(expected).max()


def test_an_adapter_that_was_trained_here(tmp_path, caplog):
    """``mediapipe``, the targets that training begins with, are those such a file holds."""
    model = llmjax.load(DATA / "PHI_2")
    adapter = new_adapter(model, TrainConfig(rank=4, alpha=4.0).lora)
    rng = np.random.default_rng(0)
    for pair in adapter.factors.values():
        pair["B"] = rng.normal(size=pair["B"].shape).astype(np.float32)
    save_adapter(adapter, tmp_path / "adapter")
    path = written("PHI_2", tmp_path, lora_ckpt=str(tmp_path / "adapter"))
    source = LoraSource(path, alpha=4.0, restore_o=True)
    assert "its scale is" not in caplog.text
    louder = new_adapter(model, TrainConfig(rank=4, alpha=8.0).lora).replace(adapter.factors)
    twice = save_adapter(louder, tmp_path / "twice")
    written("PHI_2", tmp_path, lora_ckpt=str(twice))
    assert f"{twice / 'adapter_model.safetensors'}: its scale is 2, which MediaPipe's LoRA files have" in caplog.text
    dora = new_adapter(model, TrainConfig(rank=4, alpha=4.0, dora=True).lora)
    dora = dora.replace({module: own | {"B": adapter.factors[module]["B"]} for module, own in dora.factors.items()})
    with pytest.raises(LoraError, match="with magnitudes .DoRA.: MediaPipe's LoRA files hold factors A and B alone"):
        written("PHI_2", tmp_path, lora_ckpt=str(save_adapter(dora, tmp_path / "dora")))
    deltas = read_adapter(source, model.architecture, model.config).deltas
    assert len(deltas) == len(adapter.targets) == 4 * model.config.num_hidden_layers
    for target in adapter.targets:
        ((parameter, _),), pair = target.parts, adapter.factors[target.module]
        whole = deltas[parameter].scale * (deltas[parameter].b @ deltas[parameter].a)
        wanted = target.scale * (pair["B"] @ np.asarray(pair["A"]))
        assert np.abs(whole - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.slow
def test_gemma_7b_beside_its_own_bin(tmp_path):
    """MediaPipe's converter has no LoRA for it; here the adapter goes with the quantized ``.bin`` as well."""
    source, adapter, rng = tmp_path / "source", tmp_path / "adapter.safetensors", np.random.default_rng(0)
    shutil.copytree(DATA / "GEMMA_2B", source)
    weights = load_file(source / "model.safetensors")
    factors = load_file(DATA / "GEMMA_2B_lora" / "adapter_model.safetensors")
    for name in [n for n in (*weights, *factors) if "k_proj" in n or "v_proj" in n]:  # of as many heads as q
        if name in weights:
            weights[name] = (0.1 * rng.normal(size=(32, 32))).astype(weights[name].dtype)
        elif "lora_B" in name:
            factors[name] = rng.normal(size=(32, 4)).astype(np.float32)
    save_file(weights, source / "model.safetensors")
    save_file(factors, adapter)
    settings = json.loads((source / "config.json").read_text()) | {"num_key_value_heads": 2}
    (source / "config.json").write_text(json.dumps(settings))
    path = tmp_path / "lora.bin"
    options = {"lora_ckpt": str(adapter), "lora_rank": 4, "lora_output_tflite_file": str(path)}
    convert_checkpoint(config("GEMMA_7B", "gpu", tmp_path, (8, 8, 8), input_ckpt=str(source), **options))
    expected = llmjax.load(source, lora=LoraSource(adapter, alpha=4.0)).logits([IDS])[0]
    for base, tolerance in ((source, 2e-3), (tmp_path / "out" / "model.tflite", 5e-2)):
        found = llmjax.load(base, lora=LoraSource(path, alpha=4.0, restore_o=True)).logits([IDS])[0]
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_a_file_alone_is_what_its_runtime_computes(caplog, tmp_path):
    """Alpha is the rank and o stays scrambled; either can be had otherwise; a line of the log says which it was."""
    path = DATA / "GEMMA_2B_gpu_lora_r4_mp0.10.21.bin"

    def logits(lora):
        caplog.clear()
        with caplog.at_level(logging.INFO, "llmjax"):
            found = llmjax.load(DATA / "GEMMA_2B", lora=lora).logits([IDS])[0]
        (line,) = [record.getMessage() for record in caplog.records]
        return found, line

    found, line = logits(path)
    assert line.endswith(
        "MediaPipe's LoRA of rank 4: scale 1: the file has none, and its runtime adds B.A as it is; o's factors as its "
        "runtime reads them"
    )
    np.testing.assert_array_equal(found, logits(str(path))[0])
    np.testing.assert_array_equal(found, logits(LoraSource(path, alpha=4.0))[0])
    for source, message in (
        (LoraSource(path, alpha=8.0), "scale 2: as asked for; o's factors as its runtime reads them"),
        (LoraSource(path, restore_o=True), "scale 1: the file has none.*; o's factors put in order, as asked for"),
        (LoraSource(path, alpha=8.0, rslora=True), "scale 4: as asked for"),
    ):
        other, line = logits(source)
        assert re.search(message, line)
        assert np.abs(other - found).max() > 0.05 * np.abs(found).max()


@pytest.mark.slow
def test_flags_give_alpha(tmp_path, capsys):
    path = DATA / "GEMMA_2B_gpu_lora_r4_mp0.10.21.bin"
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"id": "a", "text": "the quick brown fox"}\n')
    found = []
    for flags in ([], ["--lora-alpha", "8"]):
        output = tmp_path / f"{len(found)}.jsonl"
        args = ["score", "--model", str(GEMMA), "--input", str(texts), "--output", str(output), "--lora", str(path)]
        assert main([*args, *flags]) == 0
        assert "llmjax: " in (said := capsys.readouterr().err)
        assert f"scale {2 if '8' in flags else 1}: " in said
        found.append(json.loads(output.read_text())["logprobs"])
    assert found[0] != found[1]
    assert main([*args[:-2], "--lora-alpha", "4"]) == 2
    assert "--lora-alpha: goes with --lora" in capsys.readouterr().err
    assert main(["lora", "check", "--model", str(DATA / "GEMMA_2B"), "--lora", str(path), "--json"]) == 0
    assert {module["scale"] for module in json.loads(capsys.readouterr().out)["modules"]} == {1.0}


def test_bad_input(tmp_path):
    for source, message in (
        (LoraSource(REAL[0], alpha=0.0), "alpha: expected a positive number"),
        (LoraSource(REAL[0], rank=3), "expected rank 3, found 4"),
        (LoraSource(REAL[0], rslora=True), "rslora.*give alpha"),
    ):
        with pytest.raises(LoraError, match=message):
            llmjax.load(DATA / REAL[0].name.split("_gpu")[0], lora=source)
    with pytest.raises(LoraError, match="this is a model"):
        llmjax.load(DATA / "GEMMA_2B", lora=LoraSource(next(DATA.glob("GEMMA_2B_gpu_int8*")), alpha=1))
    with pytest.raises(LoraError, match=r"expected .* bytes for|no LoRA factor"):
        llmjax.load(DATA / "PHI_2", lora=LoraSource(REAL[0], alpha=1))
    with pytest.raises((LoraError, ConfigError), match="rank"):
        written("GEMMA_2B", tmp_path, lora_rank=3)
    assert not list(tmp_path.glob("*.bin"))
