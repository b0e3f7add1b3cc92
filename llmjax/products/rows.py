"""One row's products with weights of four bits as a kernel for an NVIDIA card, what ``defined`` writes as sums.

XLA's sums take nine instructions a weight, as compiled for an H100, whose memory brings one in the time of five.  Here
they are six: a byte is the last bits of 2^23 and more, of which 2^23 is taken away with what means zero, exactly.  Of
its two weights the lower one is its last bits, and the upper one a sixteenth of what is left: so they meet ``even - odd
/ 16``, rounded to 2^-28 of odd at worst, and, the whole byte, ``odd / 16``.  All weights that meet the same x are one
kernel.

The order of a sum follows from shapes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from llmjax.quant.qtensor import QTensor

# Bytes that a thread loads at once, and those of a program's turn: four such loads for each of its threads.
_LOAD, _TURN, _WARPS = 16, 8192, 4
# Fewest loads of a channel that stand side by side.
_FEWEST = 4


def can_serve(weight: Any) -> bool:
    """Whether the kernel knows a weight: of four bits, and all that is loaded at once is of one group."""
    return (
        isinstance(weight, QTensor)
        and weight.bits == 4
        and weight.values.size < 1 << 31
        and weight.values.shape[1] // weight.scales.shape[1] % _LOAD == 0
        and _tile(weight)[1] >= _FEWEST
        and weight.shape[0] >= _tile(weight)[0]
    )


def _tile(q: QTensor) -> tuple[int, int]:
    """Channels of a program, and loads of each in a turn: powers of two."""
    loads = q.values.shape[1] // _LOAD
    loads = min(32 * _WARPS, loads & -loads)
    return _TURN // (_LOAD * loads), loads


def row_products(x: jax.Array, *weights: QTensor, interpret: bool = False) -> list[jax.Array]:
    """``x [1, in] . weight [out, in] -> float32 [1, out]`` for each weight.

    Args:
      x: float32.
      weights: all of which it ``can_serve``.
      interpret: run it on any device, slowly.
    """
    programs = [pl.cdiv(q.shape[0], _tile(q)[0]) for q in weights]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    args = (x.reshape(-1, 2), weights)
    found: list[jax.Array] = pl.pallas_call(
        functools.partial(_sum, programs),
        grid=(sum(programs),),
        in_specs=jax.tree.map(lambda _: anywhere, args),
        out_specs=[anywhere] * len(weights),
        out_shape=[jax.ShapeDtypeStruct((q.shape[0],), jnp.float32) for q in weights],
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="row_products",
    )(*args)
    return [y[None] for y in found]


def _sum(programs: list[int], x: Any, weights: Any, *results: Any) -> None:
    """Some channels of one weight."""
    first = 0
    for count, q, result in zip(programs, weights, results, strict=True):
        number = pl.program_id(0) - first
        pl.when((number >= 0) & (number < count))(functools.partial(_channels, number, x, q, result))
        first += count


def _channels(number: jax.Array, x: Any, q: Any, result: Any) -> None:
    channels, loads = _tile(q)
    (out, stored), groups = q.values.shape, q.scales.shape[1]
    apart = groups > 1 or q.offsets is not None
    # The last program may repeat channels of the one before, to the same bits.
    outs = jnp.minimum(number * channels, out - channels) + jnp.arange(channels, dtype=jnp.int32)
    magic = np.uint32(0x4B00_0000)

    def number_of(bits: jax.Array, zero: int) -> jax.Array:
        return lax.bitcast_convert_type(bits | magic, jnp.float32) - np.float32((1 << 23) + zero)

    def turn(i: jax.Array, acc: jax.Array) -> jax.Array:
        load = i * loads + jnp.arange(loads, dtype=jnp.int32)
        at = load[:, None] * _LOAD + jnp.arange(_LOAD, dtype=jnp.int32)[None]
        byte = plt.load(q.values.at[outs[:, None, None], at[None]]).astype(jnp.uint32)
        low, both = number_of(byte & np.uint32(15), q.zero), number_of(byte, 17 * q.zero)
        even, odd = plt.load(x.at[at, np.int32(0)]), plt.load(x.at[at, np.int32(1)])
        part = odd * np.float32(1 / 16)
        y = jnp.sum(low * (even - part)[None] + both * part[None], 2)
        if apart:
            group = outs[:, None], (lax.div(load, np.int32(stored // groups // _LOAD)))[None]
            y = y * plt.load(q.scales.at[group]).astype(jnp.float32)
            if q.offsets is not None:
                y = y + jnp.sum(even + odd, 1)[None] * plt.load(q.offsets.at[group]).astype(jnp.float32)
        return acc + y

    turns = stored // (loads * _LOAD)
    y = jnp.sum(lax.fori_loop(0, turns, turn, jnp.zeros((channels, loads), jnp.float32)), 1)
    if not apart:
        y = y * plt.load(q.scales.at[outs, np.int32(0)]).astype(jnp.float32)
    plt.store(result.at[outs], y)
