"""Runs the few instructions of PTX that kernels are given, in NumPy: registers of 32 bits, a number for each thread."""

import re

import ml_dtypes
import numpy as np

HALVES = {"f16x2": np.float16, "bf16x2": ml_dtypes.bfloat16}


def run(lines: str, count: int, given: list[np.ndarray]) -> list[np.ndarray]:
    """What is in ``$0``, ``$1`` ... at the end.

    Args:
      lines: instructions between braces.
      count: of results.
      given: uint32, what is in the registers that follow.
    """
    registers = {f"${count + i}": x for i, x in enumerate(given)}
    for line in lines.strip(" {}").split(";"):
        op, _, rest = line.strip().partition(" ")
        if not op or op == ".reg":
            continue
        to, *args = (arg.strip() for arg in rest.split(","))
        x = [registers[a] if a in registers else np.full(given[0].shape, int(a, 0), np.uint32) for a in args]
        registers[to] = instruction(op, x)
    return [registers[f"${i}"] for i in range(count)]


def instruction(op: str, x: list[np.ndarray]) -> np.ndarray:
    name, *kinds = op.split(".")
    if name == "fma":
        dtype = HALVES[kinds[-1]]
        a, b, c = (v[..., None].view(np.uint16).view(dtype).astype(np.float64) for v in x)
        return np.ascontiguousarray((a * b + c).astype(dtype)).view(np.uint32)[..., 0]
    if name == "prmt":
        a, b, which = x
        places = [(which >> np.uint32(4 * i)) & np.uint32(7) for i in range(4)]
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        some = [(both >> (np.uint64(8) * p)) & np.uint64(255) for p in places]
        return sum(byte << np.uint64(8 * i) for i, byte in enumerate(some)).astype(np.uint32)
    if name == "lop3":
        a, b, c, table = x
        assert (table == 0xEA).all()
        return a & b | c
    return {"mov": lambda a: a, "and": np.bitwise_and, "xor": np.bitwise_xor, "shr": np.right_shift}[name](*x)


def elementwise(asm: str, pack: int, count: int, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Of bytes ``x``, ``pack`` of them in one register, numbers of 16 bits, two in one."""
    assert pack == 4 and count == 2 and x.dtype.itemsize == 1 and dtype.itemsize == 2
    words = np.ascontiguousarray(x).reshape(-1, 4).view(np.uint32)[:, 0]
    found = np.stack(run(re.sub(r"\s+", " ", asm), count, [words]), -1)
    return np.ascontiguousarray(found).view(dtype).reshape(x.shape)
