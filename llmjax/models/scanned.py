"""Layers on the way to a gradient: those that are alike in one loop, so that a program compiles one of them.

The loop takes a layer's frozen weights where they stand: a branch that copies those of one layer, instead of a stack of
all.  What is learned, small factors beside the weights, is stacked, and its gradients come back so.  Within a loop
``jax.checkpoint`` keeps its word on the CPU, too: nothing of the way back can begin before its turn.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llmjax.models.context import PROJECTED, Context

# The leaf beside a weight that is learned.
_LEARNED = "lora"
_FROZEN = "frozen weights"

Apply = Callable[..., Any]


def periods(kinds: Sequence[Any]) -> tuple[int, int]:
    """``(P, n)``: the first ``n * P`` layers are n times the same P, for the fewest layers that are traced by
    themselves; n is 1 or 0 where none are alike."""
    count = len(kinds)

    def turns(size: int) -> int:
        same = next((i for i in range(size, count) if kinds[i] != kinds[i - size]), count)
        return same // size

    return min(
        ((p, turns(p)) for p in range(1, count + 1)), key=lambda at: at[0] + count - at[0] * at[1], default=(0, 0)
    )


def scanned(apply: Apply, blocks: Sequence[nn.Module], x: Any, ctx: Context, own: Sequence[tuple[Any, ...]]) -> Any:
    """Applies as many of the first blocks as are alike in periods, one after the other: ``(x, how many)``.

    Args:
      apply: ``(block, variables, x, ctx, *own)`` to the next x.
      blocks: bound.
      x: what the first gets.
      ctx: ``recompute`` says what is kept of a turn.
      own: the arguments of each beside x.
    """
    plain = [block.clone(parent=None, name=None) for block in blocks]
    size, turns = periods([(each, kind_of(block.variables)) for each, block in zip(plain, blocks, strict=True)])
    if turns < 2:
        return x, 0
    split = [_split((block.variables, extra)) for block, extra in zip(blocks, own, strict=True)]
    learned = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *(split[i][0] for i in range(place, turns * size, size)))
               for place in range(size)]  # fmt: skip
    branches = [partial(lambda i: [split[i * size + place][1] for place in range(size)], i) for i in range(turns)]

    def turn(x: Any, at: tuple[jax.Array, Any]) -> tuple[Any, None]:
        i, learned = at
        frozen = jax.tree.map(lambda leaf: checkpoint_name(leaf, _FROZEN), lax.switch(i, branches))
        for block, some, rest, (_, _, join) in zip(plain, learned, frozen, split, strict=False):
            variables, extra = join(some, rest)
            x = apply(block, variables, x, ctx, *extra)
        return x, None

    step = jax.checkpoint(turn, policy=_KEPT[ctx.recompute], prevent_cse=False)
    places = (jnp.arange(turns, dtype=jnp.int32), learned)
    if kind_of(jax.eval_shape(step, x, jax.tree.map(lambda leaf: leaf[0], places))[0]) != kind_of(x):
        return x, 0  # what travels grows on its way
    x, _ = lax.scan(step, x, places)
    return x, turns * size


# What is kept of a turn, by what is computed again.
_KEPT: dict[str | None, Any] = {
    "all": None,
    "cheap": jax.checkpoint_policies.save_only_these_names(PROJECTED),
    "nothing": jax.checkpoint_policies.save_anything_except_these_names(_FROZEN),
}


def _split(tree: Any) -> tuple[list[Any], list[Any], Callable[[list[Any], list[Any]], Any]]:
    """The leaves that are learned, the others, and what puts them together again."""
    leaves, form = jax.tree_util.tree_flatten_with_path(tree)
    learned = [any(getattr(key, "key", None) == _LEARNED for key in path) for path, _ in leaves]

    def join(some: list[Any], rest: list[Any]) -> Any:
        parts = iter(some), iter(rest)
        return jax.tree.unflatten(form, [next(parts[0] if is_learned else parts[1]) for is_learned in learned])

    some, rest = ([leaf for (_, leaf), is_learned in zip(leaves, learned, strict=True) if is_learned == which]
                  for which in (True, False))  # fmt: skip
    return some, rest, join


def kind_of(tree: Any) -> Any:
    """The tree's structure with the shapes and dtypes of its leaves: equal for what one program can compute."""
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
