"""Attention whose keys and values another layer may have made: that of Gemma 3n and Gemma 4.

The last layers of a model own no keys and values; each attends to those of the last layer before them of its own kind,
local or global.  So it keeps no cache.  All that is made travels through the layers beside the activations.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
from flax import linen as nn

from llmjax.models.attention import Scores
from llmjax.models.config import DecoderConfig
from llmjax.models.context import Context, tap
from llmjax.models.hf_config import Reader
from llmjax.models.layers import Projection, WideRMSNorm, attended, keys_and_values, rms_normalised
from llmjax.models.rope import Rope
from llmjax.models.stack import in_turn

# Keys and values of the layers that others attend to, by the kind of layer; see ``layers.kept``.
Kept = dict[str, tuple[jax.Array, jax.Array]]

# Whose keys and values a layer attends to: its own, and none else does; its own, as later ones do; an earlier layer's.
OWN, GIVEN, TAKEN = "own", "given", "taken"


def sharing(r: Reader, windows: Sequence[int | None], default: int) -> tuple[str, ...]:
    """``OWN``, ``GIVEN`` or ``TAKEN`` for each layer.

    Args:
      r: the config.
      windows: of the layers, None for a global one.
      default: for an absent ``num_kv_shared_layers``.
    """
    layers = len(windows)
    shared = r.count("num_kv_shared_layers", default)
    first = layers - shared
    local = [window is not None for window in windows]
    if shared and not (first > 0 and set(local[first:]) <= set(local[:first])):
        r.problem(
            f"num_kv_shared_layers: {shared} of {layers} layers take keys and values from earlier ones of their kind, "
            "and there are none for some"
        )
        return (OWN,) * layers
    givers = {max(i for i in range(first) if local[i] == kind) for kind in set(local[first:])}
    return tuple(TAKEN if i >= first else GIVEN if i in givers else OWN for i in range(layers))


@dataclasses.dataclass(frozen=True)
class SharingConfig(DecoderConfig):
    """A config whose layers share keys and values."""

    windows: tuple[int | None, ...]  # a local layer's sliding window in tokens; None for a global layer
    keys: tuple[str, ...]  # of each layer: OWN, GIVEN or TAKEN

    def cache(self, layer: int) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """See ``DecoderConfig.cache``."""
        return {} if self.keys[layer] == TAKEN else super().cache(layer)

    def unused(self) -> tuple[str, ...]:
        """Tensors that published files have all the same, see ``Architecture.unused``: those that would make the keys
        and values of layers which take others'."""
        takers = "|".join(str(i) for i, keys in enumerate(self.keys) if keys == TAKEN)
        return (rf"layers\.({takers})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\..*",)


def through_layers(
    model: nn.Module, blocks: Sequence[nn.Module], x: jax.Array, ctx: Context, own: jax.Array | None
) -> tuple[jax.Array, Context]:
    """``in_turn`` for blocks that share keys and values.  Those that take them keep nothing of a token, so where the
    last token's logits alone are wanted they are spared the others.

    Args:
      model: its config is a ``SharingConfig``.
      blocks: from ``(x, Kept)`` to the same.
      x: ``[..., B, T, D]``.
      ctx: for all of them.
      own: ``[L, B, T, P]``, each layer's own input; None for none.

    Returns:
      what comes out, and the context that goes with it.
    """
    keys = model.config.keys
    first = keys.index(TAKEN) if TAKEN in keys else len(keys)
    x, given = in_turn(model, blocks[:first], (x, {}), ctx, None if own is None else own[:first])
    if first < len(keys):
        x, own = ctx.select_last(x), None if own is None else ctx.select_last(own[first:])
        ctx = ctx.at_last()
        x, _ = in_turn(model, blocks[first:], (x, given), ctx, own)
    return x, ctx


class SharingAttention(nn.Module):
    """Attention whose queries and keys are normed per head, and values, too, without a weight.

    Attributes:
      num_heads: N.
      num_kv_heads: K.
      head_dim: H.
      kind: ``SLIDING`` or ``FULL``: keys and values are taken from a layer of the same kind.
      scores: window and scale.
      rope: of queries and keys.
      eps: of the norms.
      keys: ``OWN``, ``GIVEN`` or ``TAKEN``.
      bias: on q, k, v and o.
      keys_are_values: values are keys before their norm and rotation.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    kind: str
    scores: Scores
    rope: Rope
    eps: float
    keys: str
    bias: bool = False
    keys_are_values: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context, given: Kept) -> tuple[jax.Array, Kept]:
        """``x [B, T, D]`` and the keys and values made so far to the same of the next layer."""

        def heads(name: str, count: int) -> jax.Array:
            y = Projection(count * self.head_dim, self.bias, name=name)(x, ctx)
            return y.reshape(*y.shape[:2], count, self.head_dim)

        q = WideRMSNorm(self.eps, name="q_norm")(heads("q", self.num_heads))
        q = tap(self, "q_rot", self.rope(q, ctx))
        if self.keys == TAKEN:
            k, v = given[self.kind]
        else:
            k = heads("k", self.num_kv_heads)
            v = k if self.keys_are_values else heads("v", self.num_kv_heads)
            k = WideRMSNorm(self.eps, name="k_norm")(k)
            k = tap(self, "k_rot", self.rope(k, ctx))
            v = tap(self, "v_norm", rms_normalised(v, self.eps).astype(v.dtype))
            k, v = keys_and_values(self, k, v, ctx)
        if self.keys == GIVEN:
            given = given | {self.kind: (k, v)}
        out = attended(self, q, k, v, self.scores, ctx)
        return Projection(x.shape[-1], self.bias, name="o")(out, ctx), given
