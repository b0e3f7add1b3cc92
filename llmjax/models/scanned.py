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

from llmjax.models.context import Context

# The leaf beside a weight that is learned.
_LEARNED = "lora"
_FROZEN = "frozen weights"

Apply = Callable[..., Any]


def period(blocks: Sequence[nn.Module]) -> int:
    """P where block ``i`` is computed like block ``i + P``, with the fewest layers outside of a loop over whole
    periods; the number of blocks where none are alike."""
    alike = [(block.clone(parent=None, name=None), _kind(block.variables)) for block in blocks]
    count = len(blocks)
    fits = [p for p in range(1, count // 2 + 1)
            if all(alike[i] == alike[i - p] for i in range(p, count // p * p))]  # fmt: skip
    return min(fits, key=lambda p: p + count % p, default=count)


def scanned(apply: Apply, blocks: Sequence[nn.Module], x: Any, ctx: Context, own: Sequence[tuple[Any, ...]]) -> Any:
    """Applies blocks, one after the other, as many as there are whole periods: ``(x, how many)``.

    Args:
      apply: ``(block, variables, x, ctx, *own)`` to the next x.
      blocks: bound.
      x: what the first gets.
      ctx: ``recompute`` says what is kept of a turn.
      own: the arguments of each beside x.
    """
    size = period(blocks)
    turns = len(blocks) // size
    if turns < 2:
        return x, 0
    alike = [block.clone(parent=None, name=None) for block in blocks[:size]]
    split = [_split((block.variables, extra)) for block, extra in zip(blocks, own, strict=True)]
    learned = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *(split[i][0] for i in range(place, turns * size, size)))
               for place in range(size)]  # fmt: skip
    branches = [partial(lambda i: [split[i * size + place][1] for place in range(size)], i) for i in range(turns)]

    def turn(x: Any, at: tuple[jax.Array, Any]) -> tuple[Any, None]:
        i, learned = at
        frozen = jax.tree.map(lambda leaf: checkpoint_name(leaf, _FROZEN), lax.switch(i, branches))
        for block, some, rest, (_, _, join) in zip(alike, learned, frozen, split, strict=False):
            variables, extra = join(some, rest)
            x = apply(block, variables, x, ctx, *extra)
        return x, None

    policy = None if ctx.recompute else jax.checkpoint_policies.save_anything_except_these_names(_FROZEN)
    step = jax.checkpoint(turn, policy=policy, prevent_cse=False)
    x, _ = lax.scan(step, x, (jnp.arange(turns), learned))
    return x, turns * size


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


def _kind(tree: Any) -> Any:
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
