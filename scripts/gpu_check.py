#!/usr/bin/env python3
"""Runs the same models on the GPU and on the CPU and compares; see gpu_check.sh."""

import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import llmjax  # noqa: E402
from tests.tiny import random_ids, random_model  # noqa: E402

# Float32 sums in another order; TF32 products would miss this by a factor of a hundred.
TOLERANCE = 1e-4


def results(model: llmjax.Model, ids: list[int]) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Logits, greedy tokens, and the margins that make them decidable."""
    llm = llmjax.LLM(model, max_batch=4)
    params = llmjax.SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=2)
    (completion,) = llm.generate(ids, params)[0].outputs
    best = [sorted(step.values())[::-1] for step in completion.logprobs or []]
    return model.logits([ids])[0], completion.token_ids, np.array([b[0] - b[1] for b in best])


def check(name: str, make: "callable") -> bool:
    """Prints one line; True when both devices agree."""
    found = {}
    for device in ("cpu", "gpu"):
        with jax.default_device(jax.devices(device)[0]):
            found[device] = results(*make())
    (cpu, cpu_tokens, margins), (gpu, gpu_tokens, _) = found["cpu"], found["gpu"]
    error = float(np.abs(cpu - gpu).max() / np.abs(cpu).max())
    same = next((i for i, (a, b) in enumerate(zip(cpu_tokens, gpu_tokens, strict=True)) if a != b), None)
    fine = error <= TOLERANCE and (same is None or margins[same] <= 1e-3)
    tokens = "greedy tokens equal" if same is None else f"greedy tokens differ at {same}, margin {margins[same]:.1e}"
    print(f"{'ok  ' if fine else 'FAIL'} {name}: max |d logit| / max |logit| {error:.1e}, {tokens}")
    return fine


def main() -> int:
    """Returns 0 when everything agrees, 1 when not, 2 without a GPU."""
    try:
        print(f"GPU: {jax.devices('gpu')[0].device_kind}, jax {jax.__version__}")
    except RuntimeError as error:
        print(f"no GPU for JAX: {error}", file=sys.stderr)
        return 2
    ids = random_ids(np.random.default_rng(0), 100)
    fine = [check(f"tiny llama, {p}", lambda p=p: (random_model(p), ids)) for p in ("reference", "fast")]
    try:
        path = llmjax.loading.find_model("smollm2")
    except llmjax.CheckpointError as error:
        print(f"skip {error}")
    else:
        prompt = list(range(1000, 1100))
        fine.append(check("smollm2, reference", lambda: (llmjax.load(path, dtype="float32"), prompt)))
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
