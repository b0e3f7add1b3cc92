"""Chat templates: transformers' environment, the sandbox, and whose mistake an error is."""

import datetime

import pytest

from llmjax import RequestError, TokenizerError
from llmjax.text.chat import render

USER = [{"role": "user", "content": "hi"}]


def run(template, messages=USER, **variables):
    return render(template, messages, variables, "tokenizer_config.json")


def test_blocks_are_trimmed():
    assert run("  {% for m in messages %}\n{{ m.role }}\n  {% endfor %}\nend") == "user\nend"


def test_loop_controls():
    assert run("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"


def test_tojson_escapes_nothing_and_takes_options():
    assert run("{{ x | tojson }}", x={"a": "<é'>"}) == '{"a": "<é\'>"}'
    assert run("{{ x | tojson(indent=1) }}", x=[1]) == "[\n 1\n]"
    assert run("{{ x | tojson(separators=(',', ':'), sort_keys=true) }}", x={"b": 1, "a": 2}) == '{"a":2,"b":1}'


def test_generation_blocks_are_transparent():
    template = "{% for m in messages %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endfor %}"
    assert run(template) == "[hi]"


def test_the_time():
    assert run("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_missing_names_are_undefined_and_tools_are_none():
    assert run("{{ tools is none }} {{ documents is none }} {{ nonsense is defined }}") == "True True False"


def test_variables_reach_the_template():
    assert run("{% if enable_thinking %}<think>{% endif %}", enable_thinking=True) == "<think>"


def test_a_template_sees_plain_data_and_changes_nothing():
    class Role(str):
        def __str__(self):
            return "something else"

    messages = [{"role": Role("user"), "content": "hi", "x": object()}]
    assert run("{{ messages[0].role }} {{ messages[0].x }}", messages) == "user <object>"
    template = "{% set _ = messages[0].update({'role': 'x'}) %}"
    with pytest.raises(TokenizerError, match="template failed"):
        run(template, messages)
    assert messages[0]["role"] == "user"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ ().__class__.__bases__[0].__subclasses__() }}",
    ],
)
def test_the_sandbox(template):
    with pytest.raises(TokenizerError, match="tokenizer_config.json: the chat template failed"):
        run(template)


def test_a_broken_template_names_file_and_line():
    with pytest.raises(TokenizerError, match="tokenizer_config.json: the chat template is broken in line 2"):
        run("\n{% for %}")


def test_a_refusal_has_the_templates_own_words():
    with pytest.raises(RequestError, match="messages: the chat template refuses them: no system role"):
        run("{{ raise_exception('no system role') }}")


def test_messages_the_template_did_not_expect():
    with pytest.raises(RequestError, match="cannot use them: .*no attribute 'name'"):
        run("{{ messages[0].name.upper() }}")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages: expected a non-empty list"),
        ("hi", "messages: expected a non-empty list"),
        ({"role": "user"}, "messages: expected a non-empty list"),
        (["hi"], r"messages\[0\]: expected an object"),
        ([*USER, {"content": "x"}], r"messages\[1\].role: expected a string, found None"),
        ([{"role": 3, "content": "x"}], r"messages\[0\].role: expected a string, found 3"),
        ([{"role": "user"}], r"messages\[0\].content: .*found none"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content: .*found 5"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content: .*list of parts"),
    ],
)
def test_malformed_messages(messages, expected):
    with pytest.raises(RequestError, match=expected):
        run("x", messages)


def test_content_may_be_parts_or_absent_with_tool_calls():
    assert (
        run("{{ messages[0].content[0].text }}", [{"role": "user", "content": [{"type": "text", "text": "a"}]}]) == "a"
    )
    assert run("ok", [{"role": "assistant", "content": None, "tool_calls": []}]) == "ok"
