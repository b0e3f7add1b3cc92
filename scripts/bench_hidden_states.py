"""``llmjax.hidden_states`` beside one ``llmjax.trace`` each, on texts of random tokens: seconds and peak memory.

Run: python scripts/bench_hidden_states.py --model smollm2 --texts 1000
"""

import argparse
import resource
import tempfile
import time

import numpy as np

import llmjax

LENGTHS = (8, 12, 16, 24)


def main() -> None:
    """Prints both, per text; compiling is told apart for the traces, and is part of what is written to disk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--traced", type=int, default=100, help="texts that are traced one by one")
    parser.add_argument("--taps", default="*.resid")
    args = parser.parse_args()
    model, random = llmjax.load(args.model), np.random.default_rng(0)
    lengths = random.choice(LENGTHS, args.texts)
    texts = [random.integers(0, model.config.vocab_size, int(n)).tolist() for n in lengths]
    for length in LENGTHS:
        llmjax.trace(model, [1] * length, args.taps)
    began = time.process_time(), time.perf_counter()
    for ids in texts[: args.traced]:
        llmjax.trace(model, ids, args.taps)
    report("trace, compiled before", args.traced, *began)
    for count in (args.texts // 5, args.texts):
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time(), time.perf_counter()
            llmjax.hidden_states(model, texts[:count], args.taps, output=f"{folder}/states")
            report("hidden_states, compiling included", count, *began)


def report(what: str, texts: int, cpu: float, wall: float) -> None:
    """One line."""
    spent, peak = time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"{what}: {texts} texts, CPU {spent:.1f} s, {1e3 * spent / texts:.1f} ms a text, wall "
          f"{time.perf_counter() - wall:.1f} s; peak memory {peak:,.0f} MB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
