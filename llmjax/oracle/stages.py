"""A model in stages (embedding, each layer, head), computed one at a time, as it is or in another way.

What another runtime computed takes the place of our values (``patches``), so that a step's own error shows without what
it inherited; an ``Edit`` changes a step, to measure what an arithmetic or a mistake does.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llmjax.errors import ConfigError
from llmjax.model import Model
from llmjax.models.config import DecoderConfig
from llmjax.models.context import PATCHES, TAP, Context
from llmjax.models.tree import path_of
from llmjax.numerics import Numerics
from llmjax.oracle.steps import order, split
from llmjax.oracle.trace import named, to_numpy
from llmjax.quant.qtensor import QTensor, dequantize

Run = Callable[..., Any]
Hook = Callable[[nn.Module, Run, Any], Any]
Params = dict[str, Any]


def _same(x: Any) -> Any:
    return x


@dataclasses.dataclass(frozen=True)
class Edit:
    """Another way to compute a stage.

    Attributes:
      hooks: by module, as its taps are named within the stage (``attn.q``; ``""`` is the layer; globs): called as
        ``hook(module, run, x)`` in the place of ``run(module, x)``.
      params: of the stage.
      after: by tap within the stage, what becomes of its value behind the tap.
      unpatched: taps whose patches do not fit any more.
      numerics: another profile.
      config: another configuration.
    """

    hooks: Mapping[str, Hook] = dataclasses.field(default_factory=dict)
    params: Callable[[Params], Params] = _same
    after: Mapping[str, Callable[[jax.Array], jax.Array]] = dataclasses.field(default_factory=dict)
    unpatched: tuple[str, ...] = ()
    numerics: Callable[[Numerics], Numerics] = _same
    config: Callable[[DecoderConfig], DecoderConfig] = _same

    def hook(self, name: str) -> Hook | None:
        """That of a module."""
        return next((h for glob, h in self.hooks.items() if fnmatchcase(name, glob)), None)


PLAIN = Edit()


class Stages:
    """The stages of a model for one prompt: ``-1`` is the embedding, ``L`` what comes after the layers.

    Args:
      model: ours.
      ids: int32 ``[T]``.

    Raises:
      ConfigError: its layers hand on more than ``[B, T, D]``.
    """

    def __init__(self, model: Model, ids: np.ndarray):
        self.model, self.ids = model, ids
        self.layers = model.config.num_hidden_layers
        # Each stage's parameters are floats here: quantized ones mean these, and nothing is converted twice.
        self.params = functools.lru_cache(maxsize=2)(self._params)
        self.blocks: list[nn.Module] = []
        self.shapes = self._shapes()

    def _params(self, stage: int) -> Params:
        if 0 <= stage < self.layers:
            return _floats(self.model.params[f"layers_{stage}"])
        ends = {name: leaf for name, leaf in self.model.params.items() if not name.startswith("layers_")}
        read = ("embed",) if stage < 0 else tuple(ends)  # what is passed by is not read
        return {name: _floats(leaf) if name in read else leaf for name, leaf in ends.items()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all taps, in the order of computation; notes the layers' modules on the way.  The first layers are
        repeated (``DecoderConfig.period``)."""
        config = self.model.config
        found: dict[str, tuple[int, ...]] = {}

        def note(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if len(module.path) == 1 and module.path[0].startswith("layers_") and context.method_name == "__call__":
                if len(args) != 2 or not isinstance(args[0], jax.Array):
                    raise ConfigError(
                        f"{self.model.architecture.model_type}: its layers hand on more than one residual stream, so "
                        "none can be computed alone"
                    )
                self.blocks.append(module.clone(parent=None, name=None))
            return next_function(*args, **kwargs)

        def taps(params: Any) -> Any:
            module = config.shortened(config.period).module()
            return module.apply({"params": params}, self.ids[None], self._context(PLAIN), mutable=["taps"])

        with nn.intercept_methods(note):
            _, made = jax.eval_shape(taps, self.model.params)
        for name, leaf in named(made["taps"]):
            shape = leaf.shape[1:]
            layer, step = split(name)
            names = [name] if layer is None else _alike(step, range(layer, self.layers, config.period))
            found |= dict.fromkeys(names, (shape[0] * shape[1], *shape[2:]) if len(shape) == 4 else shape)
        return {name: found[name] for name in sorted(found, key=order)}

    def _context(self, edit: "Edit") -> Context:
        return Context(jnp.arange(len(self.ids))[None], edit.numerics(self.model.numerics))

    def stage_of(self, tap: str) -> int:
        """Which stage computes it."""
        layer, name = split(tap)
        return layer if layer is not None else -1 if name == "embed" else self.layers

    def run(
        self, stage: int, x: jax.Array | None, patches: Mapping[str, np.ndarray], edit: Edit = PLAIN
    ) -> tuple[jax.Array | None, dict[str, np.ndarray]]:
        """Computes one stage.

        Args:
          stage: which.
          x: what goes into it, ``[1, T, D]``; None for the embedding.
          patches: by tap, what is computed with instead of our value, from that tap on.
          edit: how.

        Returns:
          what goes into the next stage, and what was computed at each of its taps, before patches.
        """
        inner = 0 <= stage < self.layers
        out: list[jax.Array | None] = [x]
        raw: dict[int, Any] = {}  # what a hook made of a module, kept so that no other takes its id

        def passes(name: str, attends: bool) -> bool:
            """Whether a module of the root is not of this stage; the table is a head at the end alone."""
            return attends == (stage < 0) if name == "embed" else stage < 0 or name.startswith("layers_")

        def intercept(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, attends = context.module, context.method_name == "attend"
            path = module.path
            if not (attends or context.method_name == "__call__") or not args or id(module) in raw:
                return next_function(*args, **kwargs)
            if not inner and not path:
                return next_function(*args, **kwargs)
            if not inner and len(path) == 1 and passes(path[0], attends):
                if path[0] == "layers_0" and stage < 0:
                    out[0] = args[0]
                return x if path[0] == "embed" and not attends else args[0]

            def run(other: nn.Module, *given: Any) -> Any:
                rest = args[len(given) :]
                if other is module:
                    return next_function(*given, *rest, **kwargs)
                bound = other.clone(parent=module.scope)
                raw[id(bound)] = bound
                return bound(*given, *rest, **kwargs)

            hook = edit.hook("head" if attends else ".".join(path))
            return run(module, *args) if hook is None else hook(module, run, args[0])

        module = self.blocks[stage % len(self.blocks)] if inner else edit.config(self.model.config).module()
        prefix = f"layers.{stage}." if inner else ""
        patched = self._patches(stage, patches, edit)
        variables = {"params": edit.params(self.params(stage)), PATCHES: _tree(patched)}
        with nn.intercept_methods(intercept):
            y, made = module.apply(variables, x if inner else self.ids[None], self._context(edit), mutable=["taps"])
        taps = {prefix + n: to_numpy(leaf) for n, leaf in named(made["taps"])}
        return y if inner else out[0], {n: value for n, value in taps.items() if self.stage_of(n) == stage}

    def _patches(self, stage: int, patches: Mapping[str, np.ndarray], edit: Edit) -> dict[str, Any]:
        """By name within the stage."""
        here = {tap: split(tap)[1] for tap in self.shapes if self.stage_of(tap) == stage}
        here = {tap: name for tap, name in here.items() if name not in edit.unpatched}
        found: dict[str, Any] = {name: jnp.asarray(patches[tap]) for tap, name in here.items() if tap in patches}
        for name in set(edit.after) & set(here.values()):
            found[name] = functools.partial(_then, edit.after[name], found.get(name))
        return found


def _alike(step: str, layers: range) -> list[str]:
    return [f"layers.{layer}.{step}" for layer in layers]


def _then(change: Callable[[jax.Array], jax.Array], given: jax.Array | None, value: jax.Array) -> jax.Array:
    return change(value if given is None else given.reshape(value.shape).astype(value.dtype))


def _tree(patches: Mapping[str, Any]) -> dict[str, Any]:
    """By tap's name to the collection that ``models.context.tap`` looks into."""
    tree: dict[str, Any] = {}
    for name, value in patches.items():
        *scopes, last = path_of(name)
        if last in _OWN_NAME or (scopes and scopes[-1] == "attn" and last in ("q_rot", "k_rot", "probs", "out")):
            branch, key = scopes, TAP + last
        elif name in ("embed", "logits"):
            branch, key = [], TAP + name
        else:
            branch, key = [*scopes, last], TAP
        at = tree
        for scope in branch:
            at = at.setdefault(scope, {})
        at[key] = value
    if "head" in tree:  # a tied head's tap is the root's
        tree[TAP + "head"] = tree["head"][TAP]
    return tree


# Taps that are no module's output.
_OWN_NAME = ("resid_attn", "resid", "act")


def _floats(tree: Any) -> Any:
    def convert(leaf: Any) -> Any:
        if isinstance(leaf, QTensor):
            return dequantize(leaf.map(jnp.asarray))
        return jnp.asarray(leaf, jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(convert, tree, is_leaf=lambda x: isinstance(x, QTensor))
