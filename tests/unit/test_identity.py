"""Every output names what it came from: nothing that changes a number leaves it as it was."""

import dataclasses
import hashlib
import importlib.metadata
import json
import pickle
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, safe_open, save_file

import llmjax
from converters.readers.digest import stamp
from llmjax import LLM
from llmjax.batch import scoring
from llmjax.batch.identity import identity
from llmjax.checkpoint.identity import differences, model_facts, runtime_facts
from llmjax.cli.main import main
from llmjax.lora.adapter import LoraSource
from llmjax.model import Model
from llmjax.quant.rounding import quantize
from llmjax.quant.schemes import Scheme
from llmjax.runtime.params import SamplingParams
from tests import tiny

# An embedding of 11 MB: what a hash of samples would pass over.
WIDE = {"vocab_size": 60_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("identity") / "m")


def facts(*args, **options):
    return model_facts(llmjax.load(*args, **options))


def changed(a, b):
    return {line.split(": was")[0] for line in differences(a, b)}


def edited(folder, copy, change):
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    return copy


def adapter(folder, alpha=8, seed=0):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {"A": (2, 48), "B": (48, 2)}
    factors = {f"{module}.lora_{s}.weight": rng.normal(size=shape).astype(np.float32) for s, shape in shapes.items()}
    save_file(factors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["layers.0.self_attn.q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_all_bytes_count(tmp_path):
    wide = tiny.checkpoint(tmp_path / "wide", **WIDE)
    whole = facts(wide)
    weights = wide / "model.safetensors"
    with open(weights, "r+b") as file:
        file.seek(weights.stat().st_size // 2 + 12_345)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    assert changed(whole, facts(wide)) == {"weights_sha256"}


def test_every_shard_and_the_index(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    shards = tmp_path / "shards"
    shutil.copytree(folder, shards)
    (shards / "model.safetensors").unlink()

    def write(change=0.0, note=""):
        halves = [sorted(tensors)[0::2], sorted(tensors)[1::2]]
        for i, names in enumerate(halves):
            part = {n: tensors[n] + np.float32(change if n == halves[1][0] else 0) for n in names}
            save_file(part, shards / f"model-{i}.safetensors")
        where = {n: f"model-{i}.safetensors" for i, names in enumerate(halves) for n in names}
        (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where, "metadata": note}))
        return facts(shards)

    first = write()
    assert first["weights_from"] == "files" and write() == first
    assert changed(first, write(change=1.0)) == {"weights_sha256"}
    assert changed(first, write(note="x")) == {"weights_sha256"}


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch):
    """Of a package's metadata there is none then."""
    installed = importlib.metadata.version

    def version(name):
        if name == "llmjax":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = runtime_facts()
    assert found["runtime_version"] == found["versions"]["llmjax"] == llmjax.__version__


def test_what_changes_a_number_changes_its_field(folder, tmp_path):
    plain = facts(folder)
    assert plain == facts(folder) and plain["model"] == str(folder)
    assert plain["config"]["rms_norm_eps"] == 1e-5 and plain["dtype"] == "float32" and plain["quantization"] is None
    for options, fields in (
        ({"config": {"rms_norm_eps": 0.01}}, {"config.rms_norm_eps"}),
        ({"config": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}}, {"config.rope.linear"}),
        ({"numerics": "fast"}, {"numerics"}),
        ({"dtype": "bfloat16"}, {"dtype", "stored.bfloat16", "stored.float32"}),
        ({"quantize": "int8"}, {"quantization", "stored.int8", "stored.float32"}),
    ):
        assert changed(plain, facts(folder, **options)) == fields, options
    int8 = facts(folder, quantize="int8")
    assert int8["quantization"] == "int8"
    # The search for scales leaves weights of the same kind.
    recipe = {"attention": "int8", "feed_forward": "int4"}
    mixed, searched = facts(folder, quantize=recipe), facts(folder, quantize=recipe | {"feed_forward": "int4-mse"})
    assert mixed["quantization"] == recipe | {"embedding": "float", "head": "float"}
    assert changed(mixed, searched) == {"quantization.feed_forward"}
    # A directory that is quantized already.
    llmjax.convert(folder, tmp_path / "q", quantize=recipe)
    assert facts(tmp_path / "q")["quantization"] == mixed["quantization"]
    # Of one that stores bfloat16 a dtype beside a scheme changes no weight, but what they are multiplied in.
    llmjax.convert(folder, tmp_path / "b", dtype="bfloat16")
    options = {"quantize": "int8", "numerics": "fast"}
    assert changed(facts(tmp_path / "b", **options), facts(tmp_path / "b", dtype="bfloat16", **options)) == {"products"}


def test_the_tokenizer_and_the_template(folder, tmp_path):
    plain = facts(folder)
    other = edited(folder, tmp_path / "other", lambda t: None)
    settings = {"eos_token": "</s>", "chat_template": "{{ messages }}"}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    assert changed(plain, facts(other)) == {"model", "chat_template_sha256"}
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert changed(plain, facts(other)) == {"model", "chat_template_sha256", "tokenizer_sha256"}


def test_an_adapter_and_how_it_is_added(folder, tmp_path):
    a, b = adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=1)
    plain, merged = facts(folder), facts(folder, lora=a)
    assert merged["weights_sha256"] == plain["weights_sha256"] and len(merged["adapters"]) == 1
    assert changed(merged, facts(folder, lora=b)) == {"adapters"}
    assert changed(merged, facts(folder, lora=a, lora_mode="unmerged")) >= {"adapters"}
    (tmp_path / "a" / "adapter_config.json").write_text(
        (tmp_path / "a" / "adapter_config.json").read_text().replace('"lora_alpha": 8', '"lora_alpha": 9')
    )
    assert changed(merged, facts(folder, lora=a)) == {"adapters"}
    (b / "adapter_config.json").unlink()
    weights = b / "adapter_model.safetensors"
    two, four = (facts(folder, lora=LoraSource(weights, alpha=alpha)) for alpha in (2.0, 4.0))
    assert changed(two, four) == {"adapters"} and two["adapters"][0]["alpha"] == 2


def test_resident_adapters(folder, tmp_path):
    a, b = adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=1)
    first, again, other = (model_facts(LLM(folder, loras={"x": path}).model) for path in (a, a, b))
    assert first == again and changed(first, other) == {"adapters"}
    assert first["adapters"][0]["name"] == "x" and first["weights_from"] == "files"


def test_weights_that_are_not_those_of_the_files(folder, tmp_path):
    model = llmjax.load(folder)
    known = model_facts(model)
    tuned = dataclasses.replace(model, params=jax.tree.map(lambda x: x, model.params))
    assert model_facts(tuned) == known  # the same arrays in another tree
    tuned.params["final_norm"]["weight"] += 1
    found = model_facts(tuned)
    assert changed(known, found) == {"weights_sha256", "weights_from"} and found["weights_from"] == "memory"
    again = dataclasses.replace(model, params=jax.tree.map(lambda x: x + 0, model.params))
    again.params["final_norm"]["weight"] += 1
    assert model_facts(again) == found
    # A file that is gone, or another by now, says nothing of what was loaded; a hash it had before does.
    copy = edited(folder, tmp_path / "copy", lambda t: t.update({"model.norm.weight": np.ones(48, np.float32)}))
    loaded = llmjax.load(copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    in_memory = model_facts(loaded)
    assert in_memory["weights_from"] == "memory" and model_facts(llmjax.load(copy))["weights_from"] == "files"
    shutil.rmtree(copy)
    assert model_facts(loaded) == in_memory
    assert pickle.loads(pickle.dumps(model.origin)).made(model.params) is False


def test_weights_from_nowhere():
    model = tiny.random_model()
    known = model_facts(model)
    assert known["weights_from"] == "memory" and known == model_facts(tiny.random_model())
    assert changed(known, model_facts(tiny.random_model(seed=1))) == {"weights_sha256"}
    packed = quantize(lambda a, b: np.ones((48, 48), np.float32)[a:b], (48, 48), Scheme(8))
    hashes = []
    for zero in (0, 1):
        params = jax.tree.map(lambda x: x, model.params)
        params["layers_0"]["attn"]["q"]["weight"] = packed.replace(zero=zero)
        hashes.append(model_facts(dataclasses.replace(model, params=params))["weights_sha256"])
    assert hashes[0] != hashes[1]


def test_arrays_are_hashed_once(monkeypatch):
    model = tiny.random_model()
    known = model_facts(model)
    monkeypatch.setattr(np, "ascontiguousarray", None)
    assert model_facts(model) == known


def test_of_a_job(folder, tmp_path):
    llm = LLM(llmjax.load(folder, numerics="fast"), max_batch=4, chunk=16, block=16)
    job = identity(llm, SamplingParams())
    moved = edited(folder, tmp_path / "moved", lambda t: None)
    shutil.copyfile(folder / "model.safetensors", moved / "model.safetensors")
    assert identity(LLM(llmjax.load(moved, numerics="fast"), max_batch=4, chunk=16, block=16), SamplingParams()) == job
    assert job["versions"].keys() == {"llmjax", "jax", "jaxlib"} and job["cpu"] and job["slots"] == 4
    text = "\n".join(differences(job, {**job, "model": {**job["model"], "config": {"rms_norm_eps": 0.5}}}))
    assert "model.config.rms_norm_eps: was 1e-05, now 0.5" in text


def test_what_the_compiler_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    plain = runtime_facts()
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=2")
    assert runtime_facts() == plain
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x  --xla_cpu_enable_fast_math=true")
    assert list(differences(plain, runtime_facts())) == ['xla_flags: was null, now ["--xla_cpu_enable_fast_math=true"]']
    told = runtime_facts()
    (tmp_path / "flags").write_text("--xla_cpu_enable_fast_math=true\n--xla_dump_to=/tmp/x\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))  # XLA reads them there
    assert runtime_facts() == told
    monkeypatch.setenv("XLA_FLAGS", f"--xla_a={tmp_path} --xla_b={tmp_path}/flags")
    monkeypatch.setattr(type(jax.config), "values", {**jax.config.values, "jax_disable_most_optimizations": True})
    sha256 = hashlib.sha256((tmp_path / "flags").read_bytes()).hexdigest()
    flags = ["--xla_a=...", f"--xla_b=sha256:{sha256}", "jax_disable_most_optimizations=True"]
    assert runtime_facts()["xla_flags"] == flags


def test_trace_and_score(folder, tmp_path):
    keys = {*model_facts(llmjax.load(folder)), *runtime_facts()}
    assert {"weights_sha256", "config", "quantization", "numerics", "dtype", "adapters", "versions", "cpu"} <= keys
    assert {"runtime", "runtime_version", "device", "model"} <= keys
    override = tmp_path / "eps.json"
    override.write_text('{"rms_norm_eps": 0.01}')
    traces, plain = [], ["--model", str(folder)]
    for i, more in enumerate(([], ["--config", str(override)], ["--quantize", "int8"])):
        out = tmp_path / f"t{i}"
        assert main(["trace", *plain, *more, "--ids", "1,2,3", "--taps", "embed", "--output", str(out)]) == 0
        traces.append(json.loads((out / "manifest.json").read_text()))
        assert keys <= set(traces[i])
    assert changed(traces[0], traces[1]) == {"config.rms_norm_eps"}
    assert changed(traces[0], traces[2]) >= {"quantization", "stored.int8"}
    assert traces[0]["token_ids"] == [1, 2, 3] and traces[0]["model"] == str(folder)

    (tmp_path / "in.jsonl").write_text('{"token_ids": [1, 2, 3, 4]}\n')
    out = tmp_path / "out.jsonl"
    assert main(["score", *plain, "--input", str(tmp_path / "in.jsonl"), "--output", str(out)]) == 0
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    (row,) = map(json.loads, out.read_text().splitlines())
    assert keys <= set(manifest["job"]) and row["identity"] == manifest["job"]["sha256"]
    assert manifest["summary"]["tokens"] == 3 and manifest["summary"]["nll"] == pytest.approx(row["nll"])
    other = scoring.identity(LLM(llmjax.load(folder, numerics="fast", config={"rms_norm_eps": 0.01}), max_batch=1))
    assert changed(manifest["job"], other) == {"sha256", "config.rms_norm_eps"}


@pytest.mark.parametrize("to", ["llmjax", "hf"])
def test_what_a_converted_checkpoint_was_made_from(folder, tmp_path, to):
    a = adapter(tmp_path / "a")
    llmjax.convert(folder, tmp_path / "out", to=to, lora=a)
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        made_from = json.loads(file.metadata()["made_from"])
    assert made_from["sha256"] == facts(folder)["weights_sha256"]
    assert made_from["adapter"]["sha256"] == facts(folder, lora=a)["adapters"][0]["sha256"]
    llmjax.load(tmp_path / "out")


def test_a_model_made_by_hand_has_an_identity(folder):
    m = llmjax.load(folder)
    made = Model(m.architecture, m.config, m.params, m.numerics, None, (), m.path)
    assert model_facts(made)["weights_from"] == "memory"
    assert stamp(folder / "model.safetensors") in m.origin.files
