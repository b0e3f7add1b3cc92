"""Weights on several devices, in a process that has four."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import slow

PROGRAM = """
import dataclasses, json, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from llmjax import LLM, SamplingParams
from llmjax.models.stack import STACKED
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


for axes in ([], [None, None], ["x", "y"]):
    placed = jax.tree.map(lambda leaf: spread(leaf, *axes), model.params) if axes else model.params
    llm = LLM(dataclasses.replace(model, params=placed), max_batch=2, chunk=16, block=16)
    rows = [r.outputs[0] for r in llm.generate(prompts, params)]
    print(json.dumps({
        "stacked": STACKED in llm.engine._params,
        "tokens": [row.token_ids for row in rows],
        "logprobs": [row.cumulative_logprob for row in rows] + llm.score(prompts[0])[0].logprobs[1:],
        "logits": llm.model.logits([prompts[0]])[0].tolist(),
    }))
"""


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
    """Replicated, and in blocks of rows and columns: the same tokens, drawn ones too."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, *kind]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, *spread = map(json.loads, done.stdout.splitlines())
    assert len(spread) == 2
    assert one["stacked"] == (kind[0] == "int4-g32")
    for found in spread:
        assert found["tokens"] == one["tokens"] and not found["stacked"]
        for name in ("logprobs", "logits"):
            scale = np.abs(one["logits"]).max()
            tolerance = 1e-5 if kind[2] == "float32" else 2e-2
            np.testing.assert_allclose(found[name], one[name], atol=tolerance * scale, rtol=0)
