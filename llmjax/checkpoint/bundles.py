"""``llmjax inspect`` for ``.task``, ``.litertlm`` and ``.tflite`` files: what is in them, and whether it runs."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from converters.readers.litert import tflite
from converters.readers.litert.tflite import Tensor, TfliteFile
from converters.readers.mediapipe import package
from converters.readers.mediapipe.package import Package, Part
from llmjax.errors import CheckpointError, LlmjaxError, amount, named, printable
from llmjax.litert import ports
from llmjax.litert.graph import problems_of
from llmjax.litert.loading import described, embedders, kind_of_part, read_tokenizer, tokenizers_of
from llmjax.litert.module import MAIN


@dataclasses.dataclass(frozen=True)
class BundleReport:
    """What ``inspect`` found in a bundle.

    Attributes:
      path: of the file.
      format: ``task``, ``litertlm`` or ``tflite``.
      version: of the format; empty for ``task`` and ``tflite``.
      supported: whether ``llmjax.load`` would take it.
      problems: why not, and what is damaged.
      parts: each with ``name, kind, nbytes`` and its notes.
      notes: the file's own keys and values.
      metadata: start and stop tokens, prompt templates and so on; None where there are none.
      tokenizer: its facts; None where there is none.
      unused: graphs that are not run: for images, sounds, drafts.
      graphs: each with ``part, subgraphs, operators``; ``kinds``, how many operators of each there are, and
        ``quantization``, how many tensors; ``context`` and ``caches`` of a language model; and ``signatures``: ``name,
        operators, inputs, outputs``, whose entries have ``name, type, shape``.
    """

    path: str
    format: str
    version: str
    supported: bool
    problems: list[str]
    parts: list[dict[str, Any]]
    notes: dict[str, Any]
    metadata: dict[str, Any] | None
    tokenizer: dict[str, Any] | None
    unused: list[str]
    graphs: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """For a terminal."""
        lines = [self.path, f"  format      {self.format} {self.version}".rstrip()]
        lines += [f"  {key:11} {value}" for key, value in self.notes.items()]
        lines += ["", "parts"]
        for part in self.parts:
            notes = "".join(f"  {key}={value}" for key, value in part["notes"].items())
            lines.append(f"  {part['name']:26} {part['kind']:13} {part['nbytes']:>14,} B{notes}")
        if self.unused:
            lines.append(f"  not run: {', '.join(self.unused)}")
        for title, facts in (("metadata", self.metadata), ("tokenizer", self.tokenizer)):
            if facts:
                lines += ["", title, *(f"  {key:28} {value!r}" for key, value in facts.items())]
        for found in self.graphs:
            size = f"{amount(found['subgraphs'], 'subgraph')}, {amount(found['operators'], 'operator')}"
            lines += ["", f"graph {found['part']}: {size}"]
            for title in ("kinds", "quantization"):
                counts = ", ".join(f"{name} {count}" for name, count in found[title].items())
                lines += [f"  {title:12} {counts}"] if counts else []
            if found["context"]:
                lines.append(
                    f"  {'context':12} {amount(found['context'], 'token')} in {amount(len(found['caches']), 'cache')}"
                )
            for signature in found["signatures"]:
                lines.append(f"  {signature['name']}: {amount(signature['operators'], 'operator')}")
                for title in ("inputs", "outputs"):
                    lines += [
                        f"    {title[:-1]:6} {port['name']:24} {port['type']:8} {list(port['shape'])}"
                        for port in signature[title]
                    ]
        lines += ["", f"supported: {'yes' if self.supported else 'no'}"]
        lines += [f"  {line}" for problem in self.problems for line in problem.splitlines()]
        return printable("\n".join(lines))


def inspect(path: Path) -> BundleReport:
    """Reads a bundle's headers, metadata and vocabulary, no weights.

    Raises:
      CheckpointError: it is damaged.
    """
    if package.kind_of(path) is None:
        graph, problems = _graph(tflite.read_file(path), path.name, True)
        return BundleReport(str(path), "tflite", "", not problems, problems, [], {}, None, None, [], [graph])
    found = Package(path)
    problems, graphs, unused = list[str](), list[dict[str, Any]](), list[str]()
    files: dict[str, TfliteFile] = {}
    kinds = [(part, kind_of_part(found, part)) for part in found.parts if part.kind == package.GRAPH]
    for part, kind in kinds:
        unused += [described(part)] if kind is None else []
        try:
            file = tflite.read(found.view(part), f"{found.path}: {part.name}")
        except CheckpointError:
            if kind is None:
                continue
            raise
        graph, wrong = _graph(file, part.name, kind == MAIN)
        graphs.append(graph)
        problems += wrong
        if kind in files:
            problems.append(f"two graphs for {kind}")
        elif kind is not None:
            files[kind] = file
    rows = None
    if MAIN not in files:
        problems.append("there is no model's graph")
    elif not problems:
        decode = ports.read(files[MAIN])[1]
        rows = decode.vocab_size
        try:
            for kind, name in embedders(files, decode, path).items():
                problems += problems_of(files[kind], [name])
        except CheckpointError as error:
            problems.append(str(error))
    facts = [found.metadata(part) for part in found.parts if part.kind == package.FACTS]
    tokenizers = [_tokenizer(found, part) for part in tokenizers_of(found)]
    if not graphs:
        names = ", ".join(map(described, found.parts)) or "nothing"
        raise CheckpointError(f"{path}: a .{found.format} bundle without a TFLite graph; it holds {names}")
    try:
        read_tokenizer(found, rows)
    except LlmjaxError as error:
        problems.append(str(error))
    return BundleReport(
        path=str(path),
        format=found.format,
        version=found.version,
        supported=not problems,
        problems=problems,
        parts=[{"name": p.name, "kind": p.kind, "nbytes": p.nbytes, "notes": p.notes} for p in found.parts],
        notes=found.notes,
        metadata=_as_dict(facts[0]) if facts else None,
        tokenizer=tokenizers[0] if tokenizers else None,
        unused=unused,
        graphs=graphs,
    )


def _as_dict(message: Any) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def _graph(file: TfliteFile, name: str, is_model: bool) -> tuple[dict[str, Any], list[str]]:
    """A graph's facts, and why it cannot be run."""
    kinds = Counter(op.label for graph in file.subgraphs for op in graph.operators)
    weights = [t for graph in file.subgraphs for t in graph.tensors if t.quantization and file.is_constant(t)]
    same = {(t.buffer, t.type): t for t in weights}.values()
    quantization = Counter(f"{t.type} {t.quantization.label}" for t in same if t.quantization)
    problems: list[str] = []
    context, caches = 0, list[dict[str, Any]]()
    if not kinds and is_model and list(file.signatures) == ["main"]:
        problems.append(
            f"{name} is no graph but named weights, as in a .bin file: unpack it, and llmjax loads it as that"
        )
    elif is_model and (problem := ports.cache_lengths(file)):
        problems.append(f"{name}: {problem}")
    elif is_model and not ports.is_language_model(file):
        problems.append(f"{name} has no signature decode: it is no language model's graph")
    elif is_model:
        problems += problems_of(file, ports.wanted(file))
        try:
            decode = ports.read(file)[1]
            context, caches = decode.context, [_port(n, decode.tensors[n]) for n in decode.states]
        except CheckpointError as error:
            problems.append(str(error))
    signatures = []
    for signature in file.signatures.values():
        graph = file.subgraphs[signature.subgraph]
        signatures.append(
            {
                "name": named(signature.name),
                "operators": len(graph.operators),
                "inputs": [_port(port, graph.tensors[i]) for port, i in signature.inputs.items()],
                "outputs": [_port(port, graph.tensors[i]) for port, i in signature.outputs.items()],
            }
        )
    facts = {
        "part": name,
        "subgraphs": len(file.subgraphs),
        "operators": kinds.total(),
        "kinds": dict(kinds.most_common()),
        "quantization": dict(quantization.most_common()),
        "context": context,
        "caches": caches,
        "signatures": signatures,
    }
    return facts, problems


def _port(name: str, tensor: Tensor) -> dict[str, Any]:
    return {"name": named(name), "type": tensor.type, "shape": tensor.dims}


def _tokenizer(found: Package, part: Part) -> dict[str, Any]:
    """A vocabulary's facts, and whether llmjax reads it."""
    from llmjax.text import huggingface, sentencepiece

    if part.kind == package.SENTENCEPIECE:
        kind, data = "sentencepiece", found.read(part)
    else:
        kind, data = "huggingface", found.unpacked(part)
    where = f"{found.path}: {part.name}"
    try:
        if kind == "sentencepiece":
            vocabulary = sentencepiece.parse(data, where)
            return {"kind": kind, "vocab_size": len(vocabulary.pieces), **sentencepiece.special_tokens(vocabulary)}
        backend = huggingface.load_json(data, where)
        return {"kind": kind, "vocab_size": backend.get_vocab_size(with_added_tokens=True)}
    except LlmjaxError as error:
        return {"kind": kind, "problem": str(error)}
