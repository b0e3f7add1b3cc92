"""llmjax's own rows.

In: ``id`` (or ``custom_id``; the line's number where there is none), one of ``prompt``, ``messages``,
``prompt_token_ids``, ``lora`` (the name of a resident adapter), sampling parameters by the names of ``SamplingParams``,
for messages ``chat_template``, ``chat_template_kwargs`` and ``fold_system`` (``ChatOptions``), and ``metadata``:
whatever is to be in the answer as well.  What is null, but for the id, is as if it were not there.

Out: ``id``, as it came; ``model``, its name; ``text``, ``token_ids``, ``finish_reason``, ``stop_reason``, ``usage``,
``seed``, ``seed_text``, ``params``, ``numerics``, ``hash``, ``metadata`` where it was given, and where they are asked
for ``token_logprobs``, ``logprobs``, ``prompt_logprobs`` and ``token_texts``: the text of every token named in those,
by its id; of a text in which the model thinks first, ``reasoning`` and ``answer`` (``llmjax.text.thinking``); of a
prompt that was cut short, ``truncated_prompt_tokens``: how many of its first tokens were dropped.  With n above 1,
``outputs`` is a list of what belongs to each sample, ``index``, ``seed`` and ``seed_text`` among it.  A row that could
not run: ``id``, ``line``, ``error``, ``hash``; without ``line`` if it failed when it ran.

``seed_text`` is ``seed`` in digits: pandas, jq and JavaScript round a number of 64 bits, and a rounded seed draws
something else.  As the ``seed`` of a row it draws the same again.
"""

import math
from typing import Any

from llmjax.batch.question import CHAT, ID, PARAMS, Question
from llmjax.errors import RequestError
from llmjax.llm import LLM
from llmjax.outside.values import LIST, STRING, check
from llmjax.runtime.outputs import CompletionOutput, RequestOutput

IDS = ("id", "custom_id")
_PROMPTS = ("prompt", "messages", "prompt_token_ids")
_MORE = ("lora", "metadata")
# What a row may hold.
KEYS = (*IDS, *_PROMPTS, *_MORE, *CHAT, *PARAMS)


def row_id(row: dict[str, Any], line: int) -> str | int:
    """The row's id.

    Raises:
      RequestError: it has two, or one that is none.
    """
    given = [name for name in IDS if name in row]
    if len(given) > 1:
        raise RequestError("expected id or custom_id, found both")
    if not given:
        return str(line)
    check(given[0], row[given[0]], ID)
    return row[given[0]]


def metadata(row: dict[str, Any]) -> Any:
    """What of it goes on to its answer; None for nothing."""
    return row.get("metadata")


def parse(row: dict[str, Any]) -> Question:
    """What the row asks.

    Raises:
      RequestError: no prompt or several, a key that is not known, or a prompt of the wrong type.
    """
    unknown = sorted(set(row) - set(KEYS))
    if unknown:
        raise RequestError(
            f"unknown key {', '.join(unknown)}; expected id, {', '.join((*_PROMPTS, *_MORE, *CHAT, *PARAMS))}"
        )
    row = {name: value for name, value in row.items() if value is not None}
    given = [p for p in _PROMPTS if p in row]
    if len(given) != 1:
        raise RequestError(f"expected exactly one of {', '.join(_PROMPTS)}, found {', '.join(given) or 'none'}")
    kind = given[0]
    prompt = row[kind]
    if kind == "prompt":
        check(kind, prompt, STRING)
    elif kind == "prompt_token_ids":
        check(kind, prompt, LIST)
    lora = row.get("lora")
    if lora is not None:
        check("lora", lora, STRING)
    chat: Any = {name: row[name] for name in CHAT if name in row}
    if chat and kind != "messages":
        raise RequestError(f"{', '.join(chat)}: goes with messages, found {kind}")
    return Question(kind, prompt, {name: row[name] for name in PARAMS if name in row}, lora=lora, chat=chat)


def answer(question: Question, output: RequestOutput, llm: LLM, row_id: str | int, content: str) -> dict[str, Any]:
    """The output row of a finished request."""
    several = [_completion(c) for c in output.outputs]
    if len(several) > 1:
        several = [
            {"index": c.index, **fields, **seed_fields(c.seed)}
            for c, fields in zip(output.outputs, several, strict=True)
        ]
    completion_tokens = sum(len(c.token_ids) for c in output.outputs)
    prompt = {} if output.prompt_logprobs is None else {"prompt_logprobs": prompt_logprobs(output)}
    return {
        "id": row_id,
        "model": output.model,
        **(several[0] if len(several) == 1 else {"outputs": several}),
        **prompt,
        **token_texts(output),
        "usage": {"prompt_tokens": len(output.prompt_token_ids), "completion_tokens": completion_tokens},
        **seed_fields(output.seed),
        "params": output.params.to_dict(),
        "numerics": output.numerics,
        **truncated(output),
        **({} if question.lora is None else {"lora": question.lora}),
        "hash": content,
    }


def seed_fields(seed: int) -> dict[str, Any]:
    """A seed as a number, and as text for those who round numbers."""
    return {"seed": seed, "seed_text": str(seed)}


def token_texts(output: RequestOutput) -> dict[str, Any]:
    """The texts of the tokens that have log-probabilities."""
    return {} if output.token_texts is None else {"token_texts": {str(i): t for i, t in output.token_texts.items()}}


def truncated(output: RequestOutput) -> dict[str, int]:
    """What there is to say where the prompt was cut short."""
    dropped = output.truncated_prompt_tokens
    return {"truncated_prompt_tokens": dropped} if dropped else {}


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.reasoning is not None:
        fields |= {"reasoning": completion.reasoning, "answer": completion.answer}
    if completion.logprobs is not None:
        fields["token_logprobs"] = [finite(p) for p in completion.token_logprobs]
        fields["logprobs"] = [_step(step) for step in completion.logprobs]
    return fields


def prompt_logprobs(output: RequestOutput) -> list[dict[str, float | None] | None]:
    """The prompt's log-probabilities as JSON has them; None for the first token, which nothing precedes."""
    return [None if step is None else _step(step) for step in output.prompt_logprobs or ()]


def _step(step: dict[int, float]) -> dict[str, float | None]:
    return {str(token): finite(logprob) for token, logprob in step.items()}


def finite(value: float) -> float | None:
    """JSON has no minus infinity, the log-probability of the impossible."""
    return value if math.isfinite(value) else None


def with_metadata(answer: dict[str, Any], metadata: Any) -> dict[str, Any]:
    """An output row with what its row brought."""
    return {**answer, "metadata": metadata}


def failure(row_id: str | int | None, line: int | None, message: str, content: str) -> dict[str, Any]:
    """The output row of a row that could not run (``line`` is then its place), or failed when it ran."""
    if line is None:
        return {"id": row_id, "error": message, "hash": content}
    return {"id": row_id, "line": line, "error": f"line {line}: {message}", "hash": content}


def describe(row: dict[str, Any]) -> tuple[str | int, str, bool, int, int]:
    """Of an output row: id as text, or line where it could not run; hash; whether it failed; prompt and completion
    tokens.

    Raises:
      KeyError, TypeError: it is none.
    """
    if "error" in row:
        return row["line"] if "line" in row else str(row["id"]), row["hash"], True, 0, 0
    return str(row["id"]), row["hash"], False, row["usage"]["prompt_tokens"], row["usage"]["completion_tokens"]
