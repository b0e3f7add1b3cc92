"""A checkpoint's chat template as a bundle can hold it, shown to write what it writes."""

import dataclasses
import datetime
import json
from collections.abc import Iterator, Mapping
from typing import Any

from converters.litert import minijinja
from llmjax.errors import RequestError, TokenizerError
from llmjax.text.bundle import affixes_template
from llmjax.text.tokenizer import Tokenizer

_NOW = datetime.datetime(2026, 1, 31, 9, 30)
_MARK = "\x02"  # stands for what is said
_ODD = '  Say "it\'s" <b>\n\n{{ x }} é \n'
_USER, _SYSTEM, _ANSWER = ({"role": role, "content": "\x02"} for role in ("user", "system", "assistant"))
_TURNS = {
    "one question": [_USER],
    "a system message": [_SYSTEM, _USER],
    "an answer": [_USER, _ANSWER, _USER],
    "two answers": [_SYSTEM, _USER, _ANSWER, _USER, _ANSWER, _USER],
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
# Messages' contents as one string each, for templates that expect strings.
_JOINED = (
    "{%- set llmjax = namespace(messages=[]) -%}{%- for m in messages -%}"
    "{%- if m.content is defined and m.content is sequence and m.content is not string"
    " and m.content | rejectattr('type', 'eq', 'text') | list | length == 0 -%}"
    "{%- set llmjax.messages = llmjax.messages + [dict(m, content=m.content | map(attribute='text') | join('\\n'))] -%}"
    "{%- else -%}{%- set llmjax.messages = llmjax.messages + [m] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = llmjax.messages -%}"
)


@dataclasses.dataclass(frozen=True)
class Carried:
    """What a bundle holds of a chat template.

    Attributes:
      source: Jinja source; empty for none.
      affixes: prefix and suffix of each role, where a ``.task`` file has them instead; empty for none.
      turn_end: what stands behind an answer.
      tools: whether conversations with tools look right, too.
      opens_bos: whether BOS, which the bundle puts before every text, begins the template's texts.
      changes_texts: whether the template does more to what is said than to put ``affixes`` around it.
    """

    source: str = ""
    affixes: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    turn_end: str = ""
    tools: bool = False
    opens_bos: bool = True
    changes_texts: bool = False


@dataclasses.dataclass(frozen=True)
class _Case:
    """A conversation, of odd texts or of plain ones, and what the checkpoint's own template makes of it; None where it
    refuses it."""

    title: str
    odd: bool
    messages: list[dict[str, Any]]
    names: dict[str, Any]
    text: str | None


def carry(tokenizer: Tokenizer) -> Carried:
    """A tokenizer's chat template in LiteRT-LM's tongue.

    A bundle's start token stands before every text, so a template does not write it; one that no start token does is
    written as text.

    Raises:
      TokenizerError: no form of it is shown to write the same.
    """
    template = tokenizer.chat_template
    if not template:
        return Carried()
    bos = _bos(tokenizer)
    try:
        cases, tools = list(_cases(tokenizer, bos)), list(_cases(tokenizer, bos, tools=True))
        affixes = _affixes(tokenizer, bos)
        end, opens = _turn_end(affixes), _opens(tokenizer, bos)
        source = minijinja.translated(template)
        names = minijinja.names_of(source)
    except TokenizerError as error:
        raise _refused(tokenizer, str(error).removeprefix(f"{tokenizer.where}: ")) from None
    if bos and source.count(bos) == 1:
        source = source.replace(bos, "")
    if all(case.text is None for case in cases):
        raise _refused(tokenizer, f"it refuses every conversation: {_refusal(tokenizer, cases[0])}")
    calls = "tools" in names and any(case.text is not None for case in tools)
    named, all_named = _set_tokens(names, tokenizer, bos), _set_tokens(names, tokenizer, "")
    # Where BOS stands before later turns, too, only the first is the bundle's.
    captured = f"{{%- set llmjax_text %}}{{{{ '' }}}}{source}{{% endset -%}}{{{{ llmjax_text[{len(bos)}:] }}}}"
    problem = ""
    forms = [source, named + source, named + _JOINED + source, *([all_named + _JOINED + captured] if bos else [])]
    for form in forms:
        problem = _problem(form, cases)
        if not problem:
            return Carried(form, {}, end, calls and not _problem(form, tools), opens)
    # The bundle's own prefixes and suffixes are Jinja to LiteRT-LM, which drops a newline that they begin with.
    form = _JOINED + (affixes_template(affixes) or "")
    if affixes and not _problem(form, cases):
        return Carried(form, {}, end, False, opens)
    raise _refused(tokenizer, problem)


def around_turns(tokenizer: Tokenizer) -> Carried:
    """A tokenizer's chat template as a ``.task`` file has it: what stands around each turn, where that writes the same
    but for what it does to the texts themselves.

    Raises:
      TokenizerError: it is broken.
    """
    if not tokenizer.chat_template:
        return Carried()
    bos, plain, odd = _bos(tokenizer), True, False
    affixes = _affixes(tokenizer, bos)
    for case in _cases(tokenizer, bos) if affixes else ():
        if "enable_thinking" in case.names:  # which nobody can say to a .task file
            continue
        if case.text not in (None, _put_around(affixes, case)):
            plain, odd = plain and case.odd, True
    return Carried("", affixes if plain else {}, _turn_end(affixes), False, _opens(tokenizer, bos), plain and odd)


def _put_around(affixes: Mapping[str, tuple[str, str]], case: _Case) -> str:
    """What MediaPipe makes of a conversation."""
    roles = {"assistant": "model"}
    text = ""
    for message in case.messages:
        prefix, suffix = affixes.get(roles.get(message["role"], message["role"]), ("", ""))
        text += prefix + message["content"][0]["text"] + suffix
    return text + (affixes["model"][0] if case.names["add_generation_prompt"] else "")


def _bos(tokenizer: Tokenizer) -> str:
    """The text of what a bundle puts before every text."""
    return tokenizer.piece(tokenizer.prefix_ids[0]) if tokenizer.prefix_ids else ""


def _turn_end(affixes: Mapping[str, tuple[str, str]]) -> str:
    return affixes["model"][1] if affixes else ""


def _refused(tokenizer: Tokenizer, problem: str) -> TokenizerError:
    return TokenizerError(
        f"{tokenizer.where}: its chat template cannot be carried over to LiteRT-LM's MiniJinja: {problem}; give "
        "another (--chat-template FILE), or leave it out (--chat-template none)"
    )


def _cases(tokenizer: Tokenizer, bos: str, tools: bool = False) -> Iterator[_Case]:
    turns = {"tools": [_USER], "a tool's answer": [_USER, _called(), _replied(), _USER]} if tools else _TURNS
    for title, pattern in turns.items():
        for said in ("Hi.", _ODD):
            messages = [_said(message, said, i) for i, message in enumerate(pattern)]
            for names in _variables(tokenizer.chat_template or "", tools):
                yield _Case(title, said == _ODD, messages, names, _expected(tokenizer, bos, messages, names))
    if not tools:
        names = {"add_generation_prompt": False}
        messages = [_said(message, "Hi.", i) for i, message in enumerate([_USER, _ANSWER])]
        yield _Case("no prompt to answer", False, messages, names, _expected(tokenizer, bos, messages, names))


def _variables(template: str, tools: bool) -> Iterator[dict[str, Any]]:
    names: dict[str, Any] = {"add_generation_prompt": True, **({"tools": [_TOOL]} if tools else {})}
    yield names
    if "enable_thinking" in template:
        yield from ({**names, "enable_thinking": value} for value in (True, False))


def _said(message: Mapping[str, Any], text: str, number: int) -> dict[str, Any]:
    if not isinstance(message["content"], str):
        return dict(message)
    said = message["content"].replace(_MARK, f"{text}{number}" if number else text)
    return {**message, "content": [{"type": "text", "text": said}]}


def _called() -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _replied() -> dict[str, Any]:
    return {"role": "tool", "name": "add", "content": "2"}


def _expected(tokenizer: Tokenizer, bos: str, messages: Any, names: Mapping[str, Any]) -> str | None:
    try:
        return tokenizer.render_chat(messages, date=_NOW, **names).removeprefix(bos)
    except RequestError:  # it refuses these messages; one that is broken, or never ends, is refused itself
        return None


def _refusal(tokenizer: Tokenizer, case: _Case) -> str:
    """Why the checkpoint's own template makes nothing of a conversation."""
    try:
        return tokenizer.render_chat(case.messages, date=_NOW, **case.names)
    except RequestError as error:
        return str(error).removeprefix("messages: ")


def _opens(tokenizer: Tokenizer, bos: str) -> bool:
    if not bos:
        return True
    try:
        return tokenizer.render_chat([_said(_USER, "Hi.", 0)], date=_NOW).startswith(bos)
    except RequestError:
        return True


def _problem(form: str, cases: list[_Case]) -> str:
    """Where a template writes something else than it should; empty where nowhere."""
    for case in cases:
        try:
            text: str | None = minijinja.render(form, case.messages, case.names, _NOW)
            reason = f"expected {_around(case.text, text)}" if case.text is not None else "it should be refused"
        except TokenizerError as error:
            text, reason = None, str(error)
        if text != case.text:
            return f"with {case.title}, {reason}"
    return ""


def _around(expected: str, found: str | None) -> str:
    """Where two texts part."""
    found = found or ""
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    at = max(0, at - 10)
    return f"{expected[at : at + 40]!r}, it writes {found[at : at + 40]!r}"


def _set_tokens(names: set[str], tokenizer: Tokenizer, bos: str) -> str:
    """Sets the special tokens that a template names, which LiteRT-LM leaves empty or undefined."""
    tokens = {name: text for name, text in tokenizer.special.items() if name in names and text != bos}
    return "".join(f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} -%}}" for name, text in tokens.items())


def _affixes(tokenizer: Tokenizer, bos: str) -> dict[str, tuple[str, str]]:
    """What stands around each role, where that is all a template does; empty where it does more.

    Each role's is what the text of a conversation has more than that of the one without its last message.
    """
    affixes, before, messages = {}, "", list[dict[str, Any]]()
    for role, message in (("system", _SYSTEM), ("user", _USER), ("model", _ANSWER)):
        messages.append({**message, "content": [{"type": "text", "text": _MARK}]})
        text = _expected(tokenizer, bos, messages, {"add_generation_prompt": False})
        around = text.removeprefix(before).split(_MARK) if text and text.startswith(before) else []
        if len(around) != 2:
            if role == "system":
                messages.clear()
                continue
            return {}
        affixes[role], before = (around[0], around[1]), text or ""
    return affixes
