#!/usr/bin/env python3
"""Runs the same models on the GPU and on the CPU and compares; see gpu_check.sh.

python scripts/gpu_check.py [PLATFORM]     gpu by default; cpu compares the CPU with itself, which tries the script
"""

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import llmjax  # noqa: E402
from llmjax.checkpoint.loading import find_model  # noqa: E402
from tests.parity import golden  # noqa: E402

# Float32 sums in another order; TF32 products would miss this by a factor of ten.
TOLERANCE = 1e-4


def results(model: llmjax.Model, ids: list[int]) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Logits, greedy tokens, and the margins that make them decidable."""
    llm = llmjax.LLM(model, max_batch=4)
    params = llmjax.SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=2)
    (completion,) = llm.generate(ids, params)[0].outputs
    best = [sorted(step.values())[::-1] for step in completion.logprobs or []]
    return model.logits([ids])[0], completion.token_ids, np.array([b[0] - b[1] for b in best])


def check(name: str, load: Callable[[], llmjax.Model], ids: list[int], platform: str) -> bool:
    """Prints one line; True when both devices agree."""
    found = []
    for device in ("cpu", platform):
        with jax.default_device(jax.devices(device)[0]):
            found.append(results(load(), ids))
    (cpu, cpu_tokens, margins), (gpu, gpu_tokens, _) = found
    error = float(np.abs(cpu - gpu).max() / np.abs(cpu).max())
    at = next((i for i, (a, b) in enumerate(zip(cpu_tokens, gpu_tokens, strict=True)) if a != b), None)
    fine = error <= TOLERANCE and (at is None or margins[at] <= 1e-3)
    tokens = "greedy tokens equal" if at is None else f"greedy tokens differ at {at}, margin {margins[at]:.1e}"
    print(f"{'ok  ' if fine else 'FAIL'} {name}: max |d logit| / max |logit| {error:.1e}, {tokens}", flush=True)
    return fine


def main() -> int:
    """Returns 0 when everything agrees, 1 when not, 2 without a GPU."""
    platform = sys.argv[1] if len(sys.argv) > 1 else "gpu"
    try:
        print(f"{platform}: {jax.devices(platform)[0].device_kind}, jax {jax.__version__}")
    except RuntimeError as error:
        print(f"no {platform} for JAX: {error}", file=sys.stderr)
        return 2
    fine = [
        check(name, lambda name=name: golden.load(name), golden.arrays(name)["short"].tolist(), platform)
        for name in golden.NAMES
    ]
    try:
        path = find_model("smollm2")
    except llmjax.CheckpointError as error:
        print(f"skip {error}")
    else:
        ids = list(range(1000, 1100))
        fine.append(check("smollm2", lambda: llmjax.load(path, numerics="reference"), ids, platform))
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
