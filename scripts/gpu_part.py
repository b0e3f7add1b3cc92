"""A part of gpu_measure.py, in a process of its own: it gets ready, says so, waits for its turn, and is measured."""

import collections
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    part, dry_run = json.loads(sys.argv[1]), "--dry-run" in sys.argv
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    repeat = 2 if dry_run else 7
    if not dry_run:
        check_card(part["kind"])

    def wait() -> None:
        print("ready", file=answers)
        if not sys.stdin.readline():
            sys.exit(1)

    model, long, new = ("config:smollm2-135m-instruct", 64, 4) if dry_run else ("config:gemma-2b", 2048, 64)
    lengths = (long, new, part["slots"], repeat)
    if part["kind"] == "transformers":
        found = transformers(model, *lengths, wait)
    else:
        exec(part["before"], {})
        found = bench(model, part["kind"], part["dtype"], *lengths, wait)
    print(json.dumps(found), file=answers)


def check_card(kind: str) -> None:
    """Leaves where what is to be measured would run on the processor: its speed would stand there as the card's."""
    if kind == "transformers":
        import torch

        who, has = f"torch {torch.__version__}", torch.cuda.is_available()
    else:
        import jax

        who, has = f"jax {jax.__version__}", jax.default_backend() == "gpu"
    if not has:
        sys.exit(f"no GPU for {who}")


def bench(
    model: str, kind: str, dtype: str, long: int, new: int, slots: int, repeat: int, wait: Callable[[], None]
) -> dict[str, Any]:
    """As ``llmjax bench --random-weights --json``."""
    import llmjax
    from llmjax.bench import measure

    lengths, chunk = ((long,), long) if slots == 1 else ((128,), 128)  # a shorter prompt would be filled up
    options = measure.Options(
        slots=slots,
        in_use=(slots,),
        chunk=chunk,
        prompt_lengths=lengths,
        output_length=new,
        contexts=(128,),
        repeat=repeat,
    )
    scheme = None if kind == "bfloat16" else kind

    def load() -> llmjax.Model:
        return llmjax.load(model, random_weights=True, numerics="fast", dtype=dtype, quantize=scheme)

    def report(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        if text == "measuring the machine":
            wait()

    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder)
        found = measure.run(load, dataclasses.replace(options, profile=profile), report).to_dict()
        return found | {"kernels": {run.name: kernels(run) for run in sorted(profile.iterdir())}}


def kernels(folder: Path) -> dict[str, Any]:
    """What a card ran in a profiler's trace: the microseconds from its first to its last event and those in which it
    was busy, and of each name, the longest first, how often it ran and its microseconds in all."""
    from jax.profiler import ProfileData

    spans, named = [], collections.defaultdict(list)
    for file in folder.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(file)).planes:
            streams = [line for line in plane.lines if line.name.startswith("Stream")] if "GPU" in plane.name else []
            for event in (event for line in streams for event in line.events):
                spans.append((event.start_ns, event.start_ns + event.duration_ns))
                named[event.name].append(event.duration_ns / 1e3)
    busy, end = 0.0, 0.0
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    longest = sorted(((name, len(us), round(sum(us), 2)) for name, us in named.items()), key=lambda n: -n[2])
    first = min((start for start, _ in spans), default=0.0)
    return {"microseconds": (end - first) / 1e3, "busy": busy / 1e3, "kernels": longest}


def transformers(name: str, long: int, new: int, slots: int, repeat: int, wait: Callable[[], None]) -> dict[str, Any]:
    """The same model, random too, in bfloat16 by ``generate``, and torch's own copies and products."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from llmjax import configs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = dict(configs.read(name)["config"])
    config = AutoConfig.for_model(facts.pop("model_type"), **facts)
    if device.type == "cpu":
        config.num_hidden_layers = 2  # the script is tried
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    data = torch.randn(size * size * 16, device=device)
    into = torch.empty_like(data)

    def seconds(call: Callable[[], Any], times: int = 1) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / times

    @torch.inference_mode()
    def generated(rows: int, count: int) -> Any:
        ids = torch.randint(3, config.vocab_size, (rows, 128), device=device)
        kept = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **kept)

    @torch.inference_mode()
    def prompt() -> Any:
        ids = torch.randint(3, config.vocab_size, (1, long), device=device)
        return model(ids, use_cache=True, logits_to_keep=1).logits

    def decoded(rows: int) -> float:
        return rows * new / (seconds(lambda: generated(rows, new + 1)) - seconds(lambda: generated(rows, 1)))

    def rounds() -> dict[str, float]:
        return {
            "copies": 2 * data.nbytes / seconds(lambda: into.copy_(data), 10),
            "products": 2 * size**3 / seconds(lambda: a @ b.T, 10),
            f"prefill {long}": long / seconds(prompt),
            "decode 1": decoded(1),
            f"decode {slots}": decoded(slots),
        }

    rounds()
    wait()
    found = [rounds() for _ in range(min(3, repeat))]
    median = {name: statistics.median(r[name] for r in found) for name in found[0]}
    return {"transformers": median, "versions": [torch.__version__, model.config.transformers_version]}


if __name__ == "__main__":
    main()
