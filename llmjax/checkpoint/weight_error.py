"""How far one checkpoint's weights are from another's: ``llmjax inspect Q --against SRC``."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.readers.source import Source
from llmjax.checkpoint.loading import fitting_plan, read_override
from llmjax.checkpoint.opened import held
from llmjax.checkpoint.parameters import Parameter, read_all
from llmjax.errors import CheckpointError, ConfigError, amount
from llmjax.quant.arrays import row_chunks
from llmjax.quant.qtensor import QTensor, dequantize
from llmjax.quant.schemes import role_of


@dataclasses.dataclass(frozen=True)
class Error:
    """The difference ``candidate - reference`` of some weights.

    Attributes:
      name: of the parameter or the role; norms and biases are the role ``other``.
      kept: how the candidate keeps it: a scheme, or a dtype.
      count: number of weights.
      max: largest absolute difference.
      squares: sum of the squared differences.
      power: sum of the reference's squares.
    """

    name: str
    kept: str
    count: int
    max: float
    squares: float
    power: float

    @property
    def rms(self) -> float:
        """Root mean square of the difference."""
        return float(np.sqrt(self.squares / self.count))

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise, ``10 log10(sum w^2 / sum d^2)`` decibels; infinite for no difference."""
        if self.squares == 0:
            return float("inf")
        return float(10 * np.log10(self.power / self.squares)) if self.power else float("-inf")


def errors(
    candidate: str | Path | Source,
    reference: str | Path | Source,
    config: str | Path | Mapping[str, Any] | None = None,
) -> list[Error]:
    """The error of every parameter, one tensor in memory at a time.

    Args:
      candidate: a checkpoint, or its source.
      reference: one of the same model; where it ties head and embedding and the candidate does not, the head has no
        part in this.
      config: of the reference: see ``llmjax.load``.

    Raises:
      CheckpointError: one of them is damaged.
      ConfigError: they are not the same model.
    """
    with held(candidate) as theirs, held(reference) as ours:
        sources = theirs, ours
        plans = [fitting_plan(theirs, None), fitting_plan(ours, None, read_override(config))]
        if plans[1].config.tie_word_embeddings and not plans[0].config.tie_word_embeddings:
            rest = [a for a in plans[0].assignments if a.parameter != "head.weight"]
            plans[0] = dataclasses.replace(plans[0], assignments=rest)
        shapes = [{a.parameter: a.shape for a in plan.assignments} for plan in plans]
        if shapes[0] != shapes[1]:
            different = sorted(n for n in shapes[0] | shapes[1] if shapes[0].get(n) != shapes[1].get(n))
            raise ConfigError(
                f"{theirs.path} and {ours.path} are not the same model: {len(different)} parameters differ "
                f"in shape or are in one alone, {different[0]} first"
            )
        values = [read_all(source, plan, None, None) for source, plan in zip(sources, plans, strict=True)]
        return [_error(name, a, b) for (name, a), (_, b) in zip(*values, strict=True)]


def by_role(found: Iterable[Error]) -> list[Error]:
    """Sums over each role, in the order of their first parameters."""
    roles: dict[str, Error] = {}
    for e in found:
        role = role_of(e.name) or "other"
        old = roles.get(role, Error(role, e.kept, 0, 0.0, 0.0, 0.0))
        kept = old.kept if old.kept == e.kept else "mixed"
        roles[role] = Error(
            role, kept, old.count + e.count, max(old.max, e.max), old.squares + e.squares, old.power + e.power
        )
    return list(roles.values())


def _error(name: str, candidate: Parameter, reference: Parameter) -> Error:
    largest = squares = power = 0.0
    for rows in row_chunks(candidate.shape):
        a, b = (_rows(x, rows) for x in (candidate, reference))
        if not np.isfinite(a).all() or not np.isfinite(b).all():
            raise CheckpointError(f"{name}: NaN or infinite weights cannot be compared; the checkpoint is damaged")
        difference = (a - b).astype(np.float64)
        largest = max(largest, float(np.abs(difference).max()))
        squares += float(np.square(difference).sum())
        power += float(np.square(b, dtype=np.float64).sum())
    kept = candidate.scheme if isinstance(candidate, QTensor) else candidate.dtype.name
    return Error(name, kept, int(np.prod(candidate.shape)), largest, squares, power)


def _rows(value: Parameter, rows: slice) -> np.ndarray:
    if isinstance(value, QTensor):
        return dequantize(value.map(lambda leaf: leaf[rows]))
    return value[rows].astype(np.float32)


def to_text(found: list[Error]) -> str:
    """For a terminal: by parameter, then by role."""
    width = max(len(e.name) for e in found)
    lines = ["error of each tensor", _head(width), *(_line(e, width) for e in found if e.squares)]
    equal = sum(1 for e in found if not e.squares)
    lines += [f"  {amount(equal, 'tensor')} {'is' if equal == 1 else 'are'} equal", "", roles_to_text(found, width)]
    return "\n".join(lines)


def roles_to_text(found: list[Error], width: int = 16) -> str:
    """For a terminal: by role, in a column of ``width``."""
    return "\n".join(["error of each role", _head(width), *(_line(e, width) for e in by_role(found))])


def _head(width: int) -> str:
    return f"  {'':{width}}  {'kept':15} {'max':>10} {'RMS':>10} {'SQNR dB':>8}"


def to_dict(found: list[Error]) -> dict[str, list[dict[str, str | float | None]]]:
    """As JSON would hold it; the SQNR of equal weights is null."""

    def entry(e: Error) -> dict[str, str | float | None]:
        sqnr = e.sqnr_db if np.isfinite(e.sqnr_db) else None
        return {"name": e.name, "kept": e.kept, "max": e.max, "rms": e.rms, "sqnr_db": sqnr}

    return {"tensors": [entry(e) for e in found], "roles": [entry(e) for e in by_role(found)]}


def _line(e: Error, width: int) -> str:
    sqnr = "equal" if e.squares == 0 else f"{e.sqnr_db:.1f}"
    return f"  {e.name:{width}}  {e.kept:15} {e.max:10.3g} {e.rms:10.3g} {sqnr:>8}"
