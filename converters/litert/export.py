"""A checkpoint's graph as a ``.tflite`` file, whose weights are written one after the other as they are read.

The graph is traced from the model's own Flax modules: one step of T tokens over caches of fixed length, for every
signature.  So an architecture is written as soon as it is run.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.litert import weights as weights_lib
from converters.litert.builder import Builder, Node
from converters.litert.graph import File, Graph, Stack, Weight
from converters.litert.lowering import lower
from converters.readers.litert import record
from converters.readers.source import Source
from llmjax.checkpoint.opened import Checkpoint, opened
from llmjax.checkpoint.parameters import OnParameter
from llmjax.checkpoint.plan import Override, Plan, describe
from llmjax.device import usual_programs
from llmjax.errors import ConfigError, shown
from llmjax.lora.adapter import AnyLora
from llmjax.models.config import DecoderConfig
from llmjax.models.context import Context
from llmjax.models.pages import shape
from llmjax.models.registry import read_config
from llmjax.models.tree import path_of, put_at
from llmjax.numerics import REFERENCE, resolve
from llmjax.outside.values import plain
from llmjax.outside.whole import whole_file

ACTIVATIONS = ("dynamic-int8", "float")


@contextlib.contextmanager
def usual_jax() -> Iterator[None]:
    """JAX as it comes, whatever the process has set for programs of its own: the same graph every time."""
    with usual_programs(), jax.enable_x64(False), jax.default_matmul_precision(None):
        yield


@dataclasses.dataclass(frozen=True)
class ExportedGraph:
    """What is written.

    Attributes:
      config: the model's.
      signatures: their names, decode last.
      context: positions that the caches hold.
      caches: of decode: name and shape of each.
      size: bytes of the file.
      weight_bytes: of it the weights and their scales.
    """

    config: DecoderConfig
    signatures: tuple[str, ...]
    context: int
    caches: Mapping[str, tuple[int, ...]]
    size: int
    weight_bytes: int


@usual_jax()
def export_graph(
    source: str | Path,
    destination: str | Path,
    *,
    quantize: str | Path | Mapping[str, Any] | None = None,
    activations: str = "dynamic-int8",
    context: int = 1280,
    prefill_lengths: Sequence[int] = (8, 128, 512),
    lora: AnyLora | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    report: OnParameter = lambda done, total: None,
    announce: Callable[[ExportedGraph], None] = lambda graph: None,
) -> ExportedGraph:
    """Writes the graph of a checkpoint.

    Args:
      source: anything ``llmjax.load`` reads.
      destination: a new file; it appears under its name when it is whole.
      quantize: see ``llmjax.load``; of the schemes int8, int4, int4-g32 and int4-g64.  None keeps what the source has
        in a form that the file can hold, and writes float32 otherwise.
      activations: ``dynamic-int8`` has the runtime round activations where they meet weights of few bits, ``float``
        expands those weights.
      context: tokens that the caches hold.
      prefill_lengths: tokens that the prefill signatures take.
      lora: an adapter to merge into the weights.
      config: see ``llmjax.load``.
      report: called after each parameter: how many are done, and how many there are.
      announce: told what is written, before it is.

    Raises:
      CheckpointError: the source is damaged, or the destination exists or cannot be written.
      ConfigError: an option or a scheme does not fit, or the model needs what LiteRT has no operator for.
      LoraError: the adapter is damaged, or does not fit.
    """
    with opened(source, quantize, config, lora, weights_lib.check) as checkpoint:
        export = Export(checkpoint, activations, context, prefill_lengths)
        announce(export.graph)
        with whole_file(Path(destination)) as place, open(place, "wb") as file:
            export.write(file, report)
    return export.graph


class Export:
    """The graph of an open checkpoint, traced and not yet written.

    Args:
      checkpoint: it.
      activations, context, lengths: see ``export_graph``.

    Attributes:
      graph: what is written.
      forms: of the weights, by parameter.

    Raises:
      ConfigError: see ``export_graph``.
    """

    def __init__(self, checkpoint: Checkpoint, activations: str, context: int, lengths: Sequence[int]):
        if activations not in ACTIVATIONS:
            raise ConfigError(f"activations: unknown {shown(activations)}; expected one of {', '.join(ACTIVATIONS)}")
        source, plan = checkpoint.source, checkpoint.plan
        context, lengths = _checked(plan.config, context, lengths)
        self._source, self._plan, self._merge = source, plan, checkpoint.merge()
        small, self._weights = weights_lib.split(source, plan, checkpoint.recipe, self._merge)
        graphs = [
            _signature(plan.config, {**small, **self._weights}, length, context, activations, decode=decode)
            for length, decode in (*((n, False) for n in lengths), (1, True))
        ]
        self.forms = {name: weight.form for name, weight in self._weights.items()}
        parts = {part.name: part for weight in self._weights.values() for part in weight.parts}
        self._file = File(graphs, parts, _record(source, plan, checkpoint.override, small))
        self.graph = ExportedGraph(
            plan.config,
            tuple(graph.name for graph in graphs),
            context,
            {name: graphs[-1].tensors[i].shape for name, i in graphs[-1].outputs.items() if name != "logits"},
            self._file.size,
            sum(part.nbytes + part.scale_bytes for part in parts.values()),
        )

    def write(self, file: IO[bytes], report: OnParameter = lambda done, total: None) -> None:
        """Writes it from where a seekable file stands, once.

        Raises:
          CheckpointError: the source is damaged.
          OSError: the file cannot be written.
        """
        weights_lib.write(file, self._file, self._source, self._plan, self._weights, self._merge, report)


def _record(source: Source, plan: Plan, override: Override, small: Mapping[str, np.ndarray]) -> bytes:
    """What the checkpoint can be had back by; nothing where a part of its configuration is among its tensors, for which
    ``config.json`` has no place."""
    facts, where = describe(source, override)
    return record.written(_public(facts), small) if read_config(facts, where)[1] == plan.config else b""


def _public(value: Any) -> Any:
    """Without the path that it was once read from."""
    if not isinstance(value, Mapping):
        return value
    return {key: _public(inner) for key, inner in value.items() if key != "_name_or_path"}


def _checked(config: DecoderConfig, context: Any, lengths: Any) -> tuple[int, tuple[int, ...]]:
    """The options that say how many tokens."""
    context = plain(context)
    if type(context) is not int or not 1 <= context <= config.max_position_embeddings:
        most = config.max_position_embeddings
        raise ConfigError(f"context: expected 1 to {most} tokens, the model's own, found {shown(context)}")
    if not config.rewinds:
        raise ConfigError(
            "this model's layers carry a state from token to token, and the graphs that are written for LiteRT keep "
            "keys and values alone; convert it to llmjax or hf"
        )
    if config.renewal is not None and context > config.renewal or config.length_kind(context) != config.length_kind(1):
        raise ConfigError(
            f"context: {context}: the model's rope changes with the length of a text beyond the context it was first "
            "trained for, which no graph can follow; expected no more than that"
        )
    lengths = plain(lengths)
    found = [plain(n) for n in lengths] if isinstance(lengths, Sequence) and not isinstance(lengths, str) else []
    if not found or any(type(n) is not int or not 1 <= n <= context for n in found):
        raise ConfigError(f"prefill_lengths: expected numbers from 1 to the context, {context}, found {shown(lengths)}")
    return context, tuple(sorted(set(found)))


def _signature(
    config: DecoderConfig,
    parameters: Mapping[str, np.ndarray | Weight | Stack],
    length: int,
    context: int,
    activations: str,
    *,
    decode: bool,
) -> Graph:
    """``decode``, or the prefill of ``length`` tokens, which gives caches alone."""
    names = list(parameters)
    caches = cache_shapes(config, context)
    module, numerics = config.module(), resolve(REFERENCE, jnp.dtype(jnp.float32))

    def step(params: list[jax.Array], inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        variables: dict[str, Any] = {"params": {}, "cache": {}}
        for name, leaf in zip(names, params, strict=True):
            put_at(variables["params"], path_of(name), leaf)
        for name, (where, _) in caches.items():
            put_at(variables["cache"], where, inputs[name])
        positions, ones = inputs["input_pos"][None], jnp.ones(1, jnp.int32)
        ctx = Context(positions, numerics, mask=inputs["mask"], length=ones, all_experts=True)
        logits, changed = module.apply(variables, inputs["tokens"], ctx, mutable=["cache"])
        found = {name: _get(changed["cache"], where) for name, (where, _) in caches.items()}
        return found | ({"logits": logits} if decode else {})

    graph = Graph("decode" if decode else f"prefill_{length}")
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "tokens": ((1, length), "int32"),
        "input_pos": ((length,), "int32"),
        "mask": ((1, 1, length, context), "float32"),
        **{name: (size, "float32") for name, (_, size) in caches.items()},
    }
    abstract = [jax.ShapeDtypeStruct(value.shape, jnp.float32) for value in parameters.values()]
    inputs = {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}
    traced, outputs = jax.make_jaxpr(step, return_shape=True)(abstract, inputs)
    order = sorted(shapes)
    nodes = {name: Node(graph.input(name, size, kind.upper()), size) for name, (size, kind) in shapes.items()}
    with jax.default_device("cpu"):
        build = Builder(graph, activations == ACTIVATIONS[0])
        arguments = [*parameters.values(), *(nodes[name] for name in order)]
        results = lower(build, traced.jaxpr, traced.consts, arguments)
    for name, result in zip(sorted(outputs), results, strict=True):
        graph.outputs[name] = result.index
    return graph.pruned()


def cache_shapes(config: DecoderConfig, context: int) -> dict[str, tuple[list[str], tuple[int, ...]]]:
    """What the signatures keep of each token: by LiteRT-LM's names its place in the ``cache`` collection, and shape."""
    found: dict[str, tuple[list[str], tuple[int, ...]]] = {}
    for layer in range(config.num_hidden_layers):
        for module, buffers in config.cache(layer).items():
            for name, (heads, width) in buffers.items():
                kind = "v" if name == "v" else "k"  # what is neither lies as keys do
                size = shape(name, 1, heads, width, context)
                found[f"kv_cache_{kind}_{layer}"] = ([f"layers_{layer}", module, name], size)
    return found


def _get(tree: Any, path: list[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
