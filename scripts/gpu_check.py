#!/usr/bin/env python3
"""A GPU beside the CPU's own path: a table with a verdict for each check; see gpu_check.sh.

    python scripts/gpu_check.py [--only GLOB] [--jobs N] [--seconds N] [--output FOLDER]
    python scripts/gpu_check.py --dry-run       the CPU beside itself, which tries the script

Checks begin in the order of what they tell, some at a time, each process with the card's memory as it needs it; those
that no time is left for are listed.  One that ends its process or hangs fails alone, for what a kernel did to a card's
context must not be another's fault.  Exit codes: 0 when all are fine, 1 when one is not or was not
run, 2 without a GPU.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Seconds that one check may take; it compiles small programs for two devices.
MOST = 120


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", default="*", metavar="GLOB", help="of the checks' names")
    parser.add_argument("--jobs", type=int, help="at a time (default: three quarters of the processors, at most 12)")
    parser.add_argument("--seconds", type=float, default=480, help="no check begins later (default 480)")
    parser.add_argument("--output", type=Path, help="folder for gpu_check.json, and a log of each process")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.dry_run)
    ends = time.monotonic() + args.seconds
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    try:
        first = Worker(args, 0)
    except NoDeviceError as error:
        print(error, file=sys.stderr)
        return 2
    names = [name for name in first.checks if fnmatchcase(name, args.only)]
    if not names:
        parser.error(f"--only {args.only}: no check is called so")
    jobs = args.jobs or max(1, min(12, len(os.sched_getaffinity(0)) * 3 // 4))
    print(f"{first.devices}; {len(names)} checks, {min(jobs, len(names))} at a time", flush=True)
    print(f"{'':4}  {'check':40}  {'error':>8}  {'allowed':>8}  {'s':>5}  note", flush=True)
    table = Table(args.output, first.devices)
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    threads = [
        threading.Thread(target=serve, args=(args, i, first if i == 0 else None, waiting, ends, table))
        for i in range(min(jobs, len(names)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wrong = [row["check"] for row in table.rows if not row["fine"]]
    left = sorted(table.left, key=names.index)
    print(f"{len(table.rows) - len(wrong)} of {len(table.rows)} fine" + (f"; not: {', '.join(wrong)}" if wrong else ""))
    if left:
        print(f"no time was left for {len(left)}, from {left[0]!r} on")
    return 1 if wrong or left or not table.rows else 0


class NoDeviceError(Exception):
    """There is none to ask about."""


class Table:
    """Prints a line a check and keeps the file up to date: who is cut off has what was found."""

    def __init__(self, folder: Path | None, devices: str):
        self._folder, self._devices, self._lock = folder, devices, threading.Lock()
        self.rows: list[dict[str, Any]] = []
        self.left: list[str] = []

    def add(self, name: str, found: dict[str, Any] | None) -> None:
        """None for one that no time was left for."""
        with self._lock:
            if found is None:
                self.left.append(name)
            else:
                self.rows.append({"check": name} | found)
                print(
                    f"{'ok' if found['fine'] else 'FAIL':4}  {name:40}  {found['error']:8.1e}  {found['allowed']:8.1e}"
                    f"  {found['seconds']:5.1f}  {found['note']}",
                    flush=True,
                )
            if self._folder:
                facts = {"devices": self._devices, "checks": self.rows, "not_run": self.left}
                (self._folder / "gpu_check.json").write_text(json.dumps(facts, indent=2) + "\n")


def serve(
    args: argparse.Namespace,
    number: int,
    worker: "Worker | None",
    waiting: "queue.SimpleQueue[str]",
    ends: float,
    table: Table,
) -> None:
    """Asks one process after another, a new one where one came to harm."""
    while not waiting.empty():
        try:
            name = waiting.get_nowait()
        except queue.Empty:
            break
        if time.monotonic() > ends:
            table.add(name, None)
            continue
        began = time.monotonic()
        try:
            worker = worker or Worker(args, number)
            found, goes_on = worker.ask(name)
        except (OSError, ValueError, NoDeviceError) as error:
            found, goes_on = {"fine": False, "error": 0.0, "allowed": 0.0, "note": str(error)}, False
        table.add(name, found | {"seconds": round(time.monotonic() - began, 2)})
        if not goes_on and worker:
            worker.close()
            worker = None
    if worker:
        worker.close()


class Worker:
    """A process that checks what it is told to, a line a check.

    Raises:
      NoDeviceError: it has no device to check.
    """

    def __init__(self, args: argparse.Namespace, number: int):
        command = [sys.executable, __file__, "--worker", *(["--dry-run"] if args.dry_run else [])]
        self._log = args.output / f"check-{number}.log" if args.output else None
        log = open(self._log, "a") if self._log else None  # noqa: SIM115
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        if log:
            log.close()
        try:
            answer = self._answer()
        except ValueError as error:
            raise NoDeviceError(str(error)) from error
        if "missing" in answer:
            self.close()
            raise NoDeviceError(answer["missing"])
        self.devices: str = answer["devices"]
        self.checks: list[str] = answer["checks"]

    def ask(self, name: str) -> tuple[dict[str, Any], bool]:
        """What a check found, and whether the process goes on."""
        assert self._process.stdin
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["found"], answer["goes_on"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        timer = threading.Timer(MOST, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            code = self._process.wait()
            how = f"was killed (no check may take {MOST} s)" if code == -signal.SIGKILL else f"ended with code {code}"
            lines = self._log.read_text(errors="replace").splitlines() if self._log else []
            last = next((line for line in reversed(lines) if "rror" in line or line.startswith("F")), "")
            raise ValueError(f"the process {how}{': ' if last else ''}{last[:160]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()


def work(dry_run: bool) -> int:
    """In a process of its own."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what others print must not mix with the answers
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # it shares the card
    import jax

    from llmjax.checkpoint.loading import find_model
    from llmjax.errors import CheckpointError
    from tests.gpu.checks import Found, checks

    cpu = jax.devices("cpu")[0]
    try:
        other = jax.devices("cpu")[-1] if dry_run else jax.devices("gpu")[0]
    except RuntimeError as error:
        print(json.dumps({"missing": f"no GPU for JAX: {error}"}), file=answers)
        return 2
    try:
        demo = find_model("smollm2")
    except CheckpointError:
        demo = None
    known = checks(demo)
    devices = f"{other} ({other.device_kind}) beside {cpu} ({cpu.device_kind}), jax {jax.__version__}"
    print(json.dumps({"devices": devices, "checks": list(known)}), file=answers)
    for line in sys.stdin:
        goes_on = True
        try:
            found = known[line.strip()](cpu, other)
        except Exception as error:  # the others are to run, too, but no card is trusted after that
            traceback.print_exc()
            goes_on = False
            found = Found(False, note=f"{type(error).__name__}: {error}".splitlines()[0][:160])
        values = found._asdict() | {"error": float(found.error), "fine": bool(found.fine)}
        print(json.dumps({"found": values, "goes_on": goes_on}), file=answers)
        if not goes_on:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
