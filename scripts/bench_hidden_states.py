"""``llmjax.hidden_states`` beside one ``llmjax.trace`` each, on texts of random tokens and lengths: seconds and peak
memory.  Compiling is part of both: a trace's program is for one length, and texts have many.

Run: python scripts/bench_hidden_states.py --model smollm2 --texts 1000
"""

import argparse
import resource
import tempfile
import time

import numpy as np

import llmjax


def main() -> None:
    """Prints both, per text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--longest", type=int, default=40, help="the shortest have 8 tokens")
    parser.add_argument("--taps", default="*.resid")
    args = parser.parse_args()
    if args.texts < 5 or args.longest < 8:
        parser.error("--texts, --longest: expected at least 5 and 8")
    try:
        model, random = llmjax.load(args.model), np.random.default_rng(0)
    except llmjax.LlmjaxError as error:
        parser.error(str(error))
    lengths = random.integers(8, args.longest + 1, args.texts)
    texts = [random.integers(0, model.config.vocab_size, int(n)).tolist() for n in lengths]
    for count in (args.texts // 5, args.texts):
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time(), time.perf_counter()
            llmjax.hidden_states(model, texts[:count], args.taps, output=f"{folder}/states")
            report("hidden_states", count, *began)
    began = time.process_time(), time.perf_counter()
    for ids in texts:
        llmjax.trace(model, ids, args.taps)
    report(f"trace, {len(set(map(len, texts)))} lengths", args.texts, *began)


def report(what: str, texts: int, cpu: float, wall: float) -> None:
    """One line."""
    spent, peak = time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"{what}: {texts} texts, CPU {spent:.1f} s, {1e3 * spent / texts:.1f} ms a text, wall "
          f"{time.perf_counter() - wall:.1f} s; peak memory {peak:,.0f} MB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
