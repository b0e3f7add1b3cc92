"""``llmjax lora``: what an adapter is, what it changes, whether merging it gives the same model; and that model."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.readers.llmjax_directory import LlmjaxSource
from converters.readers.opening import open_source
from llmjax.checkpoint.conversion import convert
from llmjax.checkpoint.loading import find_model, load
from llmjax.checkpoint.parameters import OnParameter
from llmjax.errors import amount
from llmjax.lora.adapter import TABLE, AnyLora, Delta, read_adapter, values_of
from llmjax.quant.arrays import row_chunks
from llmjax.quant.qtensor import QTensor, dequantize

# Ids of the text both ways are compared on, where no prompt is given.
_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Module:
    """One changed weight: r, the scale, the largest change of a value, and whether it has magnitudes (DoRA)."""

    parameter: str
    rank: int
    scale: float
    largest: float
    dora: bool


@dataclasses.dataclass(frozen=True)
class Check:
    """What ``check`` found.

    Attributes:
      path: of the adapter.
      modules: what it changes.
      difference: largest difference between the logits of the merged and of the unmerged model; None where it cannot be
        merged, for it changes a head that is the embedding's table as well.
      effect: largest difference between the logits with the adapter and without.
      size: largest logit, in absolute value.
    """

    path: Path
    modules: list[Module]
    difference: float | None
    effect: float
    size: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self) | {"path": str(self.path)}

    def describe(self) -> str:
        """As text."""
        ranks, scales = sorted({m.rank for m in self.modules}), sorted({m.scale for m in self.modules})
        width = max(len(m.parameter) for m in self.modules)
        merged = "cannot be merged: it changes the head, whose weight is the embedding's as well"
        if self.difference is not None:
            merged = f"merged and unmerged differ by {self.difference:.2g}"
        lines = [
            f"{self.path}: fits; {amount(len(self.modules), 'weight')}, rank {_listed(ranks)}, scale {_listed(scales)}"
            + (", with magnitudes (DoRA)" if any(m.dora for m in self.modules) else ""),
            *(
                f"  {m.parameter:{width}}  r {m.rank:<4} scale {m.scale:<8.4g} max |dW| {m.largest:.3g}"
                for m in self.modules
            ),
            f"logits: largest {self.size:.3g}; the adapter changes them by up to {self.effect:.3g}; {merged}",
        ]
        return "\n".join(lines)


def _listed(values: list[Any]) -> str:
    return ", ".join(f"{v:.6g}" for v in values)


def check(path: str | Path, lora: AnyLora, *, prompt: str | None = None) -> Check:
    """Reads an adapter, fits it to a model, and runs it merged and unmerged over a short text.

    Args:
      path: the model: see ``llmjax.load``.
      lora: the adapter.
      prompt: the text; where there is none, a few token ids.

    Raises:
      LoraError: it does not fit.
      LlmjaxError: the model cannot be loaded.
    """
    base = load(path)
    values = values_of(base.params)
    adapter = read_adapter(lora, base.architecture, base.config, values)
    if prompt is not None and base.tokenizer is not None:
        ids = base.tokenizer.encode(prompt)
    else:
        ids = [(7 * i) % base.config.vocab_size for i in range(1, _TOKENS + 1)]
    modules = [
        Module(name, delta.rank, delta.scale, _largest(delta, values(name), name), delta.magnitude is not None)
        for name, delta in adapter.deltas.items()
    ]
    without = base.logits([ids])[0]
    del base
    modes = ["unmerged"] if TABLE in adapter.deltas else ["unmerged", "merged"]
    unmerged, *merged = (load(path, lora=adapter, lora_mode=m).logits([ids])[0] for m in modes)
    return Check(
        adapter.path,
        modules,
        difference=float(np.abs(merged[0] - unmerged).max()) if merged else None,
        effect=float(np.abs(unmerged - without).max()),
        size=float(np.abs(without).max()),
    )


def _largest(delta: Delta, weight: Any, name: str) -> float:
    """``max |dW|``."""
    weight = jax.tree.map(np.asarray, weight)  # once: JAX would compile a slice for every chunk of rows

    def of(rows: slice) -> np.ndarray:
        part = jax.tree.map(lambda leaf: leaf[rows], weight)
        base = dequantize(part) if isinstance(part, QTensor) else part.astype(np.float32)
        return np.abs(delta.rows(rows, base, name))

    return float(max(of(rows).max() for rows in row_chunks(weight.shape)))


def merge(
    path: str | Path, lora: AnyLora, destination: str | Path, *, report: OnParameter = lambda done, total: None
) -> Path:
    """Writes a checkpoint with an adapter in its weights: an llmjax directory for one, Hugging Face's form for any
    other, floats in the dtype they have.

    Args:
      path: the base model: see ``llmjax.load``.
      lora: the adapter.
      destination: a new directory, or an empty one.
      report: see ``llmjax.convert``.

    Raises:
      LoraError: it does not fit.
      LlmjaxError: see ``llmjax.convert``.
    """
    source = open_source(find_model(path))
    packed = isinstance(source, LlmjaxSource)
    source.close()
    return convert(path, destination, to="llmjax" if packed else "hf", lora=lora, report=report)
