"""Decode: one pure step behind the loop, the stream and forced tokens.

A decode program always has the same number of slots and prefill always the same chunk, so a row's bits depend neither
on its neighbours nor on its slot.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from llmjax.device import by_device
from llmjax.models.context import Context
from llmjax.numerics import Numerics
from llmjax.runtime.logits import LogitsProcessor, adjust
from llmjax.runtime.packed import Packed
from llmjax.runtime.params import MAX_LOGPROBS
from llmjax.runtime.sampling import alternatives, draw, likeliest
from llmjax.runtime.state import State

# Tokens a row can produce in one call of the decode program.
BURST = 32


class Produced(NamedTuple):
    """What one burst generated; ``M`` is ``BURST``.

    Attributes:
      steps: int32 ``[]``, steps that were run.
      lengths: int32 ``[B]``, tokens of each row.
      tokens: int32 ``[B, M]``.
      logprobs: float32 ``[B, M]``, log-softmax of the model's own logits at the token; NaN where those are not
        finite, or the logits processor made one.
      top_ids: int32 ``[B, M, MAX_LOGPROBS]``, most likely tokens where ``want_logprobs``.
      top_logprobs: float32, as top_ids.
    """

    steps: jax.Array
    lengths: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def decode(
    module: nn.Module,
    numerics: Numerics,
    block: int,
    processor: LogitsProcessor | None,
    params: Any,
    state: State,
    table: jax.Array,
    forced: jax.Array,
    going: jax.Array,
    steps: jax.Array,
    refill: jax.Array,
) -> tuple[State, Packed, tuple[jax.Array, jax.Array]]:
    """Generates up to ``steps`` tokens in every active row.

    Args:
      module: static.
      numerics: static.
      block: static.
      processor: static; see ``llmjax.runtime.logits``.
      params: the model's.
      state: donated.
      table: int32 ``[B, N]``, the rows' pages, enough for what this call adds.
      forced: int32 ``[B, BURST]``, tokens to impose at each step of this call; -1 draws freely.
      going: bool ``[B]``, rows the host has not ended (by a stop string, say); the others become inactive.
      steps: int32 ``[]``, at most BURST.  The stream asks for 1 and runs the same program.
      refill: bool ``[]``: stop early when a row ends, since another waits for its slot.

    Returns:
      the state, and what ``Produced`` has: all but alternatives in one, and those.
    """
    slots = state.active.shape[0]
    state = state.replace(active=state.active & going)
    began = state.active
    produced = Produced(
        jnp.int32(0),
        jnp.zeros(slots, jnp.int32),
        jnp.zeros((slots, BURST), jnp.int32),
        jnp.zeros((slots, BURST), jnp.float32),
        jnp.zeros((slots, BURST, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((slots, BURST, MAX_LOGPROBS), jnp.float32),
    )

    def goes_on(carry: tuple[State, Produced]) -> jax.Array:
        state, produced = carry
        return (produced.steps < steps) & jnp.any(state.active) & ~(refill & jnp.any(began & ~state.active))

    def body(carry: tuple[State, Produced]) -> tuple[State, Produced]:
        state, produced = carry
        i = produced.steps
        token, record = _choose(processor, state, forced[:, i])
        put = partial(lax.dynamic_update_index_in_dim, index=i, axis=1)
        produced = Produced(
            i + 1,
            produced.lengths + state.active.astype(jnp.int32),
            *(put(old, new) for old, new in zip(produced[2:], (token, *record), strict=True)),
        )
        return _advance(module, numerics, block, params, state, table, token), produced

    state, produced = lax.while_loop(goes_on, body, (state, produced))
    return state, Packed.of(produced[:4]), produced[4:]


def _choose(
    processor: LogitsProcessor | None, state: State, forced: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The next token of each row, its log-probability and the alternatives'."""
    drawn = partial(_drawn, processor)
    chosen = by_device(drawn if processor else _likeliest_or_drawn, cpu=drawn)
    norm, token, broken, *top = chosen(state.replace(cache=None))
    token = jnp.where(forced >= 0, forced, token)
    logprob = jnp.take_along_axis(state.logits, token[:, None], -1)[:, 0] - norm
    return token, (jnp.where(broken | ~jnp.isfinite(norm), jnp.nan, logprob), *top)


def _drawn(processor: LogitsProcessor | None, state: State, norm: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """Logsumexp of each row's logits, ``norm`` if it is known, a token, whether what it was drawn from became NaN, and
    ``alternatives``."""
    logits = state.logits
    norm = jax.nn.logsumexp(logits, -1) if norm is None else norm
    broken = jnp.zeros_like(state.active)
    if processor is not None:
        logits = processor(logits, state.tokens).astype(jnp.float32)
        broken = jnp.any(jnp.isnan(logits), -1)
    logits = adjust(logits, state.controls, state.step < state.min_tokens, state.stops, state.tokens)
    token = draw(logits, state.knobs, state.step)
    return norm, token, broken, *alternatives(state.logits, norm, jnp.any(state.want_logprobs))


def _likeliest_or_drawn(state: State) -> tuple[jax.Array, ...]:
    """``_drawn`` for a GPU, whose host reads what a branch depends on: one branch where no row asks for more than its
    likeliest token, instead of one for each thing that could be asked for.  The logits are read once, no more."""
    _, best, norm = likeliest(state.logits)

    def no_more() -> tuple[jax.Array, ...]:
        return best, jnp.zeros_like(state.active), *alternatives(state.logits, norm, jnp.bool_(False))

    asked = state.controls.used | (state.step < state.min_tokens) | (state.knobs.temperature > 0) | state.want_logprobs
    return norm, *lax.cond(jnp.any(state.active & asked), lambda: _drawn(None, state, norm)[1:], no_more)


def _advance(
    module: nn.Module, numerics: Numerics, block: int, params: Any, state: State, table: jax.Array, token: jax.Array
) -> State:
    """Feeds the chosen tokens and decides which rows go on."""
    step = state.step + state.active.astype(jnp.int32)
    stops = jnp.take_along_axis(state.stops, token[:, None], -1)[:, 0]
    stopped = stops & (state.step >= state.min_tokens)
    active = state.active & ~stopped & (step < state.max_tokens)
    position = jnp.where(active, state.position, 0)  # a row at rest must not lengthen the others' attention
    ctx = Context(position[:, None], numerics, block, table, jnp.int32(0), active, adapter=state.adapter)
    logits, out = module.apply({"params": params, "cache": state.cache}, token[:, None], ctx, mutable=["cache"])
    place = jnp.where(active, state.position, state.ids.shape[1])  # out of range: dropped
    return state.replace(
        cache=out["cache"],
        logits=logits[:, 0].astype(jnp.float32),
        ids=state.ids.at[jnp.arange(token.shape[0], dtype=jnp.int32), place].set(
            token, mode="drop", unique_indices=True
        ),
        position=jnp.where(active, state.position + 1, state.position),
        step=step,
        active=active,
    )
