"""The state of the decode slots, and what changes a single one: a row moves in, or a prompt is copied from another."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from llmjax.runtime.cache import along_positions
from llmjax.runtime.logits import Controls, Tokens, no_controls
from llmjax.runtime.sampling import Knobs


class State(struct.PyTreeNode):
    """Everything the step reads and writes; ``B`` is the number of slots.

    Attributes:
      cache: the module's ``cache`` collection, see ``runtime.cache``: ``B`` rows a buffer, or ``n * B`` for n stacked
        layers.
      logits: float32 ``[B, V]``, of the token each row will draw next.
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
    """A state with no row in it, ``length`` positions a slot."""

    def full(dtype: Any, *shape: int) -> jax.Array:
        return jnp.zeros((slots, *shape), dtype)

    return State(
        cache=cache,
        logits=full(jnp.float32, vocab),
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
    """``state`` with room for ``more`` positions, the rows in it kept."""

    def pad(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])

    return state.replace(cache=along_positions(pad, state.cache), ids=jnp.pad(state.ids, ((0, 0), (0, more))))


def admit(state: State, slot: jax.Array, row: dict[str, Any]) -> State:
    """Makes a prefilled slot active under a row's parameters.

    Args:
      state: donated.
      slot: int32 ``[]``.
      row: ``ids [S]``, ``knobs``, ``controls``, ``stops [V]``, ``min_tokens``, ``max_tokens``,
        ``want_logprobs``, ``adapter``.
    """
    new = {"step": 0, "active": True, **row}
    return state.replace(
        **{
            name: jax.tree.map(lambda old, value: old.at[slot].set(value), getattr(state, name), value)
            for name, value in new.items()
        }
    )


def share(
    chunk: int,
    state: State,
    source: jax.Array,
    slot: jax.Array,
    chunks: jax.Array,
    length: jax.Array,
    logits: jax.Array,
) -> State:
    """Copies the beginning of a prompt from one slot's cache into another's: the same bits as computing it there.

    Args:
      chunk: static, positions copied at a time.
      state: donated.
      source: int32 ``[]``.
      slot: int32 ``[]``; may be the source, which then only gets its logits back.
      chunks: int32 ``[]``, how many to copy.
      length: int32 ``[]``, tokens the slot then holds.
      logits: float32 ``[V]``, of the token after them; of use where they are the whole prompt.
    """

    def copy(i: jax.Array, cache: Any) -> Any:
        def one(x: jax.Array, axis: int) -> jax.Array:
            layers = x.reshape(-1, state.active.shape[0], *x.shape[1:])
            axis += 1
            size = [1 if k == 1 else chunk if k == axis else n for k, n in enumerate(layers.shape)]
            begin = [source if k == 1 else i * chunk if k == axis else 0 for k in range(layers.ndim)]
            part = lax.dynamic_slice(layers, begin, size)
            begin[1] = slot
            return lax.dynamic_update_slice(layers, part, begin).reshape(x.shape)

        return along_positions(one, cache)

    return state.replace(
        cache=lax.fori_loop(0, chunks, copy, state.cache),
        logits=state.logits.at[slot].set(logits),
        position=state.position.at[slot].set(length),
    )
