"""Progress of what takes long, on a terminal alone."""

import sys


def report_tensors(done: int, total: int) -> None:
    """How many tensors are done."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} tensors", end="\n" if done == total else "", file=sys.stderr, flush=True)


def report_line(line: str) -> None:
    """A line in the place of the one before."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
