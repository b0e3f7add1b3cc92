"""Ropes whose frequencies a GGUF file keeps as tensors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmjax.errors import ConfigError, shown
from llmjax.models.config import FULL, DecoderConfig
from llmjax.models.rope import Rope
from llmjax.models.scalings import Llama3Scaling, LongRope, plain_frequencies

FREQS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
TENSORS = (FREQS, SHORT_FACTORS, LONG_FACTORS)

# What divides the frequencies of pairs that do not turn.
_STILL = 1e30

# Whose files have Llama 3's scaling as divisors, and contexts that it may be of: first that of all published ones.
_LLAMAS = ("llama", "mistral", "smollm3", "granite")
_ORIGINALS = (8192, *(1 << n for n in range(4, 21)))
# Converters compute the divisors of the slow frequencies in float32, as differences.
_ROUNDING = 5e-6


def described(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Such tensors put into a ``config.json`` that has a place for them: longrope's factors, how much of Gemma 4's
    global heads turns, and divisors that are Llama 3's scaling.  What is wrong with them ``with_ropes`` says.

    Args:
      config: ``gguf_config.hf_config``'s.
      tensors: those of ``TENSORS`` that the file has.
    """
    scaling, ropes = dict(config.get("rope_scaling", {})), dict(config.get("rope_parameters", {}))
    for key, name in (("short_factor", SHORT_FACTORS), ("long_factor", LONG_FACTORS)):
        found = tensors.get(name, np.zeros(0))
        if key in scaling and found.shape == (len(scaling[key]),) and (0 < found).all() and np.isfinite(found).all():
            scaling[key] = found.tolist()
    whole, found = ropes.get(FULL, {}), tensors.get(FREQS, np.zeros(0)).reshape(-1)
    if config["model_type"] in _LLAMAS and not scaling and (llama3 := _llama3(config["rope_theta"], found)):
        scaling = {"rope_type": "llama3", **dataclasses.asdict(llama3)}
    if whole.get("rope_type") == "proportional" and (turning := _turning(tuple(found.tolist()))) is not None:
        # As of rope.dimension_count: half a dimension more is safe.
        ropes[FULL] = whole | {"partial_rotary_factor": min(1.0, (2 * turning + 0.5) / (2 * len(found)))}
    return {**config} | ({"rope_scaling": scaling} if scaling else {}) | ({"rope_parameters": ropes} if ropes else {})


def with_ropes(config: DecoderConfig, tensors: Mapping[str, np.ndarray], where: str) -> DecoderConfig:
    """Such tensors put into a config.

    ``rope_freqs`` holds a divisor of each frequency: Llama 3's scaling, or in Gemma 4's global layers the pairs that do
    not turn.  ``rope_factors_*`` are longrope's.

    Args:
      config: with a ``rope``, or a ``global_rope`` of which a part turns.
      tensors: those of ``TENSORS`` that the file has, each ``[H / 2]``.
      where: for messages.

    Raises:
      ConfigError: another shape, a value that is not a positive number, a model that has no such rope, or a given
        configuration that says otherwise.
    """
    for name, tensor in tensors.items():
        place = _place(config, name)
        if place is None:
            raise ConfigError(f"{where}: tensor {name} is not supported in this architecture")
        rope: Rope = getattr(config, place)
        if tensor.shape != (rope.dims // 2,):
            found = list(tensor.shape)
            raise ConfigError(f"{where}: tensor {name}: expected shape {[rope.dims // 2]}, found {found}")
        values = tuple(float(v) for v in tensor)
        if not all(0 < v < float("inf") for v in values):
            raise ConfigError(f"{where}: tensor {name}: expected positive numbers, found {shown(tensor)}")
        if rope.llama3 is not None and not _is(rope.llama3, rope.theta, tensor):
            raise ConfigError(
                f"{where}: tensor {name}: the file scales its rotation otherwise than rope_scaling says; leave "
                "that out of the configuration given"
            )
        config = dataclasses.replace(config, **{place: _with(rope, name, values)})  # type: ignore[arg-type]
    return config


def _place(config: DecoderConfig, name: str) -> str | None:
    """The field of the rope that a tensor is about."""
    if name == FREQS and getattr(getattr(config, "global_rope", None), "turning", None) is not None:
        return "global_rope"
    rope = getattr(config, "rope", None)
    return "rope" if rope is not None and (name == FREQS or isinstance(rope.scaling, LongRope)) else None


def _with(rope: Rope, name: str, values: tuple[float, ...]) -> Rope:
    if isinstance(rope.scaling, LongRope):
        old = rope.scaling
        scaling = (
            dataclasses.replace(old, short=values) if name == SHORT_FACTORS else dataclasses.replace(old, long=values)
        )
        return dataclasses.replace(rope, scaling=scaling)
    if rope.llama3 is not None:
        return rope  # the same again
    if rope.turning is not None and (turning := _turning(values)) is not None:
        return dataclasses.replace(rope, turning=turning)
    return rope if set(values) == {1.0} else dataclasses.replace(rope, divisors=values)


def _turning(values: tuple[float, ...]) -> int | None:
    """How many pairs turn by divisors that leave the others still; None where they are of another kind."""
    turning = sum(v == 1 for v in values)
    still = (float(np.float32(_STILL)),) * (len(values) - turning)
    return turning if values and values == (1.0,) * turning + still else None


def _llama3(theta: float, divisors: np.ndarray) -> Llama3Scaling | None:
    """The scaling that divisors ``[H / 2]`` are values of, as all of Llama 3's models have it but for factor and
    context; None where they are of another kind.  Of any that fit the first, since they turn alike."""
    factor = float(divisors.max(initial=1))
    if not (divisors.size and 1 < factor < float("inf")):
        return None
    found = (Llama3Scaling(factor, 1.0, 4.0, original) for original in _ORIGINALS)
    return next((scaling for scaling in found if _is(scaling, theta, divisors)), None)


def _is(scaling: Llama3Scaling, theta: float, divisors: np.ndarray) -> bool:
    """Whether it divides frequencies so, but for rounding."""
    plain = plain_frequencies(theta, 2 * len(divisors))
    return np.allclose(scaling(plain) * divisors, plain, rtol=_ROUNDING, atol=0)
