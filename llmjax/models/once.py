"""Layers that are alike are traced and lowered once, not once each: most of what starting a compiled program costs."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar

import jax
from flax import linen as nn

from llmjax.models.context import Context

_Block = TypeVar("_Block", bound=type[nn.Module])


def traced_once(block: _Block) -> _Block:
    """Class decorator for ``Block.__call__(x, ctx)``: blocks of equal fields, shapes and numerics share a trace.

    The program is the same, for the compiler inlines the shared function where it is called.  Without effect where a
    block's place matters: while parameters are made or activations are tapped.
    """
    plain: Callable[..., jax.Array] = block.__call__

    @wraps(plain)
    def __call__(self: nn.Module, x: jax.Array, ctx: Context) -> jax.Array:
        if self.is_initializing() or self.is_mutable_collection("taps"):
            return plain(self, x, ctx)
        y, changed = _apply(self.clone(parent=None, name=None), plain, self.variables, x, ctx)
        for name, leaves in changed.get("cache", {}).items():
            self.put_variable("cache", name, leaves)
        return y

    setattr(block, "__call__", __call__)  # noqa: B010  a method, to the type checker
    return block


@partial(jax.jit, static_argnums=(0, 1))
def _apply(block: nn.Module, method: Callable[..., jax.Array], variables: Any, x: jax.Array, ctx: Context) -> Any:
    return block.apply(variables, x, ctx, method=method, mutable=["cache"])
