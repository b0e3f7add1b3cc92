"""What the machine itself can do: bytes read a second and operations a second, in programs of a few lines."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.device import device_of
from llmjax.numerics import resolve
from llmjax.products.sums import by_weight

# Far above any processor's caches; a GPU reads more in the time one call takes to start.
_READ_BYTES = {"cpu": 1 << 30, "gpu": 4 << 30}
# Of what is free of a device's memory, the probe's part at most, the copy included.
_SHARE = 1 / 4
_READ_ARRAYS = 16
_WIDTH = 4096
# Rows, inputs and outputs of the product: large enough for full speed, small enough for a second at most.
_MATMUL_SIZE = {"cpu": 1536, "gpu": 8192}


def read_probe(size: int | None = None) -> Callable[[], float]:
    """A function that returns bytes a second of the default device's memory.

    On the CPU they are read: products of one float32 row with large ``[out, in]`` arrays, as sums
    (``llmjax.products.sums``), which read at memory speed on all cores.  Elsewhere they are copied, and those written
    count as well.

    Args:
      size: bytes to read, rounded down to a few whole rows of each array; None takes what suits the device.
    """
    device = device_of()
    size = size or _READ_BYTES.get(device.platform, _READ_BYTES["gpu"])
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        size = min(size, int(_SHARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) / 2))
    rows = max(2, size // (_READ_ARRAYS * _WIDTH * 4) // 4 * 4)
    weights = [jnp.full((rows, _WIDTH), 0.5 + i, jnp.float32) for i in range(_READ_ARRAYS)]
    if device.platform != "cpu":
        copy = jax.jit(lambda weights: [w + 1 for w in weights])
        return functools.partial(_rate, functools.partial(copy, weights), 2 * sum(w.nbytes for w in weights))
    x = jnp.ones((1, _WIDTH), jnp.float32)

    @functools.partial(jax.jit, compiler_options=resolve("fast", x.dtype).compiler_options("cpu"))
    def read(x: jax.Array, weights: list[jax.Array]) -> list[jax.Array]:
        return [by_weight(x, w) for w in weights]

    return functools.partial(_rate, functools.partial(read, x, weights), sum(w.nbytes for w in weights))


def matmul_probe(dtype: str, size: int | None = None) -> Callable[[], float]:
    """A function that returns operations a second (two for each multiply-add) of a square product, on the default
    device.

    Args:
      dtype: of both operands: ``float32`` (at the highest precision), ``bfloat16``, ``float16`` or ``int8`` (summed in
        int32).
      size: of each side; None takes what suits the device.
    """
    platform = device_of().platform
    size = size or _MATMUL_SIZE.get(platform, _MATMUL_SIZE["gpu"])
    # Random, for a card's clock follows the bits that change: with constants it would be faster than any model.
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.float32) for i in (0, 1))
    a, b = ((32 * x).astype(dtype) for x in (a, b))
    sums = jnp.int32 if dtype == "int8" else jnp.float32
    # On a card the library's: what else XLA would try takes it as long to compile as a model.
    options: dict[str, bool | int] = {"xla_gpu_enable_triton_gemm": False} if platform == "gpu" else {}
    multiply = jax.jit(functools.partial(_product, sums=sums), compiler_options=options)
    return functools.partial(_rate, functools.partial(multiply, a, b), 2 * size**3)


def _product(x: jax.Array, weight: jax.Array, sums: jnp.dtype) -> jax.Array:
    return lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=sums
    )


def _rate(call: Callable[[], object], amount: int) -> float:
    """``amount`` a second, over a few calls that wait for each other only at the end."""
    calls = 4 if device_of().platform == "cpu" else 10
    began = time.perf_counter()
    for _ in range(calls):
        result = call()  # the one before is freed: it must not take a card's memory
    jax.block_until_ready(result)
    return calls * amount / (time.perf_counter() - began)
