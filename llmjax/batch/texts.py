"""Rows of texts to be scored.

In: ``id`` (the line's number where there is none), one of ``text`` and ``token_ids``, and ``metadata``: whatever is to
be in the answer as well.  What is null, but for the id, is as if it were
not there.

Out: ``id``, as it came; ``model``, its name; ``token_ids``, ``tokens`` (their texts), ``logprobs``, ``top1``, ``nll``,
``perplexity``, their standard errors, ``numerics``, ``identity`` (the SHA-256 of all that the numbers depend on, which
the manifest has), ``hash``, ``metadata`` where it was given.  A row that could not be scored: ``id``, ``line``,
``error``, ``hash``; without ``line`` if it failed when it ran.
"""

from typing import Any, NamedTuple

from llmjax.batch import native
from llmjax.batch.question import ID
from llmjax.errors import RequestError
from llmjax.llm import LLM
from llmjax.outside.values import LIST, STRING, check
from llmjax.runtime.outputs import ScoreOutput

_PROMPTS = ("text", "token_ids")
KEYS = ("id", *_PROMPTS, "metadata")
metadata, with_metadata, failure = native.metadata, native.with_metadata, native.failure


class Text(NamedTuple):
    """What a row brings: ``kind`` is the name it stands under."""

    kind: str
    prompt: Any
    model: str | None = None


def row_id(row: dict[str, Any], line: int) -> str | int:
    """As ``native.row_id``."""
    check("id", row.get("id", line), ID)
    return row.get("id", line)


def parse(row: dict[str, Any]) -> Text:
    """What the row asks.

    Raises:
      RequestError: no text or two, a key that is not known, or a text of the wrong type.
    """
    unknown = sorted(set(row) - set(KEYS))
    given = [name for name in _PROMPTS if row.get(name) is not None]
    if unknown or len(given) != 1:
        raise RequestError(f"expected id, metadata and one of text, token_ids; found {', '.join(row) or 'none'}")
    (kind,) = given
    check(kind, row[kind], STRING if kind == "text" else LIST)
    return Text(kind, row[kind])


def answer(question: Text, output: ScoreOutput, llm: LLM, row_id: str | int, content: str) -> dict[str, Any]:
    """The output row of a scored text."""
    assert output.score is not None
    return {
        "id": row_id,
        "model": llm.model.path.name,
        **output.score.to_dict(),
        "numerics": llm.model.numerics.label,
        "identity": output.identity,
        "hash": content,
    }


def describe(row: dict[str, Any]) -> tuple[str | int, str, bool, int, int]:
    """As ``native.describe``."""
    if "error" in row:
        return native.describe(row)
    return str(row["id"]), row["hash"], False, len(row["token_ids"]), 0
