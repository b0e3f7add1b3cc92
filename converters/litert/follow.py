"""Models and graphs a layer at a time, whole texts through each: of the weights no more than a layer's are in memory,
and layers that are alike share a program.  What both make behind each layer can be held against each other.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from converters.litert.lowering import resid
from converters.readers.litert.tflite import Operator, TfliteFile
from llmjax.litert.constants import Constants
from llmjax.litert.kernels import KERNELS, put_results
from llmjax.litert.ports import LOGITS, Ports
from llmjax.litert.products import as_array
from llmjax.models.config import DecoderConfig
from llmjax.models.context import Context
from llmjax.models.stack import layer_of
from llmjax.models.tree import path_of, put_at
from llmjax.numerics import Numerics
from llmjax.quant.arrays import aligned, row_chunks
from llmjax.quant.qtensor import QTensor, dequantize

# Told what stands behind a layer: its number, and the stream.
OnLayer = Callable[[int, np.ndarray], None]


def model_logits(
    config: DecoderConfig,
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], np.ndarray],
    numerics: Numerics,
    ids: Sequence[int],
    places: Sequence[int],
    on_layer: OnLayer = lambda layer, stream: None,
) -> np.ndarray:
    """A model's logits ``[len(places), V]``.

    Args:
      config: the model's.
      shapes: of its parameters, by name.
      load: a parameter, float32; asked for it each time that a part of the model needs it.
      numerics: the profile.
      ids: a text.
      places: of it the tokens whose logits are wanted.
      on_layer: told the stream behind each layer, ``[..., T, D]``.
    """

    def step(params: Sequence[jax.Array], ids: jax.Array, places: jax.Array) -> jax.Array:
        tree: dict[str, Any] = {}
        for name, leaf in zip(shapes, params, strict=True):
            put_at(tree, path_of(name), leaf)
        ctx = Context.whole(ids, numerics, last=places)
        logits: Any = config.module().apply({"params": tree}, ids, ctx)
        return logits.astype(jnp.float32)

    abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values()]
    given = [np.array([numbers], np.int32) for numbers in (ids, places)]
    traced = jax.make_jaxpr(step)(abstract, *given)
    jaxpr, names = traced.jaxpr, dict(zip(traced.jaxpr.invars, shapes, strict=False))
    values = dict(zip(jaxpr.constvars, traced.consts, strict=True)) | dict(zip(jaxpr.invars[-2:], given, strict=True))
    parts = list(_parts(jaxpr.eqns))
    needed = [{v for e in eqns for v in e.invars if not isinstance(v, core.Literal)} for eqns, _ in parts]
    programs: dict[int, Any] = {}
    for turn, (eqns, layer) in enumerate(parts):
        later = set(jaxpr.outvars).union(*needed[turn + 1 :])
        made = dict.fromkeys(v for e in eqns for v in e.outvars)
        if layer is None:
            takes = [v for v in needed[turn] if v not in made]
            gives = [v for v in made if v in later]
            names_of = jaxpr.debug_info.with_unknown_names()
            part = jaxpr.replace(constvars=[], invars=takes, outvars=gives, eqns=eqns, debug_info=names_of)
            program: Any = jax.jit(core.jaxpr_as_fun(core.ClosedJaxpr(part, [])))
        else:
            (equation,) = eqns
            closed, takes, gives = equation.params["jaxpr"], equation.invars, equation.outvars
            program = programs.setdefault(id(closed), jax.jit(core.jaxpr_as_fun(closed)))
        inputs = [
            v.val if isinstance(v, core.Literal) else jax.device_put(load(names[v])) if v in names else values[v]
            for v in takes
        ]
        found = program(*inputs)
        del inputs
        values |= dict(zip(gives, found, strict=True))
        if layer is not None:
            on_layer(layer, np.asarray(found[0]))
        values = {v: x for v, x in values.items() if v in later}
        jax.block_until_ready(list(values.values()))  # then what it was made of may go
    (logits,) = (values[v] for v in jaxpr.outvars)
    return np.asarray(logits)[0]


def _parts(equations: Sequence[Any]) -> Iterator[tuple[list[Any], int | None]]:
    """What stands between layers, and each layer with its number."""
    between: list[Any] = []
    for equation in equations:
        layer = layer_of(equation)
        if layer is None:
            between.append(equation)
            continue
        if between:
            yield between, None
        yield [equation], layer
        between = []
    if between:
        yield between, None


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a signature: ``count`` of a text's tokens, from number ``start`` on."""

    ports: Ports
    start: int
    count: int


class GraphRuns:
    """The signatures of a language model's graph, as llmjax writes them.

    Args:
      file: the graph.
      signatures: their ports.
      numerics: the profile, see ``llmjax.litert.graph.settled``.
    """

    def __init__(self, file: TfliteFile, signatures: Sequence[Ports], numerics: Numerics):
        self._file, self._numerics = file, numerics
        self._programs: dict[Any, Any] = {}
        self._signatures = {ports.name: _Signature(file, ports) for ports in signatures}
        if not all(signature.is_layered for signature in self._signatures.values()):
            self._signatures = {ports.name: _Signature(file, ports, layered=False) for ports in signatures}

    def logits(
        self,
        ids: Sequence[int],
        runs: Sequence[Sequence[Call]],
        on_layer: Callable[[int, Call, np.ndarray], None] = lambda layer, call, stream: None,
    ) -> list[np.ndarray]:
        """Of each run ``[n, V]``, those of its calls that give logits.

        Args:
          ids: the text that all of them read from.
          runs: calls one after the other, each from caches of zeros.
          on_layer: told the stream behind each layer that names it.
        """
        values = [[self._inputs(call, ids) for call in run] for run in runs]
        states: list[dict[str, Any]] = [{} for _ in runs]
        for turn in range(max(len(signature.parts) for signature in self._signatures.values())):
            constants, ready = Constants(self._file), dict[str, tuple[Any, list[Any]]]()
            for run, given, state in zip(runs, values, states, strict=True):
                for call, inner in zip(run, given, strict=True):
                    signature = self._signatures[call.ports.name]
                    if turn >= len(signature.parts):
                        continue
                    if call.ports.name not in ready:
                        ready[call.ports.name] = self._ready(signature, signature.parts[turn], constants)
                    self._step(signature, turn, ready[call.ports.name], inner, state)
                    if (stream := inner.pop("stream", None)) is not None:
                        on_layer(turn, call, stream)
                for call in run[-1:]:  # a layer's caches are not needed behind it
                    signature = self._signatures[call.ports.name]
                    for name in [n for n in state if signature.made_in.get(n, turn) <= turn]:
                        del state[name]
        return [
            np.stack([np.asarray(inner[LOGITS]).reshape(-1) for inner in given if LOGITS in inner]) for given in values
        ]

    def _inputs(self, call: Call, ids: Sequence[int]) -> dict[Any, Any]:
        """By tensor; padding is as LiteRT-LM's: token 0 at position 0, which attends to nothing."""
        ports, places = call.ports, np.zeros(call.ports.length, np.int32)
        places[: call.count] = np.arange(call.start, call.start + call.count)
        tokens = np.where(np.arange(ports.length) < call.count, np.asarray(ids, np.int32)[places], 0)
        seen = (np.arange(ports.length) < call.count)[:, None] & (np.arange(ports.context) <= places[:, None])
        shape = {name: tensor.shape for name, tensor in ports.tensors.items()}
        assert ports.tokens and ports.mask
        inputs = {ports.tokens: tokens.astype(np.int32), ports.positions: places, ports.mask: ports.mask_value(seen)}
        numbers = self._file.signatures[ports.name].inputs
        return {numbers[name]: jnp.asarray(value).reshape(shape[name]) for name, value in inputs.items()}

    def _ready(self, signature: "_Signature", part: "_Part", constants: Constants) -> tuple[Any, list[Any]]:
        """The program of a part, and the weights that it takes."""
        read = {i: constants.read(signature.graph, signature.graph.tensors[i]) for i in part.constants}
        static = {i: found for i, found in read.items() if not isinstance(found, str)}
        for op in part.operators if self._numerics.digits is None else ():  # a product of floats is quicker to compile
            name = read.get(op.inputs[1]) if op.name == "FULLY_CONNECTED" else None
            if isinstance(name, str) and isinstance(weight := constants.weights[name], QTensor):
                constants.weights[name] = _expanded(weight)
        key = part.key(signature, static)
        if key not in self._programs:
            named = [i for i, found in read.items() if isinstance(found, str)]
            options = self._numerics.compiler_options(jax.default_backend())
            self._programs[key] = jax.jit(self._program(signature, part, static, named), compiler_options=options)
        return self._programs[key], [constants.weights[found] for found in read.values() if isinstance(found, str)]

    def _step(
        self,
        signature: "_Signature",
        turn: int,
        ready: tuple[Any, list[Any]],
        values: dict[Any, Any],
        states: dict[str, Any],
    ) -> None:
        part, (program, weights) = signature.parts[turn], ready
        inputs = []
        for i in part.takes:
            name = signature.states.get(i)
            if name is None:
                inputs.append(values[i])
                continue
            shape, dtype = signature.ports.states[name]
            inputs.append(states[name] if name in states else jnp.zeros(shape, dtype))
        for i, value in zip(part.gives, program(weights, inputs), strict=True):
            if signature.graph.tensors[i].name == resid(turn):
                values["stream"] = np.asarray(value)
            if (name := signature.made.get(i)) == LOGITS:
                values[LOGITS] = np.asarray(value)
            elif name is not None:
                states[name] = value
            values[i] = value
        for i in [i for i in values if type(i) is int and signature.last.get(i, -1) <= turn]:
            del values[i]

    def _program(
        self, signature: "_Signature", part: "_Part", static: Mapping[int, np.ndarray], named: Sequence[int]
    ) -> Callable[[list[Any], list[Any]], list[Any]]:
        def run(weights: list[Any], inputs: list[Any]) -> list[Any]:
            values = {**static, **dict(zip(named, weights, strict=True)), **dict(zip(part.takes, inputs, strict=True))}
            for op in part.operators:
                tensors = [signature.graph.tensors[i] for i in op.outputs]
                inputs_of = [None if i < 0 else values[i] for i in op.inputs]
                try:
                    put_results(op, KERNELS[op.name](op, inputs_of, tensors, self._numerics), tensors, values)
                except ValueError as error:
                    raise ValueError(f"{op.name}: {error}") from None
            return [as_array(values[i]) for i in part.gives]

        return run


def _expanded(weight: QTensor) -> jax.Array:
    packed, value = jax.tree.map(np.asarray, weight), aligned(weight.shape, np.dtype(np.float32))
    for part in row_chunks(weight.shape):
        value[part] = dequantize(packed.map(operator.itemgetter(part)))
    return jax.device_put(value)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some operators of a signature; numbers of tensors."""

    operators: list[Operator]
    constants: list[int]
    takes: list[int]
    gives: list[int]

    def key(self, signature: "_Signature", static: Mapping[int, np.ndarray]) -> Any:
        """The same for parts that differ in their weights alone."""
        places: dict[int, int] = {-1: -1}

        def place(i: int) -> int:
            return places.setdefault(i, len(places))

        steps = []
        for op in self.operators:
            ends = [tuple(map(place, numbers)) for numbers in (op.inputs, op.outputs)]
            shapes = [(t.type, t.shape) for t in (signature.graph.tensors[i] for i in op.outputs)]
            steps.append((op.name, tuple(sorted(op.options.items())), *ends, tuple(shapes)))
        fixed = tuple((place(i), x.shape, x.dtype.str, x.tobytes()) for i, x in static.items())
        rest = [i for i in self.constants if i not in static]
        return tuple(steps), fixed, *(tuple(map(place, numbers)) for numbers in (rest, self.takes, self.gives))


class _Signature:
    """A signature, cut behind each layer.

    Attributes:
      parts: in turn.
      states: inputs that are states, by tensor; ``made``: outputs, by tensor.
      made_in: by state, the part that makes it.
      last: the last part that needs a tensor.
      is_layered: each state is read and made in one part.
    """

    def __init__(self, file: TfliteFile, ports: Ports, *, layered: bool = True):
        found = file.signatures[ports.name]
        self.ports, self.graph = ports, file.subgraphs[found.subgraph]
        self.states = {i: name for name, i in found.inputs.items() if name in ports.states}
        self.made = {i: name for name, i in found.outputs.items()}
        operators, constant = self.graph.operators, lambda i: i >= 0 and file.is_constant(self.graph.tensors[i])
        maker = {i: op for op in operators for i in op.outputs}
        cuts, done = [0], 0
        for number, op in enumerate(operators, 1):
            if layered and any(self.graph.tensors[i].name == resid(done) for i in op.outputs):
                cuts.append(number)
                done += 1
        cuts += [len(operators)] if cuts[-1] < len(operators) else []
        several = [list(operators[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        expanded = {i for i, op in maker.items() if op.name == "DEQUANTIZE" and constant(op.inputs[0])}
        for part in several:  # what is only a constant in another form is made where it is needed
            inner = {i for op in part for i in op.outputs}
            part[:0] = [maker[i] for i in dict.fromkeys(i for op in part for i in op.inputs) if i in expanded - inner]
        self.last = {i: turn for turn, part in enumerate(several) for op in part for i in op.inputs if i >= 0}
        first = {i: turn for turn, part in reversed([*enumerate(several)]) for op in part for i in op.inputs}
        self.parts: list[_Part] = []
        made_in: dict[int, int] = {}
        for turn, part in enumerate(several):
            made = dict.fromkeys(i for op in part for i in op.outputs)
            used = dict.fromkeys(i for op in part for i in op.inputs if i >= 0)
            made_in |= dict.fromkeys(made, turn)
            gives = [
                i
                for i in made
                if i in self.made
                or self.graph.tensors[i].name == resid(turn)
                or (self.last.get(i, -1) > turn and i not in expanded)
            ]
            takes = [i for i in used if i not in made and not constant(i)]
            self.parts.append(_Part(part, [i for i in used if constant(i)], takes, gives))
        self.made_in = {name: made_in[i] for i, name in self.made.items() if i in made_in}
        self.is_layered = all(
            first.get(i, turn) == self.last.get(i, turn) == turn
            for i, name in self.states.items()
            for turn in [self.made_in.get(name, 0)]
        )


class Distance:
    """How far the streams of a graph and of a model are apart behind each layer, of their size: the root of
    ``sum (x - y)^2 / sum (x^2 + y^2)``."""

    def __init__(self) -> None:
        self._wanted: dict[int, np.ndarray] = {}
        self._sums: dict[int, np.ndarray] = {}

    def model(self, layer: int, stream: np.ndarray) -> None:
        """The model's, ``[..., T, D]``; before the graph's."""
        self._wanted[layer] = stream

    def graph(self, layer: int, call: Call, stream: np.ndarray) -> None:
        """The graph's, in whatever shape."""
        wanted = self._wanted[layer]
        x = stream.reshape(-1, call.ports.length, wanted.shape[-1])[:, : call.count].astype(np.float64)
        y = wanted.reshape(-1, *wanted.shape[-2:])[:, call.start : call.start + call.count].astype(np.float64)
        sums = np.array([np.sum((x - y) ** 2), np.sum(x**2 + y**2)])
        self._sums[layer] = self._sums.get(layer, 0) + sums

    def steepest(self, beyond: float) -> int | None:
        """The layer behind which the distance has grown most, the first one's from float32's roundings; None where none
        has by ``beyond`` times."""
        far = [math.sqrt(num / den) if den else 0.0 for _, (num, den) in sorted(self._sums.items())]
        far = [x if math.isfinite(x) else math.inf for x in far]
        growth = [b / max(a, 1e-6) for a, b in zip([0.0, *far], far, strict=False)]
        most = int(np.argmax(growth)) if growth else 0
        return sorted(self._sums)[most] if growth and growth[most] > beyond else None
