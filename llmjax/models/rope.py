"""Rotary position embeddings.

Shapes: ``B`` batch, ``T`` query positions, ``N`` heads, ``H`` head width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.models.context import Context
from llmjax.models.scalings import Dynamic, Llama3Scaling, LongRope, Yarn, plain_frequencies


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding, half-split pairing (Su et al. 2021, arXiv:2104.09864; the pairing is Hugging Face's
    rotate_half).

    Attributes:
      theta: the base.
      dims: how many leading dimensions of each head rotate; the rest pass through (partial rotary).
      linear: positions are divided by this factor (``rope_type: linear``).
      llama3: scaling of ``rope_type: llama3``.
      divisors: what each of the ``dims / 2`` frequencies is divided by: that scaling again, as GGUF stores it.
      turning: how many of the ``dims / 2`` pairs turn, the others having frequency 0 (``rope_type: proportional``);
        None for all.
      scaling: of the other types; see ``models.scalings``.
    """

    theta: float
    dims: int
    linear: float = 1.0
    llama3: Llama3Scaling | None = None
    divisors: tuple[float, ...] | None = None
    turning: int | None = None
    scaling: Yarn | Dynamic | LongRope | None = None

    @property
    def follows_length(self) -> bool:
        """Whether frequencies depend on how long the text is."""
        return isinstance(self.scaling, Dynamic | LongRope)

    def frequencies(self) -> np.ndarray:
        """float32 ``[dims / 2]``, where they do not ``follows_length``."""
        if isinstance(self.scaling, Yarn):
            return self.scaling.frequencies(self.theta, self.dims)
        inv = plain_frequencies(self.theta, self.dims)
        if self.linear != 1.0:
            inv = inv / np.float32(self.linear)
        if self.llama3 is not None:
            inv = self.llama3(inv)
        if self.turning is not None:
            inv[self.turning :] = 0
        if self.divisors is not None:
            inv = inv / np.array(self.divisors, np.float32)
        return inv

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """Rotates ``x [B, T, N, H]`` at ``ctx.positions``, in x's dtype with angles in float32."""
        if isinstance(self.scaling, Dynamic | LongRope):
            frequencies = self.scaling.frequencies(self.theta, self.dims, ctx.tokens)[:, None]
        else:
            frequencies = jnp.asarray(self.frequencies())[None, None]
        angles = ctx.positions[..., None].astype(jnp.float32) * frequencies
        factor = 1.0 if self.scaling is None else self.scaling.attention_factor
        cos, sin = ((f(angles) * jnp.float32(factor))[:, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
        half = self.dims // 2
        first, second, rest = x[..., :half], x[..., half : self.dims], x[..., self.dims :]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)
