"""What the CPU can do."""

import functools
from pathlib import Path

# x86: VNNI in its three forms, AMX; Arm: SDOT.
_INTEGER_DOT = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp"}


@functools.cache
def has_integer_dot() -> bool:
    """Whether one instruction multiplies and adds int8, so that integer products outrun float32; False where the
    system does not say (``/proc/cpuinfo``)."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not _INTEGER_DOT.isdisjoint(words)
