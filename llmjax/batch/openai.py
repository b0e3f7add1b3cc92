"""Rows in the form of OpenAI's batch files, for /v1/chat/completions and /v1/completions.

In: ``custom_id``, ``method``, ``url``, ``body``.  A body may also hold any field of ``SamplingParams`` (``top_k``,
``min_p``, ...), as vLLM's may, and for chats ``chat_template``, ``chat_template_kwargs`` and ``fold_system``
(``ChatOptions``).  ``model`` is repeated in the answer; the model is the job's.  ``metadata`` is in the answer, too.

Out: ``id``, ``custom_id``, ``response`` (``status_code``, ``request_id``, ``body``), ``error``, and under ``llmjax``
what OpenAI's form has no place for.  What a model thought before it answered in a chat is ``reasoning_content`` beside
``content``, as vLLM has it.  ``created`` is 0 and ids follow from the row's content: the same job gives the same bytes.
"""

import itertools
from typing import Any

from llmjax.batch.native import finite, prompt_logprobs, seed_fields, token_texts, truncated
from llmjax.batch.question import CHAT as CHAT_OPTIONS
from llmjax.batch.question import ID, PARAMS, Question
from llmjax.errors import RequestError
from llmjax.llm import LLM
from llmjax.outside.values import LIST, STRING, check
from llmjax.runtime.outputs import CompletionOutput, RequestOutput
from llmjax.text.tokenizer import Tokenizer, token_text

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_KEYS = ("custom_id", "method", "url", "body")
# What a body may say without any effect here, or only in the way that is the default.
_NO_EFFECT = ("metadata", "service_tier", "store", "user")
_FIXED: dict[str, Any] = {"stream": False, "echo": False, "best_of": 1, "response_format": {"type": "text"}}
# OpenAI's chat gives the probability of what cannot be as this.
_IMPOSSIBLE = -9999.0


def is_form(row: dict[str, Any]) -> bool:
    """Whether a row of the input means to be in this form."""
    return any(name in row for name in ("method", "url", "body"))


def row_id(row: dict[str, Any], line: int) -> str | int:
    """The row's id.

    Raises:
      RequestError: there is none.
    """
    if "custom_id" not in row:
        raise RequestError("custom_id: expected a string, found none")
    check("custom_id", row["custom_id"], ID)
    return row["custom_id"]


def metadata(row: dict[str, Any]) -> Any:
    """As ``native.metadata``."""
    body = row.get("body")
    return body.get("metadata") if isinstance(body, dict) else None


def with_metadata(answer: dict[str, Any], metadata: Any) -> dict[str, Any]:
    """As ``native.with_metadata``."""
    return {**answer, "llmjax": {**answer.get("llmjax", {}), "metadata": metadata}}


def parse(row: dict[str, Any]) -> Question:
    """What the row asks.

    Raises:
      RequestError: a key or a value that is not of this form, or asks for something llmjax does not do.
    """
    unknown = sorted(set(row) - set(_KEYS))
    if unknown:
        raise RequestError(f"unknown key {', '.join(unknown)}; expected {', '.join(_KEYS)}")
    url, body = row.get("url"), row.get("body")
    if url not in (CHAT, COMPLETIONS):
        raise RequestError(f"url: expected {CHAT} or {COMPLETIONS}, found {url!r:.80}")
    if row.get("method", "POST") != "POST":
        raise RequestError(f"method: expected POST, found {row['method']!r:.80}")
    if not isinstance(body, dict):
        raise RequestError(f"body: expected an object, found {type(body).__name__}")
    body = {name: value for name, value in body.items() if value is not None and name not in _NO_EFFECT}
    model = body.pop("model", None)
    if model is not None:
        check("body.model", model, STRING)
    name = "messages" if url == CHAT else "prompt"
    if name not in body:
        raise RequestError(f"body: expected {name}, found {', '.join(body) or 'nothing'}")
    prompt = body.pop(name)
    if url == COMPLETIONS and not isinstance(prompt, str):
        check("body.prompt", prompt, LIST)
        if any(isinstance(part, str | list) for part in prompt):
            raise RequestError("body.prompt: expected one prompt, a string or token ids, found a list of them")
    chat: Any = {name: body.pop(name) for name in CHAT_OPTIONS if name in body and url == CHAT}
    return Question(url, prompt, _params(body, chat=url == CHAT), model, chat=chat)


def _params(body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    params = {}
    for name, value in body.items():
        if name in _FIXED:
            if value != _FIXED[name]:
                raise RequestError(f"body.{name}: only {_FIXED[name]!r} is supported, found {value!r:.80}")
        elif name == "max_completion_tokens" and chat:
            if body.get("max_tokens", value) != value:
                raise RequestError("body: max_tokens and max_completion_tokens differ; give one of them")
            params["max_tokens"] = value
        elif name == "top_logprobs" and chat:
            if body.get("logprobs") is not True:
                raise RequestError("body.top_logprobs: expected logprobs true beside it")
            params["logprobs"] = value
        elif name == "logprobs" and chat:
            if not isinstance(value, bool):
                raise RequestError(f"body.logprobs: expected true or false, found {value!r:.80}")
            if value:
                params.setdefault("logprobs", body.get("top_logprobs", 0))
        elif name in PARAMS:
            params[name] = value
        else:
            tools = ", or give it to the template (chat_template_kwargs), and calls come back as text"
            raise RequestError(f"body.{name}: not supported; leave it out{tools if name == 'tools' and chat else ''}")
    return params


def answer(question: Question, output: RequestOutput, llm: LLM, row_id: str | int, content: str) -> dict[str, Any]:
    """The output row of a finished request."""
    chat = question.is_chat
    prompt_tokens = len(output.prompt_token_ids)
    completion_tokens = sum(len(c.token_ids) for c in output.outputs)
    choices = [(_chat_choice if chat else _choice)(c, output, llm.model.tokenizer) for c in output.outputs]
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{content}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": question.model or output.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    prompt = {} if output.prompt_logprobs is None else {"prompt_logprobs": prompt_logprobs(output)}
    return {
        "id": f"batch_req_{content}",
        "custom_id": row_id,
        "response": {"status_code": 200, "request_id": f"req_{content}", "body": body},
        "error": None,
        "llmjax": {
            "token_ids": [c.token_ids for c in output.outputs],
            **seed_fields(output.seed),
            "params": output.params.to_dict(),
            "numerics": output.numerics,
            **truncated(output),
            **prompt,
            **(token_texts(output) if prompt else {}),
        },
    }


def _chat_choice(completion: CompletionOutput, output: RequestOutput, tokenizer: Tokenizer | None) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        steps = []
        for token, logprob, step in zip(
            completion.token_ids, completion.token_logprobs, completion.logprobs, strict=True
        ):
            best = list(step.items())[: output.params.logprobs or 0]
            steps.append(
                {**_token(token, logprob, tokenizer), "top_logprobs": [_token(t, p, tokenizer) for t, p in best]}
            )
        logprobs = {"content": steps, "refusal": None}
    thought = {} if completion.reasoning is None else {"reasoning_content": completion.reasoning}
    return {
        "index": completion.index,
        "message": {"role": "assistant", "content": completion.answer, **thought, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }


def _choice(completion: CompletionOutput, output: RequestOutput, tokenizer: Tokenizer | None) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        tokens = [token_text(t, tokenizer) for t in completion.token_ids]
        logprobs = {
            "tokens": tokens,
            "token_logprobs": [finite(p) for p in completion.token_logprobs],
            "top_logprobs": [
                {token_text(t, tokenizer): finite(p) for t, p in list(step.items())[: output.params.logprobs or 0]}
                for step in completion.logprobs
            ],
            "text_offset": list(itertools.accumulate(map(len, tokens[:-1]), initial=0)),
        }
    return {
        "index": completion.index,
        "text": completion.text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }


def _token(token: int, logprob: float, tokenizer: Tokenizer | None) -> dict[str, Any]:
    data = tokenizer.token_bytes(token) if tokenizer else None
    value = finite(logprob)
    return {
        "token": token_text(token, tokenizer),
        "logprob": _IMPOSSIBLE if value is None else value,
        "bytes": None if data is None else list(data),
    }


def failure(row_id: str | int | None, line: int | None, message: str, content: str) -> dict[str, Any]:
    """As ``native.failure``."""
    error: dict[str, Any] = {"code": "failed", "message": message}
    if line is not None:
        error = {"code": "invalid_request", "message": f"line {line}: {message}", "line": line}
    return {
        "id": f"batch_req_{content}",
        "custom_id": row_id,
        "response": None,
        "error": error,
    }


def describe(row: dict[str, Any]) -> tuple[str | int, str, bool, int, int]:
    """As ``native.describe``."""
    content = row["id"].removeprefix("batch_req_")
    if row["error"] is not None:
        return row["error"].get("line", str(row["custom_id"])), content, True, 0, 0
    usage = row["response"]["body"]["usage"]
    return str(row["custom_id"]), content, False, usage["prompt_tokens"], usage["completion_tokens"]
