"""Named activations of one forward pass.

Names are the parameter tree's paths with dots: ``embed`` (after any scaling), ``layers.3.attn_norm``,
``layers.3.attn.q``, ``.k``, ``.v`` (before the rotation), ``.q_rot``, ``.k_rot``, ``.probs``, ``.out`` (heads joined,
before ``o``), ``.o``, ``layers.3.resid_attn``, ``layers.3.mlp.gate``, ``.up``, ``.act``, ``.down``, ``layers.3.resid``,
``final_norm``, ``head`` (before a soft-cap), ``logits``.  They come in the order of computation (``oracle.steps``).

A graph (``.tflite``, ``.task``, ``.litertlm``) has the names that its file gives its tensors, and ``logits``; each
token goes through ``decode``.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llmjax.checkpoint.identity import model_facts, runtime_facts
from llmjax.errors import RequestError, shown
from llmjax.litert import tracing
from llmjax.litert.model import GraphModel
from llmjax.model import Model, check_ids
from llmjax.models.context import Context
from llmjax.models.interventions import Interventions
from llmjax.models.tree import tap_name
from llmjax.models.watched import Program
from llmjax.numerics import Numerics
from llmjax.oracle.steps import order
from llmjax.outside.whole import whole_folder


@dataclasses.dataclass(frozen=True)
class Trace:
    """Activations by name, and how they came about.

    Attributes:
      activations: float32 arrays without the batch dimension: ``[T, D]``, heads ``[T, N, H]``, ``probs`` ``[N, T, T]``,
        ``logits`` ``[T, V]``.
      manifest: what was traced and on what (``llmjax.checkpoint.identity``), token ids and taps.
    """

    activations: dict[str, np.ndarray]
    manifest: dict[str, Any]

    def __repr__(self) -> str:
        names = list(self.activations)
        tokens = len(self.manifest["token_ids"])
        return f"Trace({len(names)} activations of {tokens} tokens: {names[0]} to {names[-1]})"

    def save(self, directory: str | Path) -> None:
        """Writes ``activations.safetensors`` and ``manifest.json`` into a new directory that appears only when whole.

        Raises:
          RequestError: the directory exists and is not empty, or cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        # safetensors writes a view's memory as if it were dense: another order, or bytes beyond it.
        dense = {name: np.asarray(x, order="C") for name, x in self.activations.items()}
        with whole_folder(Path(directory), RequestError) as folder:
            try:
                save_file(dense, folder / "activations.safetensors")
            except SafetensorError as error:  # a full disk
                raise OSError(str(error)) from None
            (folder / "manifest.json").write_text(json.dumps(self.manifest, indent=2) + "\n", encoding="utf-8")


def trace(
    model: Model,
    token_ids: Sequence[int],
    taps: str | Sequence[str] = "*",
    *,
    interventions: Interventions = MappingProxyType({}),
) -> Trace:
    """Runs ``token_ids`` through the model without a cache and returns the activations whose names match.

    What is not asked for is not computed beyond what the logits need.

    Args:
      model: the model; its profile decides the numbers.
      token_ids: as fed, BOS included.
      taps: a glob (``*`` matches dots too) or several.
      interventions: see ``Model.intervened``; of a tap that has one, the trace holds what the model went on with.

    Raises:
      RequestError: bad ids, a glob that matches nothing, or an intervention that cannot be.
    """
    if not isinstance(model, Model):
        raise RequestError(f"model: expected what llmjax.load returns, found {shown(model)}")
    model = model.intervened(interventions)
    ids = check_ids(token_ids, model, "token_ids")
    globs = (taps,) if isinstance(taps, str) else tuple(taps) if isinstance(taps, Sequence) else (taps,)
    for glob in globs or (None,):
        if not isinstance(glob, str):
            raise RequestError(f"taps: expected a glob, or a list of them, found {shown(taps)}")
    if isinstance(model, GraphModel):
        tensors = tracing.activations(model, ids, globs)
        return Trace(tensors, _manifest(model, ids, list(globs)) | {"modules": tracing.meanings(model, tensors)})
    program, static = _program_of(model), (model.module, model.numerics)
    program.forget()
    found = program(*static, globs, model.params, ids[None])
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in found):
            every = jax.eval_shape(functools.partial(_matching, *static, ("*",)), model.params, ids[None])
            raise RequestError(f"taps: {glob!r} matches no activation; there are {_listed(every)}")
    activations = {name: to_numpy(x) for name, x in sorted(found.items(), key=lambda item: order(item[0]))}
    return Trace(activations, _manifest(model, ids, list(globs)))


def _matching(
    module: nn.Module, numerics: Numerics, globs: tuple[str, ...], params: Any, ids: jax.Array
) -> dict[str, jax.Array]:
    """Activations by name of ``ids [1, T]``."""
    ctx = Context(jnp.arange(ids.shape[1])[None], numerics)
    _, collected = module.apply({"params": params}, ids, ctx, mutable=["taps"])
    return {name: x for name, x in named(collected["taps"]) if any(fnmatchcase(name, glob) for glob in globs)}


def _program_of(model: Model) -> Program:
    """What is compiled with interventions is kept as long as the model that has them."""
    if not model.interventions:
        return _program(model.numerics)
    programs: dict[str, Program] = model.module.programs
    return programs.setdefault("trace", _program.__wrapped__(model.numerics))


@functools.cache
def _program(numerics: Numerics) -> Program:
    """One for all models, so that a shape is compiled but once."""
    return Program(_matching, static_argnums=(0, 1, 2), compiler_options=numerics.compiler_options)


def _listed(names: Iterable[str]) -> str:
    """The names, those of all layers as one."""
    return ", ".join(dict.fromkeys(re.sub(r"^layers\.\d+", "layers.N", name) for name in sorted(names, key=order)))


def named(tree: Any) -> Iterator[tuple[str, jax.Array]]:
    """The activations in a collection ``taps``, by name."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield tap_name(path), leaf


def to_numpy(x: jax.Array) -> np.ndarray:
    """Without the batch dimension; ``probs [1, K, G, T, T]`` as ``[N, T, T]``."""
    array = np.asarray(x[0], np.float32)
    return array.reshape(-1, *array.shape[2:]) if array.ndim == 4 else array


def _manifest(model: Model, ids: np.ndarray, globs: list[str]) -> dict[str, Any]:
    return {
        **model_facts(model),
        **runtime_facts(),
        "token_ids": ids.tolist(),
        "token_ids_sha256": hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(),
        "taps": globs,
    }
