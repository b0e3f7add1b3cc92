"""What attention's kernels, a prompt's and a step's, have in common: how a head is cut, read and multiplied."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from llmjax.quant.bits import halves, into_half

# Tensor cores have no fewer queries, keys or dimensions.
FEWEST = 16
# Heads as wide as this fill an SM's registers; no register file holds wider ones than the widest.
WIDTH, WIDEST = 256, 512

# ``(products, queries, keys, slopes) -> (scores, mask)``, see ``attention.Scores``.
Rule = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]


class Call(NamedTuple):
    """What a call's kernels are told.

    Attributes:
      rule: makes scores of products.
      window: of the rule.
      slopes: of the rule, float32 ``[N]``.
      interpret: run them on any device, slowly.
    """

    rule: Rule
    window: int | None
    slopes: jax.Array | None
    interpret: bool

    def run(self, kernel: Any, grid: tuple[int, ...], args: list[Any], shapes: Any, name: str, **how: int) -> Any:
        anywhere = pl.BlockSpec(memory_space=pl.ANY)
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[anywhere] * len(args),
            out_specs=jax.tree.map(lambda _: anywhere, shapes),
            out_shape=shapes,
            compiler_params=plt.CompilerParams(**how),
            interpret=self.interpret,
            name=name,
        )(*args)


class Piece(NamedTuple):
    """Neighbouring dimensions of a head, a power of two; of the last the head may have but some."""

    start: int
    size: int
    whole: bool

    @property
    def lanes(self) -> jax.Array:
        """int32 ``[size]``: which they are."""
        return self.start + jnp.arange(self.size, dtype=jnp.int32)


def pieces_of(width: int, most: int) -> list[Piece]:
    """Of a head, the largest first, of so many dimensions at most."""
    found, start = [], 0
    while (left := width - start) > 0:
        size = min(most, max(FEWEST, 1 << (left.bit_length() - 1)))
        found.append(Piece(start, size, size <= left))
        start += size
    return found


def cut(cache: Any, piece: Piece, width: int, axis: int, *index: Any) -> jax.Array:
    """Of a head's keys or values the dimensions of a piece, along ``axis``; zero for those that it has not."""
    mask = None if piece.whole else jnp.expand_dims(piece.lanes < width, 1 - axis)
    return plt.load(cache.at[index], mask=mask, other=None if piece.whole else 0)


def dot(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """``a [M, in] . b [out, in] -> float32 [M, out]``, each one array or two, the large one first; without TF32."""
    each = [(0, 0)] if len(a) == 1 else [(1, 0), (0, 1), (0, 0)]
    contracted = (((1,), (1,)), ((), ()))
    return functools.reduce(
        jnp.add, [lax.dot_general(a[i], b[j], contracted, lax.Precision.HIGHEST, jnp.float32) for i, j in each]
    )


def operands(x: list[jax.Array], in_halves: bool, axis: int | None = None) -> tuple[list[list[jax.Array]], jax.Array]:
    """Pieces of a head as ``dot`` has them, and what its sums are to be multiplied by: of all, or along ``axis``."""
    if not in_halves:
        return [[piece] for piece in x], jnp.float32(1)
    tops = [jnp.max(jnp.abs(piece), axis, keepdims=axis is not None) for piece in x]
    top = functools.reduce(jnp.maximum, tops)
    factor, scale = into_half(top)
    return [halves(piece * factor) for piece in x], scale


def weights_of(p: jax.Array, dtype: Any, in_halves: bool) -> tuple[list[jax.Array], jax.Array]:
    """Probabilities, none above 1, likewise."""
    if not in_halves:
        return [p.astype(dtype)], jnp.float32(1)
    return halves(p * jnp.float32(2.0**14)), jnp.float32(2.0**-14)


def query_pieces(
    q: Any, batch: Any, token: Any, query: jax.Array, real: jax.Array, pieces: list[Piece]
) -> list[jax.Array]:
    """Some rows' pieces, zero for those that are none."""
    width = q.shape[3]
    return [
        plt.load(
            q.at[batch, token, query[:, None], piece.lanes[None]],
            mask=real[:, None] & (piece.lanes < width)[None],
            other=0,
        )
        for piece in pieces
    ]


def first_seen(at: jax.Array, window: int | None, size: int) -> jax.Array:
    """Which part of so many keys is the first that a query sees."""
    return jnp.int32(0) if window is None else lax.div(jnp.maximum(at - (window - 1), 0), size)
