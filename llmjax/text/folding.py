"""System messages for templates that have no place for them."""

from collections.abc import Mapping, Sequence
from typing import Any


def folded(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A conversation whose system messages stand before what the user says first, a blank line between them.

    Args:
      messages: checked (``llmjax.text.chat.check_messages``); a content of parts stays one.
    """
    system = [m for m in messages if m["role"] == "system"]
    rest: list[Mapping[str, Any]] = [m for m in messages if m["role"] != "system"]
    if not system:
        return rest
    first = next((i for i, m in enumerate(rest) if m["role"] == "user"), None)
    said = "\n\n".join(_text(m["content"]) for m in system)
    if first is None:
        return [{"role": "user", "content": said}, *rest]
    content = rest[first]["content"]
    if isinstance(content, str):
        content = f"{said}\n\n{content}"
    else:
        content = [{**content[0], "text": f"{said}\n\n{content[0]['text']}"}, *content[1:]]
    rest[first] = {**rest[first], "content": content}
    return rest


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
