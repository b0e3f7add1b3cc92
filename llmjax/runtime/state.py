"""The state of the decode slots, and what changes a single one: a row moves in, or a prompt is copied from another."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from llmjax.runtime.logits import Controls, Tokens, no_controls
from llmjax.runtime.sampling import Knobs


class State(struct.PyTreeNode):
    """Everything the step reads and writes; ``B`` is the number of slots.

    Attributes:
      cache: the module's ``cache`` collection, see ``runtime.cache``: ``P`` pages a buffer, or ``n * P`` for n stacked
        layers.  Whose a page is, ``runtime.pages`` knows.  What layers carry lies at each slot's number, and behind the
        slots' that of a text which is scored.
      logits: float32 ``[B, V]``, of the token each row will draw next; anything of a row at rest.
      after: float32 ``[B, V]``, those that follow the prompt in each slot's pages, or as much of it as is there.
      position: int32 ``[B]``, where that token will stand.
      step: int32 ``[B]``, tokens generated so far.
      active: bool ``[B]``.
      ids: int32 ``[B, S]``, the row's tokens.
      knobs: sampling parameters.
      controls: what is changed in the logits before the draw.
      stops: bool ``[B, V]``, tokens that end the row.
      min_tokens: int32 ``[B]``: no stop token before this many.
      max_tokens: int32 ``[B]``.
      want_logprobs: bool ``[B]``: rows whose alternatives are reported.
      adapter: int32 ``[B]``, see ``Context``.
    """

    cache: Any
    logits: jax.Array
    after: jax.Array
    position: jax.Array
    step: jax.Array
    active: jax.Array
    ids: jax.Array
    knobs: Knobs
    controls: Controls
    stops: jax.Array
    min_tokens: jax.Array
    max_tokens: jax.Array
    want_logprobs: jax.Array
    adapter: jax.Array

    @property
    def tokens(self) -> Tokens:
        """The rows' tokens as a logits processor sees them."""
        return Tokens(self.ids, self.position - self.step, self.position, self.active)


def empty_state(cache: Any, slots: int, length: int, vocab: int) -> State:
    """A state with no row in it, for rows of up to ``length`` tokens."""

    def full(dtype: Any, *shape: int) -> jax.Array:
        return jnp.zeros((slots, *shape), dtype)

    return State(
        cache=cache,
        logits=full(jnp.float32, vocab),
        after=full(jnp.float32, vocab),
        position=full(jnp.int32),
        step=full(jnp.int32),
        active=full(jnp.bool_),
        ids=full(jnp.int32, length),
        knobs=Knobs(full(jnp.float32), full(jnp.int32), full(jnp.float32), full(jnp.float32), full(jnp.uint32, 2)),
        controls=no_controls(slots, vocab),
        stops=full(jnp.bool_, vocab),
        min_tokens=full(jnp.int32),
        max_tokens=full(jnp.int32),
        want_logprobs=full(jnp.bool_),
        adapter=full(jnp.int32),
    )


def lengthened(state: State, more: int) -> State:
    """``state`` for rows of ``more`` tokens more, the rows in it kept."""
    return state.replace(ids=jnp.pad(state.ids, ((0, 0), (0, more))))


def seated(
    state: State, slot: jax.Array, row: dict[str, Any], logits: jax.Array, position: jax.Array, active: jax.Array
) -> State:
    """A slot under a row's parameters.

    Args:
      state: of all slots.
      slot: int32 ``[]``.
      row: fields of the state by name, without the ``B``; see ``runtime.terms``.
      logits: float32 ``[V]``, that follow what is in its pages.
      position: int32 ``[]``, tokens in them.
      active: bool ``[]``, whether that is the whole prompt, and the row goes on.
    """
    new = row | {"logits": logits, "after": logits, "position": position, "active": active}
    return state.replace(
        **{
            name: jax.tree.map(lambda old, value: old.at[slot].set(value), getattr(state, name), value)
            for name, value in new.items()
        }
    )


def share(
    layers: int,
    state: State,
    wide: dict[str, Any],
    row: dict[str, Any],
    source: jax.Array,
    page: jax.Array,
    to: jax.Array,
    slot: jax.Array,
    length: jax.Array,
    active: jax.Array,
) -> State:
    """Makes a slot go on from the beginning of another's prompt, or of its own, whose pages it was lent: the same bits
    as computing it.

    Args:
      layers: static, in each of the cache's buffers.
      state: donated.
      wide: of the row, see ``runtime.terms``.
      row: the rest of it.
      source: int32 ``[]``, the other slot.
      page: int32 ``[]``, the page that they share in part.
      to: int32 ``[]``, the slot's own, which becomes the same.
      slot: int32 ``[]``.
      length: int32 ``[]``, tokens the slot then holds.
      active: bool ``[]``, whether that is the whole prompt, and the row goes on.
    """

    def copied(x: jax.Array) -> jax.Array:
        pages, *one = x.shape  # of which nothing may be kept: no -1 stands for their number
        each = x.reshape(layers, pages // layers, *one)
        part = lax.dynamic_index_in_dim(each, page, 1)
        return lax.dynamic_update_index_in_dim(each, part, to, 1).reshape(x.shape)

    state = state.replace(cache=jax.tree.map(copied, state.cache), ids=state.ids.at[slot].set(state.ids[source]))
    return seated(state, slot, wide | row, state.after[source], length, active)
