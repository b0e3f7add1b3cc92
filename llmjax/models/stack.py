"""A model's layers, one after the other: alike layers are traced once, and small packed ones run in a loop.

What starting a program costs grows with its layers: tracing, compiling, and reading a compiled one back (0.7 ms a
kernel, 2,000 kernels in 30 layers).  A loop over stacked weights has those of one layer.  But XLA:CPU copies what a
loop cuts out of a stack before it multiplies with it, unless the weight is converted (``products.tiles``) or the
product is a sum (``products.sums``) anyway.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from llmjax.device import platform_of
from llmjax.models.context import PATCHES, Context
from llmjax.models.recompute import recomputed
from llmjax.models.scanned import kind_of, scanned
from llmjax.models.watched import watched
from llmjax.numerics import Numerics
from llmjax.products.matmul import summed_rows
from llmjax.products.tiles import converted_whole
from llmjax.quant.arrays import aligned
from llmjax.quant.bits import from_storage, to_storage
from llmjax.quant.qtensor import QTensor, is_qtensor

# The entry of the ``params`` and ``cache`` collections that holds stacked layers: a tuple with one tree for each layer
# of the pattern that repeats, leaves ``[n, ...]`` and cache buffers of ``n * P`` pages or slots, n being the
# repetitions.
STACKED = "layers"
# By the name of ``_traced_once``'s inner function a layer is known in a traced model, see ``layer_of``.
_ALIKE = "alike"


def in_turn(model: nn.Module, blocks: Sequence[nn.Module], x: Any, ctx: Context, each: Any = None) -> Any:
    """Applies a model's blocks to ``x``, one after the other: ``[B, T, D]``, or any tree of arrays that travels through
    them.

    In plain use blocks of equal fields and shapes share one trace, which the compiler inlines where it is called, and
    those whose parameters ``stacked`` made one run in a loop.  While Flax's tools look on, each is called in its place.

    Args:
      model: bound, whose variables the blocks' are.
      blocks: named ``layers_i``.
      x: what the first gets and each hands on.
      ctx: for all of them.
      each: arrays ``[L, ...]``, a third argument for each block; None for none.
    """
    pattern = model.get_variable("params", STACKED, ())
    patched = PATCHES in model.variables
    if not watched(model) and not (patched and ctx.recompute is not None):
        return (_looped if pattern else _traced_once)(model, blocks, x, ctx, each)
    if not pattern:
        return _each(blocks, x, ctx, each)

    def apart(inner: nn.Module, x: Any) -> Any:
        return _each([block.clone(parent=inner) for block in blocks], x, ctx, each)

    views = (partial(view, len(blocks), len(pattern)) for view in (_unstacked, _restacked))
    return nn.map_variables(apart, ["params", "cache"], *views, mutable=True)(model, x)


def _each(blocks: Sequence[nn.Module], x: Any, ctx: Context, each: Any) -> Any:
    for i, block in enumerate(blocks):
        x = block(x, ctx, *_own(each, i))
    return x


def _own(each: Any, i: int | jax.Array) -> tuple[Any, ...]:
    return () if each is None else (jax.tree.map(lambda leaf: leaf[i], each),)


def _traced_once(model: nn.Module, blocks: Sequence[nn.Module], x: Any, ctx: Context, each: Any) -> Any:
    @partial(jax.jit, static_argnums=0)  # of this call: what it traces is forgotten with it
    def alike(block: nn.Module, variables: Any, *args: Any) -> Any:
        return block.apply(variables, *args, mutable=["cache"])

    done = 0
    if ctx.recompute is not None:
        own = [_own(each, i) for i in range(len(blocks))]
        x, done = scanned(lambda *args: alike(*args)[0], blocks, x, ctx, own)
    for i, block in enumerate(blocks[done:], done):
        plain = block.clone(parent=None, name=None)
        patched = PATCHES in block.variables  # functions are no arguments of a jitted one, which others would share
        apply = partial(plain.apply, mutable=["cache"]) if patched else partial(alike, plain)
        with jax.named_scope(str(block.name)):
            x, made = (recomputed(apply) if ctx.recompute not in (None, "nothing") else apply)(
                block.variables, x, ctx, *_own(each, i)
            )
        for collection, leaves in made.items():
            if leaves:
                model.put_variable(collection, str(block.name), leaves)
    return x


def layer_of(equation: Any) -> int | None:
    """The number of the layer that an equation of a traced model computes as a whole; None where it does not."""
    found = re.search(r"layers_(\d+)$", str(equation.source_info.name_stack))
    return int(found[1]) if found and equation.params.get("name") == _ALIKE else None


def _looped(model: nn.Module, blocks: Sequence[nn.Module], x: Any, ctx: Context, each: Any) -> Any:
    pattern: tuple[Any, ...] = model.get_variable("params", STACKED)
    count = len(blocks) // len(pattern)
    alike = [block.clone(parent=None, name=None) for block in blocks[: len(pattern)]]
    patches = [block.variables.get(PATCHES, {}) for block in blocks]

    def step(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        x, caches = carry
        new = []
        for place, (block, params, cache) in enumerate(zip(alike, pattern, caches, strict=True)):
            placed = _placed(ctx, i * _rows(cache, count))
            variables = {"params": jax.tree.map(partial(_pick, i), params), "cache": cache}
            variables[PATCHES] = _in_turn(i, patches[place :: len(pattern)])
            own = _own(each, i * len(pattern) + place)
            x, changed = block.apply(variables, x, placed, *own, mutable=["cache"])
            new.append(changed["cache"])
        return x, tuple(new)

    caches: tuple[Any, ...] = model.get_variable("cache", STACKED, ({},) * len(pattern))
    x, caches = lax.fori_loop(0, count, step, (x, caches))
    if model.has_variable("cache", STACKED):
        model.put_variable("cache", STACKED, caches)
    return x


def _placed(ctx: Context, first: jax.Array) -> Context:
    """The context of a layer whose pages, or slots, begin at ``first`` in buffers that several share."""
    places = {"table": ctx.table, "slot": ctx.slot}
    return ctx.replace(**{name: place + first for name, place in places.items() if place is not None})


def _in_turn(i: jax.Array, each: Sequence[Any]) -> dict[str, Any]:
    """The patches of one of several layers, ``i``, that run in a loop.

    Args:
      i: int32 ``[]``.
      each: the layers' own.
    """
    found: dict[str, Any] = {}
    for key in {key: None for own in each for key in own}:
        inner = {turn: own[key] for turn, own in enumerate(each) if key in own}
        is_scope = isinstance(next(iter(inner.values())), Mapping)
        found[key] = (
            _in_turn(i, [inner.get(turn, {}) for turn in range(len(each))]) if is_scope else partial(_chosen, i, inner)
        )
    return found


def _chosen(i: jax.Array, patches: Mapping[int, Callable[[jax.Array], jax.Array]], value: jax.Array) -> jax.Array:
    """What the patch of turn ``i`` makes of a value, or the value; nothing is chosen where no patch changes a thing."""
    if all(patch(value) is value for patch in patches.values()):
        return value
    which = jnp.select([i == turn for turn in patches], list(range(1, len(patches) + 1)), 0)
    return lax.switch(which, [lambda x: x, *patches.values()], value)


def _rows(cache: Any, count: int) -> int:
    """Rows of one layer in buffers that ``count`` of them share."""
    return next((leaf.shape[0] // count for leaf in jax.tree.leaves(cache)), 0)


def _unstacked(layers: int, period: int, variables: dict[str, Any]) -> dict[str, Any]:
    """Variables with an entry for each layer: a view of those with ``STACKED`` for Flax's ``map_variables``."""
    count = layers // period

    def layer(collection: str, tree: Any, i: int) -> Any:
        if collection == "params":
            return jax.tree.map(lambda leaf: leaf[i], tree)
        rows = _rows(tree, count)
        return jax.tree.map(lambda leaf: leaf[i * rows : (i + 1) * rows], tree)

    found = {}
    for collection, tree in variables.items():
        pattern = tree.get(STACKED, ())
        entries = {f"layers_{i}": layer(collection, pattern[i % period], i // period) for i in range(layers) if pattern}
        found[collection] = {name: leaf for name, leaf in tree.items() if name != STACKED} | entries
    return found


def _restacked(layers: int, period: int, variables: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``_unstacked``."""
    found = {}
    for collection, tree in variables.items():
        rest = dict(tree)
        entries = [rest.pop(f"layers_{i}") for i in range(layers) if f"layers_{i}" in tree]
        join = jnp.stack if collection == "params" else jnp.concatenate
        groups = [entries[i::period] for i in range(period) if entries]
        whole = tuple(jax.tree.map(lambda *leaves, join=join: join(leaves), *group) for group in groups)
        found[collection] = rest | ({STACKED: whole} if whole else {})
    return found


def _pick(i: jax.Array, leaf: jax.Array) -> jax.Array:
    return from_storage(lax.dynamic_index_in_dim(to_storage(leaf), i, keepdims=False), leaf.dtype)


def stacked(params: dict[str, Any], period: int, slots: int, numerics: Numerics) -> dict[str, Any] | None:
    """``params`` with the layers' entries made one, a copy, where a loop over them is no slower; else None: for other
    devices than the CPU, and weights spread over several, among others.

    Args:
      params: a model's.
      period: layer ``i`` is computed like layer ``i + period``.
      slots: rows of a decode step.
      numerics: the profile.
    """
    layers = [params[f"layers_{i}"] for i in range(sum(name.startswith("layers_") for name in params))]
    leaves = jax.tree.leaves(layers)
    if not leaves:
        return None
    if platform_of(leaves) != "cpu" or any(isinstance(leaf, jax.Array) and len(leaf.devices()) > 1 for leaf in leaves):
        return None
    if (
        len(layers) % period
        or len(layers) == period > 1
        or not all(_converted(layer, slots, numerics) for layer in layers)
    ):
        return None
    groups = [layers[i::period] for i in range(period)]
    if any(kind_of(layer) != kind_of(group[0]) for group in groups for layer in group):
        return None
    rest = {name: value for name, value in params.items() if not name.startswith("layers_")}
    return {**rest, STACKED: tuple(jax.tree.map(_stack, *group) for group in groups)}


def _stack(*leaves: jax.Array) -> jax.Array:
    stack = aligned((len(leaves), *leaves[0].shape), leaves[0].dtype)  # NumPy: nothing to compile
    return jnp.asarray(np.stack(leaves, out=stack))


def _converted(layer: Any, slots: int, numerics: Numerics) -> bool:
    """Whether each weight of a layer is small, and converted where a decode step multiplies with it."""
    leaves = jax.tree.leaves(layer, is_leaf=is_qtensor)
    return all(
        leaf.values.ndim == 2
        and converted_whole(leaf.shape, 4)
        and (leaf.bits <= 5 or slots <= summed_rows(leaf, numerics))
        if isinstance(leaf, QTensor)
        else leaf.ndim < 2
        for leaf in leaves
    )
