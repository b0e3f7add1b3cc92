"""What a cause is, and what the catalogue is written with: fields of modules, leaves of parameters."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from llmjax.oracle.metrics import gap
from llmjax.oracle.stages import Edit, Hook, Params, Stages, floats

NORMS = ("attn_norm", "post_attn_norm", "mlp_norm", "post_mlp_norm", "attn.q_norm", "attn.k_norm", "final_norm")
PROJECTIONS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", "head")
SCHEMES = (
    "int8", "int4", "int8-g32", "int4-g32", "int4-g64", "int4-g128", "int8-asym", "int4-asym", "int4-g32-asym",
    "int4-g32-mse",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cause:
    """One mistake.

    Attributes:
      cause: the contract's word.
      detail: what exactly.
      steps: what it acts on, as taps are named within the stage.
      edit: how our code makes the same mistake.
      post: instead, what becomes of the step's right value.
    """

    cause: str
    detail: str
    steps: tuple[str, ...]
    edit: Edit = Edit()
    post: Callable[[np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a cause may look at.

    Attributes:
      stages: our model.
      stage: where the error is.
      step: the tap that shows it, as named within the stage.
      ours: what our step makes of the candidate's input.
      theirs: what the candidate has.
      under: what our step makes of it under an edit of the stage; None where its shapes leave no room for it.
      fits: by what was fitted, the factors found, in other stages too; None where nothing is fitted.
    """

    stages: Stages
    stage: int
    step: str
    ours: np.ndarray
    theirs: np.ndarray
    under: Callable[[Edit], np.ndarray | None]
    fits: dict[str, list[float]] | None = None


def field(**changes: Any) -> Hook:
    """Other fields of a module, where it has them; a function gets the old value."""

    def hook(module: nn.Module, run: Any, x: Any) -> Any:
        if any(getattr(module, name, None) is None for name in changes):
            return run(module, x)
        found = {n: v(getattr(module, n)) if callable(v) else v for n, v in changes.items()}
        return run(module.clone(**found), x)

    return hook


def nothing(module: nn.Module, run: Any, x: Any) -> Any:
    """A hook: zeros in the place of what a module gives."""
    return 0 * run(module, x)


def leaf(step: str, name: str, change: Callable[[jax.Array], Any]) -> Callable[[Params], Params]:
    """One leaf of a module's parameters changed, if it is there; a tied head's weight is the embedding's."""

    def edit(params: Params, path: tuple[str, ...] = tuple(step.split("."))) -> Params:
        if path == ("head",) and "weight" not in params.get("head", {}) and name != "bias":
            path = ("embed",)
        if not path:
            return params | {name: change(params[name])} if name in params else params
        return params | {path[0]: edit(params[path[0]], path[1:])} if path[0] in params else params

    return edit


def weight_of(scene: Scene, step: str, name: str = "weight") -> Any:
    """A leaf of a module's parameters; None where there is none."""
    node = _module(scene.stages.params(scene.stage), step)
    if step == "head" and (node is None or "weight" not in node):
        node = scene.stages.params(scene.stages.layers)["embed"] if name != "bias" else node
    return node.get(name) if isinstance(node, Mapping) else None


def _module(node: Any, step: str) -> Any:
    """A module's parameters; None where there is none."""
    for key in step.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def borrowed(scene: Scene, step: str, layer: int, *names: str) -> Callable[[Params], Params] | None:
    """Leaves of a module that are another layer's, read when they are put there: there may be many layers.  None where
    its weight is of another shape."""
    own, node = weight_of(scene, step), _module(scene.stages.model.params[f"layers_{layer}"], step)
    if node is None or "weight" not in node or node["weight"].shape != own.shape:
        return None
    return lambda params: put(step, {name: floats(node[name]) for name in names if name in node})(params)


def other_layers(scene: Scene) -> Iterable[int]:
    """The other layers, the nearest first."""
    if not 0 <= scene.stage < scene.stages.layers:
        return ()
    return sorted(set(range(scene.stages.layers)) - {scene.stage}, key=lambda j: abs(j - scene.stage))


def modules(scene: Scene, norms: bool) -> list[str]:
    """Those of the scene's stage that are norms, or products with a weight: first of all the usual ones."""
    found: list[str] = []

    def walk(node: Mapping[str, Any], path: tuple[str, ...]) -> None:
        if "weight" in node and path and path[-1] not in ("embed", "kernel") and node["weight"].ndim < 3:
            found.append(".".join(path))
        for name, inner in node.items():
            if isinstance(inner, Mapping):
                walk(inner, (*path, name))

    walk(scene.stages.params(scene.stage), ())
    usual = NORMS if norms else PROJECTIONS
    rest = [name for name in found if name not in usual and ("norm" in name.split(".")[-1]) == norms]
    return [*usual, *rest]


def always(value: Any) -> Callable[[Any], Any]:
    """A change of anything to ``value``."""
    return lambda _: value


def unbiased(scene: Scene, step: str) -> list[np.ndarray]:
    """Ours and theirs, float64 ``[M, out]``, without the step's bias; a norm of each head has one for all of them."""
    bias, both = weight_of(scene, step, "bias"), (scene.ours, scene.theirs)
    if bias is None:
        return [x.reshape(len(x), -1).astype(np.float64) for x in both]
    return [x.reshape(-1, len(bias)).astype(np.float64) - np.asarray(bias, np.float64) for x in both]


def scale_of(scene: Scene, step: str) -> float | None:
    """The factor of the weight that comes nearest; None where it is 1."""
    ours, theirs = unbiased(scene, step)
    scale = float((ours * theirs).sum() / max((ours**2).sum(), 1e-300))
    return None if abs(scale - 1) < 1e-6 else scale


def scales_of(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """By what each channel of ours ``[T, out]`` comes nearest to theirs."""
    found: np.ndarray = (ours * theirs).sum(0) / np.maximum((ours**2).sum(0), 1e-300)
    return found


# By what a number is changed for its derivative, steps of a fit at most, and what of an error must look like it.
_NUDGE, _STEPS, _LIKE = 0.02, 6, 0.5


def factors(scene: Scene, what: str, edit: Callable[[float], Edit], digits: int = 5) -> list[float]:
    """By what factors a number of the program's may be off where its own step was not dumped, in as many digits.

    What a change of the number changes is looked for in the candidate's error: Gauss's and Newton's steps.  Rounding
    has next to nothing of it, however large it is.
    """
    if scene.fits is None or scene.ours.shape != scene.theirs.shape:
        return []
    found, factor, value = scene.fits.setdefault(what, []), 1.0, scene.ours.astype(np.float64)
    for step in range(_STEPS):
        error, nudge = scene.theirs - value, factor * _NUDGE
        moved = scene.under(edit(factor + nudge))
        if moved is None or not np.isfinite(moved).all():
            break
        change = (moved - value) / nudge
        ee, ed, dd = (float((x * y).sum()) for x, y in ((error, error), (error, change), (change, change)))
        if not ee or not dd or (not step and abs(ed) < _LIKE * (ee * dd) ** 0.5):
            break
        last, factor = factor, float(np.clip(factor + ed / dd, factor / 3, factor * 3))
        if abs(factor - last) < 1e-7 or (under := scene.under(edit(factor))) is None or not np.isfinite(under).all():
            break
        value = under.astype(np.float64)
    if (factor := float(f"{factor:.{digits}g}")) not in (1.0, *found):
        found.append(factor)
    return found


def put(step: str, found: Mapping[str, Any]) -> Callable[[Params], Params]:
    """Other leaves of a module by name, those that are not None."""

    def edit(params: Params) -> Params:
        for name, value in found.items():
            params = params if value is None else leaf(step, name, always(value))(params)
        return params

    return edit


def begins(ours: np.ndarray, theirs: np.ndarray, axis: int = 0) -> int | None:
    """The token, the third or a later one, from which on two arrays differ whose ``axis`` counts tokens; None where
    those before it are not clearly nearer."""
    if ours.shape != theirs.shape or ours.shape[axis] < 4:
        return None
    apart = gap(ours, theirs, axis).by_token
    before = np.maximum.accumulate(apart)[1:-2]  # of tokens 0 to t - 1, for t from 2 on
    times = np.minimum(apart[2:-1], apart[3:]) / np.maximum(before, 1e-6)
    at = int(times.argmax())
    return at + 2 if times[at] > 2 else None
