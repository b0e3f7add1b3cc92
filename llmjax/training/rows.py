"""Rows of training data: texts, conversations or ids become examples; what cannot is counted and named.

A row has one of these forms; the first whose fields it has is taken, and fields that no form uses are told once:

``ids``, ``loss_mask``            token ids, and 1 for those that are learned (without a mask all but the first)
``prompt_ids``, ``completion_ids``  the like; the completion is learned as it is
``messages``                      a conversation in the checkpoint's template; the assistant's turns are learned, to
                                  the token that ends each
``prompt``, ``completion``        the completion is learned, and the end token behind it
``text``                          all of it is learned, and the end token behind it
"""

import dataclasses
import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.readers.jsonfile import parse_json
from llmjax.errors import LlmjaxError, RequestError, amount, lfs_pointer, named, shown
from llmjax.model import Model, check_ids
from llmjax.outside.paths import checked_path
from llmjax.outside.values import plain
from llmjax.text.dates import Date, settled
from llmjax.text.tokenizer import Tokenizer
from llmjax.training.batches import Example

_FORMS: tuple[tuple[str, ...], ...] = (
    ("ids",),
    ("prompt_ids", "completion_ids"),
    ("messages",),
    ("prompt", "completion"),
    ("text",),
)
_OPTIONAL = {"ids": ("loss_mask",), "messages": ("tools",)}
_ALWAYS = ("id",)
_MOST = 10

BLANK = object()  # a line without a row: rows are known by the numbers of their lines

Segments = list[tuple[list[int], bool]]  # token ids, and whether they are learned


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that is left out.

    Attributes:
      row: its number, from 0.
      why: what is wrong with it.
    """

    row: int
    why: str

    def __str__(self) -> str:
        return f"row {self.row + 1}: {self.why}"


@dataclasses.dataclass(frozen=True)
class Data:
    """What rows became.

    Attributes:
      where: the file, for messages.
      examples: to learn from.
      bad: rows that are left out.
      unused: fields no form uses, and in how many rows they were.
    """

    where: str
    examples: list[Example]
    bad: list[BadRow]
    unused: Mapping[str, int]

    def notes(self) -> list[str]:
        """What a person should know."""
        found = []
        if self.bad:
            all_rows = amount(len(self.bad) + len(self.examples), "row")
            are = "is" if len(self.bad) == 1 else "are"
            found.append(f"{self.where}: {len(self.bad):,} of {all_rows} {are} left out")
            found += [f"  {bad}" for bad in self.bad[:_MOST]]
            found += [f"  and {len(self.bad) - _MOST} more"] if len(self.bad) > _MOST else []
        if self.unused:
            fields = ", ".join(
                f"{named(str(name))} ({amount(count, 'row')})" for name, count in sorted(self.unused.items(), key=str)
            )
            found.append(f"{self.where}: fields that are not used: {fields}")
        return found


def read_rows(path: str | Path) -> list[Any]:
    """The lines of a JSONL file, packed by gzip or not; one that is no JSON becomes the error that says so.

    Raises:
      RequestError: the file cannot be read.
    """
    path = checked_path("rows", path, RequestError)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path}: cannot read the file: {getattr(error, 'strerror', None) or error}") from None
    if pointer := lfs_pointer(data):
        raise RequestError(f"{path}: {pointer}")
    return [_parsed(line) if line.strip() else BLANK for line in text.split("\n")]


def _parsed(line: str) -> Any:
    try:
        return parse_json(line)
    except (ValueError, RecursionError) as error:
        return RequestError(f"not valid JSON: {error}")


def make_examples(
    rows: Iterable[Any], model: Model, *, max_length: int | None = None, where: str = "rows", date: Date | None = None
) -> Data:
    """Examples of a model from rows.

    Args:
      rows: objects of the forms above.
      model: whose tokenizer and template are used.
      max_length: rows of more tokens are left out; None for the model's context.
      where: what to call the data in messages.
      date: what chat templates take for the present.

    Raises:
      RequestError: no row is any good.
    """
    if not isinstance(rows, Iterable) or isinstance(rows, bytes | Mapping):
        raise RequestError(f"{where}: expected a JSONL file's path or objects, found {shown(rows)}")
    longest = min(max_length or model.context_length, model.context_length)
    date = settled(date)
    examples, bad = [], []
    unused: Counter[str] = Counter()
    for number, row in enumerate(rows):
        if row is BLANK:
            continue
        try:
            form = _form(row)
            used = (*form, *_OPTIONAL.get(form[0], ()), *_ALWAYS)
            unused.update(name for name in row if name not in used)
            examples.append(_example(number, _segments(row, form, model, date), model, longest))
        except LlmjaxError as error:
            bad.append(BadRow(number, str(error)))
    data = Data(where, examples, bad, unused)
    if not examples:
        raise RequestError("\n".join([f"{where}: no row to learn from", *data.notes()]))
    return data


def _form(row: Any) -> tuple[str, ...]:
    if isinstance(row, LlmjaxError):
        raise row
    if not isinstance(row, Mapping):
        raise RequestError(f"expected an object, found {shown(row)}")
    for form in _FORMS:
        if all(name in row for name in form):
            return form
    expected = "; ".join(" and ".join(form) for form in _FORMS)
    raise RequestError(f"fields {named(', '.join(map(str, row))) or 'none'}; expected one of: {expected}")


def _segments(row: Mapping[str, Any], form: tuple[str, ...], model: Model, date: Any) -> Segments:
    if form == ("ids",):
        ids = _list(row, "ids")
        mask = [1] * len(ids) if row.get("loss_mask") is None else _list(row, "loss_mask")
        if len(mask) != len(ids) or any(m not in (0, 1) for m in mask):
            raise RequestError(f"loss_mask: expected {len(ids)} zeros and ones, one for each id")
        return [([token], bool(m)) for token, m in zip(ids, mask, strict=True)]
    if form == ("prompt_ids", "completion_ids"):
        prompt, completion = _list(row, "prompt_ids"), _list(row, "completion_ids")
        if not completion:
            raise RequestError("completion_ids: empty")
        return [(prompt, False), (completion, True)]
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise RequestError(f"{form[0]}: the model has no tokenizer; give ids")
    if form == ("messages",):
        return _turns(row, tokenizer, date)
    if form == ("text",):
        if not (text := _text(row, "text")).strip():
            raise RequestError("text: empty")
        return [(tokenizer.encode(text), True), (_end(tokenizer, model), True)]
    prompt_text, completion_text = _text(row, "prompt"), _text(row, "completion")
    if not completion_text:
        raise RequestError("completion: empty")
    prompt = tokenizer.encode(prompt_text, add_bos=None)
    prompt = prompt[: len(prompt) - len(tokenizer.suffix_ids)] if tokenizer.suffix_ids else prompt
    learned = continuation(tokenizer, prompt_text, completion_text)
    return [(prompt, False), (learned, True), (_end(tokenizer, model), True)]


def _turns(row: Mapping[str, Any], tokenizer: Tokenizer, date: Any) -> Segments:
    """The rendered conversation, cut where the assistant's turns begin and end."""
    messages = row["messages"]
    options = {"date": date} | ({"tools": row["tools"]} if row.get("tools") is not None else {})
    text = tokenizer.render_chat(messages, add_generation_prompt=False, **options)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise RequestError("messages: no turn of the assistant to learn from")
    segments: Segments = []
    done = ""
    for i in turns:
        opened = tokenizer.render_chat(messages[:i], **options) if i else ""
        closed = tokenizer.render_chat(messages[: i + 1], add_generation_prompt=False, **options)
        for part in (opened, closed):
            if not (text.startswith(part) and len(part) >= len(done)):
                raise RequestError(
                    f"messages[{i}]: the chat template writes this turn otherwise when others follow, so where it "
                    "begins and ends in the whole is not known; end the conversation with it"
                )
        segments.append((continuation(tokenizer, done, opened[len(done) :]), False))
        said = closed[len(opened) :]
        spoken = said.rstrip() if _ends(tokenizer, said.rstrip()) else said
        if not said.strip():
            raise RequestError(f"messages[{i}]: the chat template writes nothing for it")
        segments.append((continuation(tokenizer, opened, spoken), True))
        segments.append((continuation(tokenizer, opened + spoken, said[len(spoken) :]), False))
        done = closed
    return segments


def _ends(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text ends with an end token."""
    return any(piece and text.endswith(piece) for piece in map(tokenizer.piece, tokenizer.eos_ids))


def continuation(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """The ids of a text that follows another: what a model says behind ``before``, whose own ids stay what they are
    alone.

    Most tokenizers write the two together as they write them apart.  Where one does not, because a word goes over the
    cut, the text's own ids are taken; where it puts a space before every text, that is not in the middle of one.
    """
    if not text:
        return []
    head = tokenizer.encode(before, add_bos=False) if before else []
    whole = tokenizer.encode(before + text, add_bos=False)
    return whole[len(head) :] if whole[: len(head)] == head else tokenizer.encode(text, add_bos=False)


def _end(tokenizer: Tokenizer, model: Model) -> list[int]:
    """The token that ends a text: the tokenizer's own, else the first that the checkpoint names."""
    own = tokenizer.special_tokens.get(tokenizer.special.get("eos_token", ""))
    if own is not None:
        return [own]
    if not model.eos_ids:
        raise RequestError("the checkpoint names no end token; give ids")
    return [model.eos_ids[0]]


def _example(number: int, segments: Segments, model: Model, longest: int) -> Example:
    ids = [token for part, _ in segments for token in part]
    learned = [flag for part, flag in segments for _ in part]
    if len(ids) > longest:
        raise RequestError(f"{len(ids)} tokens, longer than {longest}")
    found = Example(number, check_ids(ids, model, "ids"), np.array(learned, bool) & (np.arange(len(ids)) > 0))
    if not found.tokens:
        raise RequestError("no token to learn: nothing comes before the first, and the others are not marked")
    return found


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    found = plain(row[name])
    if not isinstance(found, Sequence) or isinstance(found, str | bytes):
        raise RequestError(f"{name}: expected a list, found {shown(row[name])}")
    return list(found)


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise RequestError(f"{name}: expected a string, found {shown(row[name])}")
    return row[name]
