"""What a row of the input asks, in whichever form it was written."""

import json
from dataclasses import fields
from typing import Any, NamedTuple

from llmjax.errors import RequestError
from llmjax.outside.values import Rule
from llmjax.runtime.asking import ChatOptions
from llmjax.runtime.params import SamplingParams

PARAMS: tuple[str, ...] = tuple(f.name for f in fields(SamplingParams))
# How a row of messages may have them rendered.
CHAT: tuple[str, ...] = ("chat_template", "chat_template_kwargs", "fold_system")
ID = Rule("a string or an integer", lambda v: isinstance(v, str | int) and not isinstance(v, bool))


class Question(NamedTuple):
    """A prompt and the parameters that go with it.

    Attributes:
      kind: which of a form's prompts it is.
      prompt: a text, token ids, or messages.
      params: sampling parameters it sets, by name.
      model: the model it names, if it does; recorded, not obeyed.
      lora: the resident adapter it wants.
      chat: how its messages are rendered, see ``ChatOptions``.
    """

    kind: str
    prompt: Any
    params: dict[str, Any]
    model: str | None = None
    lora: str | None = None
    chat: ChatOptions = {}

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is messages."""
        return self.kind in ("messages", "/v1/chat/completions")


def check_text_id(row_id: str) -> None:
    """Raises RequestError for an id that cannot be written as UTF-8."""
    if any("\ud800" <= char <= "\udfff" for char in row_id):
        raise RequestError("id: half a surrogate pair, which no UTF-8 text has")


def checked_json(value: Any, name: str) -> Any:
    """Raises RequestError for what no JSON can hold: numbers that are not finite, lists nested too deeply."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name}: cannot be written as JSON: {error}") from None
    return value
