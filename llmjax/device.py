"""Which device computes.  It is asked here and nowhere else, and the answer follows the arrays.

While a function is traced nobody knows: it is lowered later, for the device that holds its arguments.  So what runs
differently there is written twice, plainly and with the CPU's trick, and ``by_device`` leaves the choice to the
lowering: one trace serves every device.
"""

import contextlib
import functools
import importlib.util
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import AbstractDevice, get_abstract_mesh, use_abstract_mesh

from llmjax.errors import ConfigError, LlmjaxError, NoRoomError, shown

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


def wants_kernels() -> bool:
    """Whether kernels of our own are wanted where there are some: ``LLMJAX_KERNELS=0``, before Python starts, has
    products and attention as they are defined, of the library's.

    Raises:
      ConfigError: it is neither 0 nor 1.
    """
    value = os.environ.get("LLMJAX_KERNELS") or "1"
    if value not in ("0", "1"):
        raise ConfigError(f"LLMJAX_KERNELS: expected 0 for none or 1, found {shown(value)}")
    return value == "1"


@functools.cache
def knows_cuda() -> bool:
    """Whether kernels can be compiled for NVIDIA's cards: JAX's plugin is there, be there a card or not, and its way to
    Triton, which JAX 0.11 says will go; and no card is older than the first (A100) that Triton serves.  Of a card that
    goes without, there is a warning."""
    if not wants_kernels() or not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return False
    cards = _cards()
    old = [card for card in cards if float(card.compute_capability) < 8]
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        why = f"JAX {jax.__version__} has no Triton for cards"
    elif old:
        why = f"they need compute capability 8.0, it has {old[0].compute_capability}"
    else:
        return True
    if cards:
        card = (old or cards)[0].device_kind
        warnings.warn(f"{card}: goes on without llmjax's kernels, right but slower: {why}", stacklevel=2)
    return False


def shared_memory() -> int:
    """Bytes of it that a kernel for NVIDIA's cards may fill: what an A10, L4 or RTX has, unless all here are like an
    H100, whose tensor cores read from there."""
    return (227 if capabilities() == {9.0} else 99) << 10


def capabilities() -> set[float]:
    """Of NVIDIA's cards, here."""
    return {float(card.compute_capability) for card in _cards()}


def _cards() -> list[jax.Device]:
    """NVIDIA's, here."""
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


def by_device(
    plain: Callable[..., Result], *, cpu: Callable[..., Result], cuda: Callable[..., Result] | None = None
) -> Callable[..., Result]:
    """A function of arrays that is ``plain``, its definition, everywhere but on the CPU, where it is ``cpu``, and in
    what is compiled for an NVIDIA card, where it is ``cuda`` if there is one.

    All are traced, ``cuda`` where it can be of use, and one is lowered.  To be differentiated under a rule of its own
    alone, if they are not alike in that.
    """

    def chosen(*args: Any) -> Result:
        leaves = jax.tree.leaves(args)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            there = {"cpu": cpu} if cuda is None or not knows_cuda() else {"cpu": cpu, "cuda": _as_on_a_card(cuda)}
            if all(function is plain for function in there.values()):
                return plain(*args)
            return lax.platform_dependent(*args, **there, default=plain)
        return (cpu if platform_of(args) == "cpu" else plain)(*args)

    return chosen


def _as_on_a_card(function: Callable[..., Result]) -> Callable[..., Result]:
    """Says to Pallas that what it lowers is for a card: from JAX 0.11 on it asks the default device, which may be the
    CPU while the arrays are on a card.  It asks for what a card can do with floats of 8 bits, of which there are none
    here, so that the first that is served stands for all."""

    def within(*args: Any) -> Result:
        facts: dict[str, Any] = {"device_kind": "NVIDIA A100", "num_cores": None, "platform": "gpu"}
        known = inspect.signature(AbstractDevice).parameters  # without a platform before JAX 0.11
        card = AbstractDevice(**{name: value for name, value in facts.items() if name in known})
        with use_abstract_mesh(get_abstract_mesh().update(abstract_device=card)):
            return function(*args)

    return within


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
      LlmjaxError: a kernel is not for it.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        said = str(error).partition("\n")[0]
        if "Triton" in said or "Shared memory size limit" in said:
            card = next((card.device_kind for card in _cards()), "the device")
            raise LlmjaxError(
                f"{card}: a kernel of llmjax's does not compile for it ({said}); set LLMJAX_KERNELS=0 in the "
                "environment to go on without, right but slower"
            ) from error
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        asked = re.search(r"allocat\w+ ([\d.]+ ?[KMGT]?i?B|\d+ bytes)", str(error))
        size = f" (it asked for {asked[1]})" if asked else ""
        raise NoRoomError(f"memory: the device has none left for {what}{size}; {lower}") from error
