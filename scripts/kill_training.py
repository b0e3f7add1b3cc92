"""Kills one training run again and again, and compares what comes of it with a run that nobody disturbed.

    python scripts/kill_training.py --kills 20

A tiny model of random weights is trained on some rows.  The run is killed at a random time (in its start, after a
random number of steps, at its end), with SIGKILL or with Ctrl-C, and started again, until it has been killed that
often; then it runs to its end.  The adapter must be the same in every byte.  With --dpo it learns from preferences,
with --dora magnitudes, too.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import tiny  # noqa: E402

FILES = ("adapter_config.json", "adapter_model.safetensors")


def write_rows(path: Path, count: int, seed: int) -> None:
    """Texts of a few lengths."""
    rng = np.random.default_rng(seed)
    rows = [{"prompt": f"{a} and {b}:", "completion": f" {a + b}" * int(rng.integers(1, 5))}
            for a, b in rng.integers(0, 50, (count, 2))]  # fmt: skip
    rows = [row | {"chosen": row["completion"], "rejected": row["prompt"]} for row in rows]
    path.write_text("\n".join(map(json.dumps, rows)))


def start(folder: Path, output: str, steps: int, flags: Sequence[str]) -> subprocess.Popen:
    """The run, in a process of its own."""
    paths = ["--model", folder / "model", "--data", folder / "in.jsonl", "--eval", folder / "eval.jsonl"]
    options = ["--steps", steps, "--eval-every", 7, "--checkpoint-every", 3, "--dropout", 0.1, "--rank", 4,
               "--accumulation", 2, "--learning-rate", 0.01, "--targets", "all-linear", *flags]  # fmt: skip
    command = [sys.executable, "-m", "llmjax", "lora", "train", *paths, *options, "--output", folder / output]
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(job: subprocess.Popen) -> None:
    """Waits for its end, which must be a good one."""
    _, err = job.communicate()
    if job.returncode != 0:
        raise SystemExit(f"the run failed: {err}")


def kill_often(folder: Path, kills: int, steps: int, seed: int, flags: Sequence[str] = ()) -> dict[str, int]:
    """Does it; how many kills found the run in its start, among its steps, or after its end."""
    rng = random.Random(seed)
    tiny.checkpoint(folder / "model", num_hidden_layers=1)
    write_rows(folder / "in.jsonl", 60, 0)
    write_rows(folder / "eval.jsonl", 8, 1)
    finish(start(folder, "warm", steps, flags))  # fills the compilation cache
    began = time.monotonic()
    finish(start(folder, "whole", steps, flags))
    seconds = time.monotonic() - began
    expected = [(folder / "whole" / name).read_bytes() for name in FILES]
    if expected != [(folder / "warm" / name).read_bytes() for name in FILES]:
        raise SystemExit("two runs that nobody disturbed differ")
    found = {"start": 0, "steps": 0, "end": 0}
    metrics, state = folder / "killed" / "metrics.jsonl", folder / "killed" / "training_state.safetensors"
    for _ in range(kills):
        before = _lines(metrics)
        job = start(folder, "killed", steps, flags)
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0.1, 0.6) * seconds)  # most likely in its start
        else:
            further = min(steps, before + rng.randint(1, steps // 3))
            while _lines(metrics) < further and job.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
        job.send_signal(rng.choice((signal.SIGKILL, signal.SIGINT)))
        job.communicate()
        ended = job.returncode == 0
        found["end" if ended else "steps" if _lines(metrics) != before or state.exists() else "start"] += 1
        if ended:
            same(folder, expected)
            shutil.rmtree(folder / "killed")
    finish(start(folder, "killed", steps, flags))
    same(folder, expected)
    if left := sorted(p.name for p in (folder / "killed").iterdir() if p.name.endswith((".partial", ".lock"))):
        raise SystemExit(f"files left behind: {left}")
    return found


def same(folder: Path, expected: list[bytes]) -> None:
    """Raises SystemExit where the killed run's adapter is another."""
    if [(folder / "killed" / name).read_bytes() for name in FILES] != expected:
        raise SystemExit(f"the adapters differ: compare {folder / 'killed'} with {folder / 'whole'}")


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    """Kills and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dpo", action="store_true", help="learn from preferences")
    parser.add_argument("--dora", action="store_true", help="learn magnitudes")
    args = parser.parse_args()
    flags = [f"--{name}" for name in ("dpo", "dora") if getattr(args, name)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmjax-kill-") as folder:
        found = kill_often(Path(folder), args.kills, args.steps, args.seed, flags)
    print(
        f"{args.kills} kills: {found['start']} in the start, {found['steps']} among the steps, {found['end']} after "
        f"the end; the adapter is the same in every byte; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
