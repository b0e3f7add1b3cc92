"""Given tokens through the model in chunks of one fixed size: a prompt into a slot's cache, or a text to be scored."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from llmjax.models.context import Context
from llmjax.numerics import Numerics
from llmjax.runtime.sampling import alternatives
from llmjax.runtime.state import State, seated


def prefill(
    module: nn.Module,
    numerics: Numerics,
    block: int,
    params: Any,
    state: State,
    wide: dict[str, Any],
    row: dict[str, Any],
    ids: jax.Array,
    slot: jax.Array,
    table: jax.Array,
    start: jax.Array,
    length: jax.Array,
    tokens: jax.Array,
    active: jax.Array,
) -> tuple[State, jax.Array]:
    """Runs one chunk of a prompt into a slot's pages, under its row's parameters.

    Args:
      module: static.
      numerics: static.
      block: static; see ``Context``.
      params: the model's.
      state: donated.
      wide: of the row, see ``runtime.terms``.
      row: the rest of it.
      ids: int32 ``[1, C]``, right-padded.
      slot: int32 ``[]``.
      table: int32 ``[N]``, its pages.
      start: int32 ``[]``, position of the chunk's first token.
      length: int32 ``[]``, tokens that are no padding.
      tokens: int32 ``[]``, those of the whole prompt.
      active: bool ``[]``, whether the chunk is the last, and the row goes on.

    Returns:
      the state, and the tokens in the slot, to wait for.
    """
    positions = start + jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    ctx = Context(positions, numerics, block, table[None], slot, adapter=row["adapter"][None], length=tokens[None])
    ctx = ctx.replace(last=length[None] - 1)
    logits, out = module.apply({"params": params, "cache": state.cache}, ids, ctx, mutable=["cache"])
    last, position = logits[0, 0].astype(jnp.float32), start + length
    state = state.replace(cache=out["cache"], ids=lax.dynamic_update_slice(state.ids, ids, (slot, start)))
    return seated(state, slot, wide | row, last, position, active), position


class Scored(NamedTuple):
    """What follows each of ``C`` given tokens.

    Attributes:
      logprobs: float32 ``[C]``, log-probability of the token that does follow.
      best: int32 ``[C]``, the most likely token.
      top_ids: int32 ``[C, MAX_LOGPROBS]``, the most likely tokens, where wanted.
      top_logprobs: float32, as top_ids.
    """

    logprobs: jax.Array
    best: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array

    def by_token(self, ids: Sequence[int], wanted: int) -> list[dict[int, float]]:
        """For each place the log-probabilities of the ``wanted`` best tokens and of the one that does follow, the first
        of ``ids``."""
        found = []
        for token, logprob, top, top_logprobs in zip(ids, self.logprobs, self.top_ids, self.top_logprobs, strict=False):
            best = zip(top[:wanted], top_logprobs[:wanted], strict=True)
            found.append({int(i): float(p) for i, p in best} | {int(token): float(logprob)})
        return found


def score_chunk(
    module: nn.Module,
    numerics: Numerics,
    block: int,
    params: Any,
    state: State,
    ids: jax.Array,
    targets: jax.Array,
    table: jax.Array,
    start: jax.Array,
    tokens: jax.Array,
    wanted: jax.Array,
    adapter: jax.Array,
) -> tuple[State, Scored]:
    """Runs one chunk of a given text and scores what follows each of its tokens.

    Args:
      module: static.
      numerics: static.
      block: static.
      params: the model's.
      state: donated; but for the cache it stays as it is.
      ids: int32 ``[1, C]``.
      targets: int32 ``[C]``, the token that follows each.
      table: int32 ``[N]``, the pages that the text may have.
      start: int32 ``[]``.
      tokens: int32 ``[]``, those of the whole text.
      wanted: bool ``[]``, whether alternatives are.
      adapter: int32 ``[]``, see ``Context``.
    """
    positions = start + jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    aside = jnp.int32(state.active.shape[0])  # see ``State``
    ctx = Context(positions, numerics, block, table[None], aside, adapter=adapter[None], length=tokens[None])
    logits, out = module.apply({"params": params, "cache": state.cache}, ids, ctx, mutable=["cache"])
    logits = logits[0].astype(jnp.float32)
    norm = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
    top = alternatives(logits, norm, wanted)
    logprobs = jnp.where(jnp.isfinite(norm), chosen - norm, jnp.nan)
    return state.replace(cache=out["cache"]), Scored(logprobs, lax.argmax(logits, 1, jnp.int32), *top)
