"""``llmjax inspect`` for ``.task`` and ``.litertlm`` files: what is in them, and what can be done with it."""

import dataclasses
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from converters.readers.mediapipe import graph, package
from converters.readers.mediapipe.package import Package, Part
from llmjax.errors import CheckpointError, LlmjaxError, printable


@dataclasses.dataclass(frozen=True)
class BundleReport:
    """What ``inspect`` found in a bundle.

    Attributes:
      path: of the file.
      format: ``task`` or ``litertlm``.
      version: of the format; empty for ``task``.
      supported: False: llmjax does not run graphs.
      problems: why not, and what is damaged.
      parts: each with ``name, kind, nbytes`` and its notes.
      notes: the file's own keys and values.
      metadata: start and stop tokens, prompt templates and so on; None where there are none.
      tokenizer: its facts; None where there is none.
      graphs: each with ``part, subgraphs, operators`` and ``signatures``: ``name, inputs, outputs``, whose entries have
        ``name, type, shape``.
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
        for title, facts in (("metadata", self.metadata), ("tokenizer", self.tokenizer)):
            if facts:
                lines += ["", title, *(f"  {key:28} {value!r}" for key, value in facts.items())]
        for found in self.graphs:
            lines += ["", f"graph {found['part']}: {found['subgraphs']} subgraphs, {found['operators']} operators"]
            for signature in found["signatures"]:
                lines.append(f"  {signature['name']}: {signature['operators']} operators")
                for title in ("inputs", "outputs"):
                    lines += [
                        f"    {title[:-1]:6} {port['name']:24} {port['type']:8} {list(port['shape'])}"
                        for port in signature[title]
                    ]
        lines += ["", "supported: no", *(f"  {problem}" for problem in self.problems)]
        return printable("\n".join(lines))


def inspect(path: Path) -> BundleReport:
    """Reads a bundle's headers, metadata and vocabulary, no weights.

    Raises:
      CheckpointError: it is damaged.
    """
    found = Package(path)
    problems: list[str] = []
    graphs = [_graph(found, part, problems) for part in found.parts if part.kind == package.GRAPH]
    facts = [found.metadata(part) for part in found.parts if part.kind == package.FACTS]
    tokenizers = [t for part in found.parts if (t := _tokenizer(found, part))]
    if not graphs:
        raise CheckpointError(f"{path}: a .{found.format} bundle without a TFLite graph; it holds {_names(found)}")
    if not tokenizers:
        problems.append(f"no tokenizer: it holds {_names(found)}")
    return BundleReport(
        path=str(path),
        format=found.format,
        version=found.version,
        supported=False,
        problems=problems,
        parts=[{"name": p.name, "kind": p.kind, "nbytes": p.nbytes, "notes": p.notes} for p in found.parts],
        notes=found.notes,
        metadata=_as_dict(facts[0]) if facts else None,
        tokenizer=tokenizers[0] if tokenizers else None,
        graphs=graphs,
    )


def _names(found: Package) -> str:
    return ", ".join(part.name for part in found.parts) or "nothing"


def _as_dict(message: Any) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def _graph(found: Package, part: Part, problems: list[str]) -> dict[str, Any]:
    read = graph.read(found.view(part), f"{found.path}: {part.name}")
    if not read.operators and not read.signatures:
        problems.append(
            f"{part.name} is no graph but named weights, as in a .bin file: unpack it, and llmjax loads it as that"
        )
    else:
        problems.append(
            f"{part.name} is a graph of {read.operators} operators, which llmjax does not run yet; to run the model, "
            "load its .bin file, GGUF file or Hugging Face directory"
        )
    return {"part": part.name, **dataclasses.asdict(read)}


def _tokenizer(found: Package, part: Part) -> dict[str, Any] | None:
    """A vocabulary's facts, and whether llmjax reads it."""
    from llmjax.text import sentencepiece, tokenizer

    if part.kind == package.SENTENCEPIECE:
        kind, data = "sentencepiece", found.read(part)
    elif part.kind == package.HUGGINGFACE:
        kind, data = "huggingface", found.unpacked(part)
    else:
        return None
    where = f"{found.path}: {part.name}"
    try:
        if kind == "sentencepiece":
            vocabulary = sentencepiece.parse(data, where)
            return {"kind": kind, "vocab_size": len(vocabulary.pieces), **sentencepiece.special_tokens(vocabulary)}
        import tokenizers

        backend = tokenizer.load_backend(lambda: tokenizers.Tokenizer.from_buffer(data), where)
        return {"kind": kind, "vocab_size": backend.get_vocab_size(with_added_tokens=True)}
    except LlmjaxError as error:
        return {"kind": kind, "problem": str(error)}
