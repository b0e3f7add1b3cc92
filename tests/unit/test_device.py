"""Which device computes, and what is said where its memory ends."""

import importlib.util
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

import llmjax
from llmjax import device
from llmjax.checkpoint import identity
from llmjax.cli.main import main
from llmjax.device import by_device, device_of, platform_of
from llmjax.errors import ConfigError, LlmjaxError, NoRoomError
from llmjax.models.watched import Program
from llmjax.numerics import GPU_LIBRARY, GPU_OPTIONS, GPU_STEP, resolve
from llmjax.products.matmul import matmul
from tests.tiny import checkpoint, random_model
from tests.unit.test_quant import on_device, quantized

FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."


def test_one_trace_is_lowered_for_each_device():
    """Under ``jit``, ``vmap`` and in a loop."""

    def function(x):
        double = by_device(lambda x: x * 3, cpu=lambda x: x + x)
        return jax.lax.fori_loop(0, 2, lambda _, x: jax.vmap(double)(x), x)

    traced = jax.jit(function).trace(jnp.ones(3))
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
    assert ["stablehlo.multiply" in texts[p] for p in ("cpu", "cuda")] == [False, True]
    np.testing.assert_array_equal(traced.lower().compile()(jnp.ones(3)), 4)
    np.testing.assert_array_equal(by_device(lambda x: x * 3, cpu=lambda x: x + x)(jnp.ones(3)), 2)


def test_what_is_for_nvidias_cards_is_lowered_for_them_alone(monkeypatch):
    """And traced where JAX's plugin for them is installed."""
    double = by_device(lambda x: x * 3, cpu=lambda x: x + x, cuda=lambda x: x - x)
    for known, others in ((True, ("subtract", "multiply")), (False, ("multiply", "multiply"))):
        monkeypatch.setattr(device, "knows_cuda", lambda known=known: known)
        traced = jax.jit(lambda x: double(x)).trace(jnp.ones(3))
        for platform, name in zip(("cpu", "cuda", "rocm"), ("add", *others), strict=True):
            assert f"stablehlo.{name}" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_kernel_is_lowered_for_a_card_whatever_the_default_device(monkeypatch):
    """JAX 0.11's Pallas asks that, which is the CPU here, unless it is told."""
    monkeypatch.setattr(device, "knows_cuda", lambda: True)

    def fill(y):
        y[0] = 1.0

    def kernel(x):
        shape = jax.ShapeDtypeStruct((1,), jnp.float32)
        asked.append(jax.sharding.get_abstract_mesh().abstract_device.device_kind)
        return x + pl.pallas_call(fill, grid=(1,), out_shape=shape, compiler_params=plt.CompilerParams())()

    asked = []
    traced = jax.jit(by_device(lambda x: x, cpu=lambda x: x, cuda=kernel)).trace(jnp.ones(1))
    with jax.default_device(jax.devices("cpu")[0]):
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert set(asked) == {"NVIDIA A100"} and jax.sharding.get_abstract_mesh().abstract_device is None


@pytest.mark.parametrize(
    ("cards", "known"), [((), True), (("9.0",), True), (("8.0", "12.0"), True), (("7.5", "9.0"), False)]
)
def test_cards_that_no_kernel_is_for(monkeypatch, cards, known):
    """A program may run on any card that is here; none says nothing."""

    def devices(platform):
        if not cards:
            raise RuntimeError(f"Unknown backend {platform}")
        return [types.SimpleNamespace(compute_capability=card, device_kind=f"NVIDIA {card}") for card in cards]

    def told(*there):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            return device.knows_cuda.__wrapped__(), [str(warning.message) for warning in found]

    monkeypatch.setattr(jax, "devices", devices)
    there, triton = "jax_cuda13_plugin", "jax.experimental.pallas.triton"
    without = "goes on without llmjax's kernels, right but slower:"
    old = [] if known else [f"NVIDIA 7.5: {without} they need compute capability 8.0, it has 7.5"]
    assert told(there, triton) == (known, old)
    first = f"NVIDIA {cards[0]}" if cards else ""
    assert told(there) == (False, [f"{first}: {without} JAX {jax.__version__} has no Triton for cards"] * bool(cards))
    assert told() == told(triton) == (False, [])
    monkeypatch.setenv("LLMJAX_KERNELS", "0")
    assert told(there, triton) == (False, [])


def test_who_wants_no_kernels_has_none(monkeypatch):
    """A program for a card calls none of ours, and a result says so; what does not compile there names the switch."""
    q, x = on_device(quantized(np.ones((32, 64), np.float32), "int8")), jnp.ones((8, 64))
    numerics = resolve("fast", jnp.dtype(jnp.float32))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_cuda12_plugin" or find(name))
    monkeypatch.setattr(device, "knows_cuda", device.knows_cuda.__wrapped__)
    monkeypatch.setattr(identity, "device_of", lambda _: types.SimpleNamespace(platform="gpu", device_kind="NVIDIA L4"))
    for switch, ours in (("1", True), ("", True), ("0", False)):
        monkeypatch.setenv("LLMJAX_KERNELS", switch)
        traced = jax.jit(lambda x, q: matmul(x, q, numerics)).trace(x, q)
        assert ("triton" in traced.lower(lowering_platforms=("cuda",)).as_text()) is ours
        assert identity.runtime_facts().get("kernels") == (None if ours else "off")
    monkeypatch.setenv("LLMJAX_KERNELS", "off")
    with pytest.raises(ConfigError, match="^LLMJAX_KERNELS: expected 0 for none or 1, found 'off'"):
        device.wants_kernels()


@pytest.mark.parametrize(
    "said",
    [
        "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 655360, available: 101376, context: []",
        "FAILED_PRECONDITION: Triton support is only enabled for Ampere GPUs (compute capability 8.0) and up, but ...",
    ],
)
def test_a_kernel_that_a_card_has_no_room_for_is_not_taken_for_full_memory(said):
    """As XLA says it."""
    with pytest.raises(LlmjaxError, match=r"^the device: a kernel .* set LLMJAX_KERNELS=0") as found:
        with device.in_memory("a run", "lower"):
            raise jax.errors.JaxRuntimeError(said)
    assert said in str(found.value) and not isinstance(found.value, NoRoomError)


def test_where_nothing_says_it_the_default_device_computes():
    assert platform_of() == platform_of(np.ones(3), {"a": 1}) == platform_of(jnp.ones(3)) == "cpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert device_of() is jax.devices("cpu")[0]
    with jax.default_device("cpu"):
        assert device_of() is jax.devices("cpu")[0]


def test_a_gpus_compiler_knows_the_options():
    """The CPU's parses them, too, and refuses a name that there is not."""
    assert jax.jit(lambda x: x + 1, compiler_options=GPU_OPTIONS | GPU_LIBRARY | GPU_STEP)(1) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_deterministic_op"):
        jax.jit(lambda x: x + 2, compiler_options={"xla_gpu_deterministic_op": True})(1)


PROGRAM = """
import dataclasses, json
import jax, numpy as np
from llmjax import LLM, SamplingParams
from llmjax.checkpoint.identity import runtime_facts
from llmjax.device import device_of
from llmjax.products.matmul import matmul
from tests.tiny import random_model
from tests.unit.test_stack import packed_model

model = packed_model("int4")
other = jax.devices()[1]
moved = dataclasses.replace(model, params=jax.device_put(model.params, other))
assert device_of(moved.params) is other and device_of(model.params) is jax.devices()[0]
with jax.default_device(other):
    loose = jax.device_put(np.ones(3))
    assert device_of(loose) is other
assert device_of(loose) is jax.devices()[0] and jax.jit(lambda x: x + 1)(loose).devices() == {jax.devices()[0]}
x = jax.device_put(np.ones((3, 64), np.float32), other)
w = moved.params["layers_0"]["attn"]["q"]["weight"]
for multiply in (matmul, jax.jit(matmul, static_argnums=2)):
    assert multiply(x, w, model.numerics).devices() == {other}
found = []
for m in (model, moved):
    llm = LLM(m, max_batch=2, chunk=16, block=16)
    row = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, temperature=1, seed=5, ignore_eos=True))[0].outputs[0]
    state = llm.engine.store.state
    found.append([row.token_ids, row.cumulative_logprob, m.logits([[4, 5, 6]])[0].tolist()])
    assert {d for leaf in jax.tree.leaves(state) for d in leaf.devices()} == {device_of(m.params)}
print(json.dumps(found[0] == found[1]))
"""


@pytest.mark.slow
def test_everything_is_where_the_parameters_are():
    """On a device that is not the default: the state, too, and the same bits."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)


def full(*_, **__):
    raise jax.errors.JaxRuntimeError(FULL)


def test_weights_that_a_device_has_no_room_for(tmp_path, monkeypatch, capsys):
    path = checkpoint(tmp_path / "model")
    monkeypatch.setattr(jax, "device_put", full)
    said = r"^memory: the device has none left for the weights, at embed.weight .*17179869184 bytes.*quantize"
    with pytest.raises(NoRoomError, match=said):
        llmjax.load(path)
    assert main(["score", "--model", str(path), "--input", os.devnull, "--output", str(tmp_path / "out.jsonl")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert line.startswith("llmjax: memory: the device has none left")


def test_a_run_that_a_device_has_no_room_for():
    model = random_model(num_hidden_layers=1)
    model._logits._plain = full
    with pytest.raises(NoRoomError, match="none left for a run of the model .*shorter texts"):
        model.logits([[1, 2]])
    engine = llmjax.LLM(model, max_batch=1).engine
    with pytest.raises(NoRoomError, match="none left for a budget of .*fewer slots"), engine.cleared_by_errors():
        full()
    assert engine.store.state is None
    program = Program(lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        program(1)
