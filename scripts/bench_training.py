"""Steps a second and peak memory of LoRA training on the demo model, beside peft and torch on the same batches.

    python scripts/bench_training.py --rows 200 --rank 8

Every runtime runs in processes of its own, in turn with the others; each compiles for every shape of batch before the
clock starts.  Memory is the process's peak, imports, loading and compiling included.  Rows are pieces of Python's
documentation: the first half of each is a prompt, the rest is learned.  llmjax trains on the packed weights of the
file, torch on the same values in float32.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("llmjax", "llmjax bfloat16", "llmjax, all recomputed", "llmjax, nothing recomputed", "peft")


def rows_of(count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` texts of 30 to 120 words, the same on every run."""
    from pydoc_data.topics import topics

    words = " ".join(topics[name] for name in sorted(topics)).split()
    rng = np.random.default_rng(seed)
    rows = []
    for start, length in zip(rng.integers(0, 60_000, count), rng.integers(30, 121, count), strict=True):
        some = words[start : start + length]
        middle = len(some) // 2
        rows.append({"prompt": " ".join(some[:middle]), "completion": " " + " ".join(some[middle:])})
    return rows


def peak_mb() -> int:
    """The process's peak of resident memory."""
    return (
        int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
        >> 10
    )


def ours(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """One run of llmjax."""
    import llmjax
    from llmjax.training.adapter import new_adapter
    from llmjax.training.batches import batches, cut
    from llmjax.training.rows import make_examples
    from llmjax.training.step import Programs, first_state, train_step

    config = llmjax.TrainConfig(
        rank=args.rank,
        targets="all-linear",
        batch_size=args.batch,
        learning_rate=args.rate,
        recompute=kind.split()[1] if "recomputed" in kind else "cheap",
        compute="bfloat16" if "bfloat16" in kind else None,
    )
    model = llmjax.load("smollm2")
    examples = make_examples(rows_of(args.rows, 0), model).examples
    groups = list(batches(examples, config, 0))[: args.steps]
    held_out = cut(make_examples(rows_of(24, 1), model).examples, args.batch)
    adapter = new_adapter(model, config.lora)
    programs = Programs(model, adapter.targets, config)
    step, state = train_step(programs, config), first_state(adapter.factors, config)
    before = programs.evaluated(state.factors, held_out)["loss"] if args.evaluate else None
    shapes = {tuple((b.ids.shape, b.at.shape) for b in group): group for group in groups}
    began = time.monotonic()
    for group in shapes.values():
        step(state, group, args.rate)
    warm, began = time.monotonic() - began, time.monotonic()
    losses = []
    for group in groups:
        state, outcome = step(state, group, args.rate)
        losses.append(outcome.loss)
    seconds = time.monotonic() - began
    after = programs.evaluated(state.factors, held_out)["loss"] if args.evaluate else None
    return {"steps_per_second": len(losses) / seconds, "peak_mb": peak_mb(), "warm_up_seconds": warm, "losses": losses,
            "shapes": len(shapes), "eval": [before, after]}  # fmt: skip


def theirs(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """One run of peft and torch in float32, on the same rows in the same batches, padded to their longest row."""
    import peft
    import torch
    import transformers

    tokens = json.loads(Path(folder, "batches.json").read_text())
    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/hf", dtype=torch.float32)
    lora = peft.LoraConfig(r=args.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.rate, weight_decay=0.0)

    def step(group: Any) -> float:
        width = max(len(ids) for ids, _ in group)
        ids = torch.tensor([i + [0] * (width - len(i)) for i, _ in group])
        mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in group])
        labels = torch.full_like(ids, -100)
        for row, (tokens, learned) in enumerate(group):
            labels[row, : len(tokens)] = torch.where(torch.tensor(learned), torch.tensor(tokens), -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    began = time.monotonic()
    model(input_ids=torch.tensor([tokens[0][0][0]])).logits.sum().backward()
    optimizer.zero_grad()
    warm, began = time.monotonic() - began, time.monotonic()
    losses = [step(group) for group in tokens[: args.steps]]
    seconds = time.monotonic() - began
    return {"steps_per_second": len(losses) / seconds, "peak_mb": peak_mb(), "warm_up_seconds": warm, "losses": losses}


def prepare(args: argparse.Namespace, folder: str) -> None:
    """The float32 checkpoint and the batches, for torch."""
    import llmjax
    from llmjax.training.batches import batches
    from llmjax.training.rows import make_examples

    llmjax.convert("smollm2", f"{folder}/hf", to="hf", dtype="float32")
    model = llmjax.load("smollm2")
    examples = make_examples(rows_of(args.rows, 0), model).examples
    found = {e.row: (e.ids.tolist(), e.learned.tolist()) for e in examples}
    config = dataclasses.replace(llmjax.TrainConfig(), batch_size=args.batch)
    groups = [[found[row] for batch in group for row in batch.rows] for group in batches(examples, config, 0)]
    Path(folder, "batches.json").write_text(json.dumps(groups))


def main() -> None:
    """Alternates the runtimes and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--evaluate", action="store_true", help="also the loss of rows that are not learned from")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.rows, args.batch, args.steps, args.rank, args.repeats) < 1:
        parser.error("--rows, --batch, --steps, --rank, --repeats: expected at least 1")
    if args.one:
        kind, folder = args.one
        print(json.dumps(theirs(args, folder) if kind == "peft" else ours(args, kind)))
        return
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in args.only}
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, folder)
        for _ in range(args.repeats):
            for kind in args.only:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", kind, folder]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[kind].append(json.loads(output.splitlines()[-1]))
                one = found[kind][-1]
                print(f"{kind}: {one['steps_per_second']:.3f} steps/s, {one['peak_mb']} MB, warm-up "
                      f"{one['warm_up_seconds']:.0f} s, {one.get('shapes', '')} shapes, eval {one.get('eval')}, losses "
                      f"{one['losses'][0]:.4f} to {one['losses'][-1]:.4f}", flush=True)  # fmt: skip

    def median(kind: str, what: str) -> float:
        return statistics.median(run[what] for run in found[kind])

    for kind in args.only:
        line = f"{kind}: {median(kind, 'steps_per_second'):.3f} steps/s, {median(kind, 'peak_mb'):.0f} MB"
        if "peft" in args.only and kind != "peft":
            line += f"; beside peft {median(kind, 'steps_per_second') / median('peft', 'steps_per_second'):.2f} x speed"
            line += f", {median(kind, 'peak_mb') / median('peft', 'peak_mb'):.2f} x memory"
        print(line)


if __name__ == "__main__":
    main()
