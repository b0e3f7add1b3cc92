"""What a language model's signatures take and give, by the names that LiteRT-LM's loader knows."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from converters.readers.litert.tflite import Tensor, TfliteFile
from converters.readers.source import problems_error
from llmjax.errors import named
from llmjax.litert.kernels import TYPES

DECODE, PREFILL = "decode", "prefill"
TOKENS, EMBEDDINGS, PER_LAYER = ("tokens", "token_ids"), ("embeddings",), ("per_layer_embeddings",)
POSITIONS, MASK, LOGITS = ("input_pos", "positions"), ("mask", "attn_mask"), "logits"
_RING = ("local_mask", "attn_mask_local", "mask_local")
# What a mask adds where a position is out of sight, as LiteRT-LM writes it.
_HIDDEN = {"FLOAT32": -0.7 * float(np.finfo(np.float32).max), "FLOAT16": -45824.0}


@dataclasses.dataclass(frozen=True)
class Ports:
    """One signature's.

    Attributes:
      name: the signature's.
      length: tokens it takes.
      context: positions its caches hold.
      tokens: the input that takes token ids, or None.
      embeddings: that takes embeddings, or None.
      per_layer: that takes embeddings for each layer, or None.
      positions: that takes the tokens' positions.
      mask: that takes the mask, or None.
      states: inputs that come out again, caches and the like: shape and type by name.
      axes: of caches: the dimension of positions, where new tokens are written.
      rewinds: all of them are caches: what they hold of a token depends on its position alone.
      tensors: of the inputs by name.
      vocab_size: of the logits; 0 where there are none.
    """

    name: str
    length: int
    context: int
    tokens: str | None
    embeddings: str | None
    per_layer: str | None
    positions: str
    mask: str | None
    states: dict[str, tuple[tuple[int, ...], Any]]
    axes: dict[str, int]
    rewinds: bool
    tensors: dict[str, Tensor]
    vocab_size: int

    def mask_value(self, seen: Any) -> Any:
        """The mask of ``seen`` bool ``[T, C]``."""
        assert self.mask is not None
        kind = self.tensors[self.mask].type
        if kind != "BOOL":
            seen = jnp.where(seen, 0, _HIDDEN[kind]).astype(TYPES[kind])
        return seen.reshape(self.tensors[self.mask].shape)


def is_language_model(file: TfliteFile) -> bool:
    """Whether there is a signature that decodes."""
    return DECODE in file.signatures


def cache_lengths(file: TfliteFile) -> str | None:
    """Why a graph without ``decode`` that has one for each of several lengths of its caches does not run."""
    several = [name for name in file.signatures if re.fullmatch(rf"{DECODE}_cache_\d+", name)]
    if not several or is_language_model(file):
        return None
    return (
        f"caches of several lengths ({', '.join(several)}) and no {DECODE} are not supported, nor by LiteRT-LM 0.18.1: "
        "export it with one cache_length"
    )


def wanted(file: TfliteFile) -> list[str]:
    """The signatures that generating runs, decode last; none that takes an adapter (``prefill_8_lora_r16``)."""
    names = [name for name in file.signatures if name.startswith(PREFILL) and not re.search(r"_lora_r\d+$", name)]
    return [*names, DECODE]


def read(file: TfliteFile) -> tuple[list[Ports], Ports]:
    """The prefill signatures, shortest first, and decode.

    Raises:
      CheckpointError: one is not a language model's, or of a kind that llmjax does not run.
    """
    problems: list[str] = []
    axes = _axes(file)
    found = [ports for name in wanted(file) if (ports := _ports(file, name, axes, problems))]
    if not problems:
        decode = found[-1]
        for other in found:
            if other.states != decode.states or other.context != decode.context:
                problems.append(f"{other.name}: its caches are not those of decode")
        if decode.length != 1:
            problems.append(f"decode: expected one token, found {decode.length}")
        if not decode.vocab_size:
            problems.append(f"decode: no output {LOGITS}")
    if problems:
        raise problems_error(file.where, "llmjax does not run this model", problems)
    by_length = {p.length: p for p in found[:-1]}  # of several the last in the file, as in LiteRT-LM
    return [by_length[length] for length in sorted(by_length)], decode


def _axes(file: TfliteFile) -> dict[str, int]:
    """Of each cache the dimension of positions: that along which ``decode`` writes its one token."""
    signature = file.signatures[DECODE]
    graph = file.subgraphs[signature.subgraph]
    names = {i: name for name, i in signature.inputs.items()}
    found: dict[str, int] = {}
    for op in graph.operators:
        if op.name == "DYNAMIC_UPDATE_SLICE" and len(op.inputs) == 3 and op.inputs[0] in names:
            whole, part = (graph.tensors[i].shape for i in op.inputs[:2])
            along = [axis for axis, (n, m) in enumerate(zip(whole, part, strict=False)) if n != m]
            if len(along) == 1:
                found[names[op.inputs[0]]] = along[0]
    return found


def padding(file: TfliteFile, prefills: Sequence[str]) -> int | None:
    """The token that a prefill signature takes for no text: what its tokens are compared with."""
    for name in prefills:
        signature = file.signatures[name]
        graph = file.subgraphs[signature.subgraph]
        tokens = {i for port, i in signature.inputs.items() if port in TOKENS}
        for op in graph.operators:
            if op.name in ("NOT_EQUAL", "EQUAL") and tokens.intersection(op.inputs):
                for tensor in (graph.tensors[i] for i in op.inputs if i not in tokens):
                    if tensor.type == "INT32" and np.prod(tensor.shape) == 1 and file.is_constant(tensor):
                        return int(file.data(tensor).view("<i4")[0])
    return None


def _ports(file: TfliteFile, name: str, axes: dict[str, int], problems: list[str]) -> Ports | None:
    signature, before = file.signatures[name], len(problems)
    tensors = {port: file.subgraphs[signature.subgraph].tensors[i] for port, i in signature.inputs.items()}
    outputs = {port: file.subgraphs[signature.subgraph].tensors[i] for port, i in signature.outputs.items()}

    def one(names: tuple[str, ...]) -> str | None:
        return next((n for n in names if n in tensors), None)

    tokens, embeddings, per_layer = one(TOKENS), one(EMBEDDINGS), one(PER_LAYER)
    positions, mask = one(POSITIONS), one(MASK)
    states = {n: (t.shape, TYPES.get(t.type)) for n, t in tensors.items() if n in outputs}
    known = {tokens, embeddings, per_layer, positions, mask, *states}
    for number, port in enumerate(tensors):
        if port in _RING:
            problems.append(f"{name}: input {number} ({port}): ring-buffer caches are not supported")
        elif port not in known:
            problems.append(f"{name}: input {number} ({named(port)}) is not known, and does not come out again")
    for number, port in enumerate(outputs):
        if port not in states and port != LOGITS:
            problems.append(f"{name}: output {number} ({named(port)}) is not known, and does not go in again")
    if positions is None or (tokens is None) == (embeddings is None):
        problems.append(f"{name}: expected tokens or embeddings, and positions, found {', '.join(map(named, tensors))}")
    for port in states:
        if outputs[port].shape != tensors[port].shape or outputs[port].type != tensors[port].type:
            problems.append(f"{name}: {named(port)} goes in and comes out in other shapes")
    if len(problems) > before or positions is None:
        return None
    length = int(np.prod(tensors[positions].shape))
    axes = {port: axis for port, axis in axes.items() if port in states and axis < len(states[port][0])}
    context = _context(tensors, mask, states, axes)
    if mask and (tensors[mask].shape != (1, 1, length, context) or tensors[mask].type not in (*_HIDDEN, "BOOL")):
        problems.append(f"{name}: {mask}: expected [1, 1, {length}, C], found {list(tensors[mask].shape)}")
    for number, (port, tensor) in enumerate(tensors.items()):
        lengths = tensor.shape[axes[port] :][:1] if port in axes else tensor.shape[2:]
        if port in states and holds_tokens(port, tensor.shape) and context not in lengths:
            problems.append(
                f"{name}: input {number} ({named(port)}): a ring-buffer cache, {list(tensor.shape)} where the mask has "
                f"{context} positions, is not supported"
            )
    shapes = {tokens: (1, length), positions: (length,)}
    for role, shape in shapes.items():
        if role and (tensors[role].type != "INT32" or tensors[role].shape not in (shape, (1, length))):
            problems.append(f"{name}: {role}: expected INT32 {list(shape)}, found {list(tensors[role].shape)}")
    for role in (embeddings, per_layer):
        if role and (tensors[role].type != "FLOAT32" or tensors[role].shape[:2] != (1, length)):
            problems.append(f"{name}: {role}: expected FLOAT32 [1, {length}, ...], found {list(tensors[role].shape)}")
    if any(tensor.dynamic for tensor in tensors.values()):
        problems.append(f"{name}: inputs whose shape is not fixed are not supported")
    vocabulary = outputs[LOGITS].shape[-1] if LOGITS in outputs and outputs[LOGITS].shape else 0
    rewinds = all(holds_tokens(port, shape) for port, (shape, _) in states.items())
    return Ports(
        name,
        length,
        context,
        tokens,
        embeddings,
        per_layer,
        positions,
        mask,
        states,
        axes,
        rewinds,
        tensors,
        vocabulary,
    )


def _context(tensors: dict[str, Tensor], mask: str | None, states: dict[str, Any], axes: dict[str, int]) -> int:
    """Positions that the caches hold."""
    if mask and len(tensors[mask].shape) == 4:
        return tensors[mask].shape[3]
    keys = [name for name, (shape, _) in states.items() if holds_keys(name, shape)]
    return next((tensors[name].shape[axes.get(name, 2)] for name in keys), 0)


def holds_tokens(name: str, shape: tuple[int, ...], kinds: str = "kv") -> bool:
    """Whether a state is a cache of keys or values, and not what a layer carries along (``kv_cache_c_3``, ``_r_3``)."""
    return len(shape) == 4 and re.search(rf"(^|_)[{kinds}]_", name) is not None


def holds_keys(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a state is a cache of keys, ``[1, K, C, H]``: ``kv_cache_k_3``, ``k_cache_3``."""
    return holds_tokens(name, shape, "k")
