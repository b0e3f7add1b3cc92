"""An architecture from a person's own file is as good as any: nothing of llmjax is touched."""

import copy
import dataclasses
import json
import pickle

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmjax
from llmjax import ConfigError
from llmjax.models import registry
from llmjax.models.registry import architectures
from tests.own_olmo import ARCHITECTURE, Config
from tests.parity import checkpoints
from tests.parity.golden import TOLERANCE, arrays, error, meta

RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """OLMo 2's golden checkpoint under the name of the fixture; known while these tests run."""
    m = meta("olmo2")
    config = m["config"] | {"model_type": ARCHITECTURE.model_type}
    written = checkpoints.write(tmp_path_factory.mktemp("own"), config, m["shapes"], m["seed"])
    with pytest.raises(ConfigError, match=f"model_type '{ARCHITECTURE.model_type}' .* is not supported"):
        llmjax.load(written)
    assert llmjax.register(ARCHITECTURE) is ARCHITECTURE
    yield written
    del registry._registered[ARCHITECTURE.model_type]
    assert ARCHITECTURE.model_type not in architectures()


def test_it_is_what_transformers_computes(folder):
    expected, model = arrays("olmo2"), llmjax.load(folder)
    assert model.architecture is ARCHITECTURE and isinstance(model.config, Config)
    found = model.logits([expected["long"].tolist()])[0][meta("olmo2")["rows"]]
    assert error(found, expected["logits_long"]) <= TOLERANCE
    trace = llmjax.trace(model, expected["short"].tolist(), ["embed", "layers.*.resid", "logits"])
    *hidden, logits = trace.activations.values()
    assert error(logits, expected["logits_short"]) <= TOLERANCE
    assert [error(x, wanted) <= TOLERANCE for x, wanted in zip(hidden, expected["hidden"], strict=True)]


def test_a_model_is_pickled(folder, monkeypatch):
    """For workers and Ray: by value, the architecture by its name; what is compiled stays behind."""
    model = llmjax.load(folder, quantize="int8", numerics="fast")
    assert model.module and "module" in vars(model)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert again.architecture is ARCHITECTURE and repr(again) == repr(model) and again.config == model.config
        assert "module" not in vars(again) and jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))
    with pytest.raises(TypeError, match="an LLM holds .* make one in each process, of a path or of a Model"):
        pickle.dumps(llmjax.LLM(model, max_batch=4))
    sent = pickle.dumps(model)
    monkeypatch.delitem(registry._registered, ARCHITECTURE.model_type)
    with pytest.raises(ConfigError, match=f"a pickled model: model_type '{ARCHITECTURE.model_type}' is not supported"):
        pickle.loads(sent)


@pytest.mark.slow
def test_it_generates(folder):
    expected = arrays("olmo2")
    llm = llmjax.LLM(folder, max_batch=4, chunk=16, block=32)
    out = llm.generate(expected["short"][:7].tolist(), llmjax.SamplingParams(temperature=0, max_tokens=24))
    assert out[0].outputs[0].token_ids == expected["greedy"].tolist()


@pytest.mark.slow
def test_it_is_quantized_and_adapted(folder, tmp_path):
    """int8 means its dequantized values; an adapter merged into the weights is the one beside them, and by hand."""
    ids = [5, 9, 2, 77]
    llmjax.convert(folder, tmp_path / "q", quantize="int8")
    packed, exact = llmjax.load(tmp_path / "q"), llmjax.load(tmp_path / "q", dtype="float32")
    assert "int8" in packed.stored() and "int8" not in exact.stored()
    assert error(packed.logits([ids])[0], exact.logits([ids])[0]) <= TOLERANCE
    module = "model.layers.1.self_attn.q_proj"
    width = packed.config.hidden_size
    a, b = (RNG.normal(size=shape).astype(np.float32) * 0.3 for shape in ((2, width), (width, 2)))
    (tmp_path / "lora").mkdir()
    names = {f"base_model.model.{module}.lora_{x}.weight": v for x, v in (("A", a), ("B", b))}
    save_file(names, tmp_path / "lora/adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [module]}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + 2 * b @ a
    (tmp_path / "merged").mkdir()
    save_file(tensors, tmp_path / "merged/model.safetensors")
    (tmp_path / "merged/config.json").write_text((folder / "config.json").read_text())
    expected = llmjax.load(tmp_path / "merged").logits([ids])[0]
    assert error(expected, llmjax.load(folder).logits([ids])[0]) > 0.01
    for mode in ("merged", "unmerged"):
        found = llmjax.load(folder, lora=tmp_path / "lora", lora_mode=mode).logits([ids])[0]
        assert error(found, expected) <= TOLERANCE


def test_a_name_has_one_architecture(folder):
    assert llmjax.register(ARCHITECTURE) is ARCHITECTURE  # again
    for name in ("llama", ARCHITECTURE.model_type):
        with pytest.raises(ConfigError, match=f"model_type '{name}': there is another architecture of this name"):
            llmjax.register(dataclasses.replace(ARCHITECTURE, model_type=name))
    assert architectures()["llama"].config.__name__ == "LlamaConfig"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (Config, "expected an llmjax.Architecture, found"),
        (dataclasses.replace(ARCHITECTURE, model_type="odd", config=dict), "odd: config: expected a subclass of"),
    ],
)
def test_what_is_no_architecture_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        llmjax.register(wrong)
    assert "odd" not in architectures()
