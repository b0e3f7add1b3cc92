"""The parameter tree of a model: every parameter's canonical name, place and shape."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llmjax import numerics
from llmjax.models.config import DecoderConfig
from llmjax.models.context import TAP, Context


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of all parameters, without making any; the first layers are repeated."""
    ctx = Context(jnp.zeros((1, 1), jnp.int32), numerics.resolve("reference", jnp.dtype(jnp.float32)))
    init = config.shortened(config.period).module().init
    tree = dict(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32), ctx)["params"])
    for i in range(config.period, config.num_hidden_layers):
        tree[f"layers_{i}"] = tree[f"layers_{i - config.period}"]
    return {canonical(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def canonical(path: tuple[Any, ...]) -> str:
    """``layers_3 / attn / q / weight`` in the tree is ``layers.3.attn.q.weight`` by name."""
    return re.sub(r"\blayers_(\d+)", r"layers.\1", ".".join(str(key.key) for key in path))


def tap_name(path: tuple[Any, ...]) -> str:
    """A tap's name from its place in the collection ``taps``."""
    return canonical(path).replace(f".{TAP}", ".").removeprefix(TAP).rstrip(".")


def named(taps: Any) -> Iterator[tuple[str, jax.Array]]:
    """The activations in a collection ``taps``, by name."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(taps):
        yield tap_name(path), leaf


def path_of(name: str) -> list[str]:
    """The inverse of ``canonical``: the keys that lead to a parameter."""
    return re.sub(r"\blayers\.(\d+)", r"layers_\1", name).split(".")


def get_at(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
    """The leaf that the keys lead to; None where there is none."""
    *parents, last = path
    for parent in parents:
        tree = tree.get(parent, {})
    return tree.get(last)


def put_at(tree: dict[str, Any], path: Sequence[str], leaf: Any) -> None:
    """Puts a leaf into a tree of dictionaries, under the keys that lead there."""
    *parents, last = path
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf
