"""Weights on several devices, in a process that has four: spread by role (``mesh``), and in ways of one's own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

import llmjax
from llmjax.errors import ConfigError
from llmjax.models import sharding
from tests.tiny import slow

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "data" / "cases"

PROGRAM = """
import dataclasses, json, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from llmjax import LLM, SamplingParams
from llmjax.models.sharding import of_parameter
from llmjax.models.stack import STACKED
from llmjax.models.tree import canonical
from llmjax.quant.qtensor import QTensor
from tests.tiny import random_model
from tests.unit.test_stack import packed_model

scheme, profile, dtype = sys.argv[1:]
model = random_model(profile, dtype, num_hidden_layers=2) if scheme == "none" else packed_model(scheme)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
assert mesh.size == 4
prompts = [[1, 2, 3], [4, 5, 6, 7] * 5]
params = [
    SamplingParams(max_tokens=10, temperature=0, logprobs=3, ignore_eos=True),
    SamplingParams(max_tokens=10, temperature=1, top_k=40, top_p=0.95, seed=3, prompt_logprobs=2, ignore_eos=True),
]


def spread(leaf, *axes):
    fits = [axis if axis and size % 2 == 0 else None for axis, size in zip(axes, leaf.shape)]
    return jax.device_put(leaf, NamedSharding(mesh, P(*fits) if leaf.ndim == 2 else P()))


def by_role(path, leaf):
    roles = Mesh(np.array(jax.devices()[:2]), ("model",))
    return jax.device_put(leaf, of_parameter(roles, canonical(path), leaf, model.config))


placements = [
    model.params,
    jax.tree.map(spread, model.params),
    jax.tree.map(lambda leaf: spread(leaf, "x", "y"), model.params),
    jax.tree_util.tree_map_with_path(by_role, model.params, is_leaf=lambda leaf: isinstance(leaf, QTensor)),
]
for placed in placements:
    llm = LLM(dataclasses.replace(model, params=placed), max_batch=2, chunk=16, block=16)
    rows = [r.outputs[0] for r in llm.generate(prompts, params)]
    print(json.dumps({
        "stacked": STACKED in llm.engine._params,
        "tokens": [row.token_ids for row in rows],
        "logprobs": [row.cumulative_logprob for row in rows] + llm.score(prompts[0])[0].logprobs[1:],
        "logits": llm.model.logits([prompts[0]])[0].tolist(),
    }))
"""


def in_process(program, *args):
    """What it prints, of a process with four devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, *args]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "kind",
    [
        slow(("none", "fast", "float32")),
        *(
            slow(kind)
            for kind in [
                ("none", "reference", "float32"),
                ("none", "fast", "bfloat16"),
                ("int8", "fast", "float32"),
                ("int4-g32", "fast", "float32"),
            ]
        ),
    ],
    ids="-".join,
)
def test_a_model_on_four_devices_says_what_it_says_on_one(kind):
    """Replicated, in blocks of rows and columns, and by role: the same tokens, drawn ones too."""
    one, *spread = in_process(PROGRAM, *kind)
    assert len(spread) == 3
    if kind[0] != "int8":  # which processors with AMX multiply otherwise, layer by layer
        assert one["stacked"] == (kind[0] == "int4-g32")
    for found in spread:
        assert found["tokens"] == one["tokens"] and not found["stacked"]
        for name in ("logprobs", "logits"):
            scale = np.abs(one["logits"]).max()
            tolerance = 1e-5 if kind[2] == "float32" else 2e-2
            np.testing.assert_allclose(found[name], one[name], atol=tolerance * scale, rtol=0)


LOADED = """
import json, sys
import jax, numpy as np
import llmjax
from llmjax.checkpoint.identity import runtime_facts
from llmjax.runtime import memory

memory.available = lambda: 1 << 34
folder, quantize = sys.argv[1], None if sys.argv[2] == "none" else sys.argv[2]
expected = np.load(f"{folder}/expected.npz")
model = llmjax.load(folder, mesh=2, quantize=quantize, context_length=512)
where = lambda tree: {jax.tree_util.keystr(path): list(leaf.sharding.spec)
                      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
ids = expected["ids"].tolist()
llm = llmjax.LLM(model, max_batch=2)
params = llmjax.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, logprobs=1)
row, other = (result.outputs[0] for result in llm.generate([ids, ids[:3]], params))
whole = jax.tree.map(np.asarray, model.params)
alone = llmjax.load(folder, quantize=quantize, context_length=512)
print(json.dumps({
    "params": where(model.params), "cache": where(llm.engine.store.state.cache), "facts": runtime_facts(model.params),
    "error": float(np.abs(model.logits([ids])[0] - expected["logits"]).max()), "atol": float(expected["atol"]),
    "tokens": [row.token_ids, other.token_ids], "logprob": row.cumulative_logprob, "traces": dict(llm.engine.traces),
    "alone": [r.outputs[0].token_ids for r in llmjax.LLM(alone, max_batch=2).generate([ids, ids[:3]], params)],
    "same": all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(alone.params))),
    "memory": [m.engine.store.memory.page for m in (llm, llmjax.LLM(alone, max_batch=2))],
    "budgets": [m.engine.store.memory.budget for m in (llm, llmjax.LLM(alone, max_batch=2))],
}))
"""


KINDS = [
    ("gemma4_moe", "none"),
    ("qwen3_moe", "int8"),
    ("gemma3n_cond", "none"),
    ("lfm2", "int4"),
    ("qwen3_5_cond", "none"),
]


@pytest.mark.parametrize(("case", "quantize"), [("llama_dynamic_old", "none"), *(slow(*kind) for kind in KINDS)])
def test_loaded_onto_two_devices(case, quantize):
    """transformers' numbers; what each device holds, and that no program is compiled twice for it."""
    (found,) = in_process(LOADED, str(CASES / case), quantize)
    if quantize == "none":
        assert found["error"] <= found["atol"]
    assert found["tokens"] == found["alone"] and found["same"]
    assert found["traces"] == {"prefill": 1, "decode": 1}
    assert found["facts"]["mesh"] == {"model": 2}
    assert found["budgets"][0] == pytest.approx(found["budgets"][1] / 2, rel=0.01)  # the machine's memory is both's
    if case == "llama_dynamic_old":
        rows, columns = ["model"], [None, "model"]
        layer = {
            "attn": {"q": rows, "k": rows, "v": rows, "o": columns},
            "mlp": {"gate": rows, "up": rows, "down": columns},
        }
        wanted = {
            f"['layers_{i}']['{module}']['{name}']['weight']": spec
            for i in range(2) for module, names in layer.items() for name, spec in names.items()
        }  # fmt: skip
        wanted |= {f"['{name}']['weight']": rows for name in ("embed", "head")}
        assert {name: spec for name, spec in found["params"].items() if spec} == wanted
        assert set(map(tuple, found["cache"].values())) == {(None, "model")}
        assert 2 * found["memory"][0] == found["memory"][1]


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (0, "mesh: expected a number of devices, or a jax.sharding.Mesh, found 0"),
        (True, "found True"),
        ("two", "found 'two'"),
        (999, "mesh: 999 devices are asked for, and JAX has"),
        (Mesh(np.array(jax.devices()[:1]), ("x",)), r"mesh: expected an axis 'model' .* found \('x',\)"),
    ],
)
def test_no_mesh(mesh, said):
    with pytest.raises(ConfigError, match=said):
        llmjax.load(CASES / "llama_dynamic_old", mesh=mesh)


def test_a_mesh_that_splits_nothing():
    config = llmjax.load(CASES / "llama_dynamic_old").config
    sharding.check_splits(AbstractMesh((2,), ("model",)), config, "M")
    with pytest.raises(ConfigError, match=r"^M: mesh: 7 divides neither its heads \(4\) nor .* nothing would be"):
        sharding.check_splits(AbstractMesh((7,), ("model",)), config, "M")


def test_kernels_are_for_one_card(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu")] * 2)
    monkeypatch.setattr(sharding, "knows_cuda", lambda: True)
    with pytest.raises(ConfigError, match="one card; set LLMJAX_KERNELS=0"):
        llmjax.load(CASES / "llama_dynamic_old", mesh=2)
