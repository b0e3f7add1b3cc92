"""Which device computes.  It is asked here and nowhere else, and the answer follows the arrays.

While a function is traced nobody knows: it is lowered later, for the device that holds its arguments.  So what runs
differently there is written twice, plainly and with the CPU's trick, and ``by_device`` leaves the choice to the
lowering: one trace serves every device.
"""

import contextlib
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax import lax

from llmjax.errors import NoRoomError

Result = TypeVar("Result")


def device_of(*trees: Any) -> jax.Device:
    """The device, or the first of those, that computes with the trees' arrays: the one they were put on (committed, as
    JAX has it), else JAX's default, wherever they happen to lie."""
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed:
            return min(leaf.devices(), key=lambda device: device.id)
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(default, jax.Device):
        return default
    return jax.local_devices(backend=default)[0]


def platform_of(*trees: Any) -> str:
    """``cpu``, ``gpu``, ...: of ``device_of``."""
    return device_of(*trees).platform


@functools.cache
def knows_cuda() -> bool:
    """Whether kernels can be compiled for NVIDIA's cards: JAX's plugin is there, be there a card or not, and its way to
    Triton, which JAX 0.11 says will go; and no card is older than the first (A100) that Triton serves."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return False
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return False
    try:
        cards = jax.devices("cuda")
    except RuntimeError:
        return True
    return all(float(card.compute_capability) >= 8 for card in cards)


def by_device(
    plain: Callable[..., Result], *, cpu: Callable[..., Result], cuda: Callable[..., Result] | None = None
) -> Callable[..., Result]:
    """A function of arrays that is ``plain``, its definition, everywhere but on the CPU, where it is ``cpu``, and in
    what is compiled for an NVIDIA card, where it is ``cuda`` if there is one.

    All are traced, ``cuda`` where it can be of use, and one is lowered.  To be differentiated under a rule of its own
    alone, if they are not alike in that.
    """
    there = {"cpu": cpu} if cuda is None else {"cpu": cpu, "cuda": cuda}

    def chosen(*args: Any) -> Result:
        leaves = jax.tree.leaves(args)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            known = {name: function for name, function in there.items() if name == "cpu" or knows_cuda()}
            return lax.platform_dependent(*args, **known, default=plain)
        return (cpu if platform_of(args) == "cpu" else plain)(*args)

    return chosen


@contextlib.contextmanager
def usual_programs() -> Iterator[None]:
    """What is computed within is compiled, ranks and dtypes meet as they do in NumPy, whatever the process asks of its
    own programs (``JAX_DISABLE_JIT``, ``JAX_NUMPY_RANK_PROMOTION``, ``JAX_NUMPY_DTYPE_PROMOTION``): the same bits every
    time, and other packages' code runs as it was written."""
    with jax.disable_jit(False), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@contextlib.contextmanager
def in_memory(what: str, lower: str) -> Iterator[None]:
    """Says where a device's memory ends, and what to lower, in a line.

    Args:
      what: is done within.
      lower: what would take less, and how to say so.

    Raises:
      NoRoomError: the device has not enough for it.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        asked = re.search(r"allocat\w+ ([\d.]+ ?[KMGT]?i?B|\d+ bytes)", str(error))
        size = f" (it asked for {asked[1]})" if asked else ""
        raise NoRoomError(f"memory: the device has none left for {what}{size}; {lower}") from error
