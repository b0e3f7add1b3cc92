#!/usr/bin/env python3
"""Damages op graphs and bundles, and checks that each costs a line: no crash, no endless loop, no memory without end.

    python scripts/mutate_litert.py FILE.tflite|FILE.litertlm|FILE.task[.xz]... [--count 10000] [--seed 0]

Bytes and bits are changed, offsets led in circles or out of the file, sizes made to lie, ends cut off.  What still
loads is looked at as ``inspect``, ``compare`` and ``convert`` do.  Child processes do it, a thousand files each, with 3
GB of address space beyond what they have at the beginning; five minutes without an outcome are an endless loop.
"""

import argparse
import collections
import lzma
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

_EACH, _SECONDS, _MEMORY = 1000, 300, 3 << 30


def mutations(data: bytes, count: int, seed: object) -> Iterator[bytes]:
    """``count`` damaged copies."""
    rng = np.random.default_rng(seed)  # type: ignore[arg-type]
    for _ in range(count):
        changed = bytearray(data)
        # Tables and offsets are dense at both ends of small files, and in the first bytes of large ones.
        reach = int(rng.choice([64, 4096, len(data)]))
        for _ in range(rng.integers(1, 8)):
            at = int(rng.integers(min(reach, len(changed))))
            changed[at : at + 4] = (
                rng.bytes(1),
                rng.bytes(4),
                bytes([changed[at] ^ 1 << int(rng.integers(8))]),
                b"\xff\xff\xff\x7f",
                b"\xff\xff\xff\xff",
                b"\0\0\0\0",
                int(rng.integers(len(data))).to_bytes(4, "little"),
                (0xFFFFFFFF & -int(rng.integers(1, 1 << 12))).to_bytes(4, "little"),
            )[rng.integers(8)]
        yield bytes(changed[: rng.integers(len(changed))] if rng.integers(5) == 0 else changed)


def outcome(path: Path) -> str:
    """What a file costs: ``runs``, or ``error`` where it is refused in a line or a list of them.

    Raises:
      Exception: anything else that it does.
    """
    import llmjax
    from llmjax.checkpoint.graph_source import GraphSource
    from llmjax.errors import LlmjaxError

    try:
        llmjax.inspect(path)
        model = llmjax.load(path)
        list(model.roles.outputs)
        GraphSource(path)
    except LlmjaxError as error:
        if len(str(error)) > 4000 or not str(error).startswith(str(path)):
            raise ValueError(f"the message: {str(error)[:300]!r}") from None
        return "error"
    return "runs"


def _child(
    data: bytes, suffix: str, numbers: range, seed: int, results: "multiprocessing.Queue[tuple[int, str]]"
) -> None:
    import llmjax.checkpoint.graph_source  # noqa: F401

    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + _MEMORY,) * 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        for number, changed in zip(numbers, mutations(data, len(numbers), [seed, numbers.start]), strict=True):
            path.write_bytes(changed)
            try:
                found = outcome(path)
            except BaseException as error:  # noqa: BLE001
                found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            results.put((number, found))
    results.put((-1, ""))


def run(data: bytes, suffix: str, numbers: range, seed: int) -> Iterator[tuple[int, str]]:
    """The outcomes of some mutations, in a process of their own."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[int, str]] = context.Queue()
    child = context.Process(target=_child, args=(data, suffix, numbers, seed, results))
    child.start()
    last, began = numbers.start - 1, time.monotonic()
    while True:
        try:
            number, found = results.get(timeout=1)
        except Exception:  # noqa: BLE001
            if child.is_alive() and time.monotonic() - began < _SECONDS:
                continue
            child.kill()
            yield last + 1, f"crash or endless loop (exit code {child.exitcode})"
            return
        if number < 0:
            break
        last, began = number, time.monotonic()
        yield number, found
    child.join()


def main() -> int:
    """Returns 1 where a file does anything but run or give an error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=10_000, help="of all files together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for file in args.files:
        if not file.is_file():
            parser.error(f"{file}: no such file")
    counts: collections.Counter[str] = collections.Counter()
    each, bad = -(-args.count // len(args.files)), 0
    for file in args.files:
        data = lzma.open(file).read() if file.suffix == ".xz" else file.read_bytes()
        suffix = Path(file.name.removesuffix(".xz")).suffix
        for start in range(0, each, _EACH):
            for number, found in run(data, suffix, range(start, min(start + _EACH, each)), args.seed):
                counts[found if found in ("runs", "error") else "bad"] += 1
                if found not in ("runs", "error"):
                    bad += 1
                    print(f"{file}: seed {args.seed}, mutation {number}: {found}", flush=True)
            print(f"{file.name}: {dict(counts)}", file=sys.stderr, flush=True)
    print(f"{sum(counts.values())} mutations: {counts['error']} refused, {counts['runs']} run, {bad} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
