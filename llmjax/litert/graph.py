"""A TFLite file as JAX functions: each signature one pure function of the weights and its inputs."""

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.readers.litert.options import COMPOSITE
from converters.readers.litert.tflite import BITS, Operator, Signature, Subgraph, Tensor, TfliteFile
from converters.readers.source import problems_error
from llmjax.device import platform_of, usual_programs
from llmjax.errors import CheckpointError, ConfigError, RequestError, named
from llmjax.litert import attention
from llmjax.litert.constants import Constants
from llmjax.litert.kernels import KERNELS, TYPES, put_results
from llmjax.litert.products import Value, as_array, computed
from llmjax.numerics import Numerics

# A profile's name -> what it means for a graph, which says itself where activations are rounded.
_PROFILES = {"litert": "litert", "fast": "litert", "dynamic_int8": "litert", "reference": "reference"}
_FLOAT32 = jnp.dtype(jnp.float32)
_FLOAT32_ONLY = ("EMBEDDING_LOOKUP", "FULLY_CONNECTED")  # weights are read in that, whatever they are
_DEPTH = 16  # of composites within composites


def numerics_for(name: str | None) -> Numerics:
    """The profile a graph is computed under.

    ``litert``, which is also what ``fast``, ``dynamic_int8`` and None mean here, is what LiteRT's interpreter computes
    with its default delegate; under ``reference`` no activation is rounded: weights mean their dequantized values.

    Raises:
      ConfigError: a profile that says nothing about graphs.
    """
    found = _PROFILES.get(name or "litert")
    if found is None:
        raise ConfigError(f"numerics: {name} is not about op graphs; expected litert or reference")
    return Numerics(found, activations=_FLOAT32, products=_FLOAT32)


def settled(file: TfliteFile, numerics: Numerics) -> Numerics:
    """A graph's profile, told whether activations are rounded in the graph; or behind it, if the profile says so."""
    rounds = numerics.digits == 1 or any(
        op.name in ("FULLY_CONNECTED", "DEPTHWISE_CONV_2D") and graph.tensors[op.inputs[1]].quantization is not None
        for graph in file.subgraphs
        for op in graph.operators
        if len(op.inputs) > 1
    )
    return dataclasses.replace(numerics, digits=1 if rounds and numerics.name == "litert" else None)


def problems_of(file: TfliteFile, signatures: Iterable[str]) -> list[str]:
    """Why signatures cannot be run, from the tables alone: operators and types that llmjax does not have, by name and
    number."""
    problems: list[str] = []
    for name in signatures:
        signature = file.signatures[name]
        _check(file, signature.subgraph, named(name), problems, ())
        if not 0 <= signature.subgraph < len(file.subgraphs):
            continue
        graph = file.subgraphs[signature.subgraph]
        for lost, what in (
            (set(graph.inputs) - set(signature.inputs.values()), "lacks its graph's input"),
            (set(signature.outputs.values()) - set(graph.outputs), "has what is no output of its graph"),
        ):
            if lost:
                problems.append(f"{named(name)}: the signature {what}, {named(graph.tensors[min(lost)].name)}")
    return list(dict.fromkeys(problems))


def _check(file: TfliteFile, number: int, name: str, problems: list[str], above: tuple[int, ...]) -> None:
    """Says what of a subgraph cannot be run."""
    if not 0 <= number < len(file.subgraphs) or number in above or len(above) > _DEPTH:
        problems.append(f"{name}: its body, subgraph {number}, is missing, or within itself")
        return
    graph = file.subgraphs[number]
    made = {i for op in graph.operators for i in op.outputs}  # what is empty may be a constant, or given
    constants = {i for i, t in enumerate(graph.tensors) if file.is_constant(t) and not (0 in t.shape and i in made)}
    known = {*graph.inputs, *constants}
    for i in graph.inputs:
        if (kind := graph.tensors[i].type) not in TYPES or graph.tensors[i].quantization:
            problems.append(f"{name}: input {named(graph.tensors[i].name)}: activations of {kind} are not supported")
    for place, op in enumerate(graph.operators):
        where = f"{name}: operator {place} ({op.label})"
        if op.name == COMPOSITE:
            _check(file, op.options["body"], where, problems, (*above, number))
        elif op.name not in KERNELS:
            problems.append(f"{where} is not supported")
        problems += [f"{where}: {why}" for i in op.inputs if i >= 0 for why in _unlike(op, graph.tensors[i])]
        if op.name == "FULLY_CONNECTED" and any(graph.tensors[i].quantization for i in op.inputs[1:2]):
            if any(i >= 0 and not file.is_constant(graph.tensors[i]) for i in op.inputs[2:]):
                problems.append(f"{where}: a bias that the graph computes, beside quantized weights, is not supported")
        if missing := [i for i in op.inputs if i >= 0 and i not in known]:
            kind = graph.tensors[missing[0]].type
            problems.append(f"{where}: nothing gives its input, tensor {missing[0]}, {kind}")
        if again := known.intersection(op.outputs):
            problems.append(f"{where}: tensor {min(again)} is given twice")
        known.update(op.outputs)
        for tensor in (graph.tensors[i] for i in op.outputs):
            if tensor.quantization is not None:
                problems.append(f"{where}: static activations of {tensor.type} are not supported")
            elif tensor.type not in TYPES or (op.name in _FLOAT32_ONLY and tensor.type != "FLOAT32"):
                problems.append(f"{where}: activations of {tensor.type} are not supported")
    if lost := set(graph.outputs) - known:
        problems.append(f"{name}: nothing gives output {named(graph.tensors[min(lost)].name)}")


def _unlike(op: Operator, weight: Tensor) -> Iterator[str]:
    """Why the runtime does not compute what a quantized weight says, or not as it does with others."""
    q, width = weight.quantization, weight.shape[-1] if weight.shape else 0
    if q is None:
        return
    if op.name == "DEQUANTIZE" and q.block:
        yield "weights with a scale for each block are not supported: LiteRT makes zeros of them"
    broken = width * BITS.get(weight.type, 0) % 8
    if op.name == "EMBEDDING_LOOKUP" and broken:
        yield f"{weight.type} rows of {width} are not supported: LiteRT begins each at a whole byte"
    # The delegate leaves these products to kernels that round activations in another way.
    if op.name == "FULLY_CONNECTED" and broken:
        yield f"{weight.type} weights of {width} inputs, which are no whole bytes, are not supported"
    if op.name == "FULLY_CONNECTED" and weight.type == "INT2" and q.scales is not None and len(q.scales) == 1:
        yield "INT2 weights with one scale for all channels are not supported"


class Graph:
    """A file's signatures, ready to run.

    Args:
      file: what was read.
      numerics: see ``numerics_for``; of another graph, if that takes what this one gives.
      signatures: that will be run; None for all.

    Attributes:
      file: as given.
      weights: the first argument of every function.

    Raises:
      CheckpointError: an operator, a type or a constant that llmjax does not have; all of them at once.
    """

    def __init__(self, file: TfliteFile, numerics: Numerics, signatures: Iterable[str] | None = None):
        self.file = file
        self.signatures = {
            name: file.signatures[name] for name in (file.signatures if signatures is None else signatures)
        }
        if problems := problems_of(file, self.signatures):
            raise problems_error(file.where, "llmjax does not run this graph", problems)
        constants = Constants(file)
        self._constants: dict[tuple[int, int], np.ndarray | str] = {}
        for number in sorted({n for s in self.signatures.values() for n in self._reached(s.subgraph)}):
            graph = file.subgraphs[number]
            for i in {i for op in graph.operators for i in op.inputs if i >= 0} | set(graph.outputs):
                if file.is_constant(graph.tensors[i]):
                    self._constants[number, i] = constants.read(graph, graph.tensors[i])
        self.weights: dict[str, Any] = constants.weights
        self.numerics = settled(file, numerics)

    def under(self, numerics: Numerics) -> "Graph":
        """The same graph under another profile, nothing read again."""
        other = copy.copy(self)
        other.__dict__.pop("_compiled", None)
        other.numerics = settled(self.file, numerics)
        return other

    def _reached(self, number: int) -> set[int]:
        bodies = {op.options["body"] for op in self.file.subgraphs[number].operators if op.name == COMPOSITE}
        return {number}.union(*(self._reached(body) for body in bodies))

    @property
    def operators(self) -> dict[str, Counter[str]]:
        """By signature, how many operators of each kind it runs, a composite as one."""
        return {
            name: Counter(op.label for op in self.file.subgraphs[s.subgraph].operators)
            for name, s in self.signatures.items()
        }

    def tensor(self, signature: str, port: str, *, output: bool = False) -> Tensor:
        """What a signature says of an input or output."""
        found = self._signature(signature)
        return self.file.subgraphs[found.subgraph].tensors[(found.outputs if output else found.inputs)[port]]

    def _signature(self, name: str) -> Signature:
        if name not in self.signatures:
            known = ", ".join(map(named, self.signatures))
            raise RequestError(f"{self.file.where}: no signature {name!r}; there are {known}")
        return self.signatures[name]

    def constant(self, subgraph: int, tensor: int, weights: Any = None) -> Value:
        """The value of a constant of a subgraph, of ``weights`` if a function was given others for its own."""
        found = self._constants[subgraph, tensor]
        return (self.weights if weights is None else weights)[found] if isinstance(found, str) else found

    def names(self, signature: str) -> dict[int, str]:
        """The tensors that a signature's inputs and operators give, by index; a name that others have too ends in its
        index."""
        graph = self.file.subgraphs[self._signature(signature).subgraph]
        places = list(dict.fromkeys([*graph.inputs, *(i for op in graph.operators for i in op.outputs)]))
        counts = Counter(graph.tensors[i].name for i in places)
        return {i: (n if counts[n := graph.tensors[i].name] == 1 else f"{n}#{i}") for i in places}

    @staticmethod
    def matches(name: str, taps: Sequence[str]) -> bool:
        """Whether a name is one of ``taps``, or matches one as a glob."""
        return any(name == glob or fnmatchcase(name, glob) for glob in taps)

    def function(
        self, signature: str, taps: Sequence[str] = ()
    ) -> Callable[[Any, Mapping[str, Any]], tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
        """``(weights, inputs by name) -> (outputs by name, tensors by name whose names match a glob of taps)``: pure,
        to jit, vectorise or differentiate."""
        found = self._signature(signature)
        names = self.names(signature) if taps else {}
        wanted = {i: name for i, name in names.items() if self.matches(name, taps)}

        @usual_programs()
        def run(weights: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
            values = self._run(weights, found.subgraph, {i: inputs[name] for name, i in found.inputs.items()})
            return (
                {name: as_array(values[i]) for name, i in found.outputs.items()},
                {name: as_array(values[i]) for i, name in wanted.items()},
            )

        return run

    def _run(self, weights: Any, number: int, values: dict[int, Value]) -> dict[int, Value]:
        """All values of a subgraph, given those of its inputs."""
        graph = self.file.subgraphs[number]

        def value(i: int) -> Value:
            return values[i] if i in values else self.constant(number, i, weights)

        for place, op in enumerate(graph.operators):
            inputs = [None if i < 0 else value(i) for i in op.inputs]
            try:
                self._step(weights, graph, op, inputs, values)
            except CheckpointError:
                raise
            # What a kernel raises where options, shapes and types do not fit each other.
            except (ValueError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError) as error:
                text = " ".join(str(error).split())[:200]
                self.file.fail(f"damaged, or not supported: subgraph {number}, operator {place} ({op.label}): {text}")
        for i in graph.outputs:
            values.setdefault(i, value(i))
        return values

    def _step(self, weights: Any, graph: Subgraph, op: Operator, inputs: list[Value], values: dict[int, Value]) -> None:
        tensors = [graph.tensors[i] for i in op.outputs]
        found: Any
        if attention.is_taken(op, graph):
            found = attention.attention(op, inputs, self.numerics)
        elif op.name == COMPOSITE:
            body = self.file.subgraphs[op.options["body"]]
            inner = self._run(weights, op.options["body"], dict(zip(body.inputs, inputs, strict=True)))
            found = tuple(inner[i] for i in body.outputs)
        else:
            if op.name == "FULLY_CONNECTED" and not self.file.is_constant(graph.tensors[op.inputs[1]]):
                inputs = [inputs[0], computed(inputs[1]), *inputs[2:]]
            found = KERNELS[op.name](op, inputs, tensors, self.numerics)
        put_results(op, found, tensors, values)

    @functools.cached_property
    def _compiled(self) -> dict[tuple[str, tuple[str, ...]], Callable[..., Any]]:
        return {}

    def check(self) -> None:
        """Computes the shapes of all that a signature gives, and nothing else.

        Raises:
          CheckpointError: they are not those that the file says.
        """
        for name, signature in self.signatures.items():
            inputs = {
                port: jax.ShapeDtypeStruct(t.shape, TYPES[t.type])
                for port, i in signature.inputs.items()
                for t in [self.file.subgraphs[signature.subgraph].tensors[i]]
            }
            jax.eval_shape(self.function(name), self.weights, inputs)

    @usual_programs()
    def run(
        self, signature: str, inputs: Mapping[str, Any], taps: Sequence[str] = ()
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Runs a signature.

        Args:
          signature: its name.
          inputs: by name, of the shapes and types that it says.
          taps: globs of tensors' names to return as well.

        Returns:
          outputs by name, and tensors by name.

        Raises:
          RequestError: there is no such signature, or inputs that do not fit it.
        """
        ports = self._signature(signature).inputs
        if set(inputs) != set(ports):
            raise RequestError(f"{signature}: expected inputs {sorted(ports)}, found {sorted(inputs)}")
        arrays = {}
        for name, given in inputs.items():
            tensor, array = self.tensor(signature, name), np.asarray(given)
            if array.shape != tensor.shape or array.dtype.kind != np.dtype(TYPES[tensor.type]).kind:
                raise RequestError(
                    f"{signature}: {name}: expected {tensor.type} {list(tensor.shape)}, found {array.dtype} "
                    f"{list(array.shape)}"
                )
            arrays[name] = array.astype(TYPES[tensor.type])
            if array.dtype.kind in "iu" and not np.array_equal(arrays[name], array):
                raise RequestError(f"{signature}: {name}: numbers that do not fit {arrays[name].dtype}")
        key = signature, tuple(taps)
        if key not in self._compiled:
            options = self.numerics.compiler_options(platform_of(self.weights))
            self._compiled[key] = jax.jit(self.function(signature, taps), compiler_options=options)
        return jax.tree.map(np.asarray, self._compiled[key](self.weights, arrays))
