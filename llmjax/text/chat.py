"""Chat templates: Jinja in a sandbox, with the environment transformers gives them."""

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from llmjax.errors import RequestError, TokenizerError, shown
from llmjax.text.dates import Date, settled
from llmjax.text.sandbox import LimitError, Sandbox

# What a message's thoughts go by, the first of which counts.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class _Refused(Exception):
    """A template called raise_exception."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    where: str,
    date: Date | None = None,
) -> str:
    """Renders a conversation.

    Content that is a list of text parts reaches a template that reads parts as such a list, and any other as one
    string, the parts on lines of their own (as in vLLM and llama.cpp).  Which of the two it is shows message by message
    when the template runs: it has read a list if it has taken the text of every part.

    Args:
      template: Jinja source.
      messages: each with ``role`` and ``content``: a string, or parts ``{"type": "text", "text": ...}``.
      variables: what else the template may name.
      where: the template's file, for messages.
      date: what the template takes for the present, see ``llmjax.text.dates``.

    Raises:
      TokenizerError: the template is broken or does what the sandbox forbids.
      RequestError: the messages are malformed, or the template refuses them; or the date is none.
    """
    check_messages(messages)
    now = settled(date)
    # Absent and null are the same to the templates that ask for these.
    names = {"tools": None, "documents": None, **variables}
    compiled = compiled_template(template, where)
    try:
        plain, names = _as_read(_plain(messages)), {**_plain(names), "strftime_now": now.strftime}
        _join_unread(compiled, plain, names)
        with _counted(compiled):
            return compiled.render(names, messages=plain)
    except _Refused as error:
        hint = ""
        if any(message.get("role") == "system" for message in messages):
            hint = "; fold_system (--fold-system) puts a system message into the user's first"
        raise RequestError(f"messages: the chat template refuses them: {error}{hint}") from None
    except (LimitError, RecursionError, MemoryError) as error:
        reason = error if isinstance(error, LimitError) else "it calls itself without end"
        raise TokenizerError(f"{where}: the chat template is refused: {reason}") from None
    except jinja2.sandbox.SecurityError as error:
        raise TokenizerError(f"{where}: the chat template failed: {error}") from None
    except Exception as error:  # a template may run into any error on messages it did not expect
        raise RequestError(f"messages: the chat template cannot use them: {type(error).__name__}: {error}") from None


def compiled_template(template: str, where: str) -> jinja2.Template:
    """A template ready to render.

    Args:
      template: Jinja source.
      where: the template's file, for messages.

    Raises:
      TokenizerError: it is broken, or larger than any template needs to be.
    """
    try:
        return _compile(template)
    except LimitError as error:
        raise TokenizerError(f"{where}: the chat template is refused: {error}") from None
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise TokenizerError(
            f"{where}: the chat template is broken{f' in line {line}' if line else ''}: {error}"
        ) from None


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Checks a conversation's form, whatever the template.

    Raises:
      RequestError: it is not a list of messages with ``role`` and ``content``.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"messages: expected a non-empty list of objects, found {shown(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{i}]: expected an object with 'role' and 'content', found {shown(message)}")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(f"messages[{i}].role: expected a string, found {shown(role)}")
        content = message.get("content")
        if content is None and ("tool_calls" in message or "tool_responses" in message):
            continue
        parts = content if isinstance(content, list | tuple) else None
        if not isinstance(content, str) and (not parts or not all(isinstance(part, Mapping) for part in parts)):
            found = shown(content) if "content" in message else "none"
            raise RequestError(f"messages[{i}].content: expected a string or a list of parts, found {found}")
        for j, part in enumerate(parts or ()):
            where = f"messages[{i}].content[{j}]"
            if part.get("type") != "text":
                raise RequestError(
                    f"{where}.type: expected 'text', all that the model reads, found {part.get('type')!r:.80}"
                )
            if not isinstance(part.get("text"), str):
                raise RequestError(f"{where}.text: expected a string, found {part.get('text')!r:.80}")


def _as_read(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers hands them to templates: without what is null, which a template would write as "None",
    and with thoughts under the names that templates read."""
    found = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in found:
        thoughts = [message[key] for key in _THOUGHTS if key in message]
        if thoughts:
            message["reasoning_content"] = thoughts[0]
            message.setdefault("thinking", thoughts[0])
    return found


class _Part(dict[str, Any]):
    """A part of a message that notes when its text is read."""

    _read = False

    def __getitem__(self, key: str) -> Any:
        self._read |= key == "text"
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default


def _join_unread(template: jinja2.Template, messages: list[dict[str, Any]], names: Mapping[str, Any]) -> None:
    """Makes strings of the lists of parts that the template does not read as such."""
    parts = {i: list(map(_Part, m["content"])) for i, m in enumerate(messages) if isinstance(m.get("content"), list)}
    if not parts:
        return
    try:
        watched = [{**m, "content": parts[i]} if i in parts else m for i, m in enumerate(messages)]
        with _counted(template):
            template.render(messages=watched, **names)
        read = {i for i, found in parts.items() if all(part._read for part in found)}
    except Exception:  # it wants strings, or else fails again with them
        read = set()
    for i in parts.keys() - read:
        messages[i]["content"] = "\n".join(part["text"] for part in parts[i])


def _plain(value: Any) -> Any:
    """A copy made of JSON's types alone: a template's reach ends at data, and it changes nothing of
    the caller's."""
    if isinstance(value, str):
        return str.__str__(value)  # a subclass, such as an enumeration, may print itself otherwise
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return None if value is None else f"<{type(value).__name__}>"


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
    environment.filters["tojson"] = environment.filtered("tojson", _tojson)
    environment.globals["raise_exception"] = _raise
    return environment.template(template)


def _counted(template: jinja2.Template) -> contextlib.AbstractContextManager[None]:
    sandbox = template.environment
    assert isinstance(sandbox, Sandbox)
    return sandbox.counted()


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; here it only is a scope."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


# Jinja's own filter escapes HTML.
def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise _Refused(message)
