"""How ropes are stretched to contexts longer than they were trained for.

Each scaling gives frequencies, float32 ``[dims / 2]``, and a factor of cosines and sines, as transformers computes them
(``modeling_rope_utils.py``).  Two depend on how long a text is (``Dynamic``, ``LongRope``), and give frequencies ``[B,
dims / 2]`` for texts of ``[B]`` tokens.  How long a text is:

- without a cache, all of it: teacher-forced logits of a long text are not those of its beginning alone;
- while it is generated, what transformers' ``generate`` takes: the prompt's length for the prompt, then each token's
  place.  Under ``Dynamic`` what is cached keeps the angles that it got; under ``LongRope`` a text that grows past the
  original context is computed anew (``DecoderConfig.renewal``).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


def plain_frequencies(theta: float, dims: int) -> np.ndarray:
    """float32 ``[dims / 2]``, in float32 arithmetic as transformers does: float64 angles differ visibly after a few
    hundred tokens."""
    return np.float32(1.0) / np.power(np.float32(theta), _exponents(dims))


def _exponents(dims: int) -> np.ndarray:
    return np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Frequency-dependent rope scaling of Llama 3.1 (transformers ``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, inv: np.ndarray) -> np.ndarray:
        """Plain frequencies scaled."""
        wavelength = np.float32(2 * np.pi) / inv
        old, low, high = self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor
        smooth = (old / wavelength - low) / (high - low)
        blended = (1 - smooth) * inv / self.factor + smooth * inv
        slow, fast = wavelength > old / low, wavelength < old / high
        return np.where(slow, inv / self.factor, np.where(fast, inv, blended)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Slow frequencies are interpolated, fast ones kept, a ramp between (Peng et al. 2023, arXiv:2309.00071).

    Attributes:
      factor: of the context.
      original: the context it was trained for, in tokens.
      attention: multiplies cosines and sines; None follows from the factor.
      fast: turns within the original context from which on a frequency is kept.
      slow: turns up to which it is interpolated.
      truncate: the ramp begins and ends at whole pairs.
      scales: DeepSeek's ``mscale`` and ``mscale_all_dim``, which give another attention factor; None for none.
    """

    factor: float
    original: float
    attention: float | None = None
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    scales: tuple[float, float] | None = None

    @property
    def attention_factor(self) -> float:
        """Of cosines and sines."""

        def scaled(by: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * by * math.log(self.factor) + 1.0

        if self.attention is not None:
            return self.attention
        return scaled(1.0) if self.scales is None else scaled(self.scales[0]) / scaled(self.scales[1])

    def frequencies(self, theta: float, dims: int) -> np.ndarray:
        """See the module."""

        def pair(turns: float) -> float:
            return dims * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair(self.fast), pair(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        ramp = (np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32((high - low) or 0.001)
        kept = 1 - np.clip(ramp, 0, 1)
        powers = np.power(np.float32(theta), _exponents(dims))
        return (1 / (np.float32(self.factor) * powers) * (1 - kept) + 1 / powers * kept).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """A base that grows with the text, once that is longer than the model was trained for (``rope_type: dynamic``).

    Attributes:
      factor: how fast.
      original: the context it was trained for, in tokens.
      attention_factor: multiplies cosines and sines, as of the other scalings; here always 1.
    """

    factor: float
    original: int
    attention_factor: float = 1.0

    def frequencies(self, theta: float, dims: int, tokens: jax.Array) -> jax.Array:
        """See the module."""
        length = jnp.maximum(tokens, self.original).astype(jnp.float32)
        growth = (jnp.float32(self.factor) * length / self.original) - (self.factor - 1)
        base = jnp.float32(theta) * growth ** (dims / (dims - 2))
        return 1 / base[:, None] ** jnp.asarray(_exponents(dims))[None]

    def kind(self, tokens: int) -> int:
        """Equal for texts whose tokens turn by the same angles."""
        return max(tokens, self.original)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """Each frequency is divided by a factor of its own, by one for texts up to the original context and by another for
    longer ones (Ding et al. 2024, arXiv:2402.13753; ``rope_type: longrope``, in older files ``su``).

    Attributes:
      short: factors ``[dims / 2]`` of short texts.
      long: of long ones.
      original: the longest text that is short, in tokens.
      attention_factor: multiplies cosines and sines, of short texts as well.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    attention_factor: float

    def frequencies(self, theta: float, dims: int, tokens: jax.Array) -> jax.Array:
        """See the module."""
        powers = np.power(np.float32(theta), _exponents(dims))
        short, long = (np.float32(1.0) / (np.array(f, np.float32) * powers) for f in (self.short, self.long))
        return jnp.where((tokens > self.original)[:, None], long[None], short[None])

    def kind(self, tokens: int) -> int:
        """Equal for texts whose tokens turn by the same angles."""
        return int(tokens > self.original)
