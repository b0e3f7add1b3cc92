"""Adapters on every projection of every architecture, as peft computes them."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmjax
from llmjax.lora.resident import with_adapters
from llmjax.training.files import read_trained
from tests import gguf_kinds
from tests.parity import checkpoints, golden
from tests.parity.golden import TOLERANCE, error, meta
from tests.parity.test_cases import FOLDER

torch = pytest.importorskip("torch", reason="parity extra not installed")
peft = pytest.importorskip("peft", reason="parity extra not installed")
reference = pytest.importorskip("tests.parity.reference")

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
# Peft's all-linear means stacks of experts, too, where adapters here do not go.
_TARGETS = {"qwen3_moe": sorted(_ATTENTION)}
# Stored cases, and modules that no older kind has.
KINDS = {
    "gemma3n_cond": {
        *("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"),
        *("linear_left", "linear_right", "modality_router", "prediction_coefs", "correction_coefs"),
    },
    "gemma4_cond": {"per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"},
    "gemma4_moe": {"proj"},
    "granite": {"o_proj"},
    "lfm2": {"in_proj", "out_proj", "w1", "w2", "w3"},
    "ministral3_cond": {"o_proj"},
    "olmo3_yarn": {"o_proj"},
    "qwen3_5_cond": {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"},
    "qwen3_moe": _ATTENTION,
    "smollm3": {"o_proj"},
}


@pytest.mark.parametrize("name", golden.some({"phi_gqa_qk_norm"}))
def test_all_projections(name, tmp_path):
    all_projections(name, tmp_path)


@pytest.mark.parametrize("name", golden.some({"falcon_40b_one_norm_bias"}))
def test_all_projections_with_magnitudes(name, tmp_path):
    all_projections(name, tmp_path, dora=True)


def all_projections(name, tmp_path, dora=False):
    """Fused projections (Falcon, Phi-3) and multimodal names; ranks and scales that differ between modules."""
    m = meta(name)
    base = checkpoints.write(tmp_path / "base", m["config"], m["shapes"], seed=3)
    theirs = reference.load(base, m["config"]["model_type"])
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules="all-linear",
        exclude_modules=r".*vision_tower.*" if "multimodal" in name else None,
        rank_pattern={r"(layers|h)\.0\..*": 2},
        alpha_pattern={r"(layers|h)\.1\..*": 9},
        use_rslora=len(name) % 2 == 0,
        init_lora_weights=False,
        use_dora=dora,
    )
    theirs = peft.get_peft_model(theirs, config).eval()
    for parameter in [p.data for n, p in theirs.named_parameters() if "magnitude" in n]:
        parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
        parameter[0] *= -1
    theirs.save_pretrained(tmp_path / "adapter")
    ids = np.random.RandomState(1).randint(0, 150, 40).tolist()
    with reference.float32_alibi():
        wanted = reference.logits(theirs, ids)
    # The division by a weight's norm rounds it once more: of gemma2_window_1 peft's logits are 2.8e-5 from those in
    # float64 themselves, ours 1.8e-5.
    room = 2 * TOLERANCE if dora else TOLERANCE
    for mode in ("merged", "unmerged"):
        model = llmjax.load(base, lora=tmp_path / "adapter", lora_mode=mode)
        assert error(model.logits([ids])[0], wanted) <= room
    assert error(llmjax.load(base).logits([ids])[0], wanted) > 100 * TOLERANCE


@pytest.mark.filterwarnings("ignore")  # peft warns of what is tied, and of what it saves
@pytest.mark.parametrize("name", golden.some({"qwen2"}, ("qwen2", "phi")))
def test_a_head(name, tmp_path):
    """As peft saves it by default: the head's own weight (and bias) beside its factors, which leave a tied embedding
    alone."""
    m = meta(name)
    base = checkpoints.write(tmp_path / "base", m["config"], m["shapes"], seed=3)
    theirs = reference.load(base, m["config"]["model_type"])
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    own = "base_model.model.lm_head.base_layer.weight"
    assert own in tensors
    ids = np.random.RandomState(1).randint(0, 150, 24).tolist()
    wanted = reference.logits(theirs, ids)
    with theirs.disable_adapter():
        assert error(reference.logits(theirs, ids), wanted) > 100 * TOLERANCE
    model = llmjax.load(base, lora=tmp_path / "adapter")
    assert error(model.logits([ids])[0], wanted) <= TOLERANCE
    if model.config.tie_word_embeddings:
        with pytest.raises(llmjax.LoraError, match="the embedding's as well"):
            llmjax.load(base, lora=tmp_path / "adapter", lora_mode="merged")
        assert read_trained(tmp_path / "adapter", llmjax.load(base)).names == ("lm_head", "q_proj")
    with pytest.raises(llmjax.LoraError, match="while the model has it in 8 bits"):
        with_adapters(llmjax.load(base, quantize="int8"), {"a": tmp_path / "adapter"})
    tensors[own][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(llmjax.LoraError, match="lm_head.base_layer.weight: .* not the model's own"):
        llmjax.load(base, lora=tmp_path / "adapter")


def text_model(name: str, folder: Path) -> Path:
    """The text model of a stored case."""
    case = FOLDER / name
    config = json.loads((case / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.get("text_config", config)))
    save_file(gguf_kinds.of_text_model(load_file(case / "model.safetensors")), folder / "model.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_all_projections_of_new_kinds(name, tmp_path):
    """Per-layer gates, LAuReL, AltUp's coefficients, routers and convolutions' projections; experts' stacks are not
    modules that peft's all-linear means."""
    base = text_model(name, tmp_path / "base")
    theirs = reference.load(base, json.loads((base / "config.json").read_text())["model_type"])
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=1, target_modules=_TARGETS.get(name, "all-linear"), init_lora_weights=False
    )
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with np.load(FOLDER / name / "expected.npz") as file:
        ids, atol = file["short"].tolist(), float(file["atol"])
    changed = {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, _ in theirs.named_parameters() if ".lora_A" in n}
    assert changed >= KINDS[name], sorted(changed)
    wanted = reference.logits(theirs, ids)
    for mode in ("merged", "unmerged"):
        found = llmjax.load(base, lora=tmp_path / "adapter", lora_mode=mode, dtype="float32").logits([ids])[0]
        assert np.abs(found - wanted).max() <= 2 * atol
    assert np.abs(llmjax.load(base, dtype="float32").logits([ids])[0] - wanted).max() > 100 * atol
