"""Named activations of one forward pass.

Names are the parameter tree's paths with dots: ``embed`` (after any scaling), ``layers.3.attn_norm``,
``layers.3.attn.q``, ``.k``, ``.v`` (before the rotation), ``.q_rot``, ``.k_rot``, ``.probs``, ``.out`` (heads joined,
before ``o``), ``.o``, ``layers.3.resid_attn``, ``layers.3.mlp.gate``, ``.up``, ``.act``, ``.down``, ``layers.3.resid``,
``final_norm``, ``head`` (before a soft-cap), ``logits``.  They come in the order of computation (``oracle.steps``).

A graph (``.tflite``, ``.task``, ``.litertlm``) has the names that its file gives its tensors, and ``logits``; each
token goes through ``decode``.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llmjax.checkpoint.identity import model_facts, runtime_facts
from llmjax.device import platform_of
from llmjax.errors import RequestError, amount, shown
from llmjax.litert import tracing
from llmjax.litert.model import GraphModel
from llmjax.model import Model, check_ids
from llmjax.models.context import Context
from llmjax.models.functions import Known
from llmjax.models.interventions import Intervened, Interventions, intervened
from llmjax.models.tree import named
from llmjax.models.watched import Program
from llmjax.numerics import Numerics
from llmjax.oracle.steps import order
from llmjax.outside.paths import checked_path
from llmjax.outside.whole import whole_folder

# Of logits float32 [T, V], a number.
Scalar = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Trace:
    """Activations by name, and how they came about.

    Attributes:
      activations: float32 arrays without the batch dimension: ``[T, D]``, heads ``[T, N, H]``, ``probs`` ``[N, T, T]``,
        ``logits`` ``[T, V]``.
      manifest: what was traced and on what (``llmjax.checkpoint.identity``), token ids and taps.
      gradients: where ``gradients_of`` asked for them, the derivatives by each activation, of its shape.
    """

    activations: dict[str, np.ndarray]
    manifest: dict[str, Any]
    gradients: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        names = list(self.activations)
        tokens = len(self.manifest["token_ids"])
        return f"Trace({amount(len(names), 'activation')} of {amount(tokens, 'token')}: {names[0]} to {names[-1]})"

    def save(self, directory: str | Path) -> None:
        """Writes ``activations.safetensors`` and ``manifest.json`` into a new directory that appears only when whole;
        gradients, where there are any, into ``gradients/gradients.safetensors``.

        Raises:
          RequestError: the directory exists and is not empty, or cannot be written.
          OutputError: the disk is full; nothing is left behind.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        # safetensors writes a view's memory as if it were dense: another order, or bytes beyond it.
        dense, slopes = (
            {name: np.asarray(x, order="C") for name, x in arrays.items()}
            for arrays in (self.activations, self.gradients)
        )
        with whole_folder(checked_path("directory", directory, RequestError), RequestError) as folder:
            try:
                save_file(dense, folder / "activations.safetensors")
                if slopes:  # apart: a dump's own arrays are activations
                    (folder / "gradients").mkdir()
                    save_file(slopes, folder / "gradients/gradients.safetensors")
            except SafetensorError as error:  # a full disk
                raise OSError(errno.EIO, str(error)) from None
            (folder / "manifest.json").write_text(json.dumps(self.manifest, indent=2) + "\n", encoding="utf-8")


@overload
def trace(
    model: Model,
    token_ids: Sequence[int],
    taps: str | Sequence[str] = "*",
    *,
    interventions: Interventions = MappingProxyType({}),
    gradients_of: Scalar | None = None,
) -> Trace: ...


@overload
def trace(
    model: Model,
    token_ids: Sequence[Sequence[int]],
    taps: str | Sequence[str] = "*",
    *,
    interventions: Interventions = MappingProxyType({}),
    gradients_of: Scalar | None = None,
) -> list[Trace]: ...


def trace(
    model: Model,
    token_ids: Sequence[int] | Sequence[Sequence[int]],
    taps: str | Sequence[str] = "*",
    *,
    interventions: Interventions = MappingProxyType({}),
    gradients_of: Scalar | None = None,
) -> Trace | list[Trace]:
    """Runs ``token_ids`` through the model without a cache and returns the activations whose names match.

    What is not asked for is not computed beyond what the logits need.  Texts of one length share a compiled program.

    Args:
      model: the model; its profile decides the numbers.
      token_ids: as fed, BOS included; or a list of such, computed one by one.
      taps: a glob (``*`` matches dots too) or several.
      interventions: see ``Model.intervened``; of a tap that has one, the trace holds what the model went on with.
      gradients_of: a pure function of the logits, float32 ``[T, V]``, that returns a number: the trace then has its
        derivatives by all of these activations, too.

    Raises:
      RequestError: bad ids, a glob that matches nothing, an intervention that cannot be, or a function whose result is
        no number.
    """
    if not isinstance(model, Model):
        raise RequestError(f"model: expected what llmjax.load returns, found {shown(model)}")
    globs = (taps,) if isinstance(taps, str) else tuple(taps) if isinstance(taps, Sequence) else (taps,)
    for glob in globs or (None,):
        if not isinstance(glob, str):
            raise RequestError(f"taps: expected a glob, or a list of them, found {shown(taps)}")
    if not (gradients_of is None or callable(gradients_of)):
        raise RequestError(f"gradients_of: expected a function of the logits, found {shown(gradients_of)}")
    model = model.intervened(interventions)
    given: Any = token_ids
    many = isinstance(given, Sequence) and not isinstance(given, str) and any(np.iterable(row) for row in given[:1])
    each = given if many else [given]
    rows = [check_ids(ids, model, f"row {i}" if many else "token_ids") for i, ids in enumerate(each)]
    if isinstance(model, GraphModel):
        traces = [_graph_trace(model, ids, globs, gradients_of) for ids in rows]
    else:
        run = _plainly(model, globs) if gradients_of is None else _with_gradients(model, globs, gradients_of)
        traces = [_trace(model, ids, globs, *run(model.params, ids[None])) for ids in rows]
    return traces if many else traces[0]


def bytes_of(model: Model, tokens: int, taps: str | Sequence[str]) -> int:
    """Memory of a trace of so many tokens; of a graph's only if it is of the logits, else 0: nothing tells before."""
    globs = (taps,) if isinstance(taps, str) else tuple(taps)
    if isinstance(model, GraphModel):
        return 4 * tokens * model.config.vocab_size if globs == ("logits",) else 0
    shape = functools.partial(_matching, model.module, model.numerics, globs)
    found = jax.eval_shape(shape, model.params, jnp.zeros((1, tokens), jnp.int32))
    return sum(4 * x.size for x in found.values())


def _trace(
    model: Model, ids: np.ndarray, globs: tuple[str, ...], found: dict[str, jax.Array], slopes: dict[str, jax.Array]
) -> Trace:
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in found):
            shape = functools.partial(_matching, model.module, model.numerics, ("*",))
            every = jax.eval_shape(shape, model.params, ids[None])
            raise RequestError(f"taps: {glob!r} matches no activation; there are {_listed(every)}")
    arrays, gradients = (
        {name: to_numpy(x) for name, x in sorted(some.items(), key=lambda item: order(item[0]))}
        for some in (found, slopes)
    )
    return Trace(arrays, _manifest(model, ids, list(globs)), gradients)


def _graph_trace(model: GraphModel, ids: np.ndarray, globs: tuple[str, ...], gradients_of: Any) -> Trace:
    if gradients_of is not None:
        raise RequestError("gradients_of: a graph (.tflite, .task, .litertlm) has no derivatives")
    tensors = tracing.activations(model, ids, globs)
    return Trace(tensors, _manifest(model, ids, list(globs)) | {"modules": tracing.meanings(model, tensors)})


def _matching(
    module: nn.Module | Intervened, numerics: Numerics, globs: tuple[str, ...], params: Any, ids: jax.Array
) -> dict[str, jax.Array]:
    """Activations by name of ``ids [1, T]``."""
    return _run(module, numerics, globs, params, ids)[1]


def _run(
    module: nn.Module | Intervened, numerics: Numerics, globs: tuple[str, ...], params: Any, ids: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits, and activations by name."""
    ctx = Context.whole(ids, numerics)
    logits, collected = module.apply({"params": params}, ids, ctx, mutable=["taps"])
    return logits, {n: x for n, x in named(collected["taps"]) if any(fnmatchcase(n, glob) for glob in globs)}


# Of params and ids [1, T]: activations by name, and derivatives by them.
_Runner = Callable[[Any, Any], tuple[dict[str, jax.Array], dict[str, jax.Array]]]


def _plainly(model: Model, globs: tuple[str, ...]) -> _Runner:
    program = _program_of(model)
    program.forget()

    def run(params: Any, ids: jax.Array) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        if model.interventions:
            known: Known = model.module.programs.setdefault("traced", Known())
            program.forget(known.changed(model.module.computed(ids.shape)))
        return program(model.module, model.numerics, globs, params, ids), {}

    return run


def _with_gradients(model: Model, globs: tuple[str, ...], scalar: Scalar) -> _Runner:
    def derived(params: Any, ids: jax.Array) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        return _derived(model, globs, scalar, params, ids)

    return Program(derived, compiler_options=model.compiler_options)


def _derived(
    model: Model, globs: tuple[str, ...], scalar: Scalar, params: Any, ids: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Activations by name, and by each the derivatives of a scalar of the logits: by nothing that is added to them."""
    shapes = jax.eval_shape(functools.partial(_matching, model.module, model.numerics, globs), params, ids)
    zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    module = intervened(model.config.module(), model.config, model.interventions)

    def value(added: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, found = _run(dataclasses.replace(module, added=added), model.numerics, globs, params, ids)
        result = scalar(logits[0].astype(jnp.float32))
        if not hasattr(result, "shape") or result.shape or not jnp.issubdtype(result.dtype, jnp.floating):
            what = f"{result.dtype} {list(result.shape)}" if hasattr(result, "shape") else shown(result)
            raise RequestError(f"gradients_of: expected a function that returns a float, found {what}")
        return result, found

    slopes, found = jax.grad(value, has_aux=True)(zeros)
    return found, slopes


def _program_of(model: Model) -> Program:
    """What is compiled with interventions is kept as long as the model that has them."""
    if not model.interventions:
        return _program(model.numerics, platform_of(model.params))
    programs: dict[str, Program] = model.module.programs
    return programs.setdefault("trace", _program.__wrapped__(model.numerics, platform_of(model.params)))


@functools.cache
def _program(numerics: Numerics, platform: str) -> Program:
    """One for all models, so that a shape is compiled but once."""
    return Program(_matching, static_argnums=(0, 1, 2), compiler_options=numerics.compiler_options(platform))


def _listed(names: Iterable[str]) -> str:
    """The names, those of all layers as one."""
    return ", ".join(dict.fromkeys(re.sub(r"^layers\.\d+", "layers.N", name) for name in sorted(names, key=order)))


def to_numpy(x: jax.Array) -> np.ndarray:
    """Without the batch dimension; ``probs [1, K, G, T, T]`` as ``[N, T, T]``."""
    array = np.asarray(x, np.float32)[0]  # on the CPU no copy
    return array.reshape(-1, *array.shape[2:]) if array.ndim == 4 else array


def _manifest(model: Model, ids: np.ndarray, globs: list[str]) -> dict[str, Any]:
    return {
        **model_facts(model),
        **runtime_facts(model.params),
        "token_ids": ids.tolist(),
        "token_ids_sha256": hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(),
        "taps": globs,
    }
