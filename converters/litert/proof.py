"""Whether a written graph computes what its checkpoint does: run by our own interpreter, beside the checkpoint's model.

The graph's activations are not rounded for the verdict, and the model has the file's own quantized weights, so the two
differ by orders of sums alone.  What rounding does on top of that is stated beside it.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from converters.litert import weights as weights_lib
from converters.litert.graph import FLOAT32, Form
from converters.readers.source import Source
from llmjax.checkpoint.parameters import Stored, stored
from llmjax.checkpoint.placing import put
from llmjax.checkpoint.plan import Plan
from llmjax.errors import CheckpointError
from llmjax.litert.loading import load_graph
from llmjax.litert.model import GraphModel
from llmjax.lora.merge import Merge
from llmjax.model import Model
from llmjax.numerics import REFERENCE, resolve
from llmjax.oracle.compare import compare
from llmjax.oracle.comparison import Comparison
from llmjax.oracle.trace import Trace
from llmjax.quant.qtensor import dequantize
from llmjax.quant.schemes import Recipe
from llmjax.text.tokenizer import Tokenizer

_TEXT = "The quick brown fox jumps over the lazy dog. In 1905 she wrote: 3.14 is not 22/7, but it is near."
_TOKENS = 24
_LONGEST = 512
_AFTER = 3  # tokens that go through decode behind a prefill


@dataclasses.dataclass(frozen=True)
class Proof:
    """What a run of the graph showed.

    Attributes:
      reports: a comparison for each text, activations unrounded.
      as_run: that of the first as LiteRT computes it, where it rounds activations; else None.
      to_float: that of the first, as LiteRT computes it, to the checkpoint before it was quantized; else None.
    """

    reports: tuple[Comparison, ...]
    as_run: Comparison | None
    to_float: Comparison | None

    @property
    def worst(self) -> Comparison:
        """The report that decides."""
        return max(self.reports, key=lambda r: (r.verdict not in ("identical", "equivalent"), _kl(r)[1]))

    @property
    def holds(self) -> bool:
        """Whether every text was equivalent."""
        return self.worst.verdict in ("identical", "equivalent")

    def to_text(self) -> str:
        """A line for each comparison."""
        worst = self.worst
        explained = f" (explained by {worst.explained_by})" if worst.explained_by else ""
        tokens = sum(r.coverage["tokens"] for r in self.reports)
        lines = [f"verdict: {worst.verdict}{explained}, {tokens} tokens, KL {_kl_text(worst)}"]
        if self.as_run:
            lines.append(f"with activations in int8, as LiteRT runs it: KL {_kl_text(self.as_run)}")
        if self.to_float:
            lines.append(f"to the checkpoint before it was quantized: KL {_kl_text(self.to_float)}")
        return "\n".join(lines)


def prove(
    path: Path, source: Source, plan: Plan, recipe: Recipe | None, merges: Sequence[Merge], tokenizer: Tokenizer | None
) -> Proof:
    """Runs a file and its checkpoint.

    Args:
      path: of the graph, or of the bundle.
      source: the checkpoint.
      plan: how it is read.
      recipe: how it was quantized.
      merges: the adapter, once for each time that the weights are read: two.
      tokenizer: the checkpoint's.

    Raises:
      CheckpointError: the file is none that our own reader takes.
    """
    graph = load_graph(path)
    plain = graph.under(REFERENCE)
    runs = _runs(graph, tokenizer)
    theirs = [plain.follow(ids, prefill)[0] for ids, prefill in runs]
    rounded = graph.follow(*runs[0])[0] if graph.numerics.digits == 1 else None
    del plain
    model = _model(source, plan, recipe, merges[0])
    ours = [model.logits([ids])[0][prefill:] for ids, prefill in runs]
    reports = [
        _compared(x, y, ids[prefill:], "float32") for x, y, (ids, prefill) in zip(ours, theirs, runs, strict=True)
    ]
    run = theirs[0] if rounded is None else rounded
    as_run = None if rounded is None else _compared(ours[0], rounded, runs[0][0], "dynamic_int8")
    to_float = None
    if recipe is not None:
        del model
        (exact,) = _model(source, plan, None, merges[1]).logits([runs[0][0]])
        to_float = _compared(exact, run, runs[0][0], "int4")
    return Proof(tuple(reports), as_run, to_float)


def refuse(proof: Proof, path: Path) -> None:
    """Raises CheckpointError where a proof does not hold."""
    if not proof.holds:
        raise CheckpointError(
            f"{path}: the written graph does not compute what the checkpoint does: {proof.worst.reason} (KL "
            f"{_kl_text(proof.worst)}); nothing is written under this name: a fault of llmjax's, please report it"
        )


def _runs(graph: GraphModel, tokenizer: Tokenizer | None) -> list[tuple[list[int], int]]:
    """Token ids, and how many of them go through the prefill signatures: a text through decode alone; each signature
    full, the shortest padded, too, with tokens of the whole vocabulary; and the end of caches that are not long."""
    random = np.random.default_rng(0)
    most, context = graph.config.vocab_size, graph.context_length
    text = tokenizer.encode(_TEXT)[:_TOKENS] if tokenizer else []
    text = [i for i in text if i < most] or random.integers(1, most, _TOKENS).tolist()
    found = [(text[:context], 0)]
    lengths = [ports.length for ports in graph.module.prefills]
    for prefill in (*sorted(lengths), max(1, min(lengths) - 1)):
        count = min(context, prefill + _AFTER)
        if prefill < count:
            found.append((random.integers(1, most, count).tolist(), prefill))
    if _AFTER < context <= _LONGEST:
        found.append((random.integers(1, most, context).tolist(), context - _AFTER))
    return found


def _model(source: Source, plan: Plan, recipe: Recipe | None, merge: Merge) -> Model:
    """The checkpoint's model in float32, its weights rounded as a file of this recipe has them."""
    forms = {name: weight.form for name, weight in weights_lib.split(source, plan, recipe, merge)[1].items()}
    params: dict[str, object] = {}
    for parameter in stored(source, plan, merge):
        put(params, parameter.name, _values(parameter, forms.get(parameter.name, FLOAT32)))
    numerics = resolve(REFERENCE, jnp.dtype(jnp.float32))
    return Model(plan.architecture, plan.config, params, numerics, None, (), source.path)


def _values(parameter: Stored, form: Form) -> np.ndarray:
    packed = None if form == FLOAT32 else parameter.packed()
    if packed is not None and weights_lib.held(packed) == form:
        return np.asarray(dequantize(packed), np.float32)
    rows = parameter.rows(0, parameter.shape[0]).astype(np.float32)
    if form == FLOAT32:
        return rows
    n, scales = weights_lib.quantized(rows.reshape(-1, rows.shape[-1]), form)
    groups = n.reshape(len(n), scales.shape[1], -1) * scales.astype(np.float32)[..., None]
    return groups.reshape(rows.shape)


def _compared(ours: np.ndarray, theirs: np.ndarray, ids: Sequence[int], arithmetic: str) -> Comparison:
    manifest = {"token_ids": list(ids)}
    return compare(Trace({"logits": ours}, manifest), Trace({"logits": theirs}, manifest), arithmetic=arithmetic)


def _kl(report: Comparison) -> tuple[float, float]:
    return (report.logits["kl_mean"], report.logits["kl_max"]) if report.logits else (np.inf, np.inf)


def _kl_text(report: Comparison) -> str:
    mean, most = _kl(report)
    return f"{mean:.1e} in the mean, {most:.1e} at most"
