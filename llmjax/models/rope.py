"""Rotary position embeddings, and how configs stretch them.

Shapes: ``B`` batch, ``T`` query positions, ``N`` heads, ``H`` head width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Frequency-dependent rope scaling of Llama 3.1 (transformers ``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding, half-split pairing (Su et al. 2021, arXiv:2104.09864; the pairing is Hugging Face's
    rotate_half).

    Attributes:
      theta: the base.
      dims: how many leading dimensions of each head rotate; the rest pass through (partial rotary).
      linear: positions are divided by this factor (``rope_type: linear``).
      llama3: scaling of ``rope_type: llama3``.
      turning: how many of the ``dims / 2`` pairs turn, the others having frequency 0 (``rope_type: proportional``);
        None for all.
      divisors: what each of the ``dims / 2`` frequencies is divided by: that scaling again, as GGUF stores it.
    """

    theta: float
    dims: int
    linear: float = 1.0
    llama3: Llama3Scaling | None = None
    divisors: tuple[float, ...] | None = None
    turning: int | None = None

    def frequencies(self) -> np.ndarray:
        """float32 ``[dims / 2]``, in float32 arithmetic as transformers does: float64 angles differ visibly after a few
        hundred tokens."""
        exponent = np.arange(0, self.dims, 2, dtype=np.float32) / np.float32(self.dims)
        inv = np.float32(1.0) / np.power(np.float32(self.theta), exponent)
        if self.linear != 1.0:
            inv = inv / np.float32(self.linear)
        if self.llama3 is not None:
            s = self.llama3
            wavelength = np.float32(2 * np.pi) / inv
            old = s.original_max_position_embeddings
            smooth = (old / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            blended = (1 - smooth) * inv / s.factor + smooth * inv
            slow, fast = wavelength > old / s.low_freq_factor, wavelength < old / s.high_freq_factor
            inv = np.where(slow, inv / s.factor, np.where(fast, inv, blended)).astype(np.float32)
        if self.turning is not None:
            inv[self.turning :] = 0
        if self.divisors is not None:
            inv = inv / np.array(self.divisors, np.float32)
        return inv

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotates ``x [B, T, N, H]`` at ``positions [B, T]``, in x's dtype with angles in float32."""
        angles = positions[..., None].astype(jnp.float32) * self.frequencies()
        cos, sin = (f(angles)[:, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
        half = self.dims // 2
        first, second, rest = x[..., :half], x[..., half : self.dims], x[..., self.dims :]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)
