"""Whether Flax's tools look on while a model runs, and programs that never mistake the one case for the other.

Flax's tools (``nn.intercept_methods``, ``sow`` and other variables, ``capture_intermediates``, random numbers,
``nn.tabulate``, perturbations) act while a module is traced.  A trace that is kept would pass them by, or keep for good
what they changed.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax.core.scope import is_filter_empty, subtract_filters
from flax.linen import module as linen

from llmjax.device import in_memory
from llmjax.models.context import PATCHES

# Where the device's memory does not do.
LOWER = "give shorter texts or fewer taps at a time, or store the weights in fewer bits (quantize, dtype)"
# What models themselves read and write.
_OWN = ("params", "cache", PATCHES)


def interceptors() -> tuple[Any, ...]:
    """Those of ``nn.intercept_methods``, in this thread, for which Flax has no public question."""
    return tuple(linen._global_interceptor_stack)


def watched(module: nn.Module) -> bool:
    """Whether a bound module's layers must run in their own places, under their own names: where something intercepts
    them, or they may make, read or write anything but their parameters, the cache and patches."""
    scope = module.scope
    assert scope is not None
    return bool(
        module.is_initializing()
        or interceptors()
        or scope.rngs
        or set(module.variables) - set(_OWN)
        or not is_filter_empty(subtract_filters(scope.mutable, "cache"))
    )


class Program:
    """A jitted function; while methods are intercepted another, which holds until ``forget``.

    Args:
      function: pure, but for what Flax's interceptors do.
      lower: what takes memory in it, where that ends.
      options: of ``jax.jit``.
    """

    def __init__(self, function: Callable[..., Any], *, lower: str = LOWER, **options: Any):
        def made() -> Callable[..., Any]:
            def program(*args: Any) -> Any:  # a function of its own: JAX keeps traces by it
                return function(*args)

            program.__name__ = function.__name__
            return jax.jit(program, **options)

        self._made, self._plain, self._lower = made, made(), lower
        self._watched: dict[tuple[int, ...], tuple[Callable[..., Any], tuple[Any, ...]]] = {}

    def __call__(self, *args: Any) -> Any:
        """What the function returns.

        Raises:
          NoRoomError: the device has no memory for it.
        """
        found = interceptors()
        key = tuple(map(id, found))  # kept beside the program, so that none of them takes another's id
        program = self._watched.setdefault(key, (self._made(), found))[0] if found else self._plain
        # Operation by operation (JAX_DISABLE_JIT) the bits would be others; who wants to stop in the middle of a model
        # calls it as a function (``Model.apply``).
        with in_memory("a run of the model", self._lower), jax.disable_jit(False):
            return program(*args)

    def forget(self, everything: bool = False) -> bool:
        """Drops what was compiled under interceptors, or all of it; whether there was anything."""
        found = bool(self._watched) or everything
        self._watched = {}
        if everything:
            self._plain = self._made()
        return found
