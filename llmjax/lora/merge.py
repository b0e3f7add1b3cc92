"""Adding an adapter to the weights it changes."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from llmjax.errors import LoraError
from llmjax.lora.adapter import TABLE, Adapter, Delta
from llmjax.numerics import resolve
from llmjax.quant.arrays import row_chunks
from llmjax.quant.qtensor import QTensor, dequantize
from llmjax.quant.rounding import Rows, quantize
from llmjax.quant.schemes import Scheme

MODES: tuple[str, ...] = ("merged", "unmerged")


@dataclasses.dataclass(frozen=True)
class Survival:
    """What rounding left of a delta that was merged into quantized weights.

    Attributes:
      count: weights.
      changed: weights whose value is another than before.
      kept: ``<d, D> / <D, D>`` of the wanted change D and the one that came about, d: 1 where all of it is there.
      noise: ``|d - D| / |D|``: what was put there instead.
    """

    count: int
    changed: int
    kept: float
    noise: float


@dataclasses.dataclass
class Merge:
    """Which deltas are merged while a checkpoint is read, and what came of it.

    Attributes:
      deltas: by parameter.
      mode: ``merged``, ``unmerged``; None merges into floats and leaves quantized weights as they are, which merging
        would round a second time.
      numerics: the profile the weights are for; None for files, whose floats keep the dtype they have.
      where: the adapter's path, for messages.
      survivals: by parameter, of packed weights that were rounded again.
      embedding: the dtype that the model's embedding is found to have, by which a profile chooses its products'; None
        before it is read.
    """

    deltas: Mapping[str, Delta]
    mode: str | None
    numerics: str | None
    where: str = "lora"
    survivals: dict[str, Survival] = dataclasses.field(default_factory=dict)
    embedding: np.dtype | None = None

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise LoraError(f"lora_mode: unknown {self.mode!r}; expected {' or '.join(MODES)}")
        if self.mode == "merged" and TABLE in self.deltas:
            raise LoraError(
                f"{self.where}: it changes the head, whose weight is the embedding's as well (tie_word_embeddings), so "
                "it cannot be merged without a change of what tokens go in as; keep it beside the weights"
            )

    @classmethod
    def of(cls, adapter: Adapter | None, mode: str | None, numerics: str | None) -> "Merge":
        """Of an adapter's deltas, or of none."""
        return cls({}, mode, numerics) if adapter is None else cls(adapter.deltas, mode, numerics, str(adapter.path))

    def delta(self, parameter: str, quantized: bool) -> Delta | None:
        """What is to be added to a parameter."""
        merges = self.mode == "merged" or (self.mode is None and not quantized and parameter != TABLE)
        return self.deltas.get(parameter) if merges else None

    def dtype(self, stored: np.dtype) -> np.dtype:
        """What merged floats, the sum of float32 rounded once, are kept as: a rounding to 16 bits that the products do
        not make would cost a part of the delta."""
        if self.numerics is None:
            return stored
        products = resolve(self.numerics, stored if self.embedding is None else self.embedding).products
        return jnp.dtype(jnp.promote_types(stored, products))

    def into_packed(self, q: QTensor, delta: Delta, parameter: str) -> QTensor:
        """A quantized weight with its delta, rounded again under the scheme it has."""
        merged, self.survivals[parameter] = requantized(q, delta, f"{self.where}: {parameter}")
        return merged


def merged_rows(rows: Rows, delta: Delta, parameter: str) -> Rows:
    """A weight with its delta, float32, a few rows at a time.

    Raises:
      LoraError: from the rows: the sum is beyond what float32 holds, or has no direction for a magnitude.
    """

    def merged(start: int, stop: int) -> np.ndarray:
        base = rows(start, stop).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # it is looked for
            found = base + delta.rows(slice(start, stop), base, parameter)
        if not np.isfinite(found).all() and np.isfinite(base).all():
            raise LoraError(
                f"{parameter}: the weight with scale * B . A goes beyond float32's range (scale {delta.scale:.3g}); is "
                "the adapter damaged?"
            )
        return found

    return merged


def requantized(q: QTensor, delta: Delta, parameter: str) -> tuple[QTensor, Survival]:
    """The weight plus its delta, quantized by the scheme the weight has, and what became of the delta.

    Raises:
      LoraError: weights of 5 bits, which llmjax reads but does not make.
    """
    if q.bits == 5:
        raise LoraError(
            f"{parameter}: {q.scheme}: a delta cannot be merged into weights of 5 bits; load it unmerged, or expand "
            "the weights (dtype)"
        )
    group = None if q.scales.shape[1] == 1 else q.group
    scheme = Scheme(q.bits, group, symmetric=q.offsets is None)
    out, width = q.shape
    merged = quantize(
        merged_rows(lambda start, stop: _rows(q, start, stop), delta, parameter), (out, width), scheme, parameter
    )
    changed, dot, power, noise = 0, 0.0, 0.0, 0.0
    for rows in row_chunks(q.shape):
        base = _rows(q, rows.start, rows.stop)
        wanted = delta.rows(rows, base, parameter).astype(np.float64)
        came = _rows(merged, rows.start, rows.stop).astype(np.float64) - base
        changed += int(np.count_nonzero(came))
        dot, power = dot + float((came * wanted).sum()), power + float(np.square(wanted).sum())
        noise += float(np.square(came - wanted).sum())
    kept, rest = (dot / power, float(np.sqrt(noise / power))) if power else (1.0, 0.0)
    return merged, Survival(q.shape[0] * q.shape[1], changed, kept, rest)


def _rows(q: QTensor, start: int, stop: int) -> np.ndarray:
    return dequantize(q.map(lambda leaf: leaf[start:stop]))


def describe(survivals: Mapping[str, Survival]) -> str:
    """One line for a warning or a log."""
    found = survivals.values()
    count, changed = sum(s.count for s in found), sum(s.changed for s in found)
    worst = min(survivals, key=lambda name: survivals[name].kept)
    kept = np.mean([s.kept for s in found])
    noise = np.mean([s.noise for s in found])
    return (
        f"merged into {len(survivals)} quantized weights and rounded again: {changed:,} of {count:,} values changed, "
        f"{kept:.0%} of the delta is there, under rounding noise {noise:.2g} times its size "
        f"(least: {worst}, {survivals[worst].kept:.0%})"
    )
