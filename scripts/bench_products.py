#!/usr/bin/env python3
"""Each way a product ``x . W^T`` can run, beside the one llmjax chooses: the reasons for ``llmjax/products/matmul.py``.

    .venv/bin/python scripts/bench_products.py
    .venv/bin/python scripts/bench_products.py --shape 1536,576 --layers 48 --rows 1 8

Weights of several layers, together beyond the caches, are multiplied one after the other in one program.  The unit is a
billion weights a second, the median of several runs; * marks what llmjax runs on this machine, weight-only and dynamic.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmjax.errors import LlmjaxError
from llmjax.numerics import resolve
from llmjax.products.cpu import has_integer_dot, has_integer_tiles
from llmjax.products.digits import in_digits, in_tiles
from llmjax.products.matmul import matmul
from llmjax.products.sums import by_weight
from llmjax.quant.rounding import quantize
from llmjax.quant.schemes import Scheme

Product = Callable[[jax.Array, Any], jax.Array]


def rows_first(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x . W^T``."""
    return lax.dot_general(x.astype(w.dtype), w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def weight_first(x: jax.Array, w: jax.Array) -> jax.Array:
    """``W . x^T``."""
    y = lax.dot_general(w, x.astype(w.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return lax.optimization_barrier(y).T


def chosen(profile: str) -> Product:
    """What llmjax runs under a profile."""
    return lambda x, w: matmul(x, w, resolve(profile, w.dtype))


def ways(kind: str, rows: int) -> dict[str, Product]:
    """The alternatives for weights of a kind."""
    if kind in ("float32", "bfloat16"):
        found = {"x.W^T": rows_first, "W.x^T": weight_first, "*": chosen("fast")}
    else:
        found = {"float32 tiles": in_tiles}
        if "-g" not in kind:
            found |= {"3 digits": lambda x, w: in_digits(x, w, 3), "1 digit": lambda x, w: in_digits(x, w, 1)}
        found |= {"*": chosen("fast"), "* dynamic": chosen("dynamic_int8")}
    return ({"sum": by_weight} if rows <= 16 else {}) | found


def speed(multiply: Product, x: jax.Array, weights: list[Any], repeats: int) -> float:
    """Weights a second."""

    @partial(jax.jit, compiler_options=resolve("fast", jnp.float32).compiler_options("cpu"))
    def run(x: jax.Array, weights: list[Any]) -> jax.Array:
        for w in weights:
            y = lax.optimization_barrier(multiply(x, w))  # all of it, though one element is read
            # The next product waits for this one, as a model's layers do.
            bit = lax.bitcast_convert_type(y[0, 0], jnp.uint32) == 0x7FC1_2345
            x = lax.optimization_barrier(x + bit.astype(x.dtype))
        return x

    jax.block_until_ready(run(x, weights))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run(x, weights))
        times.append(time.perf_counter() - began)
    return len(weights) * float(np.prod(weights[0].shape)) / statistics.median(times)


def main() -> None:
    """Prints a table for each kind of weight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8192,2048", help="out,in (default 8192,2048)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 32, 128])
    parser.add_argument("--kinds", nargs="+", default=["float32", "bfloat16", "int8", "int4", "int4-g32"])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    try:
        out, width = map(int, args.shape.split(","))
        for kind in {*args.kinds} - {"float32", "bfloat16"}:
            Scheme.parse(kind)
    except (ValueError, LlmjaxError) as error:
        parser.error(f"--shape, --kinds: {error}")
    rng = np.random.default_rng(0)
    instructions = {"dot": has_integer_dot(), "tiles": has_integer_tiles()}
    print(f"jax {jax.__version__}, integer instructions: {instructions}, [{out}, {width}] x {args.layers}")
    for kind in args.kinds:
        weights: list[Any] = []
        for _ in range(args.layers):
            w = rng.standard_normal((out, width), np.float32)
            if kind in ("float32", "bfloat16"):
                weights.append(jnp.asarray(w, kind))
            else:
                q = quantize(lambda a, b, w=w: w[a:b], w.shape, Scheme.parse(kind))
                weights.append(q.map(jnp.asarray))
        for rows in args.rows:
            x = jnp.asarray(rng.standard_normal((rows, width), np.float32))
            found = (
                f"{name} {speed(way, x, weights, args.repeats) / 1e9:6.2f}" for name, way in ways(kind, rows).items()
            )
            print(f"{kind:9} {rows:4} rows   " + "   ".join(found), flush=True)


if __name__ == "__main__":
    main()
