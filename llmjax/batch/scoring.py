"""``llmjax score``: a JSONL of texts in, their log-probabilities out."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from llmjax.batch.question import checked_id
from llmjax.batch.rows import parse_object, row_error
from llmjax.checkpoint.identity import model_facts, runtime_facts
from llmjax.errors import RequestError
from llmjax.llm import LLM
from llmjax.outside.whole import write_whole
from llmjax.runtime.outputs import Score


@dataclasses.dataclass
class ScoreSummary:
    """Over all texts of a job: rows, failures, and the pooled log-probabilities."""

    rows: int = 0
    failed: int = 0
    logprobs: list[float] = dataclasses.field(default_factory=list)

    @property
    def pooled(self) -> Score:
        """All tokens as those of one text."""
        return Score([], list(self.logprobs), [])

    def describe(self) -> str:
        """One line: NLL and perplexity of all tokens together, with standard errors."""
        if not self.logprobs:
            return f"{self.rows} rows scored, {self.failed} failed; no token has another before it"
        pooled = self.pooled
        return (
            f"{self.rows} rows scored, {self.failed} failed; {len(self.logprobs)} tokens, "
            f"NLL {pooled.nll:.5f} ± {pooled.nll_standard_error:.5f}, "
            f"perplexity {pooled.perplexity:.4f} ± {pooled.perplexity_standard_error:.4f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        numbers = {name: value for name, value in self.pooled.to_dict().items() if not isinstance(value, list)}
        return {"rows": self.rows, "failed": self.failed, "tokens": len(self.logprobs), **numbers}


def identity(llm: LLM) -> dict[str, Any]:
    """Everything that fixes a text's scores, by name; ``sha256`` is over all of it but the model's path, and what
    every row names."""
    engine = llm.engine
    facts = {"slots": engine.slots, "chunk": engine.chunk, "block": engine.block}
    facts |= {**model_facts(llm.model), **runtime_facts()}
    text = json.dumps({**facts, "model": None}, sort_keys=True)
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), **facts}


def write_manifest(output: Path, known: Mapping[str, Any], summary: ScoreSummary | None = None) -> None:
    """Writes ``OUT.manifest.json`` beside an output: what made it and, once it is whole, what is in it.

    Raises:
      OSError: it cannot be written.
    """
    values = {"format": "llmjax-score", "version": 1, "job": known, "summary": summary and summary.to_dict()}
    path = output.with_name(f"{output.name}.manifest.json")
    write_whole(path, [json.dumps(values, indent=2, ensure_ascii=False).encode("utf-8", "replace"), b"\n"])


def run(llm: LLM, lines: Iterable[str], output: IO[str], known: str | None = None) -> ScoreSummary:
    """Scores every row; a bad row becomes an output row with an error and the others go on.

    Args:
      llm: the model.
      lines: JSON objects with ``text`` or ``token_ids``, and optionally ``id``.
      output: gets one JSON line a row: ``id``, ``token_ids``, ``logprobs``, ``top1``, ``nll``, ``perplexity``,
        standard errors, ``numerics`` and ``identity``.
      known: the SHA-256 of ``identity``; None makes it.
    """
    known = known or identity(llm)["sha256"]
    summary = ScoreSummary()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row_id: Any = None
        try:
            row = parse_object(line)
            checked_id(row.get("id", number), "id")
            row_id = row.get("id", number)
            (score,) = llm.score([_text(row)])
            result = {"id": row_id, **score.to_dict(), "numerics": llm.model.numerics.label, "identity": known}
            summary.rows += 1
            summary.logprobs += score.scored
        except BaseException as error:
            summary.failed += 1
            result = {"id": row_id, "line": number, "error": f"line {number}: {row_error(error)}"}
        output.write(json.dumps(result, ensure_ascii=False) + "\n")
        output.flush()
    return summary


def _text(row: dict[str, Any]) -> str | list[int]:
    unknown = sorted(set(row) - {"id", "text", "token_ids"})
    if unknown or ("text" in row) == ("token_ids" in row):
        raise RequestError(f"expected id and one of text, token_ids; found {', '.join(row) or 'none'}")
    if "text" in row:
        if not isinstance(row["text"], str):
            raise RequestError(f"text: expected a string, found {type(row['text']).__name__}")
        return row["text"]
    if not isinstance(row["token_ids"], list):
        raise RequestError(f"token_ids: expected a list, found {type(row['token_ids']).__name__}")
    return row["token_ids"]
