"""Rows of training data: texts, conversations or ids become examples; what cannot is counted and named.

A row has one of these forms; the first whose fields it has is taken, and fields that no form uses are told once (a
null, as tables of several kinds of rows have them, is a field that is left out):

``ids``, ``loss_mask``            token ids, and 1 for those that are learned (without a mask all but the first)
``prompt_ids``, ``completion_ids``  the like; the completion is learned as it is
``messages``                      a conversation in the checkpoint's template; the assistant's turns are learned, to
                                  the token that ends each
``prompt``, ``completion``        the completion is learned, and the end token behind it
``text``                          all of it is learned, and the end token behind it

Rows of preferences, for ``dpo``, have two completions of one prompt, which are tokenized, and end, as the above:

``prompt_ids``, ``chosen_ids``, ``rejected_ids``  token ids
``prompt``, ``chosen``, ``rejected``  texts, or the messages of one conversation: those before, and what is said then
``chosen``, ``rejected``              whole conversations, or whole texts; what they begin with in common is the prompt
                                      (the user's last message in it may stand as a text in ``prompt``, too)
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llmjax.errors import LlmjaxError, RequestError, amount, named, shown
from llmjax.model import Model, check_ids
from llmjax.outside.values import plain
from llmjax.text.dates import Date, settled
from llmjax.text.tokenizer import Tokenizer
from llmjax.training.batches import Example, Pair
from llmjax.training.lines import BLANK

_FORMS: tuple[tuple[str, ...], ...] = (
    ("ids",),
    ("prompt_ids", "completion_ids"),
    ("messages",),
    ("prompt", "completion"),
    ("text",),
)
_HALVES = ("chosen", "rejected")
_PREFERENCES: tuple[tuple[str, ...], ...] = (
    ("prompt_ids", "chosen_ids", "rejected_ids"),
    ("prompt", *_HALVES),
    _HALVES,
)
_OPTIONAL = {"ids": ("loss_mask",), "messages": ("tools",)}
_ALWAYS = ("id",)
_MOST = 10

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
    examples: list[Example] | list[Pair]
    bad: list[BadRow]
    unused: Mapping[str, int]

    def notes(self) -> list[str]:
        """What a person should know."""
        found = []
        if self.bad:
            all_rows = amount(len(self.bad) + len(self.examples), "row")
            are = "is" if len(self.bad) == 1 else "are"
            found.append(f"{self.where}: {len(self.bad):,} of {all_rows} {are} left out")
            if not self.examples and len({bad.why for bad in self.bad}) == 1 < len(self.bad):
                return [*found, f"  each of them: {self.bad[0].why}"]
            found += [f"  {bad}" for bad in self.bad[:_MOST]]
            found += [f"  and {len(self.bad) - _MOST} more"] if len(self.bad) > _MOST else []
        if self.unused:
            fields = ", ".join(
                f"{named(str(name))} ({amount(count, 'row')})" for name, count in sorted(self.unused.items(), key=str)
            )
            found.append(f"{self.where}: fields that are not used: {fields}")
        return found


def make_examples(
    rows: Iterable[Any],
    model: Model,
    *,
    max_length: int | None = None,
    where: str = "rows",
    date: Date | None = None,
    dpo: bool = False,
) -> Data:
    """Examples of a model from rows.

    Args:
      rows: objects of the forms above.
      model: whose tokenizer and template are used.
      max_length: rows of more tokens are left out; None for the model's context.
      where: what to call the data in messages.
      date: what chat templates take for the present.
      dpo: the rows are of preferences, and become pairs of examples.

    Raises:
      RequestError: no row is any good.
    """
    if not isinstance(rows, Iterable) or isinstance(rows, bytes | Mapping):
        raise RequestError(f"{where}: expected a JSONL file's path or objects, found {shown(rows)}")
    longest = min(max_length or model.context_length, model.context_length)
    date = settled(date)
    examples: list[Any] = []
    bad = []
    unused: Counter[str] = Counter()
    template = model.tokenizer and (model.tokenizer.tools_template or model.tokenizer.chat_template)
    ignored = {"tools"} if template and "tools" not in template else set()
    for number, row in enumerate(rows):
        if row is BLANK:
            continue
        try:
            form = _form(row, dpo)
            talk = form[-1] == "rejected" and not isinstance(row["rejected"], str)
            used = {*form, *_OPTIONAL.get("messages" if talk else form[0], ()), *_ALWAYS} - ignored
            unused.update(name for name in row if name not in used and row[name] is not None)
            if dpo:
                examples.append(_pair(number, row, form, model, date, longest))
            else:
                examples.append(_example(number, _segments(row, form, model, date), model, longest))
        except LlmjaxError as error:
            bad.append(BadRow(number, str(error)))
    data = Data(where, examples, bad, unused)
    if not examples:
        raise RequestError("\n".join([f"{where}: no row to learn from", *data.notes()]))
    return data


def _form(row: Any, dpo: bool) -> tuple[str, ...]:
    if isinstance(row, LlmjaxError):
        raise row
    if not isinstance(row, Mapping):
        raise RequestError(f"expected an object, found {shown(row)}")
    forms, others = (_PREFERENCES, _FORMS) if dpo else (_FORMS, _PREFERENCES)
    expected = "; ".join(" and ".join(form) for form in forms)
    for names in ({name for name in row if row[name] is not None}, row):  # at last for what is wrong with a null
        for form in forms:
            if all(name in names for name in form):
                return form
        for form in others:
            if all(name in names for name in form):
                kind = "no preferences; train without dpo" if dpo else "preferences; train with dpo (--dpo)"
                raise RequestError(f"fields {', '.join(form)}: {kind}, or give one of: {expected}")
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
    tokenizer = _tokenizer(model, form[0])
    if form == ("messages",):
        return _turns(row["messages"], row.get("tools"), tokenizer, date)
    if form == ("text",):
        if not (text := _text(row, "text")).strip():
            raise RequestError("text: empty")
        return [(tokenizer.encode(text), True), (_end(tokenizer, model), True)]
    return _behind(row, ("completion",), model, tokenizer)[0]


def _behind(row: Mapping[str, Any], names: tuple[str, ...], model: Model, tokenizer: Tokenizer) -> list[Segments]:
    """The prompt, and each of these fields behind it."""
    prompt_text, texts = _text(row, "prompt"), [_text(row, name) for name in names]
    for name, text in zip(names, texts, strict=True):
        if not text:
            raise RequestError(f"{name}: empty")
    prompt = tokenizer.encode(prompt_text, add_bos=None)
    prompt = prompt[: len(prompt) - len(tokenizer.suffix_ids)] if tokenizer.suffix_ids else prompt
    end = _end(tokenizer, model)
    return [[(prompt, False), (continuation(tokenizer, prompt_text, text), True), (end, True)] for text in texts]


def _tokenizer(model: Model, name: str) -> Tokenizer:
    if model.tokenizer is None:
        raise RequestError(f"{name}: the model has no tokenizer; give ids")
    return model.tokenizer


def _pair(number: int, row: Mapping[str, Any], form: tuple[str, ...], model: Model, date: Any, longest: int) -> Pair:
    halves = []
    for name, segments in zip(_HALVES, _completions(row, form, model, date), strict=True):
        try:
            halves.append(_example(number, segments, model, longest))
        except LlmjaxError as error:
            raise RequestError(f"{name}: {error}") from None
        if not segments[0][0]:
            raise RequestError("prompt: no token, so nothing says how likely a completion's first one is")
    if np.array_equal(halves[0].ids, halves[1].ids):
        raise RequestError("chosen and rejected are the same tokens, so neither can be preferred")
    return Pair(*halves)


def _completions(row: Mapping[str, Any], form: tuple[str, ...], model: Model, date: Any) -> list[Segments]:
    """Chosen and rejected, each behind the prompt."""
    if form[0] == "prompt_ids":
        prompt, *completions = (_list(row, name) for name in form)
        for name, found in zip(form[1:], completions, strict=True):
            if not found:
                raise RequestError(f"{name}: empty")
        return [[(prompt, False), (found, True)] for found in completions]
    tokenizer = _tokenizer(model, form[0])
    texts = [isinstance(row[name], str) for name in form]
    if all(texts):
        return _behind(_parted(row) if form == _HALVES else row, _HALVES, model, tokenizer)
    if texts == [True, False, False] and _asked(*(_list(row, name) for name in _HALVES)) == row["prompt"]:
        form, texts = _HALVES, texts[1:]
    if any(texts):
        raise RequestError(
            f"{', '.join(form)}: expected a prompt and two texts, or lists of messages all; a prompt that the "
            "conversations begin with is left out"
        )
    lists = [_list(row, name) for name in form]
    if form == _HALVES:
        same = _alike(*lists)
        lists = [lists[0][:same], *(talk[same:] for talk in lists)]
    before, *talks = lists
    if not before:
        raise RequestError(f"{form[0]}: no message that chosen and rejected both follow")
    halves = zip(_HALVES, talks, strict=True)
    return [_said(name, before, talk, row.get("tools"), tokenizer, date) for name, talk in halves]


def _alike(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many messages, or characters, both begin with."""
    both = enumerate(zip(chosen, rejected, strict=False))
    return next((i for i, (a, b) in both if a != b), min(len(chosen), len(rejected)))


def _parted(row: Mapping[str, Any]) -> dict[str, str]:
    """Texts, parted where they are no longer alike: before the space that a word begins with, as TRL parts them."""
    same = _alike(*(row[name] for name in _HALVES))
    same -= row["chosen"][:same].endswith(" ")
    rest = {name: row[name][same:] for name in _HALVES}
    for name, text in rest.items():
        if not text.strip(" "):
            raise RequestError(f"{name}: no text behind what chosen and rejected begin with in common")
    return {"prompt": row["chosen"][:same], **rest}


def _asked(chosen: list[Any], rejected: list[Any]) -> Any:
    """What the last message says that both conversations begin with, if it is the user's."""
    last = chosen[same - 1] if (same := _alike(chosen, rejected)) else None
    return last.get("content") if isinstance(last, Mapping) and last.get("role") == "user" else None


def _said(name: str, before: list[Any], talk: list[Any], tools: Any, tokenizer: Tokenizer, date: Any) -> Segments:
    """What the assistant says behind a conversation; what it said in that is not learned."""
    if not talk:
        raise RequestError(f"{name}: no message behind those that chosen and rejected have in common")
    role = talk[0].get("role") if isinstance(talk[0], Mapping) else None
    if role not in ("assistant", None):  # before a template says something of roles that take no turns
        raise RequestError(
            f"{name}: begins with a message of {shown(role)}, expected the assistant's; leave prompt out where chosen "
            "and rejected are whole conversations"
        )
    try:
        return _turns([*before, *talk], tools, tokenizer, date, first=len(before))
    except LlmjaxError as error:
        raise RequestError(f"{name}: {error}") from None


def _turns(messages: list[Any], tools: Any, tokenizer: Tokenizer, date: Any, first: int = 0) -> Segments:
    """The rendered conversation, cut where the assistant's turns begin and end; those before the ``first`` message are
    not learned."""
    options = {"date": date} | ({"tools": tools} if tools is not None else {})
    text = tokenizer.render_chat(messages, add_generation_prompt=False, **options)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
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
        whole = f"the model's context; shorten it{model.longer_context}"
        raise RequestError(
            f"{len(ids)} tokens, longer than {longest}, {whole if longest == model.context_length else 'max_length'}"
        )
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
