"""One line of a batch's input, and one of its output."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

from llmjax.errors import LlmjaxError, RequestError
from llmjax.llm import LLM
from llmjax.outputs import RequestOutput
from llmjax.runtime.params import SamplingParams
from llmjax.runtime.row import Request

_PROMPTS = ("prompt", "messages", "prompt_token_ids")
_PARAMS = tuple(f.name for f in fields(SamplingParams))


class InputRow(NamedTuple):
    """A parsed line: ``request`` is None where the row cannot run, and ``error`` then says why."""

    line: int
    row_id: str | None
    request: Request | None
    error: str | None


def read_rows(lines: Iterable[str], llm: LLM, defaults: SamplingParams) -> Iterator[InputRow]:
    """Parses lines one by one; blank ones are skipped, bad ones become rows with an error.

    Args:
      lines: JSON objects: ``id`` or ``custom_id`` (the line number where absent), one of ``prompt``, ``messages``,
        ``prompt_token_ids``, and sampling parameters by name.
      llm: tokenises and checks.
      defaults: parameters a row does not set.
    """
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row_id = None
        try:
            row = parse_object(line)
            row_id = str(row.get("id", row.get("custom_id", number)))
            if row_id in seen:
                raise RequestError(f"id {row_id!r} was used by an earlier row; ids name rows and seed their draws")
            seen.add(row_id)
            yield InputRow(number, row_id, _request(row, row_id, llm, defaults), None)
        except LlmjaxError as error:
            yield InputRow(number, row_id, None, f"line {number}: {error}")


def parse_object(line: str) -> dict[str, Any]:
    """A line of JSONL that must be an object.

    Raises:
      RequestError: it is not.
    """
    try:
        line.encode()
        row = json.loads(line)
    except UnicodeEncodeError:
        raise RequestError("not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise RequestError(f"expected a JSON object, found {type(row).__name__}")
    return row


def _request(row: dict[str, Any], row_id: str, llm: LLM, defaults: SamplingParams) -> Request:
    given = [p for p in _PROMPTS if p in row]
    if len(given) != 1:
        raise RequestError(f"expected exactly one of {', '.join(_PROMPTS)}, found {', '.join(given) or 'none'}")
    unknown = sorted(set(row) - {"id", "custom_id", *_PROMPTS, *_PARAMS})
    if unknown:
        raise RequestError(f"unknown key {', '.join(unknown)}; expected id, {', '.join((*_PROMPTS, *_PARAMS))}")
    params = replace(defaults, **{k: row[k] for k in _PARAMS if k in row})
    prompt = row[given[0]]
    if given[0] == "prompt":
        if not isinstance(prompt, str):
            raise RequestError(f"prompt: expected a string, found {type(prompt).__name__}")
        return llm.request(prompt, params, request_id=row_id)
    if given[0] == "messages":
        return llm.chat_request(prompt, params, request_id=row_id)
    if not isinstance(prompt, list):
        raise RequestError(f"prompt_token_ids: expected a list, found {type(prompt).__name__}")
    return llm.request(prompt, params, request_id=row_id)


def output_row(output: RequestOutput) -> dict[str, Any]:
    """A finished row as written: one JSON object."""
    (completion,) = output.outputs
    row: dict[str, Any] = {
        "id": output.request_id,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(completion.token_ids),
        },
        "seed": output.seed,
        "params": output.params.to_dict(),
        "numerics": output.numerics,
    }
    if completion.logprobs is not None:
        row["token_logprobs"] = completion.token_logprobs
        row["logprobs"] = [{str(k): v for k, v in step.items()} for step in completion.logprobs]
    return row


def error_row(row: InputRow) -> dict[str, Any]:
    """A row that could not run, as written."""
    return {"id": row.row_id, "line": row.line, "error": row.error}
