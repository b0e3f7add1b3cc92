"""Adapters trained step by step beside peft and torch: fused modules, ranks and scales that differ, clipping, decay."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import llmjax
from llmjax.errors import TrainingError
from llmjax.training.adapter import new_adapter
from llmjax.training.batches import Example, Pair, cut, from_labels
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


def begin(name, folder):
    """A checkpoint and an adapter that changes something: B of zeros would leave A alone in the first step."""
    m = meta(name)
    base = checkpoints.write(folder / "base", m["config"], m["shapes"], seed=3)
    model = llmjax.load(base)
    begun = new_adapter(model, CONFIG.lora, seed=1)
    rng = np.random.default_rng(0)
    for pair in begun.factors.values():
        pair["B"] = pair["B"] + rng.normal(size=pair["B"].shape).astype(np.float32) / 10
    save_adapter(begun, folder / "begun")
    wanted = reference.load(base, m["config"]["model_type"])
    return model, begun, peft.PeftModel.from_pretrained(wanted, folder / "begun", is_trainable=True).eval()


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
    model, begun, wanted = begin(name, tmp_path)
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
    same(tmp_path)


def same(folder):
    a, b = (load_file(folder / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys()
    for tensor in a:
        np.testing.assert_allclose(a[tensor], b[tensor], atol=2e-4, err_msg=tensor)


def their_preferences(model, ids, labels, beta) -> tuple[list[list[float]], list[float]]:
    """Means of a plain loop in torch (loss, rewards, accuracy, log-probabilities), and norms; each pair in two rows."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)

    def sums(i, chosen):
        logits = model(torch.tensor(i, dtype=torch.int64)).logits[:, :-1]
        target = torch.tensor(chosen[:, 1:], dtype=torch.int64)
        lost = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")  # 0 for -100
        return -lost.sum(1).reshape(-1, 2)

    found, norms = [], []
    for step in zip(ids, labels, strict=True):
        seen = []
        for i, chosen in zip(*step, strict=True):
            with torch.no_grad(), model.disable_adapter():
                base = sums(i, chosen)
            policy = sums(i, chosen)
            rewards = beta * (policy - base)
            margins = rewards[:, 0] - rewards[:, 1]
            losses = -torch.nn.functional.logsigmoid(margins)
            (losses.sum() / (ids[0].size // ids.shape[-1] // 2)).backward()
            seen.append(torch.column_stack([losses, rewards, margins, margins > 0, policy]).detach())
        found.append(torch.cat(seen).mean(0).tolist())
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights, 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return found, norms


@pytest.mark.parametrize("name", golden.some({"phi3"}, ("phi3", "gemma2")))
def test_preferences(name, tmp_path, monkeypatch):
    model, begun, wanted = begin(name, tmp_path)
    ids, labels = data()
    ids[:, :, 1, :5] = ids[:, :, 0, :5]  # the prompt
    values, norms = their_preferences(wanted, ids, labels, 0.3)
    wanted.save_pretrained(tmp_path / "theirs")

    config = dataclasses.replace(CONFIG, dpo=True, beta=0.3)
    programs = Programs(model, begun.targets, config)
    step, state = train_step(programs, config), first_state(begun.factors, config)
    names = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
             "logps/rejected"]  # fmt: skip
    for k in range(STEPS):
        pairs = [Pair(*(Example(3, *row) for row in zip(i, chosen != -100, strict=True)))
                 for i, chosen in zip(ids[k], labels[k], strict=True)]  # fmt: skip
        group = [batch for pair in pairs for batch in cut([pair], 2)]  # filled up
        state, outcome = step(state, group, 0.02)
        found = [outcome.loss, *(outcome.preferences[n] for n in names)]
        np.testing.assert_allclose(found, values[k], rtol=2e-5, atol=2e-4, err_msg=f"step {k + 1}")
        np.testing.assert_allclose(outcome.grad_norm, norms[k], rtol=2e-4)
        assert programs.evaluated(state.factors, group)["loss"] != outcome.loss
    save_adapter(begun.replace(state.factors), tmp_path / "ours")
    same(tmp_path)
    nothing = {module: pair | {"B": 0 * pair["B"]} for module, pair in begun.factors.items()}
    with monkeypatch.context() as patch:  # what changes nothing is the reference: no other program's rounding shows
        patch.setattr(programs, "referenced", None)
        _, outcome = programs.accumulated(nothing, group, jax.random.key(0))
    assert outcome.loss == np.log(2) and outcome.preferences["rewards/accuracies"] == 0
    unknown = [group[0].replace(reference=np.float32([np.nan, 0, 0, 0])), group[1]]
    with pytest.raises(TrainingError, match="step 4: the loss of row 4 is not finite"):
        step(state, unknown, 0.02)
