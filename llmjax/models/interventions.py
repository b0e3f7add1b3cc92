"""What a person puts in an activation's place, by its tap's name, wherever the model runs.

An intervention is a pure function of the tap's value, or an array that takes its place.  It is traced with the model
and compiled into its programs, and into those of no other: ``Model.intervened`` gives a model of its own.  Where what a
function looks at has changed since (a strength, a vector), the next call compiles anew.

A value is ``[B, T, ...]``; ``probs`` are ``[B, K, G, T, S]``.  Without a cache (``apply``, ``logits``, ``trace``) it is
that of the whole text.  With one (``LLM``) the value holds a part: of a prompt a chunk of one row, padded on its right,
and in decode the next token of every slot, ``T = 1``, slots at rest among them.  ``S`` is then what the cache has room
for, the text's positions in their order; what is put where a token does not see counts for nothing.  Where only the
last token's logits are wanted, ``final_norm``, ``head`` and ``logits`` are those of that token alone.  So a function
should treat each token by itself: what it makes of one is then the same however the text is cut, and no row depends on
its neighbours.  Which token that is, a second parameter says (``At``).
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llmjax import numerics
from llmjax.errors import RequestError, shown
from llmjax.models import functions
from llmjax.models.config import DecoderConfig
from llmjax.models.context import PATCHES, Context, Patch
from llmjax.models.tree import put_at, tap_name
from llmjax.models.watched import interceptors

# By tap: a function of its value, or of that and ``At``; or an array.
Interventions = Mapping[str, Any]


class At(NamedTuple):
    """The tokens of a tap's value.

    Attributes:
      ids: int32 ``[B, T]``.
      positions: int32 ``[B, T]``, each one's place in its text, from 0.
    """

    ids: jax.Array
    positions: jax.Array


class Place(NamedTuple):
    """Where a tap is.

    Attributes:
      keys: that lead to it in the collections ``taps`` and ``patches``.
      shape: of its value, of one token.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]

    def value(self, rows: int, tokens: int) -> jax.ShapeDtypeStruct:
        """What a function sees of so many tokens of so many rows."""
        own = self.shape[1:3] + (tokens, tokens) if len(self.shape) == 5 else (tokens, *self.shape[2:])
        return jax.ShapeDtypeStruct((rows, *own), jnp.float32)


class Intervention(Patch):
    """One of them in one call of the model.

    Args:
      name: the tap's.
      change: a function or an array.
      ids: int32 ``[B, T]``, of the call.
      ctx: of the call.
      added: to what takes the value's place; None for nothing.
    """

    def __init__(self, name: str, change: Any, ids: jax.Array, ctx: Context, added: jax.Array | None = None):
        self.name, self.change, self.ids, self.ctx, self.added = name, change, ids, ctx, added
        self.used = False

    def __call__(self, value: jax.Array) -> jax.Array:
        """What takes the value's place, of its shape and dtype.

        Raises:
          RequestError: the function fails to give that, or the array does not fit.
        """
        self.used = True
        changed = self._changed(value)
        return changed if self.added is None else changed + self.added.astype(value.dtype)

    def _changed(self, value: jax.Array) -> jax.Array:
        if not callable(self.change):
            return _fitted(jnp.asarray(self.change), value, self.name)
        try:
            found = self.change(value, self._at(value)) if _wants_tokens(self.change) else self.change(value)
        except Exception as error:
            error.add_note(f"in the intervention at {self.name}")
            raise
        if found is value:
            return value
        if not _is_numeric(found) or jnp.shape(found) != value.shape:
            what = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray | jax.Array) else shown(found)
            raise RequestError(
                f"interventions: {self.name}: the function must return an array of numbers of the value's shape "
                f"{list(value.shape)}, found {what}"
            )
        return jnp.asarray(found).astype(value.dtype)

    def _at(self, value: jax.Array) -> At:
        count = value.shape[3 if value.ndim == 5 else 1]
        if self.ctx.last is None or count == self.ids.shape[1]:
            return At(self.ids, self.ctx.positions)
        ids = jnp.take_along_axis(self.ids, self.ctx.last.reshape(len(self.ctx.last), -1), axis=1)
        return At(ids, self.ctx.at_last().positions)


@dataclasses.dataclass(frozen=True, eq=False)
class Intervened:
    """A module with interventions, for the programs that run one.

    Attributes:
      module: theirs without them.
      interventions: by tap.
      places: of the taps, see ``tap_places``.
      added: by tap, what is added to its value at last, for who wants the derivatives.
      programs: compiled with them, by purpose, for whoever keeps some.
    """

    module: nn.Module
    interventions: Interventions
    places: Mapping[str, Place]
    added: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    programs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def apply(self, variables: Mapping[str, Any], ids: jax.Array, ctx: Context, **options: Any) -> Any:
        """See ``nn.Module.apply``.

        Raises:
          RequestError: a tap that this call does not come by.
        """
        changes = dict.fromkeys(self.added, _same) | dict(self.interventions)
        made = [Intervention(name, change, ids, ctx, self.added.get(name)) for name, change in changes.items()]
        tree: dict[str, Any] = {}
        for intervention in made:
            put_at(tree, self.places[intervention.name].keys, intervention)
        result = self.module.apply({**variables, PATCHES: tree}, ids, ctx, **options)
        if unused := [intervention.name for intervention in made if not intervention.used]:
            raise RequestError(f"interventions: {', '.join(unused)}: not computed here")
        return result

    def computed(self, *shapes: tuple[int, int]) -> dict[Any, str]:
        """By tap and ``(rows, tokens)``, a hash of what its intervention computes by now."""
        return {(name, *shape): self._computed(name, *shape) for name in self.interventions for shape in shapes}

    def _computed(self, name: str, rows: int, tokens: int) -> str:
        change = self.interventions[name]
        if not callable(change):
            return functions.computed(lambda: jnp.asarray(change))
        value, ids = self.places[name].value(rows, tokens), _shaped(rows, tokens)
        return functions.computed(change, value, *([At(ids, ids)] if _wants_tokens(change) else []))


def tap_places(config: DecoderConfig) -> Mapping[str, Place]:
    """The taps of a model by name."""
    return (_places.__wrapped__ if interceptors() else _places)(config)


@functools.lru_cache(maxsize=32)
def _places(config: DecoderConfig) -> Mapping[str, Place]:
    period, ids = config.period, jnp.zeros((1, 1), jnp.int32)
    module = config.shortened(period).module()
    ctx = Context(ids, numerics.resolve("reference", jnp.dtype(jnp.float32)))

    def taps() -> Any:
        variables = module.init(jax.random.key(0), ids, ctx)
        return module.apply(variables, ids, ctx, mutable=["taps"])[1]["taps"]

    found: dict[str, Place] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(taps)):
        keys, name = tuple(str(key.key) for key in path), tap_name(path)
        found[name] = Place(keys, leaf.shape)
        if keys[0].startswith("layers_"):
            first, rest = int(keys[0].removeprefix("layers_")), name.split(".", 2)[2]
            for layer in range(first + period, config.num_hidden_layers, period):
                found[f"layers.{layer}.{rest}"] = Place((f"layers_{layer}", *keys[1:]), leaf.shape)
    return found


def intervened(module: nn.Module, config: DecoderConfig, interventions: Interventions) -> Intervened:
    """A model's module with interventions.

    Raises:
      RequestError: with every one that is for no tap, or neither function nor array.
    """
    places, problems = tap_places(config), []
    for name, change in interventions.items():
        if name not in places:
            near = difflib.get_close_matches(str(name), places, n=5, cutoff=0.5) or ["embed", "layers.0.resid"]
            problems.append(f"interventions: {shown(name)} is no tap of this model; near it are {', '.join(near)}")
        elif not callable(change) and not _is_numeric(change):
            problems.append(f"interventions: {name}: expected a function or an array of numbers, found {shown(change)}")
        elif callable(change) and not _is_fit(change):
            problems.append(
                f"interventions: {name}: expected a function of a tap's value, or of that and At, found one of "
                f"{inspect.signature(change)}"
            )
    if problems:
        raise RequestError("\n".join(problems))
    return Intervened(module, dict(interventions), places)


def checked(interventions: Any) -> Interventions:
    """What was given as interventions.

    Raises:
      RequestError: it is no mapping.
    """
    if not isinstance(interventions, Mapping):
        raise RequestError(f"interventions: expected functions or arrays by tap, found {shown(interventions)}")
    return interventions


def _shaped(rows: int, tokens: int) -> Any:
    return jax.ShapeDtypeStruct((rows, tokens), jnp.int32)


def _same(value: jax.Array) -> jax.Array:
    return value


def _is_numeric(value: Any) -> bool:
    """Whether it is real numbers: the imaginary part of others would be lost."""
    if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array) or isinstance(value, bool):
        return False
    dtype = value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
    return bool(jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating))


def _wants_tokens(function: Any) -> bool:
    """Whether it takes two arguments and cannot do with one."""
    return not _takes(function, 1) and _takes(function, 2)


def _is_fit(function: Any) -> bool:
    return _takes(function, 1) or _takes(function, 2)


def _takes(function: Any, count: int) -> bool:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return count == 1
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _fitted(array: jax.Array, value: jax.Array, name: str) -> jax.Array:
    """Spread over the value's shape, as NumPy does; probabilities may have their heads as one axis, as in a trace."""
    shape = array.shape
    if value.ndim == 5 and array.ndim in (3, 4) and shape[-3] == value.shape[1] * value.shape[2]:
        array = array.reshape(*shape[:-3], *value.shape[1:3], *shape[-2:])
    try:
        return jnp.broadcast_to(array, value.shape).astype(value.dtype)
    except ValueError:
        raise RequestError(
            f"interventions: {name}: an array of shape {list(shape)} does not fit {list(value.shape)}"
        ) from None
