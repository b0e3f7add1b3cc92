"""A language model whose forward pass is a TFLite graph."""

import dataclasses
import functools
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.device import usual_programs
from llmjax.errors import LoraError, RequestError
from llmjax.litert.graph import numerics_for
from llmjax.litert.module import MAIN, GraphModule, States
from llmjax.litert.ports import Ports, holds_keys
from llmjax.litert.roles import Roles
from llmjax.litert.steps import DAMAGE
from llmjax.model import Model, check_ids, check_rows
from llmjax.models.architecture import Architecture
from llmjax.models.config import DecoderConfig
from llmjax.models.context import Context
from llmjax.models.interventions import Interventions, checked

# Tokens of a text that is scored that one call of its program takes.
_SCORED = 32


@dataclasses.dataclass(frozen=True)
class GraphConfig(DecoderConfig):
    """What a graph's signatures say; a dimension that none says is 0.

    Attributes:
      states: of a row, caches and the like: ``(name, shape, dtype)``.
      prefill_lengths: tokens of the prefill signatures.
      positional: see ``rewinds`` of ``llmjax.litert.ports.Ports``.
    """

    states: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    prefill_lengths: tuple[int, ...] = ()
    positional: bool = True

    @property
    def rewinds(self) -> bool:
        """See ``DecoderConfig``."""
        return self.positional

    @property
    def row_arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """See ``DecoderConfig``."""
        return {name: (shape, dtype) for name, shape, dtype in self.states}

    def engine_sizes(self, chunk: int, block: int) -> tuple[int, int, int]:
        """See ``DecoderConfig``: a page for a whole row, and a whole prompt in one chunk, as LiteRT-LM cuts it up."""
        half = -(-self.max_position_embeddings // 2)
        return 2 * half, half, min(2 * half, _SCORED)

    @classmethod
    def of(cls, prefills: Sequence[Ports], decode: Ports) -> "GraphConfig":
        """From the signatures."""
        keys = [
            shape[1 : (axis := decode.axes.get(name, 2))] + shape[axis + 1 :]
            for name, (shape, _) in decode.states.items()
            if holds_keys(name, shape)
        ]
        heads, width = keys[0] if keys else (0, 0)
        embeddings = decode.tensors[decode.embeddings].shape[-1] if decode.embeddings else 0
        return cls(
            vocab_size=decode.vocab_size,
            hidden_size=embeddings,
            intermediate_size=0,
            num_hidden_layers=len(keys),
            num_attention_heads=0,
            num_key_value_heads=heads,
            head_dim=width,
            max_position_embeddings=decode.context,
            tie_word_embeddings=False,
            states=tuple((name, shape, np.dtype(dtype).name) for name, (shape, dtype) in decode.states.items()),
            prefill_lengths=tuple(p.length for p in prefills),
            positional=decode.rewinds,
        )


def _no_names(config: Any) -> Any:
    raise LoraError("an adapter goes with a checkpoint's weights; a graph (.tflite, .task, .litertlm) takes none")


ARCHITECTURE = Architecture("litert", GraphConfig, _no_names)


@dataclasses.dataclass(repr=False)
class GraphModel(Model):
    """A model that runs its file's signatures; all else is as for any ``Model``.

    Attributes:
      signatures: of the file.
    """

    signatures: GraphModule | None = None

    longer_context: ClassVar[str] = ""  # its caches are as long as they are

    @property
    def module(self) -> GraphModule:
        """What the engine runs."""
        assert self.signatures is not None
        return self.signatures

    @functools.cached_property
    def decode_names(self) -> dict[int, str]:
        """The tensors of ``decode`` by index: see ``Graph.names``."""
        return self.module.graphs[MAIN].names(self.module.decode_ports.name)

    @functools.cached_property
    def roles(self) -> Roles:
        """What the parts of ``decode`` are.

        Raises:
          CheckpointError: the file is damaged.
        """
        file = self.module.graphs[MAIN].file
        try:
            return Roles(file, self.module.decode_ports)
        except DAMAGE as error:
            file.fail(f"damaged, or not supported: its steps cannot be told apart: {type(error).__name__} {error}")

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self.path}: the model of a graph stays with its file, is not pickled; load it again there")

    def under(self, numerics: str) -> "GraphModel":
        """The same model under another profile, nothing read again."""
        main = self.module.graphs[MAIN].under(numerics_for(numerics))
        graphs = {part: graph.under(main.numerics) for part, graph in self.module.graphs.items()}
        module = GraphModule(graphs, self.module.prefills, self.module.decode_ports, self.module.padding)
        return dataclasses.replace(self, numerics=graphs[MAIN].numerics, signatures=module, numerics_chosen=True)

    def intervened(self, interventions: Interventions) -> "GraphModel":
        """None can be.

        Raises:
          RequestError: there are some.
        """
        if checked(interventions):
            raise RequestError("interventions: a graph (.tflite, .task, .litertlm) takes none")
        return self

    def apply(  # type: ignore[override]
        self, params: dict[str, Any], ids: jax.Array, *, interventions: Interventions = MappingProxyType({})
    ) -> jax.Array:
        """Logits float32 ``[B, T, V]`` of ``ids`` int32 ``[B, T]``, a pure function: the tokens of a row one after the
        other through ``decode``.

        Raises:
          RequestError: ids that are no such array, interventions, or it is differentiated.
        """
        self.intervened(interventions)
        check_rows(ids)
        ctx = Context(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], self.numerics)
        return self.module.apply({"params": _constant(params)}, ids, ctx)

    @functools.cached_property
    def _steps(self) -> tuple[Any, dict[int, Any]]:
        """Compiled: decode, and the prefill signatures by length."""
        module = self.module
        options: dict[str, Any] = {"compiler_options": self.compiler_options, "donate_argnums": 1}

        def prefill(ports: Ports, params: Any, states: States, ids: Any, start: Any, length: Any) -> States:
            return module.run(params, ports, states, ids, start, length)[1]

        prefills = {p.length: jax.jit(functools.partial(prefill, p), **options) for p in module.prefills}
        return jax.jit(module.decode, **options), prefills

    def logits(
        self,
        batch: Sequence[Sequence[int]],
        prefill: int = 0,
        *,
        interventions: Interventions = MappingProxyType({}),
    ) -> list[np.ndarray]:
        """Teacher-forced logits of token id lists of any lengths.

        Args:
          batch: non-empty lists of token ids.
          prefill: of each row so many tokens go through the prefill signatures: the longest that fits first and so on
            where that comes out even, else as LiteRT-LM cuts and pads (``cuts``).  The others go through ``decode``.
          interventions: none can be.

        Returns:
          for each row float32 ``[T_i - prefill, V]``.

        Raises:
          RequestError: an empty row, an id outside the vocabulary, a row longer than the context, one shorter than
            ``prefill``, or an intervention.
        """
        self.intervened(interventions)
        return [self.follow(ids, prefill, f"row {index}")[0] for index, ids in enumerate(batch)]

    @usual_programs()
    def follow(self, ids: Sequence[int], prefill: int = 0, what: str = "row") -> tuple[np.ndarray, States]:
        """The logits of one row, and the states it leaves: see ``logits``.

        Raises:
          RequestError: as there.
        """
        tokens = check_ids(ids, self, what)
        if not isinstance(prefill, int) or not 0 <= prefill <= len(tokens):
            raise RequestError(f"{what}: prefill: expected 0 to {len(tokens)}, its length, found {prefill!r}")
        decode, prefills = self._steps
        states, at = jax.jit(self.module.empty)(), 0
        for length, count in cuts(list(prefills), prefill, self.context_length):
            part = np.pad(tokens[at : at + count], (0, length - count))
            states = prefills[length](self.params, states, part, np.int32(at), np.int32(count))
            at += count
        rows = []
        for position in range(at, len(tokens)):
            logits, states = decode(self.params, states, tokens[position], np.int32(position))
            if position >= prefill:
                rows.append(np.asarray(logits))
        return np.stack(rows) if rows else np.zeros((0, self.config.vocab_size), np.float32), states


@jax.custom_jvp
def _constant(params: dict[str, Any]) -> dict[str, Any]:
    return params


@_constant.defjvp
def _constant_jvp(primals: Any, tangents: Any) -> Any:
    raise RequestError(
        "derivative: a graph (.tflite, .task, .litertlm) has none, it may round where the slope is then zero; write "
        "its checkpoint (llmjax convert FILE DIRECTORY --to llmjax) and differentiate that"
    )


def cuts(lengths: Sequence[int], count: int, context: int) -> list[tuple[int, int]]:
    """How ``count`` tokens go through prefill signatures: ``(its length, tokens that are no padding)`` each.

    The longest that fits first, then the longest that fits the rest, where that leaves nothing; else the longest as
    often as it fills, and the rest in the shortest that holds it.  What would end beyond the context is left to decode.
    """
    ordered, even, left = sorted(lengths, reverse=True), [], count
    for length in ordered:
        even += [(length, length)] * (left // length)
        left %= length
    if not left or not ordered:
        return [] if left else even
    found, left = [(ordered[0], ordered[0])] * (count // ordered[0]), count % ordered[0]
    holds = [n for n in ordered if n >= left and count - left + n <= context]
    return [*found, *([(holds[-1], left)] if holds else [])]
