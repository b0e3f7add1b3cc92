"""Whether a written graph computes what its checkpoint does: run by our own interpreter, beside the checkpoint's model.

The graph's activations are not rounded for the verdict, and the model has the file's own quantized weights, so the two
differ by orders of sums alone.  What rounding does on top of that is stated beside it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from converters.litert import weights as weights_lib
from converters.litert.follow import Call, Distance, GraphRuns, model_logits
from converters.litert.graph import FLOAT32, Form
from llmjax.checkpoint.opened import Checkpoint
from llmjax.checkpoint.parameters import Stored, stored
from llmjax.errors import CheckpointError, amount
from llmjax.litert import ports
from llmjax.litert.graph import numerics_for, settled
from llmjax.litert.loading import graphs_of
from llmjax.litert.model import cuts
from llmjax.litert.module import MAIN
from llmjax.litert.ports import Ports
from llmjax.lora.merge import Merge
from llmjax.numerics import REFERENCE, resolve
from llmjax.oracle.compare import compare
from llmjax.oracle.comparison import Comparison
from llmjax.oracle.trace import Trace
from llmjax.quant.arrays import aligned, row_chunks
from llmjax.quant.qtensor import dequantize
from llmjax.text.tokenizer import Tokenizer

_TEXT = "The quick brown fox jumps over the lazy dog. In 1905 she wrote: 3.14 is not 22/7, but it is near."
_TOKENS = 24
_LONGEST = 512
# Times that the distance of the streams grows by where a layer goes astray.
_ASTRAY = 30
_AFTER = 3  # tokens that go through decode behind a prefill


@dataclasses.dataclass(frozen=True)
class Proof:
    """What a run of the graph showed.

    Attributes:
      reports: a comparison for each text, activations unrounded.
      as_run: that of the first as LiteRT computes it, where it rounds activations; else None.
      to_float: that of the first, as LiteRT computes it, to the checkpoint before it was quantized; else None.
      where: the layer in which a graph goes astray that does not hold, in words.
    """

    reports: tuple[Comparison, ...]
    as_run: Comparison | None
    to_float: Comparison | None
    where: str = ""

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
        lines = [f"verdict: {worst.verdict}{explained}, {amount(tokens, 'token')}, KL {_kl_text(worst)}"]
        if self.as_run:
            lines.append(f"with activations in int8, as LiteRT runs it: KL {_kl_text(self.as_run)}")
        if self.to_float:
            lines.append(f"to the checkpoint before it was quantized: KL {_kl_text(self.to_float)}")
        return "\n".join(lines)


def prove(path: Path, checkpoint: Checkpoint, forms: Mapping[str, Form], tokenizer: Tokenizer | None) -> Proof:
    """Runs a file and its checkpoint, a layer at a time: see ``converters.litert.follow``.

    Args:
      path: of the graph, or of the bundle.
      checkpoint: what it was made of; where it was to be quantized, what that cost is stated.
      forms: of the weights in the file, by parameter.
      tokenizer: the checkpoint's.

    Raises:
      CheckpointError: the file is none that our own reader takes.
    """
    file, plan = graphs_of(path)[0][MAIN], checkpoint.plan
    prefills, decode = ports.read(file)
    ids, runs = _runs(prefills, decode, plan.config.vocab_size, tokenizer)
    wanted = [[call.start for call in run if call.ports is decode] for run in runs]
    places = sorted({place for each in wanted for place in each})
    distance, shapes = Distance(), {a.parameter: a.shape for a in plan.assignments}
    exact = resolve(REFERENCE, jnp.dtype(jnp.float32))

    def load(forms: Mapping[str, Form], merge: Merge, name: str) -> np.ndarray:
        only = [assignment for assignment in plan.assignments if assignment.parameter == name]
        (parameter,) = stored(checkpoint.source, dataclasses.replace(plan, assignments=only), merge)
        return _values(parameter, forms.get(name, FLOAT32))

    of = functools.partial(load, forms, checkpoint.merge())
    logits = model_logits(plan.config, shapes, of, exact, ids[: places[-1] + 1], places, distance.model)
    ours = [logits[[places.index(place) for place in each]] for each in wanted]
    signatures, profile = [*prefills, decode], numerics_for(None)
    plain = GraphRuns(file, signatures, settled(file, numerics_for(REFERENCE)))
    theirs = plain.logits(ids, runs, distance.graph)
    reports = [
        _compared(x, y, [ids[place] for place in each], "float32")
        for x, y, each in zip(ours, theirs, wanted, strict=True)
    ]
    first, run, as_run, to_float = [ids[place] for place in wanted[0]], theirs[0], None, None
    if settled(file, profile).digits == 1:
        (run,) = GraphRuns(file, [decode], settled(file, profile)).logits(ids, runs[:1])
        as_run = _compared(ours[0], run, first, "dynamic_int8")
    if checkpoint.recipe is not None:
        of = functools.partial(load, {}, checkpoint.merge())
        unrounded = model_logits(plan.config, shapes, of, exact, first, range(len(first)))
        to_float = _compared(unrounded, run, first, "int4")
    found = Proof(tuple(reports), as_run, to_float)
    if found.holds:
        return found
    layer = distance.steepest(_ASTRAY)
    return dataclasses.replace(found, where=", behind the layers" if layer is None else f", in layers.{layer}")


def refuse(proof: Proof, path: Path) -> None:
    """Raises CheckpointError where a proof does not hold."""
    if not proof.holds:
        raise CheckpointError(
            f"{path}: the written graph does not compute what the checkpoint does{proof.where}: {proof.worst.reason} "
            f"(KL {_kl_text(proof.worst)}); nothing is written under this name: a fault of llmjax's, please report it"
        )


def _runs(
    prefills: Sequence[Ports], decode: Ports, most: int, tokenizer: Tokenizer | None
) -> tuple[list[int], list[list[Call]]]:
    """Token ids, and how their beginnings go through the signatures: a text through decode alone; each prefill full,
    the shortest padded, too, with tokens of the whole vocabulary; and the end of caches that are not long."""
    random, context = np.random.default_rng(0), decode.context
    lengths = sorted(ports.length for ports in prefills)
    text = tokenizer.encode(_TEXT)[:_TOKENS] if tokenizer else []
    text = [i for i in text if i < most][:context] or random.integers(1, most, min(_TOKENS, context)).tolist()
    whole = context if context <= _LONGEST else min(context, lengths[-1] + _AFTER)
    ids = [*text, *random.integers(1, most, max(0, whole - len(text))).tolist()]

    def run(prefilled: int, count: int) -> list[Call]:
        calls, at = [], 0
        for length, tokens in cuts(lengths, prefilled, context):
            calls.append(Call(next(p for p in prefills if p.length == length), at, tokens))
            at += tokens
        return [*calls, *(Call(decode, place, 1) for place in range(at, count))]

    found = [run(0, len(text))]
    for prefilled in (*lengths, max(1, lengths[0] - 1)):
        count = min(context, prefilled + _AFTER)
        if prefilled < count:
            found.append(run(prefilled, count))
    if _AFTER < context <= _LONGEST:
        found.append(run(context - _AFTER, context))
    return ids, found


def _values(parameter: Stored, form: Form) -> np.ndarray:
    packed = None if form == FLOAT32 else parameter.packed()
    if packed is not None and weights_lib.held(packed) == form:
        return np.asarray(dequantize(packed), np.float32)
    value = aligned(parameter.shape, np.dtype(np.float32))
    for part in row_chunks(parameter.shape):
        rows = parameter.rows(part.start, part.stop).astype(np.float32)
        if form != FLOAT32:
            n, scales = weights_lib.quantized(rows.reshape(-1, rows.shape[-1]), form)
            rows = (n.reshape(len(n), scales.shape[1], -1) * scales.astype(np.float32)[..., None]).reshape(rows.shape)
        value[part] = rows
    return value


def _compared(ours: np.ndarray, theirs: np.ndarray, ids: Sequence[int], arithmetic: str) -> Comparison:
    manifest = {"token_ids": list(ids)}
    return compare(Trace({"logits": ours}, manifest), Trace({"logits": theirs}, manifest), arithmetic=arithmetic)


def _kl(report: Comparison) -> tuple[float, float]:
    return (report.logits["kl_mean"], report.logits["kl_max"]) if report.logits else (np.inf, np.inf)


def _kl_text(report: Comparison) -> str:
    mean, most = _kl(report)
    return f"{mean:.1e} in the mean, {most:.1e} at most"
