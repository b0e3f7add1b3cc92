"""Kills the workers of a job on a Ray cluster again and again, and its driver, and compares with a job of one process.

    python scripts/kill_ray.py --rows 10000 --kills 50 --drivers 3

A tiny model of random weights answers rows of every kind, on a cluster of this machine's own.  As the job goes on,
workers are killed with SIGKILL at random, whatever they do (load, compile, answer), and so is the job's own process,
which is then started again.  The output must be that of one process in every byte: every row once, in the order of the
input.
"""

import argparse
import importlib.util
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.kill_test import write_rows  # noqa: E402
from tests import tiny  # noqa: E402

# What a worker is called, whatever it does.
_NAME = b"ray::Worker"


def command(folder: Path, output: Path, *more: str) -> list[str]:
    """The job's command line."""
    files = ["--model", str(folder / "model"), "--input", str(folder / "in.jsonl"), "--output", str(output)]
    return [sys.executable, "-m", "llmjax", "batch", *files, "--ordered", "--progress-seconds", "0", *more]


def start(folder: Path, output: Path, *more: str) -> subprocess.Popen:
    """The job."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(command(folder, output, *more), env=env, stdout=log, stderr=log)


def finish(job: subprocess.Popen, folder: Path) -> None:
    """Waits for its end: some rows are bad, so that it says 1."""
    if job.wait() != 1:
        raise SystemExit(f"the job failed: {(folder / 'log').read_text()[-2000:]}")


def workers(job: int) -> list[int]:
    """The processes of workers that a job's cluster has."""
    return [p for p in descendants(job) if _read(p, "cmdline").startswith(_NAME)]


def descendants(process: int) -> Iterator[int]:
    """Of a process."""
    for thread in _children(process):
        yield thread
        yield from descendants(thread)


def _children(process: int) -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{process}/task")
    except OSError:
        return []
    return [int(child) for task in tasks for child in _read(process, f"task/{task}/children").split()]


def _read(process: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:
        return b""


def kill_often(folder: Path, kills: int, drivers: int, actors: int, seed: int, expected: bytes) -> dict[str, int]:
    """Does it: one kill for each part of the rows that is done.

    Returns:
      what the workers were at when they were killed, by the name that Ray gives them, and how often.
    """
    rng, output = random.Random(seed), folder / "killed.jsonl"
    more = "--ray", "local", "--actors", str(actors), "--actor-cpus", str(min(1, (os.cpu_count() or 1) / actors))
    job, found, done = start(folder, output, *more), {}, 0
    at = [len(expected) * (i + rng.random()) / (kills + drivers + 1) for i in range(kills + drivers)]
    driver_at = set(rng.sample(range(kills + drivers), drivers))
    while done < kills + drivers:
        if job.poll() is not None:
            raise SystemExit(f"it ended after {done} kills: {(folder / 'log').read_text()[-2000:]}")
        if not output.exists() or output.stat().st_size < at[done]:
            time.sleep(0.02)
            continue
        time.sleep(rng.random() * rng.choice((0.1, 3)))
        if done in driver_at:
            job.send_signal(signal.SIGKILL)
            job.wait()
            what, job = "the driver", start(folder, output, *more)
        else:
            alive = workers(job.pid)
            if not alive:
                continue
            victim = rng.choice(alive)
            what = _read(victim, "cmdline").strip(b"\0 ").decode().removeprefix("ray::")
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
        found[what] = found.get(what, 0) + 1
        done += 1
    finish(job, folder)
    if output.read_bytes() != expected:
        raise SystemExit(f"the rows differ: compare {output} with {folder / 'one.jsonl'}")
    return found


def one_process(folder: Path, rows: int, tokens_below: int) -> bytes:
    """The model, the rows, and what one process makes of them."""
    tiny.checkpoint(folder / "model")
    write_rows(folder / "in.jsonl", rows, tokens_below)
    finish(start(folder, folder / "one.jsonl"), folder)
    return (folder / "one.jsonl").read_bytes()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--tokens-below", type=int, default=16, metavar="N", help="tokens of each answer")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--drivers", type=int, default=3)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--same", type=int, nargs="*", default=[], metavar="N", help="and N workers, left alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.rows, args.tokens_below - 1, args.actors, *args.same) < 1 or min(args.kills, args.drivers) < 0:
        parser.error("--rows, --actors, --same: expected at least 1; --tokens-below: 2; --kills, --drivers: 0")
    if importlib.util.find_spec("ray") is None:
        parser.error("needs Ray: pip install 'llmjax[ray]'")
    with tempfile.TemporaryDirectory(prefix="llmjax-kill-ray-") as name:
        folder, began = Path(name), time.monotonic()
        expected = one_process(folder, args.rows, args.tokens_below)
        print(f"one process: {time.monotonic() - began:.0f} s", flush=True)
        for actors in args.same:
            began, output = time.monotonic(), folder / f"{actors}.jsonl"
            cpus = str(min(1, (os.cpu_count() or 1) / actors))
            finish(start(folder, output, "--ray", "local", "--actors", str(actors), "--actor-cpus", cpus), folder)
            if output.read_bytes() != expected:
                raise SystemExit(f"the rows of {actors} workers differ")
            print(f"{actors} workers: equal in every byte, {time.monotonic() - began:.0f} s", flush=True)
        began = time.monotonic()
        found = kill_often(folder, args.kills, args.drivers, args.actors, args.seed, expected)
        told = ", ".join(f"{count} at {what}" for what, count in sorted(found.items()))
        print(f"{sum(found.values())} kills ({told}): equal in every byte, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
