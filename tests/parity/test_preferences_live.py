"""Preferences learned step by step beside peft and torch, from an adapter that already changes something."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import llmjax
from llmjax.errors import TrainingError
from llmjax.training.adapter import new_adapter
from llmjax.training.batches import Example, Pair, cut
from llmjax.training.config import TrainConfig
from llmjax.training.files import save_adapter
from llmjax.training.step import Programs, first_state, train_step
from tests.parity import checkpoints, golden
from tests.parity.golden import meta

torch = pytest.importorskip("torch", reason="parity extra not installed")
peft = pytest.importorskip("peft", reason="parity extra not installed")
reference = pytest.importorskip("tests.parity.reference")

STEPS = 3
CONFIG = TrainConfig(dpo=True, beta=0.3, targets="all-linear", rank=3, alpha=5.0, learning_rate=0.02, weight_decay=0.1,
                     betas=(0.9, 0.95), clip=0.5)  # fmt: skip


def data() -> tuple[np.ndarray, np.ndarray]:
    """ids and labels ``[step, micro batch, chosen and rejected, T]``."""
    rng = np.random.RandomState(2)
    ids = rng.randint(0, 150, (STEPS, 2, 2, 12)).astype(np.int32)
    ids[..., 1, :5] = ids[..., 0, :5]  # the prompt
    labels = ids.copy()
    labels[..., :5] = labels[0, 0, 1, 8:] = labels[1, 1, 0, 9:] = -100
    return ids, labels


def theirs(model, ids, labels) -> tuple[list[list[float]], list[float]]:
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
            rewards = 0.3 * (policy - base)
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
def test_steps(name, tmp_path, monkeypatch):
    m = meta(name)
    base = checkpoints.write(tmp_path / "base", m["config"], m["shapes"], seed=3)
    model = llmjax.load(base)
    begun = new_adapter(model, CONFIG.lora, seed=1)
    rng = np.random.default_rng(0)
    for pair in begun.factors.values():
        pair["B"] = pair["B"] + rng.normal(size=pair["B"].shape).astype(np.float32) / 10
    save_adapter(begun, tmp_path / "begun")
    module = reference.load(base, m["config"]["model_type"])
    wanted = peft.PeftModel.from_pretrained(module, tmp_path / "begun", is_trainable=True).eval()
    ids, labels = data()
    values, norms = theirs(wanted, ids, labels)
    wanted.save_pretrained(tmp_path / "theirs")

    programs = Programs(model, begun.targets, CONFIG)
    step, state = train_step(programs, CONFIG), first_state(begun.factors, CONFIG)
    names = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
             "logps/rejected"]  # fmt: skip
    for k in range(STEPS):
        pairs = [Pair(*(Example(3, *row) for row in zip(i, chosen != -100, strict=True)))
                 for i, chosen in zip(ids[k], labels[k], strict=True)]  # fmt: skip
        group = [batch for pair in pairs for batch in cut([pair], 2)]  # filled up
        told = programs.evaluated(state.factors, group)
        state, outcome = step(state, group, 0.02)
        found = [outcome.loss, *(outcome.preferences[n] for n in names)]
        np.testing.assert_allclose(found, values[k], rtol=2e-5, atol=2e-4, err_msg=f"step {k + 1}")
        np.testing.assert_allclose(outcome.grad_norm, norms[k], rtol=2e-4)
        np.testing.assert_allclose([told[n] for n in ("loss", *names)], found, rtol=1e-5, atol=1e-5)
    save_adapter(begun.replace(state.factors), tmp_path / "ours")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys()
    for tensor in a:
        np.testing.assert_allclose(a[tensor], b[tensor], atol=2e-4, err_msg=tensor)
    nothing = {module: pair | {"B": 0 * pair["B"]} for module, pair in begun.factors.items()}
    with monkeypatch.context() as patch:  # what changes nothing is the reference: no other program's rounding shows
        patch.setattr(programs, "referenced", None)
        _, outcome = programs.accumulated(nothing, group, jax.random.key(0))
    assert outcome.loss == np.log(2) and outcome.preferences["rewards/accuracies"] == 0
    unknown = [group[0].replace(reference=np.float32([np.nan, 0, 0, 0])), group[1]]
    with pytest.raises(TrainingError, match="step 4: the loss of row 4 is not finite"):
        step(state, unknown, 0.02)
