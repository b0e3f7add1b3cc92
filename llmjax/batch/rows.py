"""The rows of a batch's input, whichever form they have, checked and ready to run."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

from llmjax.batch import native, openai
from llmjax.batch.files import Lines
from llmjax.batch.index import Index, Written, digest
from llmjax.batch.question import Question, check_text_id
from llmjax.errors import LlmjaxError, RequestError, ResumeError
from llmjax.llm import LLM
from llmjax.runtime.outputs import RequestOutput
from llmjax.runtime.params import SamplingParams
from llmjax.runtime.row import Request
from llmjax.text.dates import Date


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part ``part`` (from 1) of ``parts``: the rows whose id's hash falls there, so that equal ids meet."""

    part: int
    parts: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From ``i/n``.

        Raises:
          RequestError: it is no such thing.
        """
        part, slash, parts = text.partition("/")
        if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
            raise RequestError(f"shard: expected i/n with i from 1 to n, such as 1/4, found {text!r}")
        return cls(int(part), int(parts))

    def has(self, row_id: str) -> bool:
        """Whether a row is in it."""
        return int.from_bytes(digest(row_id)[-8:], "big") % self.parts == self.part - 1

    def __str__(self) -> str:
        return f"{self.part}/{self.parts}"


WHOLE = Shard(1, 1)


class InputRow(NamedTuple):
    """A line of the input.

    Attributes:
      line: its number, from 1.
      row_id: its id, or the line's number; None where the line is no JSON.
      form: the module that reads and writes rows of its kind.
      question: what it asks, None where it cannot be told.
      request: that, ready to run; None where it cannot.
      error: why not, or why it failed when it ran.
      key: which row it is.
      content: digest of everything its answer depends on but the model.
    """

    line: int
    row_id: str | None
    form: ModuleType
    question: Question | None
    request: Request | None
    error: LlmjaxError | None
    key: bytes
    content: bytes

    def answer(self, output: RequestOutput, llm: LLM) -> tuple[Written, bytes]:
        """The output row of what became of it."""
        assert self.question is not None
        row = self.form.answer(self.question, output, llm, self.content.hex())
        used = len(output.prompt_token_ids), sum(len(c.token_ids) for c in output.outputs)
        return Written(self.key, self.content, False, *used), _line(row)

    def failure(self) -> tuple[Written, bytes]:
        """The output row that says why there is no answer."""
        line = self.line if self.request is None else None
        row = self.form.failure(self.row_id, line, str(self.error), self.content.hex())
        return Written(self.key, self.content, True, 0, 0), _line(row)


def read_rows(
    lines: Iterable[str],
    llm: LLM,
    defaults: SamplingParams,
    index: Index,
    shard: Shard = WHOLE,
    date: Date | None = None,
) -> Iterator[InputRow]:
    """Parses lines one by one; blank ones are skipped, bad ones become rows with an error.

    Args:
      lines: JSON objects in the form of ``llmjax.batch.native`` or ``llmjax.batch.openai``.
      llm: tokenises and checks.
      defaults: parameters a row does not set.
      index: remembers the ids.
      shard: which rows to yield.
      date: what chat templates take for the present.

    Raises:
      RequestError: the lines cannot be read on.
      ResumeError: the index cannot be written.
    """

    def request(question: Question, row_id: str) -> Request:
        params = dataclasses.replace(defaults, **question.params)
        if question.is_chat:
            return llm.chat_request(question.prompt, params, request_id=row_id, lora=question.lora, date=date)
        return llm.request(question.prompt, params, request_id=row_id, lora=question.lora)

    for number, line in enumerate(lines, 1):
        if line.strip():
            row = _read(number, line, request, index, shard)
            if row is not None:
                yield row


def count_rows(lines: Lines, shard: Shard = WHOLE) -> int | None:
    """Rows of an input; None for a pipe, which can be read but once."""
    if not lines.repeatable:
        return None
    filled = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    return sum(1 for number, line in filled if shard == WHOLE or shard.has(_shard_id(number, line)))


def _shard_id(number: int, line: str) -> str:
    try:
        row = parse_object(line)
        return (openai if openai.is_form(row) else native).row_id(row, number)
    except BaseException as error:
        row_error(error)
        return str(number)


def row_error(error: BaseException) -> LlmjaxError:
    """What went wrong with a row, as it says it: whatever that is must not end a job.

    Raises:
      BaseException: ``error`` itself, which is no row's: an interrupt, an index that cannot be written.
    """
    # Where its Rust code panics, the tokenizers library raises a BaseException of its own.
    own = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    if isinstance(error, ResumeError) or not own:
        raise error
    return error if isinstance(error, LlmjaxError) else RequestError(f"{type(error).__name__}: {error}")


def _read(
    number: int, line: str, make: Callable[[Question, str], Request], index: Index, shard: Shard
) -> InputRow | None:
    row_id: str | None = None
    form: ModuleType = native
    question: Question | None = None
    try:
        row = parse_object(line)
        form = openai if openai.is_form(row) else native
        row_id = form.row_id(row, number)
        if not shard.has(row_id):
            return None
        check_text_id(row_id)
        if not index.is_new(row_id):
            raise RequestError(f"id {row_id!r} was used by an earlier row; ids name rows and seed their draws")
        question = form.parse(row)
        request = make(question, row_id)
        return InputRow(number, row_id, form, question, request, None, _key(row_id), _content(question, request))
    except BaseException as raised:
        error = row_error(raised)
        if row_id is None and not shard.has(str(number)):
            return None
        content = digest(f"{line.strip()}\n{error}")
        return InputRow(number, row_id, form, question, None, error, _key(number), content)


def _key(name: str | int) -> bytes:
    """A row that can run is known by its id; one that cannot, perhaps for want of an id, by its line."""
    return digest(f"id {name}" if isinstance(name, str) else f"line {name}")


def _content(question: Question, request: Request) -> bytes:
    values = vars(request) | {"params": request.params.to_dict(), "prompt": question.kind, "model": question.model}
    return digest(json.dumps(values, sort_keys=True))


def _line(row: dict[str, Any]) -> bytes:
    # Lone surrogates in an id are written as the escapes JSON has for them.
    return f"{json.dumps(row, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace")


def describe(row: Any) -> Written | None:
    """What an output row stands for; None for JSON that is no row of a job."""
    if not isinstance(row, dict):
        return None
    form = openai if "custom_id" in row else native
    try:
        name, content, failed, prompt_tokens, completion_tokens = form.describe(row)
        used = int(prompt_tokens), int(completion_tokens)
        return Written(_key(name), bytes.fromhex(content), failed, *used) if max(map(abs, used)) < 2**63 else None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


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
