"""Adapters on every projection of every architecture, as peft computes them."""

import numpy as np
import pytest

import llmjax
from tests.parity import checkpoints, golden
from tests.parity.golden import TOLERANCE, error, meta

torch = pytest.importorskip("torch", reason="parity extra not installed")
peft = pytest.importorskip("peft", reason="parity extra not installed")
reference = pytest.importorskip("tests.parity.reference")


@pytest.mark.parametrize("name", golden.some({"falcon_40b", "gemma3_multimodal", "phi3", "phi_gqa_qk_norm"}))
def test_all_projections(name, tmp_path):
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
    )
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ids = np.random.RandomState(1).randint(0, 150, 40).tolist()
    with reference.float32_alibi():
        wanted = reference.logits(theirs, ids)
    for mode in ("merged", "unmerged"):
        model = llmjax.load(base, lora=tmp_path / "adapter", lora_mode=mode)
        assert error(model.logits([ids])[0], wanted) <= TOLERANCE
    assert error(llmjax.load(base).logits([ids])[0], wanted) > 100 * TOLERANCE
