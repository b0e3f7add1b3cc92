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
    before = datetime.datetime.now().replace(microsecond=0)
    told = datetime.datetime.fromisoformat(run("{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}"))
    assert before <= told <= datetime.datetime.now()


@pytest.mark.parametrize("date", ["2026-01-31", datetime.date(2026, 1, 31), datetime.datetime(2026, 1, 31)])
def test_a_given_time(date):
    assert render("{{ strftime_now('%d %b %Y %H:%M') }}", USER, {}, "x", date) == "31 Jan 2026 00:00"
    assert render("{{ strftime_now('%H:%M') }}", USER, {}, "x", "2026-01-31T09:30") == "09:30"
    for wrong in ("today", "2026-13-01", ""):
        with pytest.raises(RequestError, match="date: expected a day such as 2026-01-31"):
            render("x", USER, {}, "x", wrong)


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
        ([{"role": "user", "content": []}], r"messages\[0\].content: .*list of parts, found \[\]"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}],
            r"messages\[0\].content\[1\].type: expected 'text', .*found 'image_url'",
        ),
        ([{"role": "user", "content": [{"text": "x"}]}], r"messages\[0\].content\[0\].type: .*found None"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content\[0\].text: .*found None"),
    ],
)
def test_malformed_messages(messages, expected):
    with pytest.raises(RequestError, match=expected):
        run("x", messages)


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<{{ m.content }}>{% endfor %}",
        "{% for m in messages %}{{ '<' + m['content'] + '>' }}{% endfor %}",
        "{% for m in messages %}{{ '<' ~ m.content | trim ~ '>' }}{% endfor %}",
        "{% for m in messages %}<{{ m.content.split('</think>')[-1] }}>{% endfor %}",
        # Qwen 3's.
        "{% for m in messages %}{% set c = m.content if m.content is string else '' %}<{{ c }}>{% endfor %}",
        "{% for m in messages %}{% if m.content is not string %}{{ raise_exception('no') }}{% endif %}"
        "<{{ m.content }}>{% endfor %}",
    ],
)
def test_parts_are_one_string_for_a_template_that_prints_content(template):
    messages = [*USER, {"role": "user", "content": parts("a", "b")}, {"role": "user", "content": parts("c")}]
    assert run(template, messages) == "<hi><a\nb><c>"


def test_parts_stay_parts_for_a_template_that_reads_them():
    # As Gemma 3's does, which takes the first part of a system message alone.
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ m.content if m.content is string else m.content[0].text }}|"
        "{% elif m.content is string %}{{ m.content }}{% elif m.content is iterable %}"
        "{% for p in m.content %}{% if p['type'] == 'text' %}({{ p['text'] }}){% endif %}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    user = {"role": "user", "content": parts("a", "b")}
    assert run(template, [{"role": "system", "content": parts("s")}, user, *USER]) == "s|(a)(b)hi"
    assert run(template, [{"role": "system", "content": parts("s", "t")}, user]) == "s\nt|(a)(b)"
    assert run("{{ messages[0].content | map(attribute='text') | join('+') }}", [user]) == "a+b"
    assert run("{% for p in messages[0].content %}{{ p.get('text') }}{{ p.x }}{% endfor %}", [user]) == "ab"
    assert user == {"role": "user", "content": parts("a", "b")}


def test_a_refusal_of_parts_has_the_templates_own_words():
    with pytest.raises(RequestError, match="refuses them: never"):
        run("{{ raise_exception('never') }}", [{"role": "user", "content": parts("a")}])


def test_content_may_be_absent_with_tool_calls():
    assert run("ok", [{"role": "assistant", "content": None, "tool_calls": []}]) == "ok"
