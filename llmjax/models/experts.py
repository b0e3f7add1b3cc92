"""Mixture of experts (Shazeer et al. 2017, arXiv:1701.06538): of many MLPs, each token goes through the few that a
router gives it.

Exact: no expert has a capacity, no token is left out.  And no row's bits depend on the others: a token meets its
experts in tiles of a fixed number of rows, and a tile has one expert.  A step reads the experts in use alone.

Shapes: ``E`` experts, ``k`` of them for a token, ``M`` tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from llmjax.device import by_device
from llmjax.models.context import Context, tap
from llmjax.models.layers import parameter
from llmjax.numerics import Numerics
from llmjax.products.defined import can_choose, chosen_product
from llmjax.products.matmul import is_zero, matmul
from llmjax.quant.bits import cut

_normal = nn.initializers.normal(0.02)

# Rows of a tile where tokens are many; a step's tiles have one.  In kernels they have more where an expert's are more.
_TILE, _MOST = 16, 64


def largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The ``k`` largest of the last axis, descending, and where they stand; of equal ones the first."""
    return lax.top_k(x, k)


class Choice(nn.Module):
    """Which experts a token gets, and how much of each, from a router's scores ``[B, T, E]``: weights, float32, and
    numbers, int32, ``[B, T, k]``, the largest first.

    Attributes:
      used: k.
      normalised: the weights, shares of the softmax over all, add up to 1.
    """

    used: int
    normalised: bool

    @nn.compact
    def __call__(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights, chosen = largest(jax.nn.softmax(scores.astype(jnp.float32), -1), self.used)
        return weights / jnp.sum(weights, -1, keepdims=True) if self.normalised else weights, chosen


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

        if ctx.all_experts:
            expert = partial(_expert, self.activation, ctx.numerics)
            return tap(self, "", by_share(expert, stack, x, weights, chosen))
        if ctx.active is not None:
            chosen = jnp.where(ctx.active[:, None, None], chosen, self.count)
        step = x.shape[1] == 1
        args = (x.reshape(-1, features), chosen.reshape(-1, chosen.shape[-1]), stack)
        y = _compiled_once(self.activation, ctx.numerics, step, *args)
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


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _through_experts(
    activation: Callable[[jax.Array], jax.Array],
    numerics: Numerics,
    step: bool,
    x: jax.Array,
    chosen: jax.Array,
    stack: dict[str, Any],
) -> jax.Array:
    """``by_expert``, on a card in kernels that do all tiles.

    Args:
      activation: see ``Experts``.
      numerics: the profile.
      step: whether tokens are of rows of their own, each the next.
      x: ``[M, D]``.
      chosen: int32 ``[M, k]``, E for none.
      stack: the weights of all, leaves ``[E, ...]``.
    """
    plainly = partial(_one_by_one, activation, numerics, step)
    return by_device(plainly, cpu=plainly, cuda=partial(_in_kernels, activation, numerics, step))(x, chosen, stack)


@partial(_through_experts.defjvp, symbolic_zeros=True)
def _through_experts_jvp(
    activation: Any, numerics: Numerics, step: bool, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The plain formula's; what does not change, most weights, has no derivative."""
    (leaves, tree), changes = jax.tree.flatten(primals), jax.tree.leaves(tangents)
    moved = [i for i, change in enumerate(changes) if not is_zero(change)]

    def plainly(*some: jax.Array) -> jax.Array:
        given = dict(zip(moved, some, strict=True))
        args = jax.tree.unflatten(tree, [given.get(i, leaf) for i, leaf in enumerate(leaves)])
        return _one_by_one(activation, numerics, step, *args)

    found: tuple[Any, Any] = jax.jvp(plainly, [leaves[i] for i in moved], [changes[i] for i in moved])
    return found


# Its loops and branches have functions of their own at every call: outside of programs JAX would compile each anew.
_compiled_once = jax.jit(_through_experts, static_argnums=(0, 1, 2), inline=True)


def _expert(
    activation: Callable[[jax.Array], jax.Array], numerics: Numerics, weights: dict[str, Any], x: jax.Array
) -> jax.Array:
    """One expert: ``[..., D]`` to ``[..., D]``."""

    def times(x: jax.Array, name: str) -> jax.Array:
        return matmul(x, weights[name], numerics).astype(numerics.activations)

    return times(activation(times(x, "gate")) * times(x, "up"), "down")


def _one_by_one(
    activation: Any, numerics: Numerics, step: bool, x: jax.Array, chosen: jax.Array, stack: dict[str, Any]
) -> jax.Array:
    expert = partial(_expert, activation, numerics)
    count = len(jax.tree.leaves(stack)[0])
    return by_expert(expert, stack, count, x, chosen, 1 if step else _TILE)


def _in_kernels(
    activation: Any, numerics: Numerics, step: bool, x: jax.Array, chosen: jax.Array, stack: dict[str, Any]
) -> jax.Array:
    """Three, where they know the weights."""
    from llmjax.products import kernel  # Pallas takes as long to import as all of llmjax

    if not all(can_choose(weight, x, numerics) for weight in stack.values()):
        return _one_by_one(activation, numerics, step, x, chosen, stack)
    count = len(jax.tree.leaves(stack)[0])
    tile = min(_MOST, kernel.pl.next_power_of_2(max(_TILE, chosen.size // count)))
    dealt = deal(chosen, count, tile)
    asked = jnp.where(jnp.arange(len(dealt.numbers), dtype=jnp.int32) < dealt.used, dealt.numbers, count)

    def times(rows: jax.Array | None, x: jax.Array, name: str) -> jax.Array:
        choice = kernel.Choice(asked, rows, tile)
        return chosen_product(numerics, x, stack[name], choice).astype(numerics.activations)

    hidden = activation(times(dealt.tokens, x, "gate")) * times(dealt.tokens, x, "up")
    return dealt.found(times(None, hidden, "down"))


class Dealt(NamedTuple):
    """How pairs of a token and an expert lie in tiles, each expert's in some of its own, in the order of experts.

    Attributes:
      numbers: int32 ``[tiles]``, the expert of each; the last ones are none's, with any number.
      used: int32 ``[]``, tiles that are someone's.
      tokens: int32 ``[tiles, tile]``, the token of each row; any where there is none.
      places: int32 ``[M, k]``, of each pair its row, tiles one after the other; -1 for a pair without an expert.
    """

    numbers: jax.Array
    used: jax.Array
    tokens: jax.Array
    places: jax.Array

    def found(self, y: jax.Array) -> jax.Array:
        """``[M, k, D]`` of the rows ``[tiles * tile, D]``, zero where there is no expert."""
        rows = jnp.take(y, jnp.clip(self.places, 0, len(y) - 1).reshape(-1), axis=0)
        return jnp.where(self.places[..., None] >= 0, rows.reshape(*self.places.shape, -1), 0)


def deal(chosen: jax.Array, count: int, tile: int) -> Dealt:
    """In as many tiles as there may have to be.

    Args:
      chosen: int32 ``[M, k]``, E for none.
      count: E.
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
    rank = jnp.argsort(order) - starts[jnp.minimum(numbers, count - 1)]  # of each pair, among its expert's
    first = (tiles - -(-counts // tile))[jnp.minimum(numbers, count - 1)]
    place = jnp.where(numbers < count, (first + rank // tile) * tile + rank % tile, -1)
    return Dealt(numbers_of, tiles[-1], tokens_of, place.reshape(tokens, k))


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
    dealt = deal(chosen, count, tile)

    def one(_: None, of: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        i, number, which = of
        rows = jnp.take(x, which, axis=0)

        def computed(rows: jax.Array) -> jax.Array:
            return expert(jax.tree.map(lambda leaf: cut(leaf, number, 1)[0], stack), rows)

        return None, lax.cond(i < dealt.used, computed, jnp.zeros_like, rows)

    _, y = lax.scan(one, None, (jnp.arange(len(dealt.numbers)), dealt.numbers, dealt.tokens))
    return dealt.found(y.reshape(-1, x.shape[-1]))
