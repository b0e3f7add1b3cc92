"""Jinja for templates that nobody vouches for: what they may reach, and how much time and memory they may take.

Jinja's own sandbox keeps a template from reaching anything but data.  This one also counts: each turn of a loop, each
call, and the characters of what is made, before it is made.
"""

import contextlib
import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

# Far above any template's: the longest published ones have 30,000 characters, and take some thousand steps a message.
_MOST_SOURCE = 200_000
_MOST_DEPTH = 15  # Python itself has no more than 20 blocks in each other
_MOST_STEPS = 500_000
_MOST_SECONDS = 5.0  # of the processor
# Of one text or list; and of all that is made on the way.
_MOST_SIZE, _MOST_MADE = 1 << 23, 1 << 28
_MOST_NUMBER = 100_000
_MOST_BITS = 4096
# Where filters and methods take numbers for sizes.
_SIZED = frozenset({"batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "to_bytes", "truncate"})
_SIZED |= {"wordwrap", "zfill", "tojson"}
# A width that a format gives, or takes from what it is filled with.
_WIDE = re.compile(r"%[^a-zA-Z%\s]*(\d{4}|\*)|\{[^{}]*:[^{}]*(\d{4}|\{)")


class LimitError(Exception):
    """A template does more than any template needs."""


class _Budget(threading.local):
    """What is left for the template that this thread renders."""

    steps = _MOST_STEPS
    made = _MOST_MADE
    until = float("inf")


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of one or several templates; see ``counted``."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any):
        # Constants are not folded: that would run parts of a template when it is compiled.
        super().__init__(optimized=False, finalize=self.printed, **options)
        self._budget = _Budget()
        self.globals.pop("lipsum", None)
        self.filters = {name: self.filtered(name, run) for name, run in self.filters.items()}

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """What is rendered inside has a budget of its own.

        Raises:
          LimitError: it is used up.
        """
        budget = self._budget
        budget.steps, budget.made, budget.until = _MOST_STEPS, _MOST_MADE, time.thread_time() + _MOST_SECONDS
        yield

    def template(self, source: str) -> jinja2.Template:
        """A compiled template.

        Raises:
          LimitError: it is too long, or nested too deeply.
          jinja2.TemplateError: it is broken.
        """
        if len(source) > _MOST_SOURCE:
            raise LimitError(f"it has {len(source):,} characters, expected at most {_MOST_SOURCE:,}")
        try:
            with self.counted():
                return self.from_string(source)
        except (RecursionError, MemoryError, SyntaxError):  # of Python's compiler, not of Jinja's
            raise LimitError("it is nested too deeply") from None

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        _Steps().visit(tree)
        return tree

    def step(self, size: int = 0) -> str:
        """Counts a turn of a loop, or a call, that makes so many characters."""
        budget = self._budget
        budget.steps -= 1
        budget.made -= size
        if budget.steps < 0 or budget.made < 0 or time.thread_time() > budget.until:
            raise LimitError("it takes too many steps")
        return ""

    def make(self, size: int) -> None:
        """Counts a text or a list of this size before it is made."""
        if size > _MOST_SIZE:
            raise LimitError(f"it makes a text or list of {size:,} entries, expected at most {_MOST_SIZE:,}")
        self.step(size)

    def printed(self, value: Any) -> Any:
        """What is printed, counted."""
        self.make(self.weigh(value))
        return value

    def weigh(self, value: Any) -> int:
        """About how long a value is as text: its parts may be shared, and are then written again and again."""
        total, todo = 0, [value]
        while todo:
            value = todo.pop()
            total += len(value) if isinstance(value, str) else 32
            if isinstance(value, Mapping):
                todo += [*value.keys(), *value.values()]
            elif isinstance(value, list | tuple | set | frozenset):
                todo += value
            elif isinstance(value, jinja2.utils.Namespace):
                todo.append(object.__getattribute__(value, "_Namespace__attrs"))
            if total + len(todo) > _MOST_SIZE:
                raise LimitError(f"it makes a text of more than {_MOST_SIZE:,} characters")
        return total

    def joined(self, *values: Any) -> str:
        """The operator ``~``."""
        self.make(sum(map(self.weigh, values)))
        return "".join(map(str, values))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See Jinja's."""
        if operator == "%" and isinstance(left, str | bytes):
            self._check_format(left)
            self.make(len(left) + self.weigh(right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            if operator != "%" and bits > _MOST_BITS:
                raise LimitError("it makes a number of more digits than it needs")
        elif operator in "+*":
            sizes = [len(x) if isinstance(x, str | bytes | list | tuple) else None for x in (left, right)]
            if operator == "+":
                self.make(sum(size or 0 for size in sizes))
            else:
                products = (
                    size * n for size, n in zip(sizes, (right, left), strict=True) if size and isinstance(n, int)
                )
                self.make(max(0, *products, 0))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """See Jinja's."""
        self.step()
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if name == "strftime" and args:
            self._check_format(str(args[0]))
        elif isinstance(owner, str | bytes | int):
            if name == "join" and args:
                args = (self._taken(args[0]), *args[1:])
            self._check(name, (owner, *args), kwargs)
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """See Jinja's."""
        run = super().wrap_str_format(value)
        if run is None:
            return None

        @functools.wraps(run)
        def counted(*args: Any, **kwargs: Any) -> str:
            self._check("format", (value.__self__, *args), kwargs)
            return run(*args, **kwargs)

        return counted

    def filtered(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is counted before it runs."""
        first = int(hasattr(run, "jinja_pass_arg"))  # Jinja hands some filters its context before the value

        @functools.wraps(run)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if name == "join" and len(args) > first:
                args = (*args[:first], self._taken(args[first]), *args[first + 1 :])
            self._check(name, args[first:], kwargs)
            return run(*args, **kwargs)

        return counted

    def _taken(self, values: Any) -> Any:
        """What is to be joined, as a list where it comes one by one."""
        if isinstance(values, Sized) or not isinstance(values, Iterable):
            return values
        taken = []
        for value in values:
            self.make(self.weigh(value))
            taken.append(value)
        return taken

    def _check(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Counts what a filter or a method of this name will make; the first argument is what it is applied to."""
        value, rest = args[0] if args else "", [*args[1:], *kwargs.values()]
        numbers = sum(abs(x) for x in rest if isinstance(x, int))
        texts = sum(len(x) for x in rest if isinstance(x, str))
        length = len(value) if isinstance(value, Sized) else 1
        if name in _SIZED and numbers > _MOST_NUMBER:
            raise LimitError(f"{name}: a size above {_MOST_NUMBER:,}")
        if name == "wordwrap" and length > _MOST_NUMBER:  # it copies a long word for each of its lines
            raise LimitError(f"wordwrap: of more than {_MOST_NUMBER:,} characters")
        if name == "sum" and any(isinstance(x, Sized) for x in rest):
            raise LimitError("sum: of other things than numbers")
        if name in ("format", "format_map") and isinstance(value, str):
            self._check_format(value)
            self.make(length + sum(map(self.weigh, rest)))
        elif name == "replace" and isinstance(value, str) and rest and isinstance(rest[0], str):
            self.make(length + value.count(rest[0]) * texts)
        elif name == "join":
            # Of a method the glue comes first, of a filter the parts do.
            parts, glue = (rest[0], value) if isinstance(value, str) and not texts and rest else (value, "x" * texts)
            self.make(self.weigh(parts) + len(glue) * (len(parts) if isinstance(parts, Sized) else 1))
        elif name in ("string", "pprint", "tojson", "urlencode", "xmlattr"):
            self.make(self.weigh(value) * (1 + texts + numbers))
        elif name in _SIZED:
            lines = value.count("\n") if isinstance(value, str) else 0
            self.make(length * (1 + texts) + numbers * (1 + lines))
        else:
            self.make(length + texts)

    def _check_format(self, template: str | bytes) -> None:
        if _WIDE.search(template if isinstance(template, str) else template.decode("latin-1")):
            raise LimitError("a format with a width above 999")


class _Steps(jinja2.visitor.NodeTransformer):
    """Has loops and macros count their turns, and ``~`` what it makes; refuses what is nested too deeply."""

    depth = 0

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        return self._counted(node)

    visit_Macro = visit_CallBlock = visit_For

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _call("joined", node.nodes, node.lineno)

    def _counted(self, node: Any) -> jinja2.nodes.Node:
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            raise LimitError("it is nested too deeply")
        self.generic_visit(node)
        self.depth -= 1
        size = sum(len(data.data) for data in node.find_all(jinja2.nodes.TemplateData))
        step = _call("step", [jinja2.nodes.Const(size, lineno=node.lineno)], node.lineno)
        node.body.insert(0, jinja2.nodes.ExprStmt(step, lineno=node.lineno))
        return node


def _call(name: str, args: list[jinja2.nodes.Expr], line: int) -> jinja2.nodes.Call:
    function = jinja2.nodes.EnvironmentAttribute(name, lineno=line)
    return jinja2.nodes.Call(function, args, [], None, None, lineno=line)
