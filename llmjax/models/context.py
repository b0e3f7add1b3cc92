"""What travels beside the activations through a model: one explicit argument instead of attributes on every module."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from llmjax.numerics import Numerics

# What may be computed again on the way to a gradient, see ``Context.recompute``.
RECOMPUTE = ("all", "cheap", "nothing")
# What a projection made, by name, for those who choose what to keep on that way.
PROJECTED = "projected"


class Context(struct.PyTreeNode):
    """Where the tokens of this call stand, and how to compute.

    Attributes:
      positions: int32 ``[B, T]``, each token's position in its own sequence, one after the other.  Rows are
        right-padded; padding lies after the tokens, so the causal rule alone keeps it out of sight.
      numerics: the profile (static).
      block: cache positions folded at a time by cached attention (static).
      table: int32 ``[B, N]``, the pages of the cache that hold each row's positions, see ``models.pages``.  ``None``
        without a cache.
      slot: int32 ``[]``, the entry of the cache in which lies what the first row carries from token to token, where the
        model does (``DecoderConfig.carried``); the other rows' are behind it.  ``None`` without a cache.
      active: bool ``[B]``; rows that are False leave the cache as it is.  ``None`` means all are active.
      last: int32 ``[B]`` or ``[B, M]``; when given, the head runs on tokens ``last[b]`` of each row alone and logits
        are ``[B, 1, V]`` or ``[B, M, V]``.
      adapter: int32 ``[B]``, each row's LoRA adapter among the resident ones, 0 for none.  ``None`` means none.
      recompute: on the way to a gradient, where layers that are alike run in a loop, what of a layer's inner values is
        computed again on the way back (static; Chen et al. 2016, arXiv:1604.06174): ``all``, so that no more of it is
        kept than its input; ``cheap``, all but what projections made; ``nothing``.  ``None`` where no gradient is
        wanted.
      length: int32 ``[B]``, tokens of each row's text, those beyond this call included and padding not: for ropes that
        follow it.  ``None`` means that it ends with this call.
      mask: float32 ``[1, 1, T, S]``, added to scores, of a caller that says itself what each token sees, as op graphs'
        callers do.  The cache has then one row and one page, whose place is a token's position, and this call's tokens
        follow each other from the first one's.  ``None`` means that each token sees all before it.
      all_experts: mixtures run every expert, of which a token takes the share that its router says, none of most: for
        op graphs, whose operators cannot choose among weights (static).
    """

    positions: jax.Array
    numerics: Numerics = struct.field(pytree_node=False)
    block: int = struct.field(pytree_node=False, default=128)
    table: jax.Array | None = None
    slot: jax.Array | None = None
    active: jax.Array | None = None
    last: jax.Array | None = None
    adapter: jax.Array | None = None
    recompute: str | None = struct.field(pytree_node=False, default=None)
    length: jax.Array | None = None
    mask: jax.Array | None = None
    all_experts: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def whole(cls, ids: jax.Array, numerics: Numerics, **rest: Any) -> "Context":
        """Of whole texts ``ids [B, T]``, from their first tokens on; ``rest`` are other attributes."""
        return cls(jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape), numerics, **rest)

    @property
    def tokens(self) -> jax.Array:
        """int32 ``[B]``, how long each row's text is."""
        return jnp.max(self.positions, 1) + 1 if self.length is None else self.length

    def select_last(self, x: jax.Array) -> jax.Array:
        """``[..., B, T, D] -> [..., B, M, D]`` where only some tokens' logits are wanted, else ``x``."""
        if self.last is None:
            return x
        last = self.last.reshape(len(self.last), -1, 1)
        return jnp.take_along_axis(x, jnp.expand_dims(last, tuple(range(x.ndim - 3))), axis=-2)

    def at_last(self) -> "Context":
        """The context of what ``select_last`` selects."""
        if self.last is None:
            return self
        last = self.last.reshape(len(self.last), -1)
        return self.replace(positions=jnp.take_along_axis(self.positions, last, axis=1), last=None, length=self.tokens)


class Patch(abc.ABC):
    """A function of a tap's value, in the collection ``patches``, whose result is what the tap names."""

    @abc.abstractmethod
    def __call__(self, value: jax.Array) -> jax.Array:
        """What the model goes on with."""


def patched(module: nn.Module, name: str) -> bool:
    """Whether the tap of this name has a patch."""
    return bool(module.has_variable(PATCHES, TAP + name))


def tap(module: nn.Module, name: str, value: jax.Array) -> jax.Array:
    """Names an activation for ``llmjax.trace``: the module's path and ``name`` (the path alone when empty), joined by
    dots.

    What the collection ``patches`` has under that name takes the value's place from here on: an array, or a function of
    the value.  Named is the value before, with a ``Patch`` the one after.  Costs nothing unless the ``taps`` collection
    is being collected; ``init`` makes parameters alone.
    """
    patch: Any = module.get_variable(PATCHES, TAP + name)
    if isinstance(patch, Patch):
        value, patch = patch(value), None
    if not module.is_initializing():
        module.sow("taps", TAP + name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    if patch is not None:
        return patch(value) if callable(patch) else patch.reshape(value.shape).astype(value.dtype)
    return value


# Keeps a tap's name apart from a submodule's of the same name, which Linen would refuse.
TAP = "tap:"
# The collection of what takes the place of our values, see ``tap``.
PATCHES = "patches"
