"""``llmjax inspect``: what a checkpoint is and whether llmjax runs it, from its headers alone."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

from converters.readers.opening import is_graph, open_source
from converters.readers.source import FLOATS, Source, TensorSpec
from llmjax.checkpoint import bundles
from llmjax.checkpoint.bundles import BundleReport
from llmjax.checkpoint.loading import find_model, read_tokenizer
from llmjax.checkpoint.parameters import is_packed
from llmjax.checkpoint.plan import Plan, describe, make_plan
from llmjax.errors import ConfigError, LlmjaxError, TokenizerError, named, printable

# For a terminal; JSON has all of them.
_MOST_LISTED, _MOST_PROBLEMS = 5_000, 100


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """What ``inspect`` found.

    Attributes:
      path: of the checkpoint.
      format: ``huggingface``, ``gguf``, ``llmjax`` or ``mediapipe``.
      model_type: its architecture, as it names it.
      supported: whether ``llmjax.load`` would take it.
      problems: why not.
      config: the model's dimensions and options, None where they could not be read.
      parameters: number of parameters, a tied head counted once; None where unknown.
      tensors: each with ``name, shape, dtype, nbytes``, the parameters it fills (``fills``) and what it is kept as in
        memory (``kept``: ``packed``, or a dtype).
      tokenizer: its facts, None where there is none.  Tokens that the embedding has no row for are in ``without_row``:
        they cannot be used.
    """

    path: str
    format: str
    model_type: str | None
    supported: bool
    problems: list[str]
    config: dict[str, Any] | None
    parameters: int | None
    tensors: list[dict[str, Any]]
    tokenizer: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """For a terminal."""
        lines = [f"{self.path}", f"  format      {self.format}", f"  model_type  {self.model_type}"]
        if self.parameters is not None:
            lines.append(f"  parameters  {self.parameters:,}")
        sizes = Counter({t["dtype"]: 0 for t in self.tensors})
        for tensor in self.tensors:
            sizes[tensor["dtype"]] += tensor["nbytes"]
        counts = Counter(t["dtype"] for t in self.tensors)
        for dtype, size in sizes.most_common():
            lines.append(f"  tensors     {counts[dtype]} {dtype}, {_size(size)}")
        if self.config:
            lines += ["", "config", *(f"  {k:24} {v!s:.200}" for k, v in self.config.items())]
        if self.tokenizer:
            lines += ["", "tokenizer", *(f"  {k:24} {v!s:.200}" for k, v in self.tokenizer.items())]
        lines += ["", "tensors"]
        listed = self.tensors[:_MOST_LISTED]
        names = [named(t["name"]) for t in listed]
        width = max(map(len, names), default=0)
        for name, t in zip(names, listed, strict=True):
            kept = "" if t["dtype"] in FLOATS else f", {t['kept']}"
            use = (", ".join(t["fills"]) + kept) if t["fills"] else t["use"]
            lines.append(f"  {name:{width}}  {t['dtype']:8} {str(t['shape']):16} -> {use}")
        if len(self.tensors) > _MOST_LISTED:
            lines.append(f"  ... and {len(self.tensors) - _MOST_LISTED:,} more")
        lines += ["", "supported: yes" if self.supported else "supported: no"]
        lines += [f"  {line}" for problem in self.problems[:_MOST_PROBLEMS] for line in problem.splitlines()]
        if len(self.problems) > _MOST_PROBLEMS:
            lines.append(f"  ... and {len(self.problems) - _MOST_PROBLEMS:,} more")
        return printable("\n".join(lines))


def inspect(path: str | Path) -> CheckpointReport | BundleReport:
    """Reads a checkpoint's headers and plans its loading without reading a weight; of a bundle, what is in it.

    Raises:
      CheckpointError: there is no checkpoint, or its headers are damaged.
    """
    path = Path(find_model(path))
    if is_graph(path):
        return bundles.inspect(path)
    source = open_source(path)
    try:
        return _report(source)
    finally:
        source.close()


def _report(source: Source) -> CheckpointReport:
    problems: list[str] = []
    plan: Plan | None = None
    try:
        plan = make_plan(source)
        problems += plan.problems
    except ConfigError as error:
        problems.append(str(error))
    tokenizer = None
    try:
        found = read_tokenizer(source)
        if found is not None:
            tokenizer = {
                "kind": found.kind,
                "vocab_size": found.vocab_size,
                "bos_id": found.bos_id,
                "eos_ids": list(found.eos_ids),
                "add_bos": found.add_bos,
                "chat_template": found.chat_template is not None,
            }
            if plan and found.vocab_size > plan.config.vocab_size:
                beyond = range(plan.config.vocab_size, found.vocab_size)
                tokenizer["without_row"] = {found.piece(i): i for i in beyond}
    except (ConfigError, TokenizerError) as error:
        problems.append(str(error))
    return CheckpointReport(
        path=str(source.path),
        format=source.format,
        model_type=_model_type(source),
        supported=not problems,
        problems=problems,
        config=dataclasses.asdict(plan.config) if plan else None,
        parameters=sum(math.prod(a.shape) for a in plan.assignments) if plan else None,
        tensors=_tensors(source, plan),
        tokenizer=tokenizer,
    )


def _model_type(source: Source) -> str | None:
    if source.format == "gguf":
        found = source.metadata.get("general.architecture")
        return found if isinstance(found, str) else None
    try:
        return describe(source)[0].get("model_type")
    except LlmjaxError:
        return None


def _tensors(source: Source, plan: Plan | None) -> list[dict[str, Any]]:
    fills: dict[str, list[str]] = {}
    for assignment in plan.assignments if plan else ():
        for spec in assignment.sources:
            fills.setdefault(spec.name, []).append(assignment.parameter)
    use = {s.name: "repeats the embedding" for s in (plan.tied if plan else ())}
    use |= {s.name: "known, not needed" for s in (plan.dropped if plan else ())}
    use |= {s.name: "in the config" for s in (plan.configuring if plan else ())}
    return [
        {
            "name": name,
            "shape": list(source.spec(name).shape),
            "dtype": source.spec(name).dtype,
            "nbytes": source.spec(name).nbytes,
            "fills": fills.get(name, []),
            "use": use.get(name, "not used"),
            "kept": _kept(source, source.spec(name)),
        }
        for name in source.names()
    ]


def _kept(source: Source, spec: TensorSpec) -> str:
    if spec.dtype in FLOATS:
        return FLOATS[spec.dtype]
    return "packed" if is_packed(source, spec) else "expanded to float32"


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), "B"
    for larger in ("KB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if unit != "B" else f"{nbytes} B"
