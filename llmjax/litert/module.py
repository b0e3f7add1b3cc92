"""A graph's prefill and decode signatures as a module the engine runs: rows side by side, each with caches of its own.

A page of the cache is a whole row here: what the graph's signatures take and give.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.litert.graph import Graph
from llmjax.litert.ports import LOGITS, Ports
from llmjax.models.context import Context

MAIN, EMBEDDER, PER_LAYER = "model", "embedder", "per_layer_embedder"
States = dict[str, jax.Array]


class GraphModule:
    """The signatures of a language model.

    Args:
      graphs: by part: the model's, and those of its embedders.
      prefills: its prefill signatures, shortest first.
      decode: its decode signature.
      padding: the token that fills up a prefill signature; graphs that carry something along tell it from text.
    """

    def __init__(self, graphs: Mapping[str, Graph], prefills: Sequence[Ports], decode: Ports, padding: int = 0):
        self.graphs, self.prefills, self.decode_ports = dict(graphs), tuple(prefills), decode
        self.padding = padding

    def empty(self) -> States:
        """The states of a row that has no token yet."""
        return {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in self.decode_ports.states.items()}

    def _embedded(self, params: Any, part: str, ids: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Of ids ``[T]``, by the first signature of an embedder, a token at a time, as LiteRT-LM has it."""
        graph = self.graphs[part]
        name, signature = next(iter(graph.signatures.items()))
        (port,), (result,) = signature.inputs, signature.outputs
        function = graph.function(name)
        one = graph.tensor(name, port).shape

        def embed(token: jax.Array) -> jax.Array:
            return function(params[part], {port: token.reshape(one)})[0][result]

        return jax.vmap(embed)(ids).reshape(shape)

    def inputs(self, params: Any, ports: Ports, states: States, ids: jax.Array, positions: jax.Array, seen: Any) -> Any:
        """What a signature takes.

        Args:
          params: the weights by part.
          ports: the signature's.
          states: of one row.
          ids: int32 ``[T]``.
          positions: int32 ``[T]``.
          seen: bool ``[T, C]``, the positions that each token attends to.
        """
        shape = {name: tensor.shape for name, tensor in ports.tensors.items()}
        found = {**states, ports.positions: positions.reshape(shape[ports.positions])}
        if ports.tokens:
            found[ports.tokens] = ids.reshape(shape[ports.tokens])
        for port, part in ((ports.embeddings, EMBEDDER), (ports.per_layer, PER_LAYER)):
            if port:
                found[port] = self._embedded(params, part, ids, shape[port])
        if ports.mask:
            found[ports.mask] = ports.mask_value(seen)
        return found

    def run(
        self,
        params: Any,
        ports: Ports,
        states: States,
        ids: jax.Array,
        start: jax.Array,
        length: jax.Array,
        taps: Sequence[str] = (),
    ) -> tuple[dict[str, jax.Array], States, dict[str, jax.Array]]:
        """Runs a signature on a row's next tokens.

        Padding is as LiteRT-LM's: tokens ``padding`` at position 0, which attend to nothing.

        Args:
          params: the weights by part.
          ports: the signature's.
          states: of the row.
          ids: int32 ``[T]``.
          start: int32 ``[]``, position of the first.
          length: int32 ``[]``, how many are no padding.
          taps: see ``Graph.function``.

        Returns:
          outputs that are no states, the row's new states, and what ``taps`` name.
        """
        place = jnp.arange(ports.length, dtype=jnp.int32)
        real = place < length
        positions = jnp.where(real, start + place, 0)
        seen = real[:, None] & (jnp.arange(ports.context, dtype=jnp.int32)[None] <= positions[:, None])
        inputs = self.inputs(params, ports, states, jnp.where(real, ids, self.padding), positions, seen)
        outputs, found = self.graphs[MAIN].function(ports.name, taps)(params[MAIN], inputs)
        return (
            {name: value for name, value in outputs.items() if name not in ports.states},
            {name: outputs[name] for name in ports.states},
            found,
        )

    def decode(self, params: Any, states: States, token: jax.Array, position: jax.Array) -> tuple[jax.Array, States]:
        """One token int32 ``[]``: the logits float32 ``[V]`` that follow it."""
        outputs, states, _ = self.run(params, self.decode_ports, states, token[None], position, jnp.int32(1))
        return outputs[LOGITS].reshape(-1).astype(jnp.float32), states

    def follow(self, params: Any, states: States, ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, States]:
        """Tokens ``[T]`` one after the other: logits ``[T, V]``, and the states behind them."""

        def step(states: States, item: tuple[jax.Array, jax.Array]) -> tuple[States, jax.Array]:
            logits, states = self.decode(params, states, *item)
            return states, logits

        states, logits = lax.scan(step, states, (ids, positions))
        return logits, states

    def prompt(self, params: Any, states: States, ids: jax.Array, start: jax.Array, last: jax.Array) -> Any:
        """A prompt's tokens ``ids [C]`` from position ``start`` on, of which ``ids[last]`` is the last: that goes
        through decode, those before it through the longest prefill signature as often as it fills, the rest through the
        shortest that holds it, as in LiteRT-LM.

        A signature that would end beyond the caches, which would move it to the wrong place, is not taken: decode is.

        Returns:
          the logits float32 ``[V]`` that follow, and the states.
        """
        end = start + last
        ids = jnp.pad(ids, (0, max((p.length for p in self.prefills), default=0)))
        Carry = tuple[States, jax.Array, jax.Array]

        def filled(ports: Ports, states: States, at: jax.Array, logits: jax.Array) -> Carry:
            tokens = lax.dynamic_slice(ids, (at - start,), (ports.length,))
            count = jnp.minimum(end - at, ports.length)
            return self.run(params, ports, states, tokens, at, count)[1], at + count, logits

        def decoded(states: States, at: jax.Array, logits: jax.Array) -> Carry:
            logits, states = self.decode(params, states, ids[at - start], at)
            return states, at + 1, logits

        def step(carry: Carry) -> Carry:
            at = carry[1]
            # The first that holds what is left, or the longest; the last choice, decode, for none.
            takes = [(at < end) & (end - at <= p.length) & (at + p.length <= p.context) for p in self.prefills]
            if takes:
                takes[-1] |= at + self.prefills[-1].length <= end
            choice = jnp.argmax(jnp.stack([*takes, jnp.bool_(True)]))
            branches: list[Any] = [*(functools.partial(filled, p) for p in self.prefills), decoded]
            return lax.switch(choice, branches, *carry) if self.prefills else decoded(*carry)

        empty = jnp.zeros(self.decode_ports.vocab_size, jnp.float32)
        states, _, logits = lax.while_loop(lambda carry: carry[1] <= end, step, (states, start, empty))
        return logits, states

    def apply(self, variables: Any, ids: jax.Array, ctx: Context, mutable: Sequence[str] = ()) -> Any:
        """As a Flax module's: texts without a cache, a decode step of all slots, a prompt (``ctx.last``), or a text to
        be scored."""
        params = variables["params"]
        if ctx.table is None:
            return jax.vmap(
                lambda row: self.follow(params, self.empty(), row, jnp.arange(len(row), dtype=jnp.int32))[0]
            )(ids)
        cache = variables["cache"]
        pages = ctx.table[:, 0]
        rows = {name: leaf[pages] for name, leaf in cache.items()}
        if ids.shape[1] == 1:
            logits, new = jax.vmap(lambda s, i, p: self.decode(params, s, i[0], p[0]))(rows, ids, ctx.positions)
            logits = logits[:, None]
            if ctx.active is not None:
                new = {
                    name: jnp.where(ctx.active.reshape(-1, *[1] * (old.ndim - 1)), new[name], old)
                    for name, old in rows.items()
                }
        else:
            start = ctx.positions[0, 0]
            row = {name: jnp.where(start == 0, 0, leaf[0]).astype(leaf.dtype) for name, leaf in rows.items()}
            if ctx.last is not None:
                last, row = self.prompt(params, row, ids[0], start, ctx.last[0])
                logits = last[None, None]
            else:
                scored, row = self.follow(params, row, ids[0], ctx.positions[0])
                logits = scored[None]
            new = {name: leaf[None] for name, leaf in row.items()}
        return logits, {"cache": {name: leaf.at[pages].set(new[name]) for name, leaf in cache.items()}}
