"""A model in stages (embedding, each layer, head), computed one at a time, as it is or in another way.

What another runtime computed takes the place of our values (``patches``), so that a step's own error shows without what
it inherited; an ``Edit`` changes a step, to measure what an arithmetic or a mistake does.
"""

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llmjax.errors import LoraError
from llmjax.lora.adapter import LoraSource, read_adapter, values_of
from llmjax.lora.apply import Lora, beside
from llmjax.model import Model
from llmjax.models.config import DecoderConfig
from llmjax.models.context import PATCHES, Context
from llmjax.models.tree import named
from llmjax.numerics import Numerics
from llmjax.oracle.steps import order, split
from llmjax.oracle.trace import to_numpy
from llmjax.quant.qtensor import QTensor, dequantize, is_qtensor

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
      dumped: by tap within the stage, what is shown of its value instead.
      unpatched: taps whose patches do not fit any more.
      numerics: another profile.
      config: another configuration.
    """

    hooks: Mapping[str, Hook] = dataclasses.field(default_factory=dict)
    params: Callable[[Params], Params] = _same
    after: Mapping[str, Callable[[jax.Array], jax.Array]] = dataclasses.field(default_factory=dict)
    dumped: Mapping[str, Callable[[jax.Array], jax.Array]] = dataclasses.field(default_factory=dict)
    unpatched: tuple[str, ...] = ()
    numerics: Callable[[Numerics], Numerics] = _same
    config: Callable[[DecoderConfig], DecoderConfig] = _same

    def hook(self, name: str) -> Hook | None:
        """That of a module."""
        return next((h for glob, h in self.hooks.items() if fnmatchcase(name, glob)), None)


PLAIN = Edit()


class Stages:
    """The stages of a model for one prompt: ``-1`` is what comes before the layers, ``L`` what comes after them.

    What goes into a stage (a *flow*) is whatever the layers hand on, a residual stream or several and what travels with
    them, and with it each layer's own input.

    Args:
      model: ours.
      ids: int32 ``[T]``.
    """

    def __init__(self, model: Model, ids: np.ndarray):
        self.model, self.ids = model, ids
        self.layers = model.config.num_hidden_layers
        # Each stage's parameters are floats here: quantized ones mean these, and nothing is converted twice.
        self.params = functools.lru_cache(maxsize=2)(self._params)
        self.blocks: list[nn.Module] = []
        # What the model's own modules before the layers give, and the names of those behind them.
        self._before: dict[tuple[str, str], Any] = {}
        self._after: set[str] = set()
        # Where the collection of taps has each, within its stage; modules called twice have but the last call there.
        self._places: dict[str, tuple[str, ...]] = {}
        self.twice: set[str] = set()
        self.shapes = self._shapes()

    @functools.cached_property
    def merged(self) -> Mapping[str, Lora]:
        """What adapters added to weights, by parameter: read again, for a model does not keep it.  Nothing of one
        with magnitudes (DoRA), which leave nothing of a weight's own length."""
        origin = self.model.origin
        found: dict[str, Lora] = {}
        for adapter in origin.adapters if origin else ():
            if adapter.name is None and adapter.mode != "unmerged" and adapter.files:
                source = LoraSource(adapter.files[0].path, **adapter.options)
                with contextlib.suppress(LoraError):  # it is not there any more
                    deltas = read_adapter(source, self.model.architecture, self.model.config).deltas
                    values = values_of(self.model.params)
                    found |= {n: beside(d, values(n), n) for n, d in deltas.items() if d.magnitude is None}
        return found

    def _params(self, stage: int) -> Params:
        if 0 <= stage < self.layers:
            return floats(self.model.params[f"layers_{stage}"])
        read = {name for name, _ in self._before} if stage < 0 else {*self._after, "embed"}
        return {name: floats(leaf) for name, leaf in self.model.params.items() if name in read}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all taps, in the order of computation; notes modules on the way.  The first layers are repeated
        (``DecoderConfig.period``)."""
        config = self.model.config
        calls: Counter[tuple[str, ...]] = Counter()
        running: list[tuple[str, ...]] = []

        def note(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, method = context.module, context.method_name
            path = module.path
            if method == "__call__":
                calls[path] += path not in running  # a class that calls its parent's is called once
            running.append(path)
            made = next_function(*args, **kwargs)
            running.pop()
            if len(path) != 1 or method not in ("__call__", "attend"):
                return made
            if path[0].startswith("layers_"):
                self.blocks.append(module.clone(parent=None, name=None))
            elif self.blocks:
                self._after.add(path[0])
            else:
                self._before[path[0], method] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made)
            return made

        def taps(params: Any) -> Any:
            module = config.shortened(config.period).module()
            return module.apply({"params": params}, self.ids[None], self._context(PLAIN), mutable=["taps"])

        with nn.intercept_methods(note):
            _, made = jax.eval_shape(taps, self.model.params)
        found: dict[str, tuple[int, ...]] = {}
        for (path, leaf), (name, _) in zip(
            jax.tree_util.tree_leaves_with_path(made["taps"]), named(made["taps"]), strict=True
        ):
            keys = tuple(key.key for key in path)
            shape = leaf.shape[1:]
            layer, step = split(name)
            names = [name] if layer is None else _alike(step, range(layer, self.layers, config.period))
            found |= dict.fromkeys(names, (shape[0] * shape[1], *shape[2:]) if len(shape) == 4 else shape)
            self._places |= dict.fromkeys(names, keys if layer is None else keys[1:])
            if calls[keys[:-1]] > 1 and len(keys) > 1:
                self.twice |= set(names)
        return {name: found[name] for name in sorted(found, key=order)}

    def _context(self, edit: "Edit") -> Context:
        return Context(jnp.arange(len(self.ids), dtype=jnp.int32)[None], edit.numerics(self.model.numerics))

    def stage_of(self, tap: str) -> int:
        """Which stage computes it."""
        layer, name = split(tap)
        before = (name.split(".")[0], "__call__") in self._before
        return layer if layer is not None else -1 if before else self.layers

    def run(
        self,
        stage: int,
        flow: Any,
        patches: Mapping[str, np.ndarray],
        edit: Edit = PLAIN,
        wanted: Collection[str] | None = None,
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """Computes one stage.

        Args:
          stage: which.
          flow: what goes into it; None for the first.
          patches: by tap, what is computed with instead of our value, from that tap on.
          edit: how.
          wanted: the taps whose values are; None for all.

        Returns:
          what goes into the next stage, and what was computed at each of its taps, before patches.
        """
        inner = 0 <= stage < self.layers
        entering: list[Any] = []  # what the layers are called with
        raw: dict[int, Any] = {}  # what a hook made of a module, kept so that no other takes its id

        def passed(name: str, method: str, args: Any) -> tuple[bool, Any]:
            """Whether a module of the root is not of this stage, and what stands for its result."""
            if name.startswith("layers_"):
                entering.append(args)
                return True, flow[0] if stage >= 0 and len(entering) == self.layers else args[0]
            if stage < 0:
                return (name, method) not in self._before, args[0]
            made = self._before.get((name, method))
            return made is not None, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)

        def intercept(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, attends = context.module, context.method_name == "attend"
            path = module.path
            if not (attends or context.method_name == "__call__") or not args or id(module) in raw:
                return next_function(*args, **kwargs)
            if not inner and not path:
                return next_function(*args, **kwargs)
            if not inner and len(path) == 1:
                foreign, instead = passed(path[0], context.method_name, args)
                if foreign:
                    return instead

            def run(other: nn.Module, *given: Any) -> Any:
                rest = args[len(given) :]
                if other is module:
                    raw[id(module)] = module  # a class that calls its parent's is hooked once
                    try:
                        return next_function(*given, *rest, **kwargs)
                    finally:
                        del raw[id(module)]
                bound = other.clone(parent=module.scope)
                raw[id(bound)] = bound
                return bound(*given, *rest, **kwargs)

            hook = edit.hook("head" if attends else ".".join(path))
            return run(module, *args) if hook is None else hook(module, run, args[0])

        module = self.blocks[stage % len(self.blocks)] if inner else edit.config(self.model.config).module()
        prefix = f"layers.{stage}." if inner else ""
        variables = {"params": edit.params(self.params(stage)), PATCHES: self._patches(stage, patches, edit)}
        given = (flow[0], self._context(edit), *flow[1][stage]) if inner else (self.ids[None], self._context(edit))
        with nn.intercept_methods(intercept):
            y, made = module.apply(variables, *given, mutable=["taps"])
        taps = {prefix + n: leaf for n, leaf in named(made["taps"]) if wanted is None or prefix + n in wanted}
        if not inner:
            y = entering[0][0] if stage < 0 else None
        own = tuple(args[2:] for args in entering) if stage < 0 else flow[1]
        shown = {n: edit.dumped.get(split(n)[1], _same)(leaf) for n, leaf in taps.items() if self.stage_of(n) == stage}
        return (y, own), {n: to_numpy(leaf) for n, leaf in shown.items()}

    def _patches(self, stage: int, patches: Mapping[str, np.ndarray], edit: Edit) -> dict[str, Any]:
        """The collection that ``models.context.tap`` looks into."""
        here = {tap: split(tap)[1] for tap in self.shapes if self.stage_of(tap) == stage and tap not in self.twice}
        tree: dict[str, Any] = {}
        for tap, name in here.items():
            patch = jnp.asarray(patches[tap]) if tap in patches and name not in edit.unpatched else None
            value: Any = functools.partial(_then, edit.after[name], patch) if name in edit.after else patch
            if value is not None:
                *scopes, last = self._places[tap]
                at = tree
                for scope in scopes:
                    at = at.setdefault(scope, {})
                at[last] = value
        return tree


def _alike(step: str, layers: range) -> list[str]:
    return [f"layers.{layer}.{step}" for layer in layers]


def _then(change: Callable[[jax.Array], jax.Array], given: jax.Array | None, value: jax.Array) -> jax.Array:
    return change(value if given is None else given.reshape(value.shape).astype(value.dtype))


def floats(tree: Any) -> Any:
    """Parameters as arrays of floats, packed ones as what they mean."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, QTensor):
            return dequantize(leaf.map(jnp.asarray))
        return jnp.asarray(leaf, jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(convert, tree, is_leaf=is_qtensor)
