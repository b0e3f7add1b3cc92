"""Adapters trained step by step beside peft and torch: fused modules, ranks and scales that differ, clipping, decay."""

import numpy as np
import pytest
from safetensors.numpy import load_file

import llmjax
from llmjax.training.adapter import new_adapter
from llmjax.training.batches import from_labels
from llmjax.training.config import TrainConfig
from llmjax.training.files import read_trained, save_adapter
from llmjax.training.optimizer import schedule
from llmjax.training.step import Programs, first_state, train_step
from tests.parity import checkpoints, golden
from tests.parity.golden import meta

torch = pytest.importorskip("torch", reason="parity extra not installed")
peft = pytest.importorskip("peft", reason="parity extra not installed")
reference = pytest.importorskip("tests.parity.reference")

STEPS = 3
CONFIG = TrainConfig(
    targets="all-linear",
    rank=3,
    alpha=5.0,
    rank_pattern={r"(layers|h)\.0\..*": 2},
    alpha_pattern={r"(layers|h)\.1\..*": 9},
    rslora=True,
    learning_rate=0.02,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    clip=0.5,
    schedule="linear",
    warmup=1,
)


def data() -> tuple[np.ndarray, np.ndarray]:
    """ids and labels ``[step, micro batch, row, T]``."""
    rng = np.random.RandomState(2)
    ids = rng.randint(0, 150, (STEPS, 2, 2, 12)).astype(np.int32)
    labels = ids.copy()
    labels[..., :5] = labels[0, 0, 1, 8:] = labels[1, 1, 0, :9] = -100
    return ids, labels


def theirs(model, ids, labels) -> tuple[list[float], list[float]]:
    """Losses and norms of a plain loop in torch."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    losses, norms = [], []
    for k, (step_ids, step_labels) in enumerate(zip(ids, labels, strict=True)):
        optimizer.param_groups[0]["lr"] = 0.02 * (0.0 if k == 0 else 1 - (k - 1) / (STEPS - 1))
        tokens, total = int((step_labels[..., 1:] != -100).sum()), 0.0
        for i, chosen in zip(step_ids, step_labels, strict=True):
            logits = model(torch.tensor(i, dtype=torch.int64)).logits[:, :-1]
            target = torch.tensor(chosen[:, 1:], dtype=torch.int64)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / tokens
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights, 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


@pytest.mark.parametrize("name", golden.some({"falcon_40b"}))
def test_steps(name, tmp_path):
    m = meta(name)
    base = checkpoints.write(tmp_path / "base", m["config"], m["shapes"], seed=3)
    model = llmjax.load(base)
    begun = new_adapter(model, CONFIG.lora, seed=1)
    rng = np.random.default_rng(0)
    for pair in begun.factors.values():  # B of zeros would leave A alone in the first step
        pair["B"] = pair["B"] + rng.normal(size=pair["B"].shape).astype(np.float32) / 10
    save_adapter(begun, tmp_path / "begun")

    module = reference.load(base, m["config"]["model_type"])
    wanted = peft.PeftModel.from_pretrained(module, tmp_path / "begun", is_trainable=True).eval()
    assert sum(p.numel() for p in wanted.parameters() if p.requires_grad) == begun.count
    ids, labels = data()
    with reference.float32_alibi():
        losses, norms = theirs(wanted, ids, labels)
    wanted.save_pretrained(tmp_path / "theirs")

    adapter = read_trained(tmp_path / "begun", model)
    step = train_step(Programs(model, adapter.targets, CONFIG), CONFIG)
    rate = schedule(CONFIG.schedule, CONFIG.learning_rate, CONFIG.warmup, STEPS)
    state = first_state(adapter.factors, CONFIG)
    found = []
    for k in range(STEPS):
        group = [from_labels(i, chosen) for i, chosen in zip(ids[k], labels[k], strict=True)]
        state, outcome = step(state, group, rate(k))
        found.append(outcome)
    np.testing.assert_allclose([o.loss for o in found], losses, rtol=2e-5)
    np.testing.assert_allclose([o.grad_norm for o in found], norms, rtol=2e-4)
    save_adapter(adapter.replace(state.factors), tmp_path / "ours")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys()
    for tensor in a:
        np.testing.assert_allclose(a[tensor], b[tensor], atol=2e-4, err_msg=tensor)
