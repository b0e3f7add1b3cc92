"""Optimizers and schedules by name: how gradients become a step.

A step is ``p -= lr * d``, ``d`` being what an optax transformation makes of the clipped gradients.  Learning rates are
computed by Python, in float64, so that a run's record has them exactly.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from llmjax.errors import ConfigError

if TYPE_CHECKING:
    from llmjax.training.config import TrainConfig

Schedule = Callable[[int], float]


def _adamw(c: "TrainConfig") -> optax.GradientTransformation:
    """As torch.optim.AdamW: biases corrected, eps outside the square root.

    Optax's own computes ``1 - b^t`` in float32, which for the first steps is wrong by 1e-5 of it: a bias in every step
    that a comparison with torch sees.
    """

    def update(gradients: Any, state: optax.ScaleByAdamState, params: Any = None) -> Any:
        count = state.count + 1
        mean, square = (
            jax.tree.map(lambda old, g, b=b, power=power: b * old + (1 - b) * g**power, moment, gradients)
            for moment, b, power in ((state.mu, c.betas[0], 1), (state.nu, c.betas[1], 2))
        )
        left, right = (-jnp.expm1(count.astype(jnp.float32) * math.log(b)) if b else jnp.float32(1) for b in c.betas)
        root = jnp.sqrt(right)
        direction = jax.tree.map(lambda m, v: (m / left) / (jnp.sqrt(v) / root + c.eps), mean, square)
        return direction, optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformation(optax.scale_by_adam(*c.betas).init, update)


def _lion(c: "TrainConfig") -> optax.GradientTransformation:
    return optax.scale_by_lion(*c.betas)


def _sgd(c: "TrainConfig") -> optax.GradientTransformation:
    return optax.trace(c.momentum) if c.momentum else optax.identity()


def _rmsprop(c: "TrainConfig") -> optax.GradientTransformation:
    return optax.scale_by_rms(decay=c.betas[1], eps=c.eps, eps_in_sqrt=False)


def _adafactor(c: "TrainConfig") -> optax.GradientTransformation:
    """As transformers' Adafactor by a given rate: ``scale_parameter`` and ``relative_step`` off.

    Every matrix is factored; optax leaves those below 128 whole, as a rank is.
    """
    return optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))


# What each makes of the gradients; weight decay comes after, apart from them, in all (Loshchilov & Hutter 2019,
# arXiv:1711.05101).
_KINDS: dict[str, Callable[["TrainConfig"], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "adafactor": _adafactor,
}
OPTIMIZERS: tuple[str, ...] = tuple(_KINDS)


def optimizer(config: "TrainConfig") -> optax.GradientTransformation:
    """The transformation that a configuration names; its updates are to be multiplied by ``-lr``."""
    decay = [optax.add_decayed_weights(config.weight_decay)] if config.weight_decay else []
    return optax.chain(_KINDS[config.optimizer](config), *decay)


def clipped(gradients: Any, norm: jax.Array, limit: float | None) -> Any:
    """``g * min(1, limit / (norm + 1e-6))``, as torch's ``clip_grad_norm_``."""
    if limit is None:
        return gradients
    factor = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, gradients)


def _cosine(k: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * k / steps))


_DECAYS: dict[str, Callable[[int, int], float]] = {
    "constant": lambda k, steps: 1.0,
    "linear": lambda k, steps: 1 - k / steps,
    "cosine": _cosine,
}
SCHEDULES: tuple[str, ...] = tuple(_DECAYS)


def schedule(name: str, rate: float, warmup: int, steps: int) -> Schedule:
    """The learning rate of optimizer step k, k from 0: ``rate * k / warmup`` first (so 0 for the very first step), then
    down from ``rate`` as the name says, to 0 behind the last step.

    Args:
      name: of ``SCHEDULES``.
      rate: the highest.
      warmup: steps on the way up.
      steps: of the whole run.

    Raises:
      ConfigError: the warm-up is as long as the run.
    """
    if warmup and warmup >= steps:
        raise ConfigError(f"warmup: {warmup} steps, but the run has {steps}; expected fewer")
    decay = _DECAYS[name]

    def at(k: int) -> float:
        return rate * (k / warmup if k < warmup else decay(k - warmup, steps - warmup))

    return at
