"""From a plan to parameters: read, cast or quantized one tensor at a time, some rows at a time."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.readers.gguf import GgufSource
from converters.readers.llmjax_directory import LlmjaxSource
from converters.readers.mediapipe.source import MediapipeSource
from converters.readers.source import Source, TensorSpec
from llmjax.checkpoint.graph_source import GraphSource
from llmjax.checkpoint.plan import Assignment, Plan
from llmjax.errors import CheckpointError, ConfigError, named
from llmjax.lora.adapter import TABLE, Adapter, AnyLora, Delta, read_adapter
from llmjax.lora.merge import Merge, merged_rows
from llmjax.models.config import DecoderConfig
from llmjax.models.names import DamagedError, TornError
from llmjax.quant import gguf
from llmjax.quant.arrays import aligned, row_chunks
from llmjax.quant.qtensor import QTensor
from llmjax.quant.rounding import Rows, quantize
from llmjax.quant.schemes import Recipe, Scheme

Parameter = np.ndarray | QTensor

# Tables of so many bytes are worth leaving in their file.
_IN_PLACE = 1 << 24

# Told after each parameter: how many are done, and how many there are.
OnParameter = Callable[[int, int], None]


class _TooLargeError(ConfigError):
    """A weight is beyond what its dtype holds."""


def read_all(
    source: Source,
    plan: Plan,
    dtype: str | None,
    recipe: Recipe | None,
    check_finite: bool = False,
    merge: Merge | None = None,
    *,
    narrowed: bool = False,
) -> Iterator[tuple[str, Parameter]]:
    """Every parameter by its canonical name, in memory of its own; the mapped pages it came from are given back.

    A large table that tokens are only looked up in stays in its mapped file, where it begins at a multiple of 64 bytes
    and is used as it is stored: JAX on the CPU takes it as it lies there, and reads of its pages those alone that hold
    a token in use.  In what ``convert`` writes it begins so.

    Args:
      source: the open checkpoint.
      plan: without problems.
      dtype: of what is not quantized; None keeps each tensor as it is stored, packed ones packed.
      recipe: what to quantize; None for nothing.
      check_finite: refuse NaN and infinite values.
      merge: what is added to the weights on the way; None for nothing.
      narrowed: float64 becomes float32, the widest that JAX computes with here.

    Raises:
      CheckpointError: NaN or infinite values (all of them named), others that no parameter has, or a tied head that
        differs from the embedding.
      ConfigError: a tensor that does not fit its scheme, or values that do not fit the dtype (all of them named).
    """
    bad, too_large = [], []
    merge = merge or Merge({}, None, "reference")
    for assignment in sorted(plan.assignments, key=lambda a: a.parameter != TABLE):  # see ``Merge.embedding``
        where = _where(assignment)
        try:
            table = _is_table(assignment.parameter, plan.config)
            value = _read(source, assignment, dtype, recipe, merge, narrowed, table)
        except _TooLargeError as error:
            too_large.append(f"{where}: {error}")
            continue
        if assignment.parameter == TABLE:
            merge.embedding = value.dtype
        if check_finite and not _finite(value):
            bad.append(where)
        yield assignment.parameter, value
    if too_large:
        raise ConfigError(
            "\n  ".join(
                [
                    f"{source.path}: values that their dtype would make infinite; float32 and bfloat16 hold the most "
                    "(dtype):",
                    *too_large,
                ]
            )
        )
    if bad:
        raise CheckpointError(f"{source.path}: " + "\n  ".join(["NaN or infinite values in:", *bad]))
    check_tied(source, plan)


def _where(assignment: Assignment) -> str:
    return f"{assignment.parameter} (from {', '.join(s.name for s in assignment.sources)})"


def _floats(source: Source, assignment: Assignment) -> np.ndarray:
    try:
        return assignment.make([source.read(s.name) for s in assignment.sources])
    except DamagedError as error:
        raise CheckpointError(f"{source.path}: {_where(assignment)}: {error}") from None


def _is_table(parameter: str, config: DecoderConfig) -> bool:
    """Whether it is never multiplied with."""
    return parameter == "per_layer.embed.weight" or (parameter == "embed.weight" and not config.tie_word_embeddings)


def _read(
    source: Source,
    assignment: Assignment,
    dtype: str | None,
    recipe: Recipe | None,
    merge: Merge,
    narrowed: bool,
    table: bool,
) -> Parameter:
    name = assignment.parameter
    scheme = recipe.scheme(name) if recipe else None
    try:
        if scheme is None and dtype is None and (packed := _packed(source, assignment, table)) is not None:
            delta = merge.delta(name, quantized=True)
            return packed if delta is None else merge.into_packed(packed, delta, name)
        value = _floats(source, assignment)
        rows, stored = _releasing(source, assignment, value), jnp.dtype(dtype) if dtype else value.dtype
        if narrowed and stored == np.float64:
            stored = np.dtype(np.float32)
        if (delta := merge.delta(name, quantized=scheme is not None)) is not None:
            rows, stored = merged_rows(rows, delta, f"{merge.where}: {name}"), stored if dtype else merge.dtype(stored)
        elif table and scheme is None and stored == value.dtype and _serves_in_place(value):
            return value
        return made(rows, value.shape, stored, scheme, name)
    finally:
        for spec in assignment.sources:
            source.release(spec.name)


@dataclasses.dataclass
class Stored:
    """A parameter that is read as far as it is asked for.

    Attributes:
      name: canonical.
      shape: of it.
      rows: some of its rows, as floats.
      packed: of one that the checkpoint has in few bits, it as it is stored; None for floats.
    """

    name: str
    shape: tuple[int, ...]
    rows: Rows
    packed: Callable[[], QTensor | None]


def stored(source: Source, plan: Plan, merge: Merge) -> Iterator[Stored]:
    """Every parameter in turn, one after the other, with ``merge``'s deltas; what it took of the mapped file is given
    back before the next."""
    for assignment in plan.assignments:
        name, delta = assignment.parameter, merge.delta(assignment.parameter, quantized=True)
        values: list[np.ndarray] = []

        def rows(start: int, stop: int, assignment: Assignment = assignment, values: Any = values) -> np.ndarray:
            if not values:
                values.append(_floats(source, assignment))
            return _releasing(source, assignment, values[0])(start, stop)

        def packed(assignment: Assignment = assignment, delta: Delta | None = delta) -> QTensor | None:
            found = _packed(source, assignment, table=True)
            return merge.into_packed(found, delta, assignment.parameter) if found is not None and delta else found

        whole = rows if delta is None else merged_rows(rows, delta, f"{merge.where}: {name}")
        yield Stored(name, assignment.shape, whole, packed)
        for spec in assignment.sources:
            source.release(spec.name)


def adapter_for(source: Source, plan: Plan, lora: AnyLora | Adapter | None) -> Adapter | None:
    """An adapter that goes with a checkpoint, which is not read for it but for what the adapter's file holds of it."""
    if lora is None:
        return None
    assignments = {assignment.parameter: assignment for assignment in plan.assignments}

    def as_stored(name: str) -> Parameter | None:
        if name not in assignments:
            return None
        return _read(source, assignments[name], None, None, Merge({}, None, None), False, False)

    return read_adapter(lora, plan.architecture, plan.config, as_stored)


def packed_tensor(source: Source, name: str) -> QTensor | None:
    """A quantized tensor of a checkpoint as it is stored; None for one of floats, or of a type that is expanded."""
    if isinstance(source, GraphSource):
        return source.packed(name)
    if isinstance(source, LlmjaxSource | MediapipeSource):
        parts = source.parts(name)
        return None if parts is None else QTensor(**parts)
    spec = source.spec(name)
    if isinstance(source, GgufSource) and is_packed(source, spec):
        *stack, width = spec.shape  # rows, or experts and rows of each
        rows = gguf.unpack(source.raw(name), spec.dtype, (math.prod(stack), width))
        return jax.tree.map(lambda leaf: leaf.reshape(*stack, leaf.shape[-1]), rows)
    return None


def is_packed(source: Source, spec: TensorSpec) -> bool:
    """Whether a tensor is quantized and stays so."""
    if isinstance(source, LlmjaxSource | MediapipeSource | GraphSource):
        return spec.dtype.startswith("INT")
    return source.format == "gguf" and spec.dtype in gguf.TYPES and len(spec.shape) in (2, 3)


def _packed(source: Source, assignment: Assignment, table: bool) -> QTensor | None:
    """The parameter of a source that has it packed.  What ``make`` does to the rows of a weight it does to those of
    each leaf: a row's integers, scales and offsets move together."""
    found = [packed_tensor(source, spec.name) for spec in assignment.sources]
    packed = [q for q in found if q is not None]
    kinds = [jax.tree.structure(q) for q in packed]
    if len(packed) < len(found) or len(set(kinds)) > 1:
        return None
    leaves = list(zip(*map(jax.tree.leaves, packed), strict=True))
    try:
        return jax.tree.unflatten(kinds[0], [_owned(assignment.make(list(same)), same, table) for same in leaves])
    except TornError:
        return None


def _owned(value: np.ndarray, parts: tuple[np.ndarray, ...], table: bool) -> np.ndarray:
    """``value`` in aligned memory that is neither the file's, but for tables, nor shared with another parameter."""
    if value is parts[0] and value.flags.writeable and value.ctypes.data % 64 == 0:
        return value  # unpacked into memory of its own, and taken as it is
    if table and _serves_in_place(value):
        return value
    own = aligned(value.shape, value.dtype)
    own[...] = value
    return own


def _serves_in_place(value: np.ndarray) -> bool:
    return value.nbytes >= _IN_PLACE and value.ctypes.data % 64 == 0 and value.flags.c_contiguous


def _releasing(source: Source, assignment: Assignment, value: np.ndarray) -> Rows:
    """``value``'s rows; what was read before is given back, so that a mapped tensor is never in memory as a whole."""

    def rows(start: int, stop: int) -> np.ndarray:
        part = np.array(value[start:stop])
        for spec in assignment.sources:
            source.release(spec.name)
        return part

    return rows


def made(rows: Rows, shape: tuple[int, ...], dtype: np.dtype, scheme: Scheme | None, name: str) -> Parameter:
    """A parameter from its rows: quantized where there is a scheme, of ``dtype`` where not; ``name`` for messages.

    Raises:
      ConfigError: values beyond what ``dtype`` holds.
    """
    if scheme is not None:
        if len(shape) == 2:
            return quantize(rows, (shape[0], shape[1]), scheme, name)

        def one(i: int) -> Rows:
            return lambda start, stop: rows(i, i + 1)[0, start:stop]

        return _stack(quantize(one(i), (shape[1], shape[2]), scheme, name) for i in range(shape[0]))
    value, lost = aligned(shape, dtype), 0.0
    for part in row_chunks(shape):
        found = rows(part.start, part.stop)
        with np.errstate(over="ignore"):  # it is looked for
            value[part] = found
        if jnp.finfo(dtype).max < jnp.finfo(found.dtype).max:
            infinite = np.isinf(value[part]) & np.isfinite(found)
            lost = max(lost, float(np.abs(found[infinite].astype(np.float64)).max(initial=0)))
    if lost:
        raise _TooLargeError(f"expected at most {float(jnp.finfo(dtype).max):g} for {dtype}, found {lost:g}")
    return value


def _stack(each: Iterable[QTensor]) -> QTensor:
    """One QTensor of several of one scheme."""

    def joined(*leaves: np.ndarray) -> np.ndarray:
        return np.stack(leaves, out=aligned((len(leaves), *leaves[0].shape), leaves[0].dtype))

    return jax.tree.map(joined, *each)


def random_rows(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> Rows:
    """Rows of a random parameter: uniform with standard deviation 0.02, norms at 1 and biases at 0.  To be asked for in
    order."""

    def rows(start: int, stop: int) -> np.ndarray:
        if len(shape) == 1:
            return np.full(stop - start, 0 if name.endswith("bias") else 1, np.float32)
        return (random.random((stop - start, *shape[1:]), np.float32) - np.float32(0.5)) * np.float32(0.02 * 12**0.5)

    return rows


def _finite(value: Parameter) -> bool:
    floats = [value] if isinstance(value, np.ndarray) else [x for x in (value.scales, value.offsets) if x is not None]
    return all(bool(np.isfinite(x[rows].astype(np.float32)).all()) for x in floats for rows in row_chunks(x.shape))


def check_tied(source: Source, plan: Plan) -> None:
    """Raises CheckpointError where a head of its own differs from the embedding that it is tied to."""
    for spec in plan.tied:
        embedding = next(a for a in plan.assignments if a.parameter == "embed.weight").sources[0]
        head, table = source.read(spec.name), source.read(embedding.name)
        if head.shape != table.shape or not all(np.array_equal(head[p], table[p]) for p in row_chunks(head.shape)):
            raise CheckpointError(
                f"{spec.file}: tensor {named(spec.name)} differs from {named(embedding.name)}, but the "
                "configuration ties them; "
                "set tie_word_embeddings to false if the head is its own"
            )
        source.release(spec.name)
        source.release(embedding.name)
