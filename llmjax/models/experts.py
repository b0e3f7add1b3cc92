"""Mixture of experts (Shazeer et al. 2017, arXiv:1701.06538): of many MLPs, each token goes through the few that a
router gives it.

Exact: no expert has a capacity, no token is left out.  And no row's bits depend on the others: a token meets its
experts in tiles of a fixed number of rows, and a tile has one expert.  A step reads the experts in use alone.

Shapes: ``E`` experts, ``k`` of them for a token, ``M`` tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from llmjax.models.context import Context, tap
from llmjax.models.layers import parameter
from llmjax.products.matmul import matmul
from llmjax.quant.bits import cut

_normal = nn.initializers.normal(0.02)

# Rows of a tile where tokens are many; a step's tiles have one.
_TILE = 16


def largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The ``k`` largest of the last axis, descending, and where they stand; of equal ones the first."""
    return lax.top_k(x, k)


class _Weights(nn.Module):
    """The weights ``[E, out, in]`` of a projection of each expert."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> Any:
        return parameter(self, "weight", _normal, self.shape)


class Experts(nn.Module):
    """``x [B, T, D]`` to ``sum_k weight_k * down_k(act(gate_k(x)) * up_k(x))``, k the token's experts.

    Attributes:
      count: E.
      hidden: F of an expert.
      activation: act.
    """

    count: int
    hidden: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array, chosen: jax.Array, ctx: Context) -> jax.Array:
        """Adds up a token's experts in the order of ``chosen``.

        Args:
          x: ``[B, T, D]``.
          weights: ``[B, T, k]``, in x's dtype or float32: a product with them is rounded as both ask, their sum is not.
          chosen: int32 ``[B, T, k]``, numbers of experts.
          ctx: rows at rest go through none.
        """
        features = x.shape[-1]
        shapes = {"gate": (self.hidden, features), "up": (self.hidden, features), "down": (features, self.hidden)}
        stack = {name: _Weights((self.count, *shape), name=name)() for name, shape in shapes.items()}

        def expert(weights: dict[str, Any], x: jax.Array) -> jax.Array:
            def times(x: jax.Array, name: str) -> jax.Array:
                return matmul(x, weights[name], ctx.numerics).astype(ctx.numerics.activations)

            return times(self.activation(times(x, "gate")) * times(x, "up"), "down")

        if ctx.all_experts:
            return tap(self, "", by_share(expert, stack, x, weights, chosen))
        if ctx.active is not None:
            chosen = jnp.where(ctx.active[:, None, None], chosen, self.count)
        tile = 1 if x.shape[1] == 1 else _TILE
        y = by_expert(expert, stack, self.count, x.reshape(-1, features), chosen.reshape(-1, chosen.shape[-1]), tile)
        y = jnp.sum((y.reshape(*chosen.shape, features) * weights[..., None]).astype(jnp.float32), 2)
        return tap(self, "", y.astype(x.dtype))


def by_share(
    expert: Callable[[Any, jax.Array], jax.Array], stack: Any, x: jax.Array, weights: jax.Array, chosen: jax.Array
) -> jax.Array:
    """Each token through every expert, times its weight where it is a chosen one and 0 where not: ``[B, T, D]``.

    Args:
      expert: from an expert's weights and ``[B, T, D]`` to ``[B, T, D]``.
      stack: the weights of all, leaves ``[E, ...]``.
      x: ``[B, T, D]``.
      weights: ``[B, T, k]``, see ``Experts``.
      chosen: int32 ``[B, T, k]``.
    """
    numbers = jnp.arange(len(jax.tree.leaves(stack)[0]), dtype=jnp.int32)
    shares = jnp.sum(jnp.where(chosen[..., None] == numbers[None, None, None], weights[..., None], 0), 2)

    def one(total: jax.Array, of: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
        weights, share = of
        return total + (expert(weights, x) * share[..., None]).astype(jnp.float32), None

    total, _ = lax.scan(one, jnp.zeros(x.shape, jnp.float32), (stack, jnp.moveaxis(shares, -1, 0)))
    return total.astype(x.dtype)


def by_expert(
    expert: Callable[[Any, jax.Array], jax.Array],
    stack: Any,
    count: int,
    x: jax.Array,
    chosen: jax.Array,
    tile: int,
) -> jax.Array:
    """Each token through each of its experts: ``[M, k, D]``, zero where there is none.

    Args:
      expert: from an expert's weights and ``[tile, D]`` to ``[tile, D]``.
      stack: the weights of all, leaves ``[E, ...]``.
      count: E.
      x: ``[M, D]``.
      chosen: int32 ``[M, k]``, E for none.
      tile: rows.
    """
    tokens, k = chosen.shape
    numbers = chosen.reshape(-1)
    order = jnp.argsort(numbers, stable=True)
    counts = jnp.zeros(count + 1, jnp.int32).at[numbers].add(1)[:count]
    starts = jnp.cumsum(counts) - counts  # of each expert, among the sorted
    tiles = jnp.cumsum(-(-counts // tile))  # of the experts up to each
    most = min(tokens * k, tokens * k // tile + count)
    # Of each tile its expert and its rows: not in the loop, where a GPU's host would wait for each search.
    at = jnp.arange(most, dtype=jnp.int32)
    numbers_of = jnp.minimum(jnp.searchsorted(tiles, at, side="right", method="compare_all"), count - 1)
    before = jnp.where(numbers_of > 0, tiles[numbers_of - 1], 0)
    places = (starts[numbers_of] + (at - before) * tile)[:, None] + jnp.arange(tile, dtype=jnp.int32)[None]
    tokens_of = order[jnp.minimum(places, tokens * k - 1)] // k

    def one(_: None, of: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        i, number, which = of
        rows = jnp.take(x, which, axis=0)

        def computed(rows: jax.Array) -> jax.Array:
            return expert(jax.tree.map(lambda leaf: cut(leaf, number, 1)[0], stack), rows)

        return None, lax.cond(i < tiles[-1], computed, jnp.zeros_like, rows)

    _, y = lax.scan(one, None, (at, numbers_of, tokens_of))
    rank = jnp.argsort(order) - starts[jnp.minimum(numbers, count - 1)]  # of each pair, among its expert's
    first = (tiles - -(-counts // tile))[jnp.minimum(numbers, count - 1)]
    place = (first + rank // tile) * tile + rank % tile
    found = jnp.take(y.reshape(most * tile, -1), jnp.clip(place, 0, most * tile - 1), axis=0)
    return jnp.where(numbers[:, None] < count, found, 0).reshape(tokens, k, -1)
