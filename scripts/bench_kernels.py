#!/usr/bin/env python3
"""How long products and attention of Gemma 2B's size take on a card, alone.

    python scripts/bench_kernels.py [--only GLOB] [--tilings] [--dry-run]

Times are those of a profiler's trace, the mean of some calls whose weights are never the same two in a row, so that
none is left in the card's cache: of all kernels of a call, and how many those are.  Beside each product stand the bytes
of its weights a second.  ``--tilings`` tries other tilings of each product than the kernel's own, some half a minute a
line: what is found so belongs into ``products.kernel``.  ``--dry-run`` runs all once, in small, on whatever device
there is.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.models.attention import Scores, cached_attention
from llmjax.models.context import Context
from llmjax.numerics import resolve
from llmjax.products import kernel
from llmjax.products.matmul import matmul, matmuls
from llmjax.quant.bits import to_storage
from llmjax.quant.qtensor import QTensor
from scripts.gpu_part import kernels

SHAPES = {
    "gate, up": [(16384, 2048)] * 2,
    "down": [(2048, 16384)],
    "q, k, v": [(2048, 2048), (256, 2048), (256, 2048)],
    "o": [(2048, 2048)],
    "head": [(256000, 2048)],
}
BEST = 8  # tilings that are shown
CALLS, CACHE = 12, 200e6  # bytes of weights that no cache holds
PAGE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB", help="of the lines' names")
    parser.add_argument("--tilings", action="store_true", help="try others than the kernel's own, the quickest first")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    for name, make in cases(args.dry_run):
        if fnmatchcase(name, args.only):
            call, inputs, nbytes = make()
            us, count = microseconds(call, inputs, args.dry_run)
            speed = f"{nbytes / us / 1e3:8.0f} GB/s" if nbytes and us else ""
            print(f"{name:48} {us:9.2f} us in {count} kernels {speed}", flush=True)
            if args.tilings and nbytes:
                for us, tiling in sorted(of_tilings(make, args.dry_run))[:BEST]:
                    print(f"    {us:9.2f} us {tiling}", flush=True)


def cases(small: bool) -> Iterator[tuple[str, Callable[[], tuple[Any, list[Any], int]]]]:
    """Names, and what makes a function, its arguments and the bytes of weights."""
    for kind, dtype in (
        ("bfloat16", "bfloat16"),
        *((kind, dtype) for kind in ("int8", "int4", "int4-g32") for dtype in ("float32", "bfloat16")),
    ):
        for what, shapes in SHAPES.items():
            for rows in (1, 64) if what == "head" else (1, 64, 2048):
                sizes = [(out // 64, width // 8) for out, width in shapes] if small else shapes
                yield f"{what}: {kind}, {rows} rows of {dtype}", functools.partial(product, kind, dtype, rows, sizes)
    for dtype in ("bfloat16", "float32"):
        for rows, tokens, past in ((1, 1, 160), (64, 1, 160), (1, 1, 8000), (1, 2048, 0)):
            name = f"attention: {dtype}, {rows} rows of {tokens} after {past}"
            yield name, functools.partial(attention, dtype, rows, tokens // (8 if small else 1) or 1, past)


def product(kind: str, dtype: str, rows: int, shapes: list[tuple[int, int]]) -> tuple[Any, list[Any], int]:
    """Of x with weights that meet it at once."""
    numerics = resolve("fast", jnp.dtype(dtype))
    x = jax.random.normal(jax.random.key(0), (rows, shapes[0][1]), numerics.activations)

    def weights(seed: int) -> list[Any]:
        return [weight(kind, *shape, jax.random.key(seed + i)) for i, shape in enumerate(shapes)]

    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights(0)))
    copies = min(24, int(CACHE // nbytes) + 1) if rows <= 64 else 1

    @functools.partial(jax.jit, compiler_options=numerics.compiler_options(jax.devices()[0].platform))
    def call(x: jax.Array, weights: list[Any]) -> list[jax.Array]:
        found = matmuls(x, weights, numerics)
        return [matmul(x, w, numerics) if y is None else y for y, w in zip(found, weights, strict=True)]

    return call, [(x, weights(10 * i)) for i in range(copies)], nbytes


def weight(kind: str, out: int, width: int, key: jax.Array) -> Any:
    if kind == "bfloat16":
        return jax.random.normal(key, (out, width), jnp.bfloat16)
    groups = width // int(kind.partition("-g")[2] or width)
    scales = jax.random.uniform(key, (out, groups), jnp.float32, 0.5, 1.5)
    if kind == "int8":
        return QTensor(jax.random.randint(key, (out, width), -127, 128, jnp.int8), scales)
    return QTensor(jax.random.bits(key, (out, width // 2), jnp.uint8), scales, bits=4, zero=8)


def of_tilings(make: Callable[[], tuple[Any, list[Any], int]], small: bool) -> Iterator[tuple[float, kernel.Tiling]]:
    """A product's microseconds under its own tiling and its neighbours, none where it is not the kernel's."""
    own, chosen = kernel._tiling, set[kernel.Tiling]()

    def tried(*args: Any) -> kernel.Tiling:
        tiling = own(*args)
        chosen.update(neighbours(tiling, args[-1]))
        return tiling

    with mock.patch.object(kernel, "_tiling", tried):
        call, inputs, _ = make()
        call.lower(*inputs[0])
    for tiling in sorted(chosen)[: 2 if small else None]:
        with mock.patch.object(kernel, "_tiling", lambda *args, tiling=tiling: tiling):
            call, inputs, _ = make()
            try:
                yield microseconds(call, inputs, small)[0], tiling
            except jax.errors.JaxRuntimeError as error:  # more shared memory than the card has
                print(f"    {tiling}: {str(error).partition(chr(10))[0][:80]}", flush=True)


def neighbours(own: kernel.Tiling, weights: list[Any]) -> Iterator[kernel.Tiling]:
    """The tiling, and those that differ in channels and parts, in width and stages, or in warps."""
    stored = kernel._stored(weights[0]).shape[-1]
    least = min(kernel._stored(weight).shape[-2] for weight in weights)
    widths = {own.width // 2, own.width, own.width * 2, own.width * 4} if own.sets == 1 else {own.width}
    group = stored // kernel._groups(weights[0])
    for channels in (16, 32, 64, 128):
        for parts in (1, 2, 4, 8, 16):
            if channels <= least and (stored // own.width) % parts == 0:
                yield own._replace(channels=channels, parts=parts)
    for width in widths:
        for stages in (2, 3, 4, 6):
            if width >= 16 and (own.sets > 1 or group % width == 0) and (stored // width) % own.parts == 0:
                yield own._replace(width=width, stages=stages)
                # Few channels, whose sums need no parts, have as many bytes under way in wide turns.
                yield own._replace(channels=16, parts=1, width=width, stages=stages)
    for warps in (2, 4, 8):
        yield own._replace(warps=warps)


def attention(dtype: str, rows: int, tokens: int, past: int) -> tuple[Any, list[Any], int]:
    """Of each row's ``tokens`` with its ``past`` and themselves, in pages of any order."""
    numerics, pages = resolve("fast", jnp.dtype(dtype)), -(-(past + tokens) // PAGE)
    order = 1 + np.random.default_rng(0).permutation(rows * pages).reshape(rows, pages).astype(np.int32)
    positions = jnp.broadcast_to(past + jnp.arange(tokens, dtype=jnp.int32), (rows, tokens))
    ctx = Context(positions, numerics, PAGE // 2, jnp.asarray(order))
    q = jax.random.normal(jax.random.key(0), (rows, tokens, 8, 256), numerics.activations)

    def caches(seed: int) -> list[jax.Array]:
        shapes = ((rows * pages + 1, 1, PAGE, 256), (rows * pages + 1, 1, 256, PAGE))
        return [to_storage(jax.random.normal(jax.random.key(seed), shape, numerics.products)) for shape in shapes]

    call = jax.jit(
        lambda q, k, v: cached_attention(q, k, v, Scores(1 / 16), ctx),
        compiler_options=numerics.compiler_options(jax.devices()[0].platform),
    )
    return call, [(q, *caches(i)) for i in range(4)], 0


def microseconds(call: Any, inputs: list[Any], once: bool) -> tuple[float, int]:
    """Of a call, and its kernels."""
    jax.block_until_ready(call(*inputs[0]))
    if once:
        return 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(CALLS):
                jax.block_until_ready(call(*inputs[i % len(inputs)]))
        ran = [(count, us) for name, count, us in kernels(Path(folder))["kernels"] if not name.startswith("Mem")]
    return sum(us for _, us in ran) / CALLS, sum(count for count, _ in ran) // CALLS


if __name__ == "__main__":
    main()
