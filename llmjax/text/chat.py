"""Chat templates: Jinja in a sandbox, with the environment transformers gives them."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from llmjax.errors import RequestError, TokenizerError


class _Refused(Exception):
    """A template called raise_exception."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    special: Mapping[str, str],
    where: str,
) -> str:
    """Renders a conversation.

    Args:
      template: Jinja source.
      messages: each with ``role`` and ``content``.
      add_generation_prompt: end with the opening of the model's turn.
      special: special tokens by name.
      where: the template's file, for messages.

    Raises:
      TokenizerError: the template is broken.
      RequestError: the messages are malformed, or the template refuses them.
    """
    _check(messages)
    try:
        return _compiled(template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **special
        )
    except _Refused as error:
        raise RequestError(f"messages: the chat template refuses them: {error}") from None
    except jinja2.TemplateError as error:
        raise TokenizerError(f"{where}: the chat template failed: {error}") from None
    except (TypeError, KeyError, ValueError) as error:
        raise RequestError(f"messages: the chat template cannot use them: {error}") from None


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(f"messages: expected a non-empty list of objects, found {messages!r:.80}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise RequestError(f"messages[{i}]: expected an object with 'role' and 'content', found {message!r:.80}")


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; here it is transparent."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise _Refused(message)
