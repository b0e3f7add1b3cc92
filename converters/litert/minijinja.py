"""The Jinja that LiteRT-LM has: MiniJinja with what it adds, as far as chat templates need it.

Measured with LiteRT-LM 0.18.1: strings and lists have no methods, dictionaries ``items`` alone; some filters take no
arguments; ``is none`` holds for what is undefined and not for none; the content of messages always comes as a list of
parts; ``bos_token`` and ``eos_token`` are empty; a newline at the end stays.  LiteRT-LM replaces methods such as
``.strip()`` by filters wherever their text is found, so that chains of them break; ``translated`` goes by the grammar.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta

from llmjax.errors import TokenizerError
from llmjax.text.sandbox import LimitError, Sandbox

# Of a method: what takes its place, with {x} for what it is called on and {a} for its arguments.
_FORMS = {
    **{name: f"({{x}} | {name}({{a}}))" for name in ("lstrip", "rstrip", "replace", "lower", "upper", "title")},
    "capitalize": "({x} | capitalize)",
    "strip": "({x} | trim({a}))",
    "split": "({x} | split({a}) | list)",
    "startswith": "({x} is startingwith({a}))",
    "endswith": "({x} is endingwith({a}))",
    "join": "({a} | join({x}))",
    "keys": "({x} | list)",
    "values": "({x} | items | map('last') | list)",
    "get": "({x}[{a}])",
}
_OR = "({x}[{a}] | default({b}))"  # ``get`` with a default
# What LiteRT-LM does to the text of a template, wherever it stands.
_REPLACED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.split\((.*?)\)\[-1\]", r" | split(\1) | last"),
        (r"\.split\((.*?)\)\[0\]", r" | split(\1) | first"),
        (r"\.split\((.*?)\)", r" | split(\1)"),
        (r"\.strip\(\)", " | trim"),
        (r"\.([lr]strip)\(\)", r" | \1"),
        (r"\.([lr]strip)\((.*?)\)", r" | \1(\2)"),
        (r"\.startswith\((.*?)\)", r" is startingwith \1"),
        (r"\.endswith\((.*?)\)", r" is endingwith \1"),
    )
]
_KEYWORDS = frozenset("and or not in is if else elif for set recursive block macro call filter with".split())
_FILTERS = frozenset(
    "abs batch capitalize count d default dictsort e escape first float format groupby indent int items join last "
    "length list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort string "
    "sum title tojson trim unique upper".split()
)
_STRIPPING = ("{%-", "{{-", "{#-")
_CLOSING = {")": "(", "]": "[", "}": "{"}
Token = tuple[str, str]


class _MiniJinja(Sandbox):
    """LiteRT-LM's environment."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
        self.filters = {name: run for name, run in self.filters.items() if name in _FILTERS}
        own: dict[str, Callable[..., Any]] = {
            "lstrip": str.lstrip,
            "rstrip": str.rstrip,
            "split": str.split,
            "tojson": _tojson,
        }
        self.filters |= {name: self.filtered(name, run) for name, run in own.items()}
        self.tests["none"] = lambda value: isinstance(value, jinja2.Undefined)
        self.tests["startingwith"] = str.startswith
        self.tests["endingwith"] = str.endswith
        kept = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals.clear()
        self.globals.update(kept, raise_exception=_raise)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """See Jinja's; of data only a dictionary's entries, and ``items``."""
        if isinstance(obj, Mapping):
            if attribute in obj:
                return obj[attribute]
            if attribute != "items":
                return self.undefined(obj=obj, name=attribute)
        elif isinstance(obj, str | list | tuple):
            return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """See Jinja's."""
        if isinstance(obj, Mapping):
            return obj[argument] if argument in obj else self.undefined(obj=obj, name=argument)
        if isinstance(argument, str):
            return self.getattr(obj, argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See Jinja's."""
        if operator == "%" and isinstance(left, str):
            raise TypeError("% of a text")
        return super().call_binop(context, operator, left, right)

    def printed(self, value: Any) -> Any:
        """See ``Sandbox``: true and lists look as in JSON."""
        return _text(super().printed(value))

    def joined(self, *values: Any) -> str:
        """See ``Sandbox``."""
        return super().joined(*map(_text, values))


def _text(value: Any) -> Any:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_inner(key)}: {_inner(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(map(_inner, value))}]" if isinstance(value, list | tuple) else value


def _inner(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(_text(value))


def _tojson(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def render(
    template: str, messages: Sequence[Mapping[str, Any]], names: Mapping[str, Any], now: datetime.datetime
) -> str:
    """A conversation as LiteRT-LM renders it.

    Args:
      template: as a bundle holds it.
      messages: whose contents are lists of parts.
      names: what else it may name.
      now: what it takes for the present.

    Raises:
      TokenizerError: MiniJinja cannot read it, or it fails on these messages.
    """
    try:
        environment, compiled = _compiled(template)
        with environment.counted():
            given = {"bos_token": "", "eos_token": "", "strftime_now": now.strftime, **names}
            text = compiled.render(given, messages=json.loads(json.dumps(messages)))
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(f"line {error.lineno}: {error.message}") from None
    except (LimitError, RecursionError, MemoryError) as error:
        raise TokenizerError(f"{error or 'it calls itself without end'}") from None
    except Exception as error:  # a template may run into any error on messages it did not expect
        raise TokenizerError(f"{type(error).__name__}: {error}") from None
    if "\0" in text:
        raise TokenizerError("it writes a NUL character, where LiteRT-LM ends a text")
    return text


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> tuple[Sandbox, jinja2.Template]:
    environment = _MiniJinja()
    for pattern, replacement in _REPLACED:
        template = pattern.sub(replacement, template)
    return environment, environment.template(template)


def names_of(template: str) -> set[str]:
    """What a template names and does not set.

    Raises:
      TokenizerError: MiniJinja cannot read it.
    """
    try:
        return jinja2.meta.find_undeclared_variables(_MiniJinja().parse(template))
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(f"line {error.lineno}: {error.message}") from None
    except (LimitError, RecursionError, MemoryError) as error:
        raise TokenizerError(f"{error or 'it is nested too deeply'}") from None


def translated(template: str) -> str:
    """A template with what MiniJinja lacks put in its words, as far as it has words for it.

    Raises:
      TokenizerError: it is no template at all.
    """
    environment = jinja2.Environment(keep_trailing_newline=True)
    try:
        # White space that a minus takes away is gone already; of one brace and a tag it must keep two.
        tokens = [
            (kind, f"\n{text}" if text[:3] in _STRIPPING else text) for _, kind, text in environment.lex(template)
        ]
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(f"line {error.lineno}: {error.message}") from None
    tokens = _without_generation(tokens)
    at = 0
    while at < len(tokens):
        for change in (_method, _json_arguments, _is_none):
            if found := change(tokens, at):
                start, end, new = found
                tokens[start:end] = new
                at = start
                break
        at += 1
    # Jinja drops one newline at the end of a template, MiniJinja as LiteRT-LM has it does not.
    return "".join(text for _, text in tokens).removesuffix("\n")


def _without_generation(tokens: list[Token]) -> list[Token]:
    """Marks of what to train on, which say nothing when a conversation is rendered."""
    found: list[Token] = []
    for kind, text in tokens:
        found.append((kind, text))
        if kind == "block_end":
            begin = max(i for i, (k, _) in enumerate(found) if k == "block_begin")
            words = [t for k, t in found[begin:] if k == "name"]
            if words in (["generation"], ["endgeneration"]):
                # A comment strips white space as the block did.
                found[begin:] = [("comment", f"{found[begin][1]} {text}".replace("%", "#"))]
    return found


def _method(tokens: list[Token], at: int) -> tuple[int, int, list[Token]] | None:
    """``x.strip(a)`` at its dot: what it begins and ends at, and what stands for it."""
    if tokens[at] != ("operator", "."):
        return None
    name, opening = _next(tokens, at), _next(tokens, _next(tokens, at))
    if opening >= len(tokens) or tokens[opening] != ("operator", "(") or tokens[name][1] not in _FORMS:
        return None
    closing = _closing(tokens, opening)
    start = _begin(tokens, _previous(tokens, at))
    if closing is None or start is None:
        return None
    arguments = _arguments(tokens[opening + 1 : closing])
    form = _FORMS[tokens[name][1]]
    if tokens[name][1] == "get" and len(arguments) == 2:
        form = _OR
    given = {"x": tokens[start:at], "a": arguments[0] if arguments else [], "b": arguments[-1] if arguments else []}
    if len(arguments) > 1 and form is not _OR:
        given["a"] = tokens[opening + 1 : closing]
    return start, closing + 1, _filled(form, given)


def _filled(form: str, given: Mapping[str, list[Token]]) -> list[Token]:
    environment = jinja2.Environment()
    for key in given:
        form = form.replace(f"{{{key}}}", f"hole_{key}")
    found: list[Token] = []
    for _, kind, text in list(environment.lex(f"{{{{{form}}}}}"))[1:-1]:
        found += given[text.removeprefix("hole_")] if text.startswith("hole_") else [(kind, text)]
    return found


def _json_arguments(tokens: list[Token], at: int) -> tuple[int, int, list[Token]] | None:
    """``tojson(...)`` without what only says how the text looks."""
    if tokens[at] != ("name", "tojson"):
        return None
    opening = _next(tokens, at)
    if opening >= len(tokens) or tokens[opening] != ("operator", "("):
        return None
    closing = _closing(tokens, opening)
    return None if closing is None else (at, closing + 1, [tokens[at]])


def _is_none(tokens: list[Token], at: int) -> tuple[int, int, list[Token]] | None:
    """``is none`` as a test that both tongues understand."""
    if tokens[at] != ("name", "is"):
        return None
    last, negated = _next(tokens, at), False
    if last < len(tokens) and tokens[last] == ("name", "not"):
        last, negated = _next(tokens, last), True
    if last >= len(tokens) or tokens[last] not in (("name", "none"), ("name", "None")):
        return None
    return at, last + 1, [("name", "not in [none]" if negated else "in [none]")]


def _next(tokens: Sequence[Token], at: int) -> int:
    at += 1
    while at < len(tokens) and tokens[at][0] == "whitespace":
        at += 1
    return at


def _previous(tokens: Sequence[Token], at: int) -> int:
    at -= 1
    while at >= 0 and tokens[at][0] == "whitespace":
        at -= 1
    return at


def _closing(tokens: Sequence[Token], opening: int) -> int | None:
    depth = 0
    for at in range(opening, len(tokens)):
        if tokens[at][0] == "operator":
            depth += (tokens[at][1] in _CLOSING.values()) - (tokens[at][1] in _CLOSING)
            if not depth:
                return at
    return None


def _begin(tokens: Sequence[Token], at: int) -> int | None:
    """Where the expression that ends at ``at`` begins: names, calls and subscripts, as they bind."""
    while at >= 0:
        kind, text = tokens[at]
        if kind == "operator" and text in _CLOSING:
            depth = 0
            while at >= 0:
                if tokens[at][0] == "operator":
                    depth += (tokens[at][1] in _CLOSING) - (tokens[at][1] in _CLOSING.values())
                if not depth:
                    break
                at -= 1
            before = _previous(tokens, at)
            if before < 0 or text == "}" or not _is_value(tokens[before]):
                return at
            at = before
        elif kind in ("name", "string", "integer", "float"):
            before = _previous(tokens, at)
            if kind == "string" and before >= 0 and tokens[before][0] == "string":  # 'a' 'b' is one text
                at = before
                continue
            if before < 0 or tokens[before] != ("operator", "."):
                return at
            at = _previous(tokens, before)
        else:
            return None
    return None


def _is_value(token: Token) -> bool:
    """Whether brackets behind it are a call or a subscript."""
    kind, text = token
    return (kind == "name" and text not in _KEYWORDS) or kind == "string" or (kind == "operator" and text in _CLOSING)


def _arguments(tokens: Sequence[Token]) -> list[list[Token]]:
    found: list[list[Token]] = [[]]
    depth = 0
    for kind, text in tokens:
        if kind == "operator":
            depth += (text in _CLOSING.values()) - (text in _CLOSING)
        if (kind, text) == ("operator", ",") and not depth:
            found.append([])
        else:
            found[-1].append((kind, text))
    return found if len(found) > 1 or any(kind != "whitespace" for kind, _ in found[0]) else []
