"""Chat templates that would take all time and memory end in a moment, with one line; honest ones are what they were."""

import datetime
import time

import jinja2.sandbox
import pytest

from llmjax.errors import TokenizerError
from llmjax.text.chat import render
from tests.tiny import some

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a\nb"}]
LOOPS = "".join(f"{{% for i{n} in range(100000) %}}" for n in range(3)) + "{% endfor %}" * 3
DOUBLE = "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 60
LIST = "{% set x = [1] %}" + "{% set x = [x, x] %}" * 40
ENDLESS = {
    "nested ranges": LOOPS,
    "nested ranges that print": LOOPS.replace("{% endfor %}", "x{% endfor %}", 1),
    "a loop in a macro": "{% macro m() %}" + LOOPS + "{% endmacro %}{{ m() }}",
    "loops that skip": LOOPS.replace(") %}", ") if false %}") + LOOPS,
    "a macro that calls itself": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    "without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "times": "{{ 'a' * 3000000000 }}",
    "times, the other way": "{{ 3000000000 * 'a' }}",
    "times a list": "{{ ([1] * 3000000000)|length }}",
    "times in a condition": "{% if 'a' * 3000000000 %}{% endif %}",
    "powers": "{{ 10 ** 100000000 }}",
    "a power": "{{ 2 ** 100000000000 }}",
    "doubling": DOUBLE,
    "doubling by +": DOUBLE.replace("~", "+"),
    "doubling by join": DOUBLE.replace("x ~ x", "[x, x]|join"),
    "doubling by a method": DOUBLE.replace("x ~ x", "''.join([x, x])"),
    "doubling by replace": DOUBLE.replace("x ~ x", "x|replace('a', x)"),
    "doubling by a method of text": DOUBLE.replace("x ~ x", "x.replace('b', x)"),
    "doubling by format": DOUBLE.replace("x ~ x", "'%s%s'|format(x, x)"),
    "doubling by %": DOUBLE.replace("x ~ x", "'%s%s' % (x, x)"),
    "doubling by str.format": DOUBLE.replace("x ~ x", "'{0}{0}'.format(x)"),
    "a list of lists": LIST + "{{ x }}",
    "a list of lists as JSON": LIST + "{{ x|tojson }}",
    "a list of lists as text": LIST + "{{ (x|string)|length }}",
    "a list of lists, joined": LIST + "{{ ('' ~ x)|length }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "a width from outside": "{{ '%*d' % (1000000000, 1) }}",
    "a width of str.format": "{{ '{:1000000000}'.format(1) }}",
    "a width of str.format from outside": "{{ '{:{}}'.format(1, 1000000000) }}",
    "a filter's width": "{{ 'a'|center(1000000000) }}",
    "a method's width": "{{ 'a'.ljust(1000000000) }}",
    "zeros": "{{ '1'.zfill(1000000000) }}",
    "tabs": "{{ '\\t'.expandtabs(1000000000) }}",
    "bytes of a number": "{{ (1).to_bytes(1000000000, 'big')|length }}",
    "indentation": "{{ ('\\n' * 1000000)|indent(99999) }}",
    "indented JSON": "{{ [1]|tojson(indent=1000000000) }}",
    "JSON's separators": "{{ ([1] * 100000)|tojson(separators=('x' * 1000000, ':')) }}",
    "batches": "{{ [1]|batch(1000000000, 'x')|list|length }}",
    "glue": "{{ (('a' * 100000)|join('b' * 100000))|length }}",
    "a long text, joined again and again": "{{ ([('a' * 8000000)] * 100000)|map('string')|join|length }}",
    "a date": "{{ strftime_now('%1000000000d') }}",
    "a sum of lists": "{{ ([[1] * 100000] * 100000)|sum(start=[]) }}",
    "much output": "{% for i in range(1000) %}{{ 'a' * 8000000 }}{% endfor %}",
    "much output in a macro": "{% macro f() %}{% for i in range(1000) %}{{ 'a' * 8000000 }}{% endfor %}{% endmacro %}"
    + "{% if f() %}{% endif %}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "brackets": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "minus signs": "{{ " + "-" * 5000 + "1 }}",
    "many terms": "{{ " + "1 + " * 50_000 + "1 }}"[:-3] + " }}",
    "nested loops": "{% for x in [1] %}" * 30 + "{% endfor %}" * 30,
    "nested conditions": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "a long word": "{{ ('a' * 1000000)|wordwrap(1) }}",
    "a long template": "a" * 3_000_000,
}


@pytest.mark.parametrize("name", some(set(list(ENDLESS)[::4]), ENDLESS))
def test_a_template_ends(name):
    began = time.process_time()
    with pytest.raises(TokenizerError) as caught:
        render(ENDLESS[name], MESSAGES, {}, "chat_template.jinja")
    assert time.process_time() - began < 5
    message = str(caught.value)
    assert message.startswith("chat_template.jinja: the chat template is refused: ") and len(message) < 200
    assert "\n" not in message
    # The next one has a budget of its own.
    assert render("{{ messages[0].content }}", MESSAGES, {}, "t") == "hi"


HONEST = """
{%- macro shout(text, n=2) -%}{{ (text|upper ~ '!') * n }}{%- endmacro -%}
{%- set ns = namespace(text='', last=none) -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{% set ns.text = ns.text + shout(m.content) %}
  {%- elif loop.last -%}<{{ m.content|trim }}>{%- endif -%}
  {%- set ns.last = m -%}
{%- endfor -%}
{{ ns.text ~ 1 ~ none ~ [1, 'a'] }} {{ ns.last|tojson(indent=2) }} {{ ns.last.content.split('\\n')|join(', ') }}
{{ '%-5s|%03d' % ('ab', 7) }} {{ '{:>4}'.format('x') }} {{ 'ab'|center(6) }} {{ 2 ** 10 + 7 % 4 - 1 }}
{{ strftime_now('%d %b 2024') }}
{{ messages|map(attribute='role')|join('/') }} {{ ', '.join(messages|map(attribute='role')) }} {{ [3, 1]|sort|sum }}
{{ 'a b'.replace('a', 'cc') }} {{ 'x\\ny'|indent(3) }} {{ range(3)|list }} {{ {'a': [1, {'b': none}]} }} {{ missing }}|
{%- for a in [[1, [2]], [3]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}
"""


def test_honest_templates_are_what_they_were():
    date = datetime.datetime(2026, 1, 31, 9, 30)
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    import json

    plain.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    expected = plain.from_string(HONEST).render(messages=MESSAGES, strftime_now=date.strftime)
    assert render(HONEST, MESSAGES, {}, "t", date) == expected and "HI!HI!" in expected and "31 Jan 2024" in expected


def test_long_conversations_are_fine():
    template = (
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content %}{% endfor %}{{ ns.t }}"
    )
    messages = [{"role": "user", "content": "a" * 20_000}] * 150
    assert render(template, messages, {}, "t") == "a" * 3_000_000
    assert len(render("{% for m in messages %}{{ m.content }}{% endfor %}", messages * 2, {}, "t")) == 6_000_000
