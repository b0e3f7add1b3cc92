"""Training of adapters: steps, runs, what they leave, and what they refuse.  Beside peft and torch:
``tests/parity/test_training_live.py``."""

import dataclasses
import errno
import importlib.util
import json
import os
import signal
import textwrap
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmjax
from llmjax import ConfigError, LoraError, RequestError, ResumeError, TrainConfig, TrainingError, training
from llmjax.cli.main import main
from llmjax.errors import OutputError
from llmjax.lora.config import LoraConfig
from llmjax.models.recompute import recomputed
from llmjax.models.scanned import periods
from llmjax.models.tree import get_at, path_of
from llmjax.training import checkpoints, curves
from llmjax.training.adapter import adapted, changes, idle_excludes, new_adapter
from llmjax.training.batches import Example, batches, bucket, from_labels, make_batch
from llmjax.training.files import read_trained, save_adapter
from llmjax.training.optimizer import optimizer, schedule
from llmjax.training.step import Programs, dropout_key, first_state, loss, train_step
from tests.parity.test_cases import FOLDER
from tests.tiny import checkpoint, random_model, slow

RNG = np.random.default_rng(5)
CONFIG = TrainConfig(rank=2, learning_rate=0.03, batch_size=2, accumulation=2, epochs=3, checkpoint_every=2, clip=0.5)
WHOLE = dataclasses.replace(CONFIG, eval_every=2, dora=True)  # of which a test takes what it can: it is compiled once


def rows(count: int, seed: int = 0) -> list[dict]:
    """Ids that follow a rule an adapter can learn."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 500, count)
    return [{"ids": [int(s), 7, int(s) % 5, 9], "loss_mask": [0, 1, 1, 1]} for s in starts]


@pytest.fixture(scope="module")
def model():
    return random_model(num_hidden_layers=1)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return llmjax.finetune(model, rows(10), WHOLE, eval_rows=rows(4, seed=1), output=folder), folder


@pytest.mark.slow
def test_a_step_by_hand(model):
    """The gradient is that of the mean over all learned tokens of both batches, and AdamW's step is torch's."""
    config = TrainConfig(
        rank=2, learning_rate=0.1, weight_decay=0.5, clip=1e-3, eps=1e-4, targets=("q_proj", "down_proj")
    )
    adapter = new_adapter(model, config.lora)
    for pair in adapter.factors.values():
        pair["B"] = jnp.asarray(RNG.normal(size=pair["B"].shape) / 5, jnp.float32)
    ids = RNG.integers(0, 600, (2, 2, 16)).astype(np.int32)
    labels = ids.copy()
    labels[0, :, :3] = labels[1, 0, :-2] = labels[1, 1, :12] = -100
    group = [from_labels(i, chosen) for i, chosen in zip(ids, labels, strict=True)]

    def mean(factors):
        total, count = 0.0, 0
        for i, chosen in zip(ids, labels, strict=True):
            log_probs = jax.nn.log_softmax(model.apply(adapted(model.params, adapter.targets, factors), jnp.asarray(i)))
            picked = jnp.take_along_axis(log_probs[:, :-1], jnp.asarray(i[:, 1:, None]), -1)[..., 0]
            total, count = total - jnp.sum(picked * (chosen[:, 1:] != -100)), count + int((chosen[:, 1:] != -100).sum())
        return total / count

    wanted, gradients = jax.jit(jax.value_and_grad(mean))(adapter.factors)
    norm = float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradients))))
    step = train_step(Programs(model, adapter.targets, config), config)
    state, outcome = step(first_state(adapter.factors, config), group, 0.1)
    assert outcome.tokens == 26 + 2 + 4
    np.testing.assert_allclose([outcome.loss, outcome.grad_norm], [float(wanted), norm], rtol=1e-5)
    for before, g, after in zip(*map(jax.tree.leaves, (adapter.factors, gradients, state.factors)), strict=True):
        g = np.asarray(g, np.float64) * min(1, 1e-3 / (norm + 1e-6))
        by_hand = np.asarray(before, np.float64) * (1 - 0.1 * 0.5) - 0.1 * g / (np.abs(g) + 1e-4)
        np.testing.assert_allclose(after, by_hand, atol=2e-6)


def test_recomputation_changes_no_gradient_and_keeps_less():
    """A chain of layers whose inner values are many times as wide as what goes from one to the next."""

    def layer(weights, x, place, scale):
        y = jnp.sin(x["a"] @ weights["frozen"]) * jnp.cos(x["a"] @ weights["frozen"])
        return {"a": x["a"] + jnp.tanh(y) @ weights["b"] * scale, "unused": x["a"] * 2, "place": place}

    def loss(learned, frozen, x, apply):
        x = {"a": x, "unused": x, "place": jnp.int32(0)}
        for i, (b, w) in enumerate(zip(learned, frozen, strict=True)):
            x = apply({"b": b, "frozen": w}, x, jnp.int32(i), jnp.float32(0.1))
        return jnp.sum(x["a"] ** 2)

    frozen = [jnp.asarray(RNG.normal(size=(8, 512)), jnp.float32) for _ in range(12)]
    learned = [w.T / 10 for w in frozen]
    x = jnp.asarray(RNG.normal(size=(64, 8)), jnp.float32)
    programs = [jax.jit(jax.grad(partial(loss, apply=apply))).lower(learned, frozen, x).compile()
                for apply in (layer, recomputed(layer))]  # fmt: skip
    kept, recomputing = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert recomputing < 0.3 * kept
    for a, b in zip(*(program(learned, frozen, x) for program in programs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())


GEMMA2 = {
    "model_type": "gemma2", "vocab_size": 600, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8,
    "max_position_embeddings": 200,
}  # fmt: skip


def gradients(layers: int, recompute: str | None):
    """Of a model whose layers are alike in pairs, lowered, and its arguments."""
    model = random_model(**GEMMA2, num_hidden_layers=layers)
    adapter = new_adapter(model, LoraConfig(2, 4.0, dora=True, target_modules="all-linear"))
    rng = np.random.default_rng(3)
    factors = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) / 5, adapter.factors)
    batch = make_batch([Example(0, np.arange(14, dtype=np.int32), np.arange(14) > 4)]).arrays()

    def mean(factors, params):
        rows = loss(model, params, adapter.targets, factors, batch, recompute=recompute)
        return jnp.sum(rows)

    return jax.jit(jax.value_and_grad(mean)).lower(factors, model.params), (factors, model.params)


@pytest.mark.parametrize("recompute", [slow("all"), "cheap", slow("nothing")])
def test_layers_that_are_alike_are_compiled_once(recompute):
    products = [gradients(n, recompute)[0].as_text().count("stablehlo.dot_general") for n in (4, 6)]
    assert products[0] == products[1]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["all", "cheap", "nothing"])
def test_layers_in_a_loop_are_the_layers(recompute):
    """The loss and every layer's gradients; the fifth has no other like it."""
    plain, arguments = gradients(5, None)
    looped, _ = gradients(5, recompute)
    (value, wanted), (again, found) = plain.compile()(*arguments), looped.compile()(*arguments)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    assert len({float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(wanted)}) == 5 * 21
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-4), found, wanted)


@pytest.mark.parametrize(("kinds", "wanted"), [
    ("aaaa", (1, 4)), ("ababa", (2, 2)), ("aabaab", (3, 2)), ("aaab", (1, 3)), ("abbabbxy", (3, 2)), ("abcd", (1, 1)),
])  # fmt: skip
def test_periods(kinds, wanted):
    assert periods(kinds) == wanted


def test_a_run_learns_and_keeps_its_best(whole):
    result, folder = whole
    assert result.finished == "all 9 steps are done" and [m["step"] for m in result.metrics] == list(range(1, 10))
    evals = {m["step"]: m["eval_loss"] for m in result.metrics if "eval_loss" in m}
    assert list(evals) == [2, 4, 6, 8, 9] and result.best_eval == min(evals.values()) < 0.9 * result.first_eval
    assert evals[result.step] == result.best_eval
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics
    page = (folder / "loss.html").read_text()
    assert page.count("<polyline") == 3 and "http" not in page.replace("http://www.w3.org", "")


def test_what_is_saved_is_what_was_trained(whole, model, tmp_path):
    """Read by the library's own reader, and beside the weights again the same logits."""
    from llmjax.lora.adapter import read_adapter, values_of
    from llmjax.lora.apply import beside, with_loras

    result, folder = whole
    deltas = read_adapter(folder, model.architecture, model.config).deltas
    again = dataclasses.replace(
        model, params=with_loras(model.params, {n: beside(d, values_of(model.params)(n), n) for n, d in deltas.items()})
    )
    ids = [[5, 7, 0, 9]]
    np.testing.assert_array_equal(again.logits(ids)[0], result.model.logits(ids)[0])
    assert np.abs(again.logits(ids)[0] - model.logits(ids)[0]).max() > 0.1
    assert (
        result.save(tmp_path / "copy").joinpath("adapter_model.safetensors").read_bytes()
        == (folder / "adapter_model.safetensors").read_bytes()
    )


@pytest.mark.parametrize(("at", "gently"), [slow(1, False), slow(4, False), slow(5, False), (5, True)])
def test_a_run_that_was_cut_short_ends_in_the_same_bits(whole, model, tmp_path, at, gently):
    """By a kill, after which it goes on from its last state; or by Ctrl-C, before which it writes one more."""

    def stop(report):
        if report.step == at:
            if not gently:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)

    result, folder = whole
    arguments = {"eval_rows": rows(4, seed=1), "output": tmp_path}
    notes = []
    with pytest.raises(KeyboardInterrupt):
        llmjax.finetune(model, rows(10), WHOLE, report=stop, note=notes.append, **arguments)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert any(f"stopped after step {at} of 9; the same run goes on" in note for note in notes) == gently
    with jax.disable_jit(True), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        again = llmjax.finetune(model, rows(10), WHOLE, note=notes.append, **arguments)
    state = at if gently else (at - 1) // 2 * 2
    assert any(f"goes on after step {state} of 9" in note for note in notes) == (at > 1)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    drop = {"seconds": 0}
    assert [m | drop for m in again.metrics] == [m | drop for m in result.metrics]
    with pytest.raises(ResumeError, match="config.rank: was 2, now 3"):
        llmjax.finetune(model, rows(10), dataclasses.replace(WHOLE, rank=3), **arguments)
    with pytest.raises(ResumeError, match="rows: was"):
        llmjax.finetune(model, rows(11), WHOLE, **arguments)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b"\xff" + metrics.read_bytes()[1:])
    with pytest.raises(ResumeError, match="metrics.jsonl: damaged"):
        llmjax.finetune(model, rows(10), WHOLE, **arguments)
    state = tmp_path / "training_state.safetensors"
    data = bytearray(state.read_bytes())
    data[-len(data) // 3] ^= 1  # of a factor or a moment: it went on to other bits
    state.write_bytes(data)
    with pytest.raises(ResumeError, match="another version's: what it holds has another checksum"):
        llmjax.finetune(model, rows(10), WHOLE, **arguments)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: [],
        lambda facts: {**facts, "identity": None},
        lambda facts: {**facts, "step": None},
        lambda facts: {**facts, "progress": {**facts["progress"], "lookahead": 3}},
        lambda facts: {name: facts[name] for name in ("step", "progress")},
    ],
)
def test_a_state_of_another_form_is_told(model, tmp_path, change):
    """Another version's, say."""
    adapter = new_adapter(model, TrainConfig(rank=2).lora)
    state = first_state(adapter.factors, TrainConfig(rank=2))
    checkpoints.save(tmp_path, state, None, checkpoints.Progress(), {"rows": "a"})
    assert checkpoints.restore(tmp_path, state, {"rows": "a"})[0].step == 0
    stored = load_file(tmp_path / checkpoints.FILE)
    facts = np.frombuffer(json.dumps(change(json.loads(stored["facts"].tobytes()))).encode(), np.uint8)
    for some in ({"state.0": stored["state.0"][:-1]}, {"facts": facts}):
        leaves = {name: leaf for name, leaf in (stored | some).items() if name != "sha256"}
        save_file(leaves | {"sha256": checkpoints._sha256(leaves)}, tmp_path / checkpoints.FILE)
        with pytest.raises(ResumeError, match="damaged, or another version's: "):
            checkpoints.restore(tmp_path, state, {"rows": "a"})


def test_preferences_are_learned(tmp_path, capsys):
    """By the command; then the same run, cut short and gone on with, to the same bits."""
    checkpoint(tmp_path / "model", num_hidden_layers=1)
    data = [{"prompt": f"say {i}:", "chosen": " yes", "rejected": f" no {i}"} for i in range(7)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*data, data[0] | {"rejected": " yes"}])))
    command = ["lora", "train", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--eval",
               str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "whole"), "--dpo", "--beta", "0.3",
               "--targets", "q_proj,v_proj", "--batch-size", "3", "--epochs", "2", "--learning-rate", "0.05",
               "--recompute", "nothing", "--no-compile-cache"]  # fmt: skip
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) | {"rows": 7, "bad_rows": 2, "step": 6} == json.loads(out)
    assert "row 8: chosen and rejected are the same tokens" in err and "margin" in err
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-12) and metrics[0]["rewards/accuracies"] == 0
    assert [m["tokens"] for m in metrics[:3]] == [3 * 11, 6 * 11, 7 * 11]  # the pair alone is filled up
    assert metrics[-1]["eval_rewards/accuracies"] == 1 and metrics[-1]["eval_loss"] < 0.5
    for m in metrics:
        assert m["rewards/margins"] == pytest.approx(m["rewards/chosen"] - m["rewards/rejected"])
    assert "each the mean over its pairs" in (tmp_path / "whole" / "loss.html").read_text()

    model = llmjax.load(tmp_path / "model")
    config = TrainConfig(dpo=True, beta=0.3, targets=("q_proj", "v_proj"), batch_size=3, epochs=2, learning_rate=0.05,
                         recompute="nothing", checkpoint_every=2)  # fmt: skip

    def stop(report):
        if report.step == 5:
            raise KeyboardInterrupt

    arguments = {"eval_rows": data, "output": tmp_path / "cut"}
    with pytest.raises(KeyboardInterrupt):
        llmjax.finetune(model, data, config, report=stop, **arguments)
    again = llmjax.finetune(model, data, config, **arguments)
    name = "adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [m | {"seconds": 0} for m in again.metrics] == [m | {"seconds": 0} for m in metrics]
    with pytest.raises(ResumeError, match=r"config.beta: was 0.3, now 0.2"):
        llmjax.finetune(model, data, dataclasses.replace(config, beta=0.2), **arguments)


def test_a_curve_has_the_name_of_any_model(tmp_path):
    """A dollar is no formula's, and a name may hold bytes that are no UTF-8."""
    metrics = [{"step": step, "loss": 3.0 / step} for step in (1, 2, 3)]
    curves.write(tmp_path, metrics, "models/a$x_$b\udce4<i>")
    assert r"<h1>a$x_$b\udce4&lt;i&gt;</h1>" in (tmp_path / curves.HTML).read_text("utf-8")
    assert (tmp_path / curves.PNG).is_file() == bool(importlib.util.find_spec("matplotlib"))


def test_it_stops_when_nothing_gets_better(model):
    """A rate that throws the adapter about: the best is kept, not the last."""
    config = dataclasses.replace(WHOLE, learning_rate=30.0, clip=None, eval_every=1, patience=2, epochs=9)
    result = llmjax.finetune(model, rows(10), config, eval_rows=rows(4, seed=1))
    assert result.finished == f"no better evaluation in 2 after step {result.step}"
    assert len(result.metrics) == result.step + 2
    for wrong, name in ((config, "eval_every"), (dataclasses.replace(config, eval_every=0), "patience")):
        with pytest.raises(ConfigError, match=f"{name}: goes with rows for evaluation"):
            llmjax.finetune(model, rows(10), wrong)


def test_not_a_number_names_step_and_row(model):
    broken = jax.tree.map(lambda leaf: leaf, model.params)
    broken["embed"]["weight"] = broken["embed"]["weight"].at[599].set(jnp.nan)
    data = rows(10)
    data[6]["ids"][0] = 599
    config = dataclasses.replace(WHOLE, shuffle=False, eval_every=0)
    with pytest.raises(TrainingError, match=r"rows: step 2: the loss of row 7 is not finite"):
        llmjax.finetune(dataclasses.replace(model, params=broken), data, config)


@pytest.mark.slow
def test_a_rate_beyond_all_numbers_keeps_what_was_before(model, tmp_path):
    """What fails behind a step fails again where the run goes on, and the adapter is that of before."""
    config = dataclasses.replace(CONFIG, learning_rate=1e30, steps=1, targets=("q_proj", "v_proj"))
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"after step 1 the loss of the rows for evaluation is not finite; the"):
            llmjax.finetune(model, rows(4), config, eval_rows=rows(2, seed=1), output=tmp_path)
    assert not any(pair["B"].any() for pair in read_trained(tmp_path, model).factors.values())
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    config = dataclasses.replace(config, learning_rate=1e38, weight_decay=100.0)
    with pytest.raises(TrainingError, match=r"step 1: at the learning rate 1e\+38 the factors go beyond"):
        llmjax.finetune(model, rows(4), config)


def test_dropout_follows_from_its_key(model):
    adapter = new_adapter(model, TrainConfig(rank=4).lora)
    for pair in adapter.factors.values():
        pair["B"] = pair["B"] + 1
    batch = make_batch([Example(0, np.arange(16, dtype=np.int32), np.arange(16) > 8)]).arrays()

    @jax.jit
    def at(seed):
        key = jax.random.key(seed)
        return loss(model, model.params, adapter.targets, adapter.factors, batch, dropout=0.5, key=key)[0]

    found = [float(at(seed)) for seed in (1, 1, 2)]
    plain = float(jax.jit(lambda: loss(model, model.params, adapter.targets, adapter.factors, batch)[0])())
    assert found[0] == found[1] != found[2] and plain not in found
    words = [jax.random.key_data(dropout_key(seed)).tolist() for seed in (7, 7 + (1 << 40))]
    assert words == [jax.random.key_data(jax.random.key(7)).tolist(), [1 << 8, 7]]  # all of a seed counts
    # What q, k and v share as one module, with one A, drops the same of its input, as peft's one dropout does.
    whole = dataclasses.replace(adapter.targets[0], parts=tuple((t.parts[0][0], None) for t in adapter.targets[:2]))
    fused = adapted(model.params, (whole,), adapter.factors, dropout=0.5, key=jax.random.key(1))
    a, b = (get_at(fused, path_of(name)[:-1])["lora"].key for name, _ in whole.parts)
    assert a == b


def test_batches():
    """Every row once an epoch, in another order each time; filled up to whole batches; few lengths."""
    examples = [Example(i, np.arange(n, dtype=np.int32), np.arange(n) > n // 2) for i, n in enumerate(range(3, 30))]
    orders = []
    for epoch in range(2):
        groups = list(batches(examples, CONFIG, epoch))
        assert [len(group) for group in groups] == [2] * 7
        assert all(
            batch.ids.shape[0] == 2 and batch.ids.shape[1] in (16, 24, 32) for group in groups for batch in group
        )
        orders.append([row for group in groups for batch in group for row in batch.rows])
        assert sorted(orders[-1]) == list(range(27))
        tokens = sum(batch.tokens for group in groups for batch in group)
        assert tokens == sum(e.tokens for e in examples)
    assert orders[0] != orders[1]
    assert [bucket(n) for n in (1, 17, 25, 33, 49, 97)] == [16, 24, 32, 48, 64, 128]
    batch = from_labels(np.array([[5, 6, 7, 8]]), np.array([[-100, 6, -100, 8]]))
    assert batch.at.tolist()[0][:2] == [0, 2] and batch.targets.tolist()[0][:2] == [6, 8] and batch.tokens == 2


@pytest.mark.parametrize(("name", "warmup", "wanted"), [
    ("constant", 0, [2, 2, 2, 2, 2]),
    ("constant", 2, [0, 1, 2, 2, 2]),
    ("linear", 1, [0, 2, 1.5, 1, 0.5]),
    ("cosine", 1, [0, 2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5]),
])  # fmt: skip
def test_schedules(name, warmup, wanted):
    rate = schedule(name, 2.0, warmup, 5)
    np.testing.assert_allclose([rate(k) for k in range(5)], wanted, atol=1e-15)
    with pytest.raises(ConfigError, match="warmup: 5 steps, but the run has 5"):
        schedule(name, 2.0, 5, 5)


@pytest.mark.parametrize(("name", "wanted"), [
    ("sgd", [[1.0, -2.0], [2.5, -4.0]]),  # momentum 0.5
    ("lion", [[1.0, -1.0], [1.0, -1.0]]),
    ("rmsprop", [[1 / 0.01**0.5, -2 / 0.04**0.5], [2 / 0.0499**0.5, -3 / 0.1296**0.5]]),
])  # fmt: skip
def test_optimizers(name, wanted):
    """Two steps by hand, of gradients (1, -2) and (2, -3)."""
    decays = {"betas": (0.9, 0.99)}
    settings = {"sgd": {"momentum": 0.5}, "lion": decays, "rmsprop": decays | {"eps": 1e-12}}
    config = TrainConfig(optimizer=name, **settings[name])
    transformation = optimizer(config)
    params = jnp.zeros(2)
    state = transformation.init(params)
    for gradient, expected in zip(([1.0, -2.0], [2.0, -3.0]), wanted, strict=True):
        direction, state = transformation.update(jnp.asarray(gradient), state, params)
        np.testing.assert_allclose(direction, expected, rtol=1e-5)


def test_adafactor_factors_every_matrix():
    """As ``transformers.Adafactor(lr=1.0, scale_parameter=False, relative_step=False)`` in two steps."""
    wanted = [[1.0910895, -0.6766649, 1.1834527], [0.7808688, 1.4528229, -0.4234856]], [
        [1.0470455, -0.4751176, 1.2052113], [0.9519616, 1.5118997, -0.1826274]]  # fmt: skip
    transformation = optimizer(TrainConfig(optimizer="adafactor"))
    params, update = jnp.zeros((2, 3)), jax.jit(transformation.update)
    state = transformation.init(params)
    for k, expected in enumerate(wanted):
        gradient = jnp.asarray([[1.0, -2.0, 4.0], [0.5, 3.0, -1.0]]) * (k + 1) + k
        direction, state = update(gradient, state, params)
        np.testing.assert_allclose(direction, expected, rtol=1e-5)


def test_targets(model, tmp_path):
    def modules(**settings):
        adapter = new_adapter(model, LoraConfig(4, 8.0, **settings))
        return {t.module.rsplit(".", 1)[-1]: (t.rank, t.scale) for t in adapter.targets}, adapter.names

    attention = ("k_proj", "o_proj", "q_proj", "v_proj")
    assert modules(target_modules="mediapipe")[1] == attention
    found, names = modules(target_modules="all-linear", rank_pattern={"q_proj": 2}, alpha_pattern={"mlp.*": 4})
    assert names == ("down_proj", "gate_proj", *attention[:3], "up_proj", "v_proj")
    assert found["q_proj"] == (2, 4.0) and found["up_proj"] == (4, 1.0) and found["k_proj"] == (4, 2.0)
    assert modules(target_modules=r".*\.mlp\.(up|down)_proj", exclude_modules=("down_proj",))[1] == ("up_proj",)
    for wrong in (("q_proj", "query"), ".*query"):
        with pytest.raises(LoraError, match="query.*matches no module.*q_proj"):
            modules(target_modules=wrong)
    with pytest.raises(ConfigError, match="rank_pattern: 'query' matches none"):
        llmjax.finetune(model, rows(2), TrainConfig(rank_pattern={"query": 2}))
    for rank in (99, 10**9):  # before anything is drawn
        with pytest.raises(LoraError, match=f"rank: {rank} is more than any module has"):
            llmjax.finetune(model, rows(2), TrainConfig(rank=rank))
    with pytest.raises(LoraError, match="matches no module of this model but what exclude leaves out"):
        llmjax.finetune(model, rows(2), TrainConfig(targets=("q_proj",), exclude=("q_proj",)))
    assert idle_excludes(model, ("lm_head", "query", "mlp.up_proj")) == ["query"]
    assert idle_excludes(model, ".*up") == [".*up"] and not idle_excludes(model, ".*up_proj")
    patterns = {"q_proj": 4, ".*proj": 2}  # the first that matches wins
    adapter = new_adapter(model, TrainConfig(rank_pattern=patterns, alpha_pattern=patterns).lora)
    again = read_trained(save_adapter(adapter, tmp_path), model)
    kept, made = ({t.module: (t.rank, t.scale) for t in a.targets} for a in (again, adapter))
    assert kept == made and set(kept.values()) == {(4, 1.0), (2, 1.0)}
    mixture, notes = llmjax.load(FOLDER / "qwen3_moe"), []  # peft's all-linear means its experts, too
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock/metrics.jsonl.lock").write_text("mine")
    with pytest.raises(ResumeError, match="a file that is no lock"):  # before anything is compiled
        llmjax.finetune(
            mixture, [{"ids": [5, 6]}], TrainConfig(targets="all-linear"), output=tmp_path / "lock", note=notes.append
        )
    assert notes == ["targets: all-linear leaves 9 stacks of experts as they are (layers.0.experts.down.weight ...)"]
    text = json.loads((FOLDER / "gemma3n_cond" / "config.json").read_text())["text_config"]
    numbered = new_adapter(random_model(**text), TrainConfig(targets=r".*altup_projections.*").lora)
    assert numbered.names == tuple(f"altup_projections.{i}" for i in range(3))  # peft takes "0" for layers.0, too
    # As the modules are called in transformers, wherever checkpoints have them: a head stands outside the text model.
    for case in ("ministral3_cond", "qwen3_5_cond"):
        settings = TrainConfig(targets=r".*(down_proj|lm_head)").lora
        found = {target.module for target in new_adapter(llmjax.load(FOLDER / case), settings).targets}
        layers = {name for name in found if name.startswith("model.language_model.layers.")}
        assert layers and found - layers == {"lm_head"}
    narrow = new_adapter(model, TrainConfig(rank=20).lora)  # k and v have 16 rows: peft takes that
    assert {t.shape[0] for t in narrow.targets if t.rank > min(t.shape)} == {16}


@pytest.mark.parametrize("dora", [False, True])
def test_what_changes_nothing(model, dora):
    """An adapter as it is begun, which is the reference of preferences itself."""
    adapter = new_adapter(model, TrainConfig(dora=dora).lora)
    assert not changes(model, adapter.targets, adapter.factors)
    name = "magnitude" if dora else "B"
    own = adapter.factors[adapter.targets[-1].module]
    if dora:  # peft's lengths: added up in another order
        own[name] = own[name] * jnp.float32(1 + 3e-7)
        assert not changes(model, adapter.targets, adapter.factors)
    own[name] = own[name].at[-1].add(1e-4)
    assert changes(model, adapter.targets, adapter.factors)


@pytest.mark.parametrize(("values", "message"), [
    ({"rank": 0}, "rank: expected a positive integer, found 0"),
    ({"optimizer": "adam"}, "optimizer: expected 'adamw' or 'lion'"),
    ({"schedule": "step"}, "schedule: expected 'constant' or"),
    ({"dropout": 1.0}, "dropout: expected a number"),
    ({"momentum": 0.5}, "momentum: goes with the optimizer sgd"),
    ({"dora": 1}, "dora: expected true or false"),
    ({"optimizer": "sgd", "betas": [0.8, 0.9]}, "betas: goes with the optimizer adamw or lion or rmsprop, not"),
    ({"optimizer": "lion", "eps": 1e-6}, "eps: goes with the optimizer adamw or rmsprop, not with lion"),
    ({"beta": 0.2}, "beta: goes with dpo"),
    ({"dpo": True, "beta": 0}, "beta: expected a positive number, found 0"),
    ({"lr": 1.0}, "unknown lr; expected some of accumulation"),
])  # fmt: skip
def test_settings(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values)


def test_command_line(tmp_path, capsys):
    """Rows of every form, bad ones among them; then the same command again, which has nothing left to do."""
    checkpoint(tmp_path / "model", num_hidden_layers=1)
    good = [{"prompt": f"say {i}:", "completion": " yes"} for i in range(6)]
    bad = [{"prompt": "a", "completion": ""}, {"foo": 1}, "text", {"messages": [{"role": "user", "content": "b"}]}]
    lines = [*map(json.dumps, [*good, *bad]), "", "{no json", json.dumps({"text": "x" * 250})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    command = ["lora", "train", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--output",
               str(tmp_path / "out"), "--rank", "2", "--no-compile-cache", "--clip", "none",
               "--rank-pattern", "q_proj=1", "--dora"]  # fmt: skip
    assert main(command) == 1  # some rows are left out
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert summary["rows"] == 6 and summary["bad_rows"] == 6 and summary["step"] == 2
    told = ["6 of 12 rows are left out", "row 7: completion: empty", "row 8: fields foo", "row 9: expected an object"]
    for line in (
        *told,
        "row 10: ",
        "no chat template",
        "row 12: not valid JSON",
        "row 13: 251 tokens, longer than 200",
    ):
        assert line in err, err
    saved = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is True
    assert main(command) == 1 and "goes on after step 2 of 2" in capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == saved
    assert main([*command, "--rank-pattern", "q_proj=2"]) == 2
    assert "--rank-pattern: 'q_proj' is given twice" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps(bad[0]))
    assert main(command) == 2 and "no row to learn from" in capsys.readouterr().err


def test_a_loop_of_ones_own(tmp_path, monkeypatch, capsys):
    """As the documentation has it, word by word."""
    base = llmjax.load(checkpoint(tmp_path / "model", num_hidden_layers=1))
    monkeypatch.setattr(llmjax, "load", lambda path: base)
    monkeypatch.chdir(tmp_path)
    code = [line for line in str(training.__doc__).splitlines() if line.startswith("    ")]
    exec(textwrap.dedent("\n".join(code)), {})
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert read_trained("adapter", base).settings.rank == 8


def test_no_adapter_is_written_over(model, whole, tmp_path):
    _, folder = whole
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    with pytest.raises(RequestError, match="holds an adapter that no run here made"):
        llmjax.finetune(model, rows(4), CONFIG, output=tmp_path)
    (tmp_path / "adapter_config.json").rename(tmp_path / "config.json")
    with pytest.raises(RequestError, match="holds a model; name another directory"):
        llmjax.finetune(model, rows(4), CONFIG, output=tmp_path)
    with pytest.raises(RequestError, match="config.json: expected a directory, found a file"):
        llmjax.finetune(model, rows(4), CONFIG, output=tmp_path / "config.json")
    with pytest.raises(RequestError, match="inside: cannot be made: Not a directory"):
        llmjax.finetune(model, rows(4), CONFIG, output=tmp_path / "config.json" / "inside")


def test_names_of_another_class(tmp_path):
    """An adapter of the text model's own class goes on beside the whole model, under the names it has."""
    model = llmjax.load(FOLDER / "ministral3_cond")
    layer = "model.language_model.layers.1.self_attn.q_proj"
    settings = TrainConfig(targets=("q_proj", "lm_head"), rank_pattern={layer: 3}).lora
    save_adapter(new_adapter(model, settings), tmp_path / "whole")
    (tmp_path / "text").mkdir()
    tensors = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    text = {name.replace(".language_model.", "."): values for name, values in tensors.items()}
    save_file(text, tmp_path / "text" / "adapter_model.safetensors")
    said = (tmp_path / "whole" / "adapter_config.json").read_text().replace(".language_model.", ".")
    (tmp_path / "text" / "adapter_config.json").write_text(said)
    whole, own = (read_trained(tmp_path / name, model) for name in ("whole", "text"))
    assert [t.parts for t in own.targets] == [t.parts for t in whole.targets]
    assert [(t.rank, t.scale) for t in own.targets] == [(t.rank, t.scale) for t in whole.targets]
    assert {t.rank for t in own.targets} == {8, 3}
    save_adapter(own, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == text.keys() and all(np.array_equal(again[name], text[name]) for name in text)
    assert read_trained(tmp_path / "again", model).names == own.names
    config = json.loads(said)
    config["target_modules"] = [name for name in config["target_modules"] if ".layers.1." not in name]
    (tmp_path / "text" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoraError, match=r"model.layers.1.self_attn.q_proj: target_modules does not name it"):
        read_trained(tmp_path / "text", model)


def test_it_goes_on_from_an_adapter(model, whole, tmp_path):
    result, folder = whole
    again = llmjax.finetune(model, rows(10), dataclasses.replace(CONFIG, learning_rate=1e-9, steps=1), start=folder)
    for module, pair in again.adapter.factors.items():
        assert set(pair) == {"A", "B", "magnitude"}
        for side in pair:
            np.testing.assert_allclose(pair[side], result.adapter.factors[module][side], atol=1e-6)
    with pytest.raises(LoraError, match="lora_A: expected shape"):
        llmjax.finetune(random_model(num_hidden_layers=1, hidden_size=96), rows(4), start=folder)
    two_layers = save_adapter(new_adapter(random_model(), CONFIG.lora), tmp_path / "two")
    with pytest.raises(LoraError, match=r"module model.layers.1.\S+: this model has no projection of that name"):
        read_trained(two_layers, model)
    adapter = new_adapter(model, CONFIG.lora)
    adapter.factors[adapter.targets[1].module]["A"] *= np.nan
    with pytest.raises(LoraError, match=r"self_attn.\w_proj: lora_A: NaN or infinite values"):
        read_trained(save_adapter(adapter, tmp_path / "bad"), model)
    plain, notes = save_adapter(new_adapter(model, CONFIG.lora), tmp_path), []
    said = json.loads((plain / "adapter_config.json").read_text())
    (plain / "adapter_config.json").write_text(json.dumps(said | {"lora_dropout": 0.1}))
    trained = llmjax.finetune(model, rows(1), dataclasses.replace(CONFIG, alpha=3, exclude="q_proj"), start=plain,
                              note=notes.append)  # fmt: skip
    assert notes[0] == f"rank, alpha, exclude: not used, for {plain} says rank, scale and modules"
    assert notes[1] == f"dropout: 0, while {plain} was trained with lora_dropout 0.1"
    dropping = new_adapter(model, dataclasses.replace(CONFIG, dropout=0.25).lora)
    for adapter_, wanted in ((trained.adapter, 0.0), (dropping, 0.25), (read_trained(plain, model), 0.1)):
        written = json.loads((save_adapter(adapter_, tmp_path / "again") / "adapter_config.json").read_text())
        assert written["lora_dropout"] == wanted  # as it was used
    with pytest.raises(ConfigError, match="dora: the adapter to start from has no magnitudes"):
        llmjax.finetune(model, rows(4), dataclasses.replace(CONFIG, dora=True), start=plain)
    file = plain / "adapter_config.json"
    text = file.read_text()
    for change, why in (
        ({"target_modules": []}, r"targets: \(\) matches no module of this model"),
        ({"layers_to_transform": [1]}, "targets: .* matches no module of this model"),
        ({"lora_alpha": None}, "lora_alpha: expected a number, found None"),
    ):
        file.write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(LoraError, match=f"adapter_config.json: {why}"):
            read_trained(plain, model)
    several = [*json.loads(text)["target_modules"], "query_key_value"]  # peft passes over it
    file.write_text(json.dumps(json.loads(text) | {"target_modules": several}))
    assert read_trained(plain, model).names == read_trained(tmp_path / "again", model).names
    file.write_text(json.dumps(json.loads(text) | {"target_modules": None}))  # then the file's modules are meant
    assert set(read_trained(plain, model).factors) == set(adapter.factors)
    # Peft leaves B of MiCA as it is; and what a file says of itself comes before what its tensors look like.
    for key, value, why in (("init_lora_weights", "mica", "trains A alone"), ("bias", "lora_only", "is not supported")):
        file.write_text(json.dumps(json.loads(text) | {key: value}))
        with pytest.raises(LoraError, match=f"adapter_config.json: {key}: '{value}' {why}"):
            read_trained(plain, model)


def test_a_full_disk_is_told(model, tmp_path, monkeypatch):
    def told():
        with pytest.raises(OutputError, match="metrics.jsonl: cannot write it: No space left"):
            llmjax.finetune(model, rows(4), dataclasses.replace(WHOLE, epochs=1, eval_every=0), output=tmp_path)

    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    told()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "ftruncate", full)  # which the lock is written with
    told()


def test_no_rows(model):
    with pytest.raises(RequestError, match="no row to learn from"):
        llmjax.finetune(model, [])
    with pytest.raises(RequestError, match="cannot read the file"):
        llmjax.finetune(model, Path("nowhere.jsonl"))
