"""Every tensor of a graph's decode signature, for each token of a text."""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.device import usual_programs
from llmjax.errors import RequestError
from llmjax.litert.model import GraphModel
from llmjax.litert.module import MAIN, States
from llmjax.litert.ports import LOGITS


@usual_programs()
def activations(model: GraphModel, ids: np.ndarray, taps: Sequence[str]) -> dict[str, np.ndarray]:
    """Tensors by the names that the file has for them, and ``logits``, in the order of computation: ``[T, ...]``
    without a leading dimension of one.  Those that hold a row's states, caches and the like, are left out.

    Args:
      model: the model.
      ids: int32 ``[T]``, fed one after the other.
      taps: globs of these names, or of what the tensors are (``Roles.outputs``: ``layers.0.resid``).

    Raises:
      RequestError: one matches nothing.
      CheckpointError: the file is damaged.
    """
    module, ports = model.module, model.module.decode_ports
    graph = module.graphs[MAIN]
    signature = graph.signatures[ports.name]
    states = {i for side in (signature.inputs, signature.outputs) for name, i in side.items() if name in ports.states}
    known = [name for i, name in model.decode_names.items() if i not in states]
    meant = meanings(model, known)
    words = {name: [name, *meant.get(name, [])] for name in [*known, LOGITS]}

    def named(globs: Sequence[str]) -> list[str]:
        return [name for name in words if any(graph.matches(word, globs) for word in words[name])]

    if missing := [glob for glob in taps if not named([glob])]:
        raise RequestError(f"taps: {missing[0]!r} matches no tensor; llmjax inspect and a trace of '*' show the names")
    names = [name for name in named(taps) if name != LOGITS]
    logits = [LOGITS] if LOGITS in named(taps) else []

    def step(params: Any, row: States, token: Any, position: Any) -> tuple[States, dict[str, jax.Array]]:
        outputs, row, found = module.run(params, ports, row, token[None], position, jnp.int32(1), names)
        return row, {**found, **{name: outputs[name] for name in logits}}

    program = jax.jit(step, donate_argnums=1, compiler_options=model.compiler_options)
    row, steps = jax.jit(module.empty)(), list[dict[str, np.ndarray]]()
    for position, token in enumerate(ids):
        row, found = program(model.params, row, token, np.int32(position))
        steps.append({name: np.asarray(value) for name, value in found.items()})
    return {name: _joined([found[name] for found in steps]) for name in [*names, *logits]}


def meanings(model: GraphModel, names: Collection[str]) -> dict[str, list[str]]:
    """By the file's name of a tensor, what it is: see ``Roles.outputs``."""
    found: dict[str, list[str]] = {}
    for meaning, i in model.roles.outputs.items():
        if (name := model.decode_names.get(i)) is not None and name in names:
            found.setdefault(name, []).append(meaning)
    return found


def _joined(values: list[np.ndarray]) -> np.ndarray:
    array = np.stack(values)
    while array.ndim > 2 and array.shape[1] == 1:
        array = array[:, 0]
    return np.ascontiguousarray(array)
