"""What the CPU can do."""

import functools
from pathlib import Path

# x86: VNNI in its three forms, AMX; Arm: SDOT.
_INTEGER_TILES = {"amx_int8"}
_INTEGER_DOT = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "asimddp"} | _INTEGER_TILES
_BFLOAT16_DOT = {"avx512_bf16", "amx_bf16", "bf16"}


def has_integer_dot() -> bool:
    """Whether one instruction multiplies and adds int8, so that integer products outrun float32; False where the
    system does not say (``/proc/cpuinfo``)."""
    return not _INTEGER_DOT.isdisjoint(_features())


def has_integer_tiles() -> bool:
    """Whether one instruction multiplies tiles of int8, many times as fast as float32; False where the system does not
    say."""
    return not _INTEGER_TILES.isdisjoint(_features())


def has_bfloat16_dot() -> bool:
    """Whether one instruction multiplies and adds bfloat16; False where the system does not say."""
    return not _BFLOAT16_DOT.isdisjoint(_features())


@functools.cache
def _features() -> frozenset[str]:
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()
