#!/usr/bin/env python3
"""A GPU beside the CPU's own path, in one process: a table with a verdict for each check; see gpu_check.sh.

    python scripts/gpu_check.py [--only GLOB] [--seconds N] [--output FOLDER]
    python scripts/gpu_check.py --dry-run       the CPU beside itself, which tries the script

Checks come in the order of what they tell; those that no time is left for are listed.  Exit codes: 0 when all are
fine, 1 when not, 2 without a GPU.
"""

import argparse
import json
import sys
import time
import traceback
from fnmatch import fnmatchcase
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llmjax.checkpoint.loading import find_model  # noqa: E402
from llmjax.errors import CheckpointError  # noqa: E402
from tests.gpu.checks import Found, checks  # noqa: E402


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", default="*", metavar="GLOB", help="of the checks' names")
    parser.add_argument("--seconds", type=float, default=480, help="no check begins later (default 480)")
    parser.add_argument("--output", type=Path, help="folder for gpu_check.json")
    args = parser.parse_args()
    cpu = jax.devices("cpu")[0]
    try:
        other = jax.devices("cpu")[-1] if args.dry_run else jax.devices("gpu")[0]
    except RuntimeError as error:
        print(f"no GPU for JAX: {error}", file=sys.stderr)
        return 2
    try:
        demo = find_model("smollm2")
    except CheckpointError:
        demo = None
    print(f"{other} ({other.device_kind}) beside {cpu} ({cpu.device_kind}), jax {jax.__version__}", flush=True)
    print(f"{'':4}  {'check':36}  {'error':>8}  {'allowed':>8}  {'s':>5}  note")
    began, rows, left = time.monotonic(), [], []
    for name, check in checks(demo).items():
        if not fnmatchcase(name, args.only):
            continue
        if time.monotonic() - began > args.seconds:
            left.append(name)
            continue
        start = time.monotonic()
        try:
            found = check(cpu, other)
        except Exception as error:  # the others are to run, too
            traceback.print_exc()
            found = Found(False, note=f"{type(error).__name__}: {error}".splitlines()[0][:100])
        seconds = time.monotonic() - start
        rows.append({"check": name, **found._asdict(), "seconds": round(seconds, 2)})
        verdict = "ok" if found.fine else "FAIL"
        print(
            f"{verdict:4}  {name:36}  {found.error:8.1e}  {found.allowed:8.1e}  {seconds:5.1f}  {found.note}",
            flush=True,
        )
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            facts = {"device": other.device_kind, "jax": jax.__version__, "checks": rows, "not_run": left}
            (args.output / "gpu_check.json").write_text(json.dumps(facts, indent=2) + "\n")
    wrong = [row["check"] for row in rows if not row["fine"]]
    print(
        f"{len(rows) - len(wrong)} of {len(rows)} fine" + (f"; no time was left for: {', '.join(left)}" if left else "")
    )
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
