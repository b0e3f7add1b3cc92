"""Adapters beside the weights: a leaf ``lora`` in a projection's parameters, and what it adds to the product.

Computed in float32 whatever the profile, as PEFT does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from llmjax.lora.adapter import Delta
from llmjax.models.tree import path_of


class Lora(struct.PyTreeNode):
    """The factors of one projection: of an adapter for all rows, or of several, stacked, for each row its own.

    Stacked, place 0 is no adapter, all zero, and ranks are filled up with zeros to the largest.

    Attributes:
      a: float32 ``[r, in]``, or ``[adapters, r, in]``.
      b: float32 ``[out, r]``, or ``[adapters, out, r]``.
      scale: float32 ``[]``, or ``[adapters]``.
      key: in training, a key that drops elements of x on the way into A, never of the product with the weight; of one
        adapter alone.
      dropout: the share of them (static); the others grow by as much.
    """

    a: Any
    b: Any
    scale: Any
    key: Any = None
    dropout: float = struct.field(pytree_node=False, default=0.0)

    def __call__(self, x: jax.Array, adapter: jax.Array | None) -> jax.Array | None:
        """What is added to ``x [B, T, in] . W^T``, float32 ``[B, T, out]``; None for nothing.

        Args:
          x: activations.
          adapter: int32 ``[B]``, each row's place among the stacked adapters; None for none.
        """
        x = x.astype(jnp.float32)
        if self.key is not None:
            kept = 1 - self.dropout
            x = jnp.where(jax.random.bernoulli(self.key, kept, x.shape), x / kept, 0)
        if self.a.ndim == 2:
            # Of all tokens at once: what is written with two axes, XLA:CPU turns about without a copy on the way back.
            h = jnp.einsum("ni,ri->nr", x.reshape(-1, x.shape[-1]), self.a, precision=lax.Precision.HIGHEST)
            y = jnp.einsum("nr,or->no", h * self.scale, self.b, precision=lax.Precision.HIGHEST)
            return y.reshape(*x.shape[:-1], -1)
        if adapter is None:
            return None
        a, b, scale = (jnp.take(leaf, adapter, axis=0) for leaf in (self.a, self.b, self.scale))
        h = jnp.einsum("bti,bri->btr", x, a, precision=lax.Precision.HIGHEST) * scale[:, None, None]
        return jnp.einsum("btr,bor->bto", h, b, precision=lax.Precision.HIGHEST)


def beside(delta: Delta) -> Lora:
    """One adapter for all rows."""
    return Lora(jnp.asarray(delta.a), jnp.asarray(delta.b), jnp.float32(delta.scale))


def together(deltas: Sequence[Delta | None]) -> Lora:
    """Several adapters' deltas of one projection, None where one leaves it alone."""
    present = [d for d in deltas if d is not None]
    rank = max(d.rank for d in present)
    a = np.zeros((1 + len(deltas), rank, present[0].a.shape[1]), np.float32)
    b = np.zeros((1 + len(deltas), present[0].b.shape[0], rank), np.float32)
    scale = np.zeros(1 + len(deltas), np.float32)
    for i, delta in enumerate(deltas, 1):
        if delta is not None:
            a[i, : delta.rank], b[i, :, : delta.rank], scale[i] = delta.a, delta.b, delta.scale
    return Lora(jnp.asarray(a), jnp.asarray(b), jnp.asarray(scale))


def with_loras(params: Mapping[str, Any], loras: Mapping[str, Lora]) -> dict[str, Any]:
    """A parameter tree with leaves ``lora`` beside the weights of these names (``layers.0.attn.q.weight``)."""
    tree: dict[str, Any] = dict(params)
    for name, lora in loras.items():
        *parents, _ = path_of(name)
        branch = tree
        for parent in parents:
            branch[parent] = dict(branch[parent])
            branch = branch[parent]
        branch["lora"] = lora
    return tree
