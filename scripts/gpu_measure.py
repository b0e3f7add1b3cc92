#!/usr/bin/env python3
"""Whether a GPU is right, then how fast it is; see gpu_measure.sh.

    python scripts/gpu_measure.py [--dry-run] FOLDER [SECONDS] [--only GLOB,GLOB] [--keep FOLDER]

First ``gpu_check.py``.  Then Gemma 2B with random weights in bfloat16, int8 and int4, one stream and 64, and a prompt
of 2,048 tokens, beside the card's copies and products of the same minutes (``llmjax bench``), and transformers.  Then
the same the other way: in plain formulas instead of kernels, with kernels that race for their place (a job's bits may
then differ), with the loop over tokens decided on the card, with float32 x beside packed weights.

To make weights and to compile takes a part a minute of one processor, and to measure it some seconds.  So each part is
a process; some get ready together, and when all of these are, each has the card to itself in turn, the others held.  A
part that fails leaves its last line in the table and its log; where a kernel may be why, the part is tried without
any.  A second call goes on with what is missing, by the same code: parts and compiled programs are kept (``--keep``).
FOLDER always holds what is known so far: table.txt, results.json, gpu_check.json and logs.tar.gz.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tarfile
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# What is asked of a card's state while a part is measured.
STATE = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
NO_PRODUCTS = "from llmjax.products import kernel; kernel.can_serve = lambda q: False"
NO_ATTENTION = "from llmjax.models import flash; flash.can_serve = lambda k: False"
NO_KERNELS = "from llmjax import device; device.knows_cuda = lambda: False"
RACED = "from llmjax import numerics as n; n.GPU_OPTIONS.clear(); n.GPU_LIBRARY.clear()"
# Seconds: for parts to get ready together, for one to be measured, and what the last lines need.
READY, MEASURE, END = 200, 90, 8


@dataclasses.dataclass(frozen=True)
class Part:
    """``llmjax bench`` of one kind of weights, or transformers.

    Attributes:
      kind: ``bfloat16``, a scheme of quantization, or ``transformers``.
      slots: streams; 1 is measured with a long prompt, too.
      dtype: of what is not quantized, and of activations that meet weights.
      before: Python that changes how llmjax does it.
      flags: more of XLA's.
    """

    kind: str
    slots: int = 1
    dtype: str = "bfloat16"
    before: str = ""
    flags: str = ""


def waves(many: int) -> list[dict[str, Part]]:
    """Parts that get ready together, what decides most first.  What XLA tries out on the card needs it alone."""
    first = {
        kind if n == 1 else f"{kind}-{n}": Part(kind, n) for n in (1, many) for kind in ("bfloat16", "int8", "int4")
    }
    second = {
        "bfloat16-folded": Part("bfloat16", before=NO_ATTENTION),
        f"int4-{many}-plain": Part("int4", many, before=NO_PRODUCTS),
        "int8-plain": Part("int8", before=NO_PRODUCTS),
        "int4-buffered": Part("int4", flags="--xla_gpu_enable_command_buffer=+WHILE"),
        "int8-float32": Part("int8", dtype="float32"),
        "int4-float32": Part("int4", dtype="float32"),
        f"int8-float32-{many}": Part("int8", many, dtype="float32"),
        f"int4-g32-{many}": Part("int4-g32", many),
    }
    return [
        first | {"transformers": Part("transformers", many)},
        second,
        {"bfloat16-raced": Part("bfloat16", before=RACED)},
    ]


def main() -> int:
    """Returns the exit code: 0 when all is there and right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the results")
    parser.add_argument("seconds", type=int, nargs="?", default=560)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", default="*", metavar="GLOB,GLOB", help="of the parts' names, and check")
    parser.add_argument(
        "--keep", type=Path, default=ROOT / "build" / "gpu", help="parts and programs (default build/gpu)"
    )
    args = parser.parse_args()
    run = Run(args)
    run.check()
    if run.results.get("check", {}).get("exit_code") == 2:  # no card: there is nothing to measure
        return run.finish()
    for wave in waves(4 if args.dry_run else 64):
        run.wave({name: part for name, part in wave.items() if run.asked(name)})
    return run.finish()


def is_done(found: dict[str, Any]) -> bool:
    """Whether there is nothing to try again."""
    return bool(found["checked"] and not found["not_run"]) if "checked" in found else "failed" not in found


class Run:
    """One call: its time, its folders, and what is known."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.ends = args, time.monotonic() + args.seconds - END
        self.keep = args.keep / ("dry" if args.dry_run else "card")
        for folder in (args.folder, self.keep):
            folder.mkdir(parents=True, exist_ok=True)
        self.facts = {"card": _card("name,driver_version,vbios_version,memory.total,power.limit,clocks.max.sm,pstate")}
        files = sorted([*(ROOT / "llmjax").rglob("*.py"), Path(__file__)])
        code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
        # What is kept is of this code and of this card, or else not.
        self.code = f"{code} {self.facts['card']}"
        kept = self.keep / "results.json"
        self.results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
        self.results = {name: r for name, r in self.results.items() if r["code"] == self.code and is_done(r)}
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu" if args.dry_run else os.environ.get("JAX_PLATFORMS", "cuda,cpu"),
            "JAX_COMPILATION_CACHE_DIR": str(self.keep / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes have the card
        }
        print(json.dumps(self.facts), f"kept: {', '.join(self.results) or 'nothing'}", flush=True)

    def asked(self, name: str) -> bool:
        """By ``--only``."""
        return any(fnmatchcase(name, glob) for glob in self.args.only.split(","))

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def put(self, name: str, found: dict[str, Any]) -> None:
        """Keeps what was found, in both folders: the time may end at any moment."""
        self.results[name] = found | {"code": self.code}
        for folder in (self.keep, self.args.folder):
            (folder / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (self.args.folder / "table.txt").write_text(table(self.results))

    def check(self) -> None:
        """Whether it is right."""
        if not self.asked("check") or "check" in self.results:
            return
        seconds = min(150, self.left / 3)
        command = [sys.executable, "scripts/gpu_check.py", "--seconds", str(int(seconds)), "--output", str(self.keep)]
        environment = dict(self.environment)
        if self.args.dry_run:
            command.append("--dry-run")
            environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
        began = time.monotonic()
        file = self.keep / "gpu_check.json"
        file.unlink(missing_ok=True)
        code: int | str
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds + 130).returncode
        except subprocess.TimeoutExpired:
            code = "cut off"
        rows = json.loads(file.read_text()) if file.exists() else {"checks": [], "not_run": []}
        (self.args.folder / "gpu_check.json").write_text(json.dumps(rows, indent=1) + "\n")
        wrong = [row["check"] for row in rows["checks"] if not row["fine"]]
        found = {"checked": len(rows["checks"]), "wrong": wrong, "not_run": rows["not_run"], "exit_code": code}
        complete = rows["checks"] and not wrong and not rows["not_run"]
        self.put("check", found | ({} if complete else {"failed": "see gpu_check.json"}))
        print(f"check: {time.monotonic() - began:.0f} s", flush=True)

    def wave(self, parts: dict[str, Part]) -> None:
        """Has parts measured; those that fail once more without kernels, for which they may have failed."""
        cores = len(os.sched_getaffinity(0))
        todo = [name for name in parts if name not in self.results]
        at_once = max(1, min(8, cores // 2))
        for start in range(0, len(todo), at_once):
            some = {name: parts[name] for name in todo[start : start + at_once]}
            self._together(some)
            again = {
                f"{name}, no kernels": dataclasses.replace(part, before=NO_KERNELS)
                for name, part in some.items()
                if self.results[name].get("failed", "").startswith("exit code")
                and not part.before
                and part.kind != "transformers"
            }
            if again and self.left > 60:
                self._together(again)

    def _together(self, parts: dict[str, Part]) -> None:
        if self.left < 30:
            for name in parts:
                self.put(name, {"failed": "no time left"})
            return
        began = time.monotonic()
        workers = {name: Worker(self, name, part) for name, part in parts.items()}
        try:
            ready = min(READY, self.left - 15)
            while workers:
                # All, if they are quick; later whoever is ready, while the others are held.
                while time.monotonic() - began < ready and not all(w.answered() for w in workers.values()):
                    time.sleep(0.1)
                able = [name for name, worker in workers.items() if worker.answered()]
                if not able and self.left < 15:
                    break
                if not able:
                    ready += 5
                    continue
                for worker in workers.values():
                    worker.hold()
                for name in able:
                    worker = workers.pop(name)
                    self.put(name, worker.measured(max(5, min(MEASURE, self.left))))
                    worker.close()
                    print(f"{name}: {self.results[name].get('failed', 'measured')}", flush=True)
                for worker in workers.values():
                    worker.go_on()
        finally:
            for name, worker in workers.items():
                worker.close()
                self.put(name, {"failed": f"not ready after {time.monotonic() - began:.0f} s"})
        print(f"{', '.join(parts)}: {time.monotonic() - began:.0f} s", flush=True)

    def finish(self) -> int:
        """The table, logs and the exit code."""
        text = table(self.results)
        with tarfile.open(self.args.folder / "logs.tar.gz", "w:gz") as tar:
            for file in sorted(self.keep.glob("*.log")):
                tar.add(file, file.name)
        print(text, end="", flush=True)
        return 1 if any("failed" in found for found in self.results.values()) else 0


class Worker:
    """A part's process: it gets ready, says so, and is measured when it is told to."""

    def __init__(self, run: Run, name: str, part: Part):
        self._log = run.keep / f"{name.replace(', ', '-').replace(' ', '-')}.log"
        environment = run.environment | {"XLA_FLAGS": f"{run.environment.get('XLA_FLAGS', '')} {part.flags}".strip()}
        command = [sys.executable, "scripts/gpu_part.py", json.dumps(dataclasses.asdict(part))]
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                command + (["--dry-run"] if run.args.dry_run else []),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=ROOT,
                text=True,
            )
        self._seconds = 0.0
        self._began = time.monotonic()

    def answered(self) -> bool:
        """Whether it is ready, or has ended."""
        found = bool(select.select([self._process.stdout], [], [], 0)[0])
        if found and not self._seconds:
            self._seconds = time.monotonic() - self._began
        return found

    def hold(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)

    def measured(self, seconds: float) -> dict[str, Any]:
        """What it found, in so many seconds, and the card's state meanwhile; or how it failed."""
        assert self._process.stdin and self._process.stdout
        self.go_on()
        if not self._process.stdout.readline():
            return {"failed": self._last()}
        with contextlib.suppress(OSError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        states, ends = [], time.monotonic() + seconds
        while time.monotonic() < ends and not select.select([self._process.stdout], [], [], 2)[0]:
            states.append(_card(",".join(STATE)))  # seldom: to be asked takes a card's time
        if time.monotonic() >= ends:
            return {"failed": f"not measured after {seconds:.0f} s"}
        line = self._process.stdout.readline()
        if not line:
            return {"failed": self._last()}
        found: dict[str, Any] = json.loads(line)
        return found | {"ready_seconds": round(self._seconds, 1), "state": states}

    def _last(self) -> str:
        self._process.wait()
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if "Error" in line or line.startswith("F")] or lines
        return f"exit code {self._process.returncode}: {told[-1][:300] if told else ''}"

    def close(self) -> None:
        """Ends it, at once: its memory is the next one's."""
        self._process.kill()
        self._process.wait()


def _card(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip().splitlines()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return ""


def table(results: dict[str, Any]) -> str:
    """A few lines for each part."""
    lines = []
    for name, found in results.items():
        if "failed" in found:
            lines.append(f"{name}: {found['failed']}")
        if "checked" in found:
            lines.append(
                f"{name}: {found['checked']} checked, {len(found['not_run'])} not run, wrong: {found['wrong']}"
            )
        if rates := found.get("transformers"):
            speeds = [f"{phase} {rate:.1f} tok/s" for phase, rate in rates.items() if " " in phase]
            peaks = f"copies {rates['copies'] / 1e9:.0f} GB/s, bfloat16 products {rates['products'] / 1e12:.1f} TFLOP/s"
            lines.append(f"{name}, torch {found['versions'][0]}: {peaks}; {', '.join(speeds)}")
        if "settings" not in found:
            continue
        peaks = "".join(f", {d} {r['median'] / 1e12:.1f} TFLOP/s" for d, r in found["matmul_flops_per_second"].items())
        lines.append(
            f"{name}: copies {found['read_bytes_per_second']['median'] / 1e9:.0f} GB/s{peaks}; load "
            f"{found['load_seconds']:.0f} s, compile {found['compile_seconds']:.0f} s; {found['state'][-1:]}"
        )
        for s in found["settings"]:
            speed = s["tokens_per_second"]
            lines.append(
                f"  {s['phase']:8} {s['tokens']:5} tokens, {s['in_use']:3} rows: {speed['median']:10.1f} tok/s"
                f" ({speed['min']:.1f}-{speed['max']:.1f})  {s['bytes_per_second'] / 1e9:8.1f} GB/s"
                f"  {s['flops_per_second'] / 1e12:7.2f} TFLOP/s  {s['of_limit']:5.0%} of the limit ({s['bound']})"
            )
        for run, ran in found["kernels"].items():
            count = sum(n for _, n, _ in ran["kernels"])
            lines.append(f"  {run}: {count} kernels, {ran['busy']:.0f} of {ran['microseconds']:.0f} microseconds")
    return "\n".join([*lines, *goals(results), ""])


def goals(results: dict[str, Any]) -> list[str]:
    """The figures that are asked for, one a line."""

    def setting(part: str, phase: str, tokens: int) -> dict[str, Any] | None:
        settings = results.get(part, {}).get("settings", ())
        return next((s for s in settings if (s["phase"], s["tokens"]) == (phase, tokens)), None)

    lines, steps = [], {kind: setting(kind, "decode", 128) for kind in ("bfloat16", "int8", "int4")}
    if one := steps["bfloat16"]:
        copies = results["bfloat16"]["read_bytes_per_second"]["median"]
        lines.append(f"one stream of bfloat16: {one['bytes_per_second'] / copies:.0%} of the copies' bandwidth")
        for kind in ("int8", "int4"):
            if other := steps[kind]:
                times = other["tokens_per_second"]["median"] / one["tokens_per_second"]["median"]
                lines.append(f"one stream of {kind}: {times:.2f} times bfloat16")
    for name, found in results.items():
        for s in found.get("settings", ()):
            if s["phase"] == "decode" and s["in_use"] > 1 and name.count("-") == 1:
                lines.append(f"{s['in_use']} streams, {name}: {s['of_limit']:.0%} of the limit ({s['bound']})")
            if s["phase"] == "prefill" and "-" not in name:
                peak = found["matmul_flops_per_second"].get("bfloat16")
                if peak:
                    share = s["flops_per_second"] / peak["median"]
                    lines.append(f"a prompt of {s['tokens']}, {name}: {share:.0%} of bfloat16 products")
    return lines


if __name__ == "__main__":
    sys.exit(main())
