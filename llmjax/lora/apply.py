"""Adapters beside the weights: a leaf ``lora`` in a projection's parameters, and what it adds to the product.

Computed in float32 whatever the profile, as PEFT does.  A magnitude m (DoRA) makes ``f * (W + scale * B . A)`` of a
weight, ``f = m / |W + scale * B . A|`` for each row, the length being a constant to the derivative (section 4.3 of
the paper): added is ``(f - 1) * W . x + f * scale * B . A . x``, and a bias is left alone.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llmjax.lora.adapter import Delta, check_norms
from llmjax.models.context import PROJECTED, Context
from llmjax.models.tree import path_of
from llmjax.products.matmul import matmul
from llmjax.products.tiles import tile_rows
from llmjax.quant.bits import cut
from llmjax.quant.qtensor import QTensor, dequantize

# Weights that are converted to less are converted whole, see ``products.plain``.
_SMALL_BYTES = 1 << 18


class Lora(struct.PyTreeNode):
    """The factors of one projection: of an adapter for all rows, or of several, stacked, for each row its own.

    Stacked, place 0 is no adapter, all zero, ranks are filled up with zeros to the largest, and magnitudes with ones to
    lengths of one.

    Attributes:
      a: float32 ``[r, in]``, or ``[adapters, r, in]``.
      b: float32 ``[out, r]``, or ``[adapters, out, r]``.
      scale: float32 ``[]``, or ``[adapters]``.
      magnitude: float32 ``[out]``, or ``[adapters, out]``; None for none.
      norm: as magnitude, ``|W + scale * B . A|`` of each row; None where factors change, and it is computed each time.
      key: in training, a key that drops elements of x on the way into A, and into the product that a magnitude's factor
        is of, never into the product with the weight; of one adapter alone.
      dropout: the share of them (static); the others grow by as much.
    """

    a: Any
    b: Any
    scale: Any
    magnitude: Any = None
    norm: Any = None
    key: Any = None
    dropout: float = struct.field(pytree_node=False, default=0.0)

    def __call__(self, x: jax.Array, product: jax.Array, weight: jax.Array | QTensor, ctx: Context) -> Any:
        """What is added to ``x [B, T, in] . W^T``, float32 ``[B, T, out]``; None for nothing.

        Args:
          x: activations.
          product: that product, float32, without a bias.
          weight: W.
          ctx: how to multiply, and each row's place among the stacked adapters.
        """
        own = self
        if self.a.ndim > 2:
            if ctx.adapter is None:
                return None
            own = jax.tree.map(partial(jnp.take, indices=ctx.adapter, axis=0), self)
        x = x.astype(jnp.float32)
        if self.key is not None:
            kept = 1 - self.dropout
            x = jnp.where(jax.random.bernoulli(self.key, kept, x.shape), x / kept, 0)
            if self.magnitude is not None:  # as PEFT: the factor is of the product with what A sees
                product = checkpoint_name(matmul(x, weight, ctx.numerics), PROJECTED)
        added = own._low_rank(x)
        if self.magnitude is None:
            return added
        norm = checkpoint_name(self.lengths(weight), PROJECTED) if self.norm is None else own.norm
        factor = (own.magnitude / norm).reshape(-1, 1, added.shape[-1])
        return (factor - 1) * product.astype(jnp.float32) + factor * added

    def _low_rank(self, x: jax.Array) -> jax.Array:
        """``x [B, T, in] . (scale * B . A)^T``, of an adapter for all rows, or of each row's own."""
        if self.a.ndim == 2:
            # Of all tokens at once: what is written with two axes, XLA:CPU turns about without a copy on the way back.
            h = jnp.einsum("ni,ri->nr", x.reshape(-1, x.shape[-1]), self.a, precision=lax.Precision.HIGHEST)
            y = jnp.einsum("nr,or->no", h * self.scale, self.b, precision=lax.Precision.HIGHEST)
            return y.reshape(*x.shape[:-1], -1)
        h = jnp.einsum("bti,bri->btr", x, self.a, precision=lax.Precision.HIGHEST) * self.scale[:, None, None]
        return jnp.einsum("btr,bor->bto", h, self.b, precision=lax.Precision.HIGHEST)

    def lengths(self, weight: jax.Array | QTensor) -> jax.Array:
        """``|W + scale * B . A|`` of each row, float32 ``[out]``, of one adapter: a constant to the derivative, made of
        a tile of W at a time, so that there is never a float copy of it."""
        a, b, scale, weight = lax.stop_gradient((self.a, self.b, self.scale, weight))
        out, tile = len(b), tile_rows(weight.shape, 4)

        def of(w: Any, b: jax.Array) -> jax.Array:
            rows = dequantize(w) if isinstance(w, QTensor) else w.astype(jnp.float32)
            rows = rows + scale * jnp.matmul(b, a, precision=lax.Precision.HIGHEST)
            return jnp.sqrt(jnp.sum(rows * rows, -1))

        def step(i: jax.Array, found: jax.Array) -> jax.Array:
            start = jnp.minimum(i * tile, out - tile)  # the last tile may repeat rows of the one before
            part = jax.tree.map(lambda leaf: cut(leaf, start, tile), (weight, b))
            return lax.dynamic_update_slice(found, of(*part), (start,))

        if 4 * out * a.shape[1] < _SMALL_BYTES:
            return of(weight, b)
        return lax.fori_loop(0, -(-out // tile), step, jnp.zeros(out))


_lengths = jax.jit(Lora.lengths)


def settled(lora: Lora, weight: jax.Array | QTensor, parameter: str) -> Lora:
    """With the lengths of the weight's rows, where there are magnitudes: for factors that change no more.

    Raises:
      LoraError: a row has none.
    """
    if lora.magnitude is None:
        return lora
    norm = _lengths(lora, weight)
    check_norms(np.asarray(norm), parameter)
    return lora.replace(norm=norm)


def has_lora(params: Any) -> bool:
    """Whether an adapter is beside some of a model's weights."""
    return any(isinstance(x, Lora) for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Lora)))


def beside(delta: Delta, weight: jax.Array | QTensor, parameter: str) -> Lora:
    """One adapter for all rows.

    Args:
      delta: its.
      weight: beside which it is to be.
      parameter: the weight's name, for messages.

    Raises:
      LoraError: a row of the weight has no direction for a magnitude.
    """
    magnitude = None if delta.magnitude is None else jnp.asarray(delta.magnitude)
    lora = Lora(jnp.asarray(delta.a), jnp.asarray(delta.b), jnp.float32(delta.scale), magnitude)
    return settled(lora, weight, parameter)


def together(deltas: Sequence[Delta | None], weight: jax.Array | QTensor, parameter: str) -> Lora:
    """Several adapters' deltas of one projection, None where one leaves it alone; see ``beside``."""
    present = [d for d in deltas if d is not None]
    rank = max(d.rank for d in present)
    a = np.zeros((1 + len(deltas), rank, present[0].a.shape[1]), np.float32)
    b = np.zeros((1 + len(deltas), present[0].b.shape[0], rank), np.float32)
    scale = np.zeros(1 + len(deltas), np.float32)
    for i, delta in enumerate(deltas, 1):
        if delta is not None:
            a[i, : delta.rank], b[i, :, : delta.rank], scale[i] = delta.a, delta.b, delta.scale
    lora = Lora(jnp.asarray(a), jnp.asarray(b), jnp.asarray(scale))
    if all(delta.magnitude is None for delta in present):
        return lora
    magnitude = np.ones(b.shape[:2], np.float32)
    norm = magnitude.copy()
    for i, delta in enumerate(deltas, 1):
        if delta is not None and delta.magnitude is not None:
            magnitude[i], norm[i] = delta.magnitude, beside(delta, weight, parameter).norm
    return lora.replace(magnitude=jnp.asarray(magnitude), norm=jnp.asarray(norm))


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
