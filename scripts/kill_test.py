"""Kills one batch job again and again, and compares what comes of it with a job that nobody disturbed.

    python scripts/kill_test.py --kills 50

A tiny model of random weights answers some rows.  The job is started, killed with SIGKILL at a random time (in its
start, among the rows, at its end) and started again, until it has been killed that often; then it runs to its end.  The
output must be the same in every byte, in the order of the input, and nothing else may be left behind.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import tiny  # noqa: E402


def write_rows(path: Path, count: int, tokens_below: int = 120) -> None:
    """Rows of every kind: texts, ids, OpenAI's form, bad ones, an id used twice."""
    rng = np.random.default_rng(1)
    rows: list[str] = []
    for i in range(count):
        length, tokens = int(rng.integers(1, 40)), int(rng.integers(1, tokens_below))
        text = "".join(map(chr, rng.integers(97, 123, length)))
        if i % 10 == 3:
            body = {"model": "m", "prompt": text, "max_tokens": tokens, "logprobs": 2}
            row = {"custom_id": f"o{i}", "method": "POST", "url": "/v1/completions", "body": body}
        elif i % 10 == 5:
            row = {"id": f"r{i}", "prompt_token_ids": list(map(ord, text)), "max_tokens": tokens, "logprobs": 1}
        elif i % 10 == 7:
            row = {"id": f"r{i - 7}", "prompt": text} if i % 20 == 7 else {"id": f"r{i}", "prompt": ""}
        else:
            row = {"id": f"r{i}", "prompt": text, "max_tokens": tokens, "temperature": round(float(rng.random()), 2)}
        rows.append(json.dumps(row))
    path.write_text("\n".join([*rows, "{no json", ""]))


def command(folder: Path, output: str) -> list[str]:
    """The job's command line."""
    paths = ["--model", str(folder / "model"), "--input", str(folder / "in.jsonl"), "--output", str(folder / output)]
    return [sys.executable, "-m", "llmjax", "batch", *paths, "--ordered", "--progress-seconds", "0"]


def run(folder: Path, output: str, start_s: float = math.inf, rows_s: float = math.inf) -> tuple[int, float]:
    """Runs the job, and kills it some time after its start or after it has written its first rows.

    Returns:
      its exit status, negative if it was killed, and the time to the first rows.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    began, before, first_s = time.monotonic(), _size(folder / output), math.inf
    job = subprocess.Popen(command(folder, output), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while job.poll() is None:
        seconds = time.monotonic() - began
        if first_s == math.inf and _size(folder / output) > before:
            first_s = seconds
        if seconds > start_s or seconds > first_s + rows_s:
            job.send_signal(signal.SIGKILL)
        time.sleep(0.005)
    _, err = job.communicate()
    if job.returncode not in (0, 1, -signal.SIGKILL):
        raise SystemExit(f"the job failed: {err}")
    return job.returncode, first_s


def kill_often(folder: Path, kills: int, rows: int, seed: int) -> dict[str, int]:
    """Does it.

    Every fourth kill falls on the job's start, the others on the time from its first row to a little after its last.

    Returns:
      how many kills found the job before its first row, among its rows, and with all rows written; and how often it
      came to its end first.
    """
    rng = random.Random(seed)
    tiny.checkpoint(folder / "model")
    write_rows(folder / "in.jsonl", rows)
    run(folder, "warm.jsonl")  # fills the compilation cache
    began = time.monotonic()
    _, first_s = run(folder, "whole.jsonl")
    rows_s = time.monotonic() - began - first_s
    expected = (folder / "whole.jsonl").read_bytes()
    output = folder / "killed.jsonl"
    found = {"before": 0, "among": 0, "after": 0, "finished": 0}
    done = 0
    while done < kills:
        if output.exists() and output.read_bytes() == expected:
            output.unlink()  # it finished before it could be killed: begin again
            (folder / "killed.jsonl.manifest.json").unlink()
            found["finished"] += 1
        before = _size(output)
        if done % 4 == 0:
            status, _ = run(folder, "killed.jsonl", start_s=rng.uniform(0, first_s))
        else:  # what is left to do shrinks with every kill
            left = 1 - before / len(expected)
            status, _ = run(folder, "killed.jsonl", rows_s=rng.uniform(0, 1) * left * rows_s)
        if status >= 0:
            continue
        done += 1
        after = _size(output)
        found["after" if after >= len(expected) else "among" if after > before else "before"] += 1
    run(folder, "killed.jsonl")
    if output.read_bytes() != expected:
        raise SystemExit(f"the rows differ: compare {output} with {folder / 'whole.jsonl'}")
    left = {path.name for path in folder.iterdir()} - {"model", "cache", "in.jsonl"}
    names = {f"{job}.jsonl{ending}" for job in ("warm", "whole", "killed") for ending in ("", ".manifest.json")}
    if left != names:
        raise SystemExit(f"files left behind: {sorted(left - names)}")
    return found


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmjax-kill-") as folder:
        found = kill_often(Path(folder), args.kills, args.rows, args.seed)
    print(
        f"{args.kills} kills: {found['before']} before a row was written, {found['among']} among the rows, "
        f"{found['after']} with all rows written; the job came to its end {found['finished']} times between; "
        f"final rows equal in every byte; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
