"""The rows of a batch's input, whichever form they have, checked and ready to run."""

import collections
import dataclasses
import json
from collections.abc import Generator, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from llmjax.batch import native, openai
from llmjax.batch.identity import identity
from llmjax.batch.index import Written, digest
from llmjax.batch.question import Question, check_text_id, checked_json
from llmjax.batch.reading import AnyLines
from llmjax.errors import LlmjaxError, OutputError, RequestError
from llmjax.llm import LLM
from llmjax.runtime.asking import ChatOptions, Params
from llmjax.runtime.outputs import RequestOutput
from llmjax.runtime.row import Request, Requests
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
        numbers = len(text) < 40 and slash and part.isdecimal() and parts.isdecimal()
        if not (numbers and 1 <= int(part) <= int(parts)):
            raise RequestError(f"shard: expected i/n with i from 1 to n, such as 1/4, found {text!r}")
        return cls(int(part), int(parts))

    def has(self, row_id: str) -> bool:
        """Whether a row is in it."""
        return int.from_bytes(digest(row_id)[-8:], "big") % self.parts == self.part - 1

    def __str__(self) -> str:
        return f"{self.part}/{self.parts}"


WHOLE = Shard(1, 1)
# Tokens of each row that a job begins with memory for; it grows where rows are longer.
RESERVE = 512


class InputRow(NamedTuple):
    """A line of the input.

    Attributes:
      line: its number, from 1.
      text: it as it stands there.
      row_id: its id as it stands there, or the line's number; None where the line is no JSON.
      form: the module that reads and writes rows of its kind.
      metadata: what its answer is to repeat; None for nothing.
      question: what it asks, None where it cannot be told.
      request: that, ready to run; None where it cannot.
      error: why not, or why it failed when it ran.
      key: which row it is.
      content: digest of everything its answer depends on but the model.
    """

    line: int
    text: str
    row_id: str | int | None
    form: ModuleType
    metadata: Any
    question: Question | None
    request: Request | None
    error: LlmjaxError | None
    key: bytes
    content: bytes

    def answer(self, output: RequestOutput, llm: LLM) -> tuple[Written, bytes]:
        """The output row of what became of it."""
        assert self.question is not None
        row = self.form.answer(self.question, output, llm, self.row_id, self.content.hex())
        used = len(output.prompt_token_ids), sum(len(c.token_ids) for c in output.outputs)
        return Written(self.key, self.content, False, *used), self._line(row)

    def failure(self) -> tuple[Written, bytes]:
        """The output row that says why there is no answer."""
        line = self.line if self.request is None else None
        row = self.form.failure(self.row_id, line, str(self.error), self.content.hex())
        return Written(self.key, self.content, True, 0, 0), self._line(row)

    def _line(self, row: dict[str, Any]) -> bytes:
        if self.metadata is not None:
            row = self.form.with_metadata(row, self.metadata)
        # Lone surrogates in an id are written as the escapes JSON has for them.
        return f"{json.dumps(row, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace")


class Work(Protocol):
    """What a job does with its rows.

    Attributes:
      llm: which it does it with.
      in_order: answers come in the order of the rows.
      keys: what a row may hold.

    Args:
      llm: which it does it with.
      params: what rows do not set.
    """

    llm: LLM
    in_order: bool
    keys: tuple[str, ...]

    def __init__(self, llm: LLM, params: Params): ...

    def identity(self, shard: Shard, date: str) -> dict[str, Any]:
        """Everything that fixes the answers, by name, as JSON would hold it."""

    @staticmethod
    def form(row: dict[str, Any]) -> ModuleType:
        """The module that reads and writes rows of this kind (``native`` shows what is in one)."""

    def request(self, question: Any, row_id: str, date: Date | None) -> Request:
        """What a row asks, checked and settled."""

    def outputs(self, requests: Requests) -> Generator[Any, None, None]:
        """What becomes of each request, in any order, with its ``request_id`` and the ``error`` if it failed."""

    @staticmethod
    def summary(rows: Iterator[bytes]) -> dict[str, Any]:
        """Of all rows of a finished output, for the manifest; empty for none."""


# For what hangs on no model: the forms of rows.
AnyWork = Work | type[Work]


class Generating:
    """Prompts are continued.

    Args:
      llm: the model.
      params: what rows do not set.
    """

    in_order = False
    keys: tuple[str, ...] = native.KEYS

    def __init__(self, llm: LLM, params: Params):
        self.llm, self.params = llm, llm.sampling_params(params)

    def identity(self, shard: Shard, date: str) -> dict[str, Any]:
        """See ``Work``."""
        return identity(self.llm, self.params, str(shard), date)

    @staticmethod
    def form(row: dict[str, Any]) -> ModuleType:
        """See ``Work``."""
        return openai if openai.is_form(row) else native

    def request(self, question: Question, row_id: str, date: Date | None) -> Request:
        """See ``Work``."""
        params = dataclasses.replace(self.params, **question.params)
        if question.is_chat:
            chat: ChatOptions = {**question.chat, "date": date}
            return self.llm.chat_request(question.prompt, params, request_id=row_id, lora=question.lora, **chat)
        return self.llm.request(question.prompt, params, request_id=row_id, lora=question.lora)

    def outputs(self, requests: Requests) -> Generator[RequestOutput, None, None]:
        """See ``Work``."""
        return self.llm.outputs(requests, reserve=[RESERVE] * self.llm.engine.slots)

    @staticmethod
    def summary(rows: Iterator[bytes]) -> dict[str, Any]:
        """See ``Work``."""
        return {}


class Ids(Protocol):
    """Ids that earlier rows had."""

    def is_new(self, row_id: str) -> bool:
        """Whether none had this one, which is one of them now."""


def read_rows(
    lines: Iterable[str | None], work: Work, index: Ids, shard: Shard = WHOLE, date: Date | None = None
) -> Iterator[InputRow | None]:
    """Parses lines one by one; blank ones are skipped, bad ones become rows with an error.

    Args:
      lines: JSON objects in the form of ``llmjax.batch.native`` or ``llmjax.batch.openai``; None where there is none at
        the moment, which is passed on.
      work: tokenises and checks.
      index: remembers the ids.
      shard: which rows to yield.
      date: what chat templates take for the present.

    Raises:
      RequestError: the lines cannot be read on.
      OutputError: the index cannot be written.
    """
    number = 0
    for line in lines:
        if line is None:
            yield None
            continue
        number += 1
        if line.strip():
            row = read_row(number, line, work, index, shard, date)
            if row is not None:
                yield row


def count_rows(lines: AnyLines, work: AnyWork, shard: Shard = WHOLE) -> int | None:
    """Rows of an input; None for a pipe, which can be read but once."""
    if not lines.repeatable:
        return None
    if shard == WHOLE:
        return lines.count()
    filled = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    return sum(1 for number, line in filled if shard.has(_shard_id(number, line, work)))


def _shard_id(number: int, line: str, work: AnyWork) -> str:
    try:
        row = parse_object(line)
        return str(work.form(row).row_id(row, number))
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
    if isinstance(error, OutputError) or not own:
        raise error
    return error if isinstance(error, LlmjaxError) else RequestError(f"{type(error).__name__}: {error}")


def read_row(
    number: int, line: str, work: Work, index: Ids, shard: Shard = WHOLE, date: Date | None = None
) -> InputRow | None:
    """One line of an input, see ``read_rows``; None where it is not in the shard."""
    row_id: str | int | None = None
    form: ModuleType = work.form({})
    metadata = question = None
    try:
        row = parse_object(line)
        form = work.form(row)
        row_id = form.row_id(row, number)
        name = str(row_id)
        if not shard.has(name):
            return None
        check_text_id(name)
        new = index.is_new(name)  # its id is taken from here on, whatever else is wrong with it
        metadata = checked_json(form.metadata(row), "metadata")
        if not new:
            lines = " (one without an id has its line's number)" if name.isdecimal() else ""
            raise RequestError(f"id {row_id!r} was used by an earlier row{lines}; ids name rows and seed their draws")
        question = form.parse(row)
        request = work.request(question, name, date)
        content = _content(question, request, metadata)
        return InputRow(number, line, row_id, form, metadata, question, request, None, row_key(name), content)
    except BaseException as raised:
        error = row_error(raised)
        if row_id is None and not shard.has(str(number)):
            return None
        content = digest(f"{line.strip()}\n{error}")
        return InputRow(number, line, row_id, form, metadata, question, None, error, row_key(number), content)


def row_key(name: str | int) -> bytes:
    """A row that can run is known by its id; one that cannot, perhaps for want of an id, by its line."""
    return digest(f"id {name}" if isinstance(name, str) else f"line {name}")


def _content(question: Question, request: Request, metadata: Any) -> bytes:
    values = vars(request) | {"params": request.params.to_dict(), "prompt": question.kind, "model": question.model}
    if metadata is not None:
        values["metadata"] = metadata
    return digest(json.dumps(values, sort_keys=True))


def describe(row: Any, work: AnyWork) -> Written | None:
    """What an output row stands for; None for JSON that is no row of such a job."""
    if not isinstance(row, dict):
        return None
    form = openai if "custom_id" in row else work.form({})
    try:
        name, content, failed, prompt_tokens, completion_tokens = form.describe(row)
        used = int(prompt_tokens), int(completion_tokens)
        return Written(row_key(name), bytes.fromhex(content), failed, *used) if max(map(abs, used)) < 2**63 else None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def named(text: bytes) -> str:
    """Of an output row that failed: which it is, and why."""
    row = json.loads(text)
    row_id, error = row.get("custom_id", row.get("id")), row["error"]
    message = error["message"] if isinstance(error, dict) else error
    return message if row_id is None else f"id {row_id!r:.80}: {message}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: of two, a reader of JSON would keep the last and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise RequestError(f"key {twice!r:.80} is there twice")
    return found


def parse_object(line: str) -> dict[str, Any]:
    """A line of JSONL that must be an object.

    Raises:
      RequestError: it is not.
    """
    try:
        line.encode()
        row = json.loads(line, object_pairs_hook=_unique)
    except UnicodeEncodeError:
        raise RequestError("not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise RequestError(f"expected a JSON object, found {type(row).__name__}")
    return row
