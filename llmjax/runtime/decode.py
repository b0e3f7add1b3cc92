"""Prefill and decode: one pure step behind the loop, the stream and forced tokens.

A decode program always has the same number of slots and prefill always the same chunk, so a row's bits depend neither
on its neighbours nor on its slot.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax

from llmjax.models.context import Context
from llmjax.numerics import Numerics
from llmjax.runtime.params import MAX_LOGPROBS
from llmjax.runtime.sampling import Knobs, best_candidates, draw

# Tokens a row can produce in one call of the decode program.
BURST = 32


class State(struct.PyTreeNode):
    """Everything the step reads and writes; ``B`` is the number of slots.

    Attributes:
      cache: the module's ``cache`` collection, ``[B, K, S, H]`` a buffer.
      logits: float32 ``[B, V]``, of the token each row will draw next.
      position: int32 ``[B]``, where that token will stand.
      step: int32 ``[B]``, tokens generated so far.
      active: bool ``[B]``.
      knobs: sampling parameters.
      stops: bool ``[B, V]``, tokens that end the row.
      min_tokens: int32 ``[B]``: no stop token before this many.
      max_tokens: int32 ``[B]``.
      want_logprobs: bool ``[B]``: rows whose alternatives are reported.
    """

    cache: Any
    logits: jax.Array
    position: jax.Array
    step: jax.Array
    active: jax.Array
    knobs: Knobs
    stops: jax.Array
    min_tokens: jax.Array
    max_tokens: jax.Array
    want_logprobs: jax.Array


class Produced(NamedTuple):
    """What one burst generated; ``M`` is ``BURST``.

    Attributes:
      lengths: int32 ``[B]``, tokens of each row.
      tokens: int32 ``[B, M]``.
      logprobs: float32 ``[B, M]``, log-softmax of the model's own logits at the token.
      top_ids: int32 ``[B, M, MAX_LOGPROBS]``, most likely tokens where ``want_logprobs``.
      top_logprobs: float32, as top_ids.
    """

    lengths: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def empty_state(cache: Any, slots: int, vocab: int) -> State:
    """A state with no row in it."""

    def full(dtype: Any, *shape: int) -> jax.Array:
        return jnp.zeros((slots, *shape), dtype)

    return State(
        cache=cache,
        logits=full(jnp.float32, vocab),
        position=full(jnp.int32),
        step=full(jnp.int32),
        active=full(jnp.bool_),
        knobs=Knobs(full(jnp.float32), full(jnp.int32), full(jnp.float32), full(jnp.float32), full(jnp.uint32, 2)),
        stops=full(jnp.bool_, vocab),
        min_tokens=full(jnp.int32),
        max_tokens=full(jnp.int32),
        want_logprobs=full(jnp.bool_),
    )


def prefill(
    module: nn.Module,
    numerics: Numerics,
    block: int,
    params: Any,
    state: State,
    ids: jax.Array,
    slot: jax.Array,
    start: jax.Array,
    length: jax.Array,
) -> State:
    """Runs one chunk of a prompt into a slot's cache and leaves the logits that follow its last token.

    Args:
      module: static.
      numerics: static.
      block: static; see ``Context``.
      params: the model's.
      state: donated.
      ids: int32 ``[1, C]``, right-padded.
      slot: int32 ``[]``.
      start: int32 ``[]``, position of the chunk's first token.
      length: int32 ``[]``, tokens that are no padding.
    """
    positions = start + jnp.arange(ids.shape[1])[None]
    ctx = Context(positions, numerics, block, slot, last=length[None] - 1)
    logits, out = module.apply({"params": params, "cache": state.cache}, ids, ctx, mutable=["cache"])
    return state.replace(
        cache=out["cache"],
        logits=state.logits.at[slot].set(logits[0, 0].astype(jnp.float32)),
        position=state.position.at[slot].set(start + length),
    )


def score_chunk(
    module: nn.Module,
    numerics: Numerics,
    block: int,
    params: Any,
    cache: Any,
    ids: jax.Array,
    targets: jax.Array,
    start: jax.Array,
) -> tuple[Any, jax.Array, jax.Array]:
    """Runs one chunk of a given text and scores what follows each of its tokens.

    Args:
      module: static.
      numerics: static.
      block: static.
      params: the model's.
      cache: one row, ``[1, K, S, H]`` a buffer; donated.
      ids: int32 ``[1, C]``.
      targets: int32 ``[C]``, the token that follows each.
      start: int32 ``[]``.

    Returns:
      the cache, log-probabilities float32 ``[C]`` of the targets, and the most likely token int32 ``[C]`` at each
      place.
    """
    ctx = Context(start + jnp.arange(ids.shape[1])[None], numerics, block, 0)
    logits, out = module.apply({"params": params, "cache": cache}, ids, ctx, mutable=["cache"])
    logits = logits[0].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
    return out["cache"], chosen - jax.nn.logsumexp(logits, -1), jnp.argmax(logits, -1)


def admit(state: State, slot: jax.Array, row: dict[str, Any]) -> State:
    """Makes a prefilled slot active under a row's parameters.

    Args:
      state: donated.
      slot: int32 ``[]``.
      row: ``knobs``, ``stops [V]``, ``min_tokens``, ``max_tokens``, ``want_logprobs``.
    """
    new = {"step": 0, "active": True, **row}
    return state.replace(
        **{
            name: jax.tree.map(lambda old, value: old.at[slot].set(value), getattr(state, name), value)
            for name, value in new.items()
        }
    )


def decode(
    module: nn.Module,
    numerics: Numerics,
    block: int,
    params: Any,
    state: State,
    forced: jax.Array,
    steps: jax.Array,
) -> tuple[State, Produced]:
    """Generates up to ``steps`` tokens in every active row, and stops early when a row ends so that its slot can be
    refilled.

    Args:
      module: static.
      numerics: static.
      block: static.
      params: the model's.
      state: donated.
      forced: int32 ``[B, BURST]``, tokens to impose at each step of this call; -1 draws freely.
      steps: int32 ``[]``, at most BURST.  The stream asks for 1 and runs the same program.
    """
    slots = state.active.shape[0]
    produced = Produced(
        jnp.zeros(slots, jnp.int32),
        jnp.zeros((slots, BURST), jnp.int32),
        jnp.zeros((slots, BURST), jnp.float32),
        jnp.zeros((slots, BURST, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((slots, BURST, MAX_LOGPROBS), jnp.float32),
    )
    began = state.active

    def going(carry: tuple[State, Produced, jax.Array]) -> jax.Array:
        state, _, i = carry
        return (i < steps) & jnp.any(state.active) & ~jnp.any(began & ~state.active)

    def body(carry: tuple[State, Produced, jax.Array]) -> tuple[State, Produced, jax.Array]:
        state, produced, i = carry
        token, record = _choose(state, forced[:, i])
        produced = Produced(
            produced.lengths + state.active,
            *(old.at[:, i].set(new) for old, new in zip(produced[1:], (token, *record), strict=True)),
        )
        return _advance(module, numerics, block, params, state, token), produced, i + 1

    state, produced, _ = lax.while_loop(going, body, (state, produced, jnp.int32(0)))
    return state, produced


def _choose(state: State, forced: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The next token of each row, its log-probability and the alternatives'."""
    barred = state.stops & (state.step < state.min_tokens)[:, None]
    drawn = draw(jnp.where(barred, -jnp.inf, state.logits), state.knobs, state.step)
    token = jnp.where(forced >= 0, forced, drawn)
    norm = jax.nn.logsumexp(state.logits, -1)
    logprob = jnp.take_along_axis(state.logits, token[:, None], -1)[:, 0] - norm

    def alternatives() -> tuple[jax.Array, jax.Array]:
        size = min(MAX_LOGPROBS, state.logits.shape[-1])
        best, ids = best_candidates(state.logits, size)
        pad = ((0, 0), (0, MAX_LOGPROBS - size))
        return jnp.pad(ids, pad), jnp.pad(best - norm[:, None], pad, constant_values=-jnp.inf)

    def none() -> tuple[jax.Array, jax.Array]:
        shape = (token.shape[0], MAX_LOGPROBS)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    return token, (logprob, *lax.cond(jnp.any(state.want_logprobs), alternatives, none))


def _advance(module: nn.Module, numerics: Numerics, block: int, params: Any, state: State, token: jax.Array) -> State:
    """Feeds the chosen tokens and decides which rows go on."""
    step = state.step + state.active
    stops = jnp.take_along_axis(state.stops, token[:, None], -1)[:, 0]
    stopped = stops & (state.step >= state.min_tokens)
    active = state.active & ~stopped & (step < state.max_tokens)
    position = jnp.where(active, state.position, 0)  # a row at rest must not lengthen the others' attention
    ctx = Context(position[:, None], numerics, block, 0, active)
    logits, out = module.apply({"params": params, "cache": state.cache}, token[:, None], ctx, mutable=["cache"])
    return state.replace(
        cache=out["cache"],
        logits=jnp.where(active[:, None], logits[:, 0].astype(jnp.float32), state.logits),
        position=jnp.where(active, state.position + 1, state.position),
        step=step,
        active=active,
    )
