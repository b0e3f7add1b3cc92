"""Per-layer embeddings (Gemma 3n, Gemma 4): besides what enters the first layer, every layer gets a narrow vector of
its own for each token, half of it looked up and half projected from the token's embedding.

Shapes: ``P`` width of such a vector, ``L`` layers.  The table ``[V, L * P]`` is most of a small model's parameters, and
a token reads one row of it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmjax.models.context import Context, tap
from llmjax.models.layers import Embedding, Projection, WideRMSNorm, scaled
from llmjax.models.names import Names


class PerLayerInputs(nn.Module):
    """Token ids ``[B, T]`` and their embeddings ``[B, T, D]`` to ``[L, B, T, P]``.

    Attributes:
      vocab_size: rows of the table.
      layers: L.
      width: P.
      eps: of the norm.
      rounded: factors are rounded to the dtype of the activations, as transformers does in Gemma 3n.
    """

    vocab_size: int
    layers: int
    width: int
    eps: float
    rounded: bool

    @nn.compact
    def __call__(self, ids: jax.Array, x: jax.Array, ctx: Context) -> jax.Array:
        table = Embedding(self.vocab_size, self.layers * self.width, scale=self.width**0.5, name="embed")
        shape = (*ids.shape, self.layers, self.width)
        looked_up = tap(self, "embed", table(jnp.where(ids < self.vocab_size, ids, 0), ctx)).reshape(shape)
        y = Projection(self.layers * self.width, name="project")(x, ctx)
        y = scaled(y, x.shape[-1] ** -0.5, rounded=self.rounded).reshape(shape)
        y = WideRMSNorm(self.eps, name="norm")(y) + looked_up
        return jnp.moveaxis(scaled(y, 2**-0.5, rounded=self.rounded), 2, 0)


class PerLayerBranch(nn.Module):
    """``norm(project(act(gate(x)) * own))``, what a layer's own input adds to ``x [B, T, D]``.

    Attributes:
      activation: act.
      eps: of the norm.
    """

    activation: Callable[[jax.Array], jax.Array]
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array, own: jax.Array, ctx: Context) -> jax.Array:
        y = tap(self, "act", self.activation(Projection(own.shape[-1], name="gate")(x, ctx))) * own
        return WideRMSNorm(self.eps, name="norm")(Projection(x.shape[-1], name="project")(y, ctx))


def per_layer_names(decoder: str) -> Names:
    """Hugging Face's names of what stands here, for a model whose tensors' names begin with ``decoder``."""
    layer = f"{decoder}layers.{{}}."
    return {
        "per_layer.embed": f"{decoder}embed_tokens_per_layer",
        "per_layer.project": f"{decoder}per_layer_model_projection",
        "per_layer.norm": f"{decoder}per_layer_projection_norm",
        "layers.{}.per_layer.gate": f"{layer}per_layer_input_gate",
        "layers.{}.per_layer.project": f"{layer}per_layer_projection",
        "layers.{}.per_layer.norm": f"{layer}post_per_layer_input_norm",
    }
