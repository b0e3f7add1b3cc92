"""Adapters trained step by step beside peft and torch: fused modules, ranks and scales that differ, clipping, decay,
magnitudes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import llmjax
from llmjax.lora.apply import Lora
from llmjax.models.context import Context
from llmjax.models.layers import Projection
from llmjax.numerics import resolve
from llmjax.quant.qtensor import dequantize
from llmjax.quant.rounding import quantize
from llmjax.quant.schemes import Scheme
from llmjax.training.adapter import new_adapter
from llmjax.training.batches import from_labels
from llmjax.training.config import TrainConfig
from llmjax.training.files import read_trained, save_adapter
from llmjax.training.optimizer import schedule
from llmjax.training.step import Programs, first_state, train_step
from tests.parity import checkpoints, golden
from tests.parity.golden import meta
from tests.tiny import some

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


DORA = [("falcon_40b", True), ("phi3", True), ("gemma2", True), ("qwen2", True)]


@pytest.mark.parametrize(("name", "dora"), some({DORA[0]}, [*((name, False) for name in golden.NAMES), *DORA]))
def test_steps(name, dora, tmp_path):
    targets = r".*(query_key_value|qkv_proj|q_proj|dense_4h_to_h|down_proj)" if dora else "all-linear"
    config = dataclasses.replace(CONFIG, dora=dora, targets=targets)
    m = meta(name)
    base = checkpoints.write(tmp_path / "base", m["config"], m["shapes"], seed=3)
    model = llmjax.load(base)
    begun = new_adapter(model, config.lora, seed=1)
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
    step = train_step(Programs(model, adapter.targets, config), config)
    rate = schedule(config.schedule, config.learning_rate, config.warmup, STEPS)
    state = first_state(adapter.factors, config)
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


class Dropped(torch.nn.Module):
    """A dropout that is known."""

    def __init__(self, mask):
        super().__init__()
        self.mask = torch.tensor(mask)

    def forward(self, x):
        return x * self.mask


@pytest.mark.parametrize(("dtype", "dropout", "dora"), [
    ("float32", 0.5, True), ("float32", 0.5, False), ("bfloat16", 0.0, True), ("int8", 0.5, True),
])  # fmt: skip
def test_one_projection(dtype, dropout, dora, monkeypatch):
    """The product and all gradients.  In DoRA a length is a constant, a bias is left alone, and what A does not see the
    factor of the weight's product does not see either."""
    rng = np.random.default_rng(0)
    w, bias, x, seed = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 8), 6, (2, 5, 8), (2, 5, 6)))
    mask = (rng.random(x.shape) < 0.5) * 2.0 if dropout else np.ones(x.shape)
    weight = quantize(lambda start, stop: w[start:stop], w.shape, Scheme(8, None), "w") if dtype == "int8" else w
    weight = weight.map(jnp.asarray) if dtype == "int8" else jnp.asarray(w, dtype)

    linear = torch.nn.Linear(8, 6)
    floats = dequantize(weight) if dtype == "int8" else weight.astype(jnp.float32)
    linear.weight.data, linear.bias.data = torch.tensor(np.asarray(floats)), torch.tensor(bias)
    lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=dora, lora_dropout=dropout,
                           init_lora_weights=False)  # fmt: skip
    layer = peft.get_peft_model(torch.nn.Sequential(linear), lora).train().base_model.model[0]
    learned = [layer.lora_A.default.weight, layer.lora_B.default.weight]
    if dora:
        learned += [layer.lora_magnitude_vector.default.weight]
        learned[2].data *= torch.tensor(rng.uniform(-2, 2, 6).astype(np.float32))
    if dropout:
        layer.lora_dropout["default"] = Dropped(mask.astype(np.float32))
    given = torch.tensor(x, requires_grad=True)
    y = layer(given)
    wanted = torch.autograd.grad((y * torch.tensor(seed)).sum(), (*learned, given))

    monkeypatch.setattr(jax.random, "bernoulli", lambda key, kept, shape: jnp.asarray(mask > 0))
    ids = jnp.zeros((2, 5), jnp.int32)
    ctx = Context(ids, resolve("reference", jnp.dtype("float32")))

    def ours(learned, x):
        a, b, *m = learned
        own = Lora(a, b, jnp.float32(1.5), *(m or [None]), None, jax.random.key(0) if dropout else None, dropout)
        params = {"weight": weight, "bias": jnp.asarray(bias), "lora": own}
        found = Projection(6, bias=True).apply({"params": params}, x, ctx)
        return jnp.sum(found * seed), found

    arguments = [jnp.asarray(p.detach().numpy()) for p in learned], jnp.asarray(x)
    (found, of_x), out = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True))(*arguments)
    np.testing.assert_allclose(out, y.detach().numpy(), atol=1e-5)
    for one, other in zip([*found, of_x], wanted, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=2e-5)
