"""One model under each of the names its tensors are saved by; that the names mean the right parameters is the golden
tests' matter."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmjax
from llmjax.errors import CheckpointError
from tests.parity import golden
from tests.parity.golden import meta

# Of Gemma 3 with its vision tower, from the names of the published files: what transformers 5 saves without going back
# to those (also ``model.state_dict()``), its base model's state dict, and what training wraps around either.
MULTIMODAL = {
    "state dict": {
        r"language_model\.model\.": "model.language_model.",
        r"vision_tower\.vision_model\.": "model.vision_tower.",
        r"vision_tower\.": "model.vision_tower.",
        r"multi_modal_projector\.": "model.multi_modal_projector.",
        r"language_model\.lm_head": "lm_head",
    },
    "base model": {r"language_model\.model\.": "language_model."},
    "torch.compile": {r"language_model\.": "_orig_mod.language_model.", r"vision_tower\.": "_orig_mod.vision_tower."},
    "data parallel": {r"language_model\.model\.": "module.model.language_model."},
}


def renamed(folder, patterns, extra=None):
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name, tensor in tensors.items():
        pattern = next((p for p in patterns if re.match(p, name)), None)
        found[re.sub(f"^{pattern}", patterns[pattern], name) if pattern else name] = tensor
    assert set(found) != set(tensors)
    save_file(found | (extra(found) if extra else {}), folder / "model.safetensors")
    return folder


def assert_same(a, b):
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("spelling", MULTIMODAL)
def test_gemma3_with_its_vision_tower(spelling, tmp_path):
    model = llmjax.load(golden.write("gemma3_multimodal", tmp_path / "published"))
    folder = renamed(golden.write("gemma3_multimodal", tmp_path / "other"), MULTIMODAL[spelling])
    assert_same(llmjax.load(folder), model)
    uses = [t["use"] for t in llmjax.inspect(folder).tensors if not t["fills"]]
    assert len(uses) == 23 and set(uses) == {"known, not needed"}


def test_a_tied_head_in_a_state_dict(tmp_path):
    embedding = "model.language_model.embed_tokens.weight"
    model = llmjax.load(golden.write("gemma3_multimodal", tmp_path / "published"))
    for change in (0, 1):
        folder = golden.write("gemma3_multimodal", tmp_path / str(change))
        renamed(folder, MULTIMODAL["state dict"], lambda t, c=change: {"lm_head.weight": t[embedding] + c})
        if not change:
            assert_same(llmjax.load(folder), model)
            continue
        with pytest.raises(CheckpointError, match=f"lm_head.weight differs from {embedding}"):
            llmjax.load(folder)


@pytest.mark.parametrize(
    "name, prefix", [("llama_biases_tied", "model"), ("falcon_40b", "transformer"), ("phi3_partial_mha_tied", "model")]
)
def test_a_base_model_alone(name, prefix, tmp_path):
    """As ``LlamaModel.save_pretrained`` writes it."""
    model = llmjax.load(golden.write(name, tmp_path / "whole"))
    assert_same(llmjax.load(renamed(golden.write(name, tmp_path / "base"), {rf"{prefix}\.": ""})), model)


def test_a_name_twice_and_a_head_that_is_missing(tmp_path):
    folder = golden.write("phi", tmp_path / "base")
    renamed(folder, {r"lm_head\.": "score."}, lambda t: {"final_layernorm.bias": np.ones(1, np.float32)})
    with pytest.raises(CheckpointError) as refused:
        llmjax.load(folder)
    for problem in ("missing tensor lm_head.weight", "tensor score.weight", "tensor final_layernorm.bias [1] is not"):
        assert problem in str(refused.value)


def test_an_adapter_of_the_whole_multimodal_model(tmp_path):
    """PEFT puts factors on the vision tower's ``q_proj``, too."""
    base = golden.write("gemma3_multimodal", tmp_path / "base")
    rng = np.random.default_rng(0)

    def adapter(folder, prefix, *further):
        folder.mkdir()
        modules = {f"{prefix}layers.1.self_attn.q_proj": "language_model.model.layers.1.self_attn.q_proj"}
        factors = {}
        for module in (*modules, *further):
            out, width = meta("gemma3_multimodal")["shapes"][f"{modules.get(module, module)}.weight"]
            for side, shape in (("A", (2, width)), ("B", (out, 2))):
                factors[f"base_model.model.{module}.lora_{side}.weight"] = rng.normal(size=shape).astype(np.float32)
        save_file(factors, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [*modules, *further]}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return folder, factors

    tower = next(n for n in meta("gemma3_multimodal")["shapes"] if re.search(r"vision_tower.*q_proj\.weight", n))
    folder, factors = adapter(tmp_path / "a", "model.language_model.", tower.removesuffix(".weight"))
    with pytest.warns(UserWarning, match="factors of 1 modules that the text model does not have"):
        model = llmjax.load(base, lora=folder)
    plain = llmjax.load(base).params["layers_1"]["attn"]["q"]["weight"]
    a, b = (next(x for n, x in factors.items() if "layers.1" in n and f"lora_{s}" in n) for s in "AB")
    got = np.asarray(model.params["layers_1"]["attn"]["q"]["weight"])
    np.testing.assert_allclose(got, np.asarray(plain) + 2 * (b @ a), rtol=1e-5, atol=1e-5)
