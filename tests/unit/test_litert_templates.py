"""Chat templates in LiteRT-LM's MiniJinja: ours makes of them what LiteRT-LM 0.18.1 makes of them (measured with
``Conversation.render_message_to_string``), and what goes along writes what the checkpoint's own template does."""

import dataclasses
import datetime

import pytest

from converters.litert import minijinja, templates
from llmjax.errors import TokenizerError
from llmjax.text import bundle, reading
from tests.tiny import checkpoint

NOW = datetime.datetime(2026, 1, 31)
SAID = [
    {"role": "system", "content": [{"type": "text", "text": "SYS"}]},
    {"role": "user", "content": [{"type": "text", "text": " U1 "}]},
]
# What is printed; None where LiteRT-LM fails.
MEASURED = {
    "{{ messages[0].content }}": '[{"type": "text", "text": "SYS"}]',
    "{{ '[' + messages[0].content + ']' }}": None,
    "{{ messages[0].content | map(attribute='text') | join('-') }}": "SYS",
    "{{ bos_token is defined }}{{ bos_token|length }}{{ tools is defined }}{{ tools is none }}": "true0falsetrue",
    "{% set x = none %}{{ x is none }}{{ x in [none] }}{{ q in [none] }}": "falsetruefalse",
    "{{ messages[0].get('role') }}": None,
    "{{ 'abc'.upper() }}": None,
    "{{ [1].append(2) }}": None,
    "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}": "a1",
    "{{ {'a': 1}.keys() }}": None,
    "{{ {'b': 1, 'a': [1, 'é<']} | tojson }}": '{"b": 1, "a": [1, "é<"]}',
    "{{ {'a': 1} | tojson(indent=2) }}": None,
    "{{ [none, true, 'a'] }}{{ none }}{{ true }}{{ 1.0 }}": '[none, true, "a"]nonetrue1.0',
    "{{ 'a' ~ 1 ~ none ~ true }}": "a1nonetrue",
    "{{ ('\n a ' | lstrip) }}|{{ ('xxa' | lstrip('x')) }}|{{ 'xax' | rstrip('x') }}|{{ 'xax'|trim('x') }}": "a |a|xa|a",
    "{{ ('a,b,c' | split(',', 1) | list)[1] }}": "b,c",
    "{{ ('abc' is startingwith('a')) }}{{ not ('abc' is endingwith('a')) }}": "truetrue",
    "{{ messages[0].x.y }}": None,
    "{{ messages[5] is defined }}{{ messages[0].nothing }}": "false",
    "{% for m in messages %}{% break %}{% endfor %}": None,
    "{{ '%s' % 'a' }}": None,
    "{{ 'q.strip()' }}{{ ' x '.strip() }}": "q | trimx",
    "{{ 'a'|center(5) }}": None,
    "{{ raise_exception('no') }}": None,
    "a\n  {% if true %}\nb\n  {% endif %}\n{# c #}\nd\n": "a\nb\nd\n",
    "{% macro f(a, b='d') %}{{a}}{{b}}{% endmacro %}{{ f(1) }}{{ f(1,b=2) }}": "1d12",
    "{{ strftime_now('%Y') }}": "2026",
    "{{ dict({'a': 1}, a=2) }}{{ [1] + [2] }}": '{"a": 2}[1, 2]',
}


@pytest.mark.parametrize("template", MEASURED)
def test_renders_as_litert_lm(template):
    expected = MEASURED[template]
    if expected is None:
        with pytest.raises(TokenizerError):
            minijinja.render(template, SAID, {}, NOW)
    else:
        assert minijinja.render(template, SAID, {}, NOW) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ x.strip() }}", "{{ (x | trim()) }}"),
        (
            "{{ a.b['c'].split('</t>')[-1].lstrip('\\n') }}",
            "{{ ((a.b['c'] | split('</t>') | list)[-1] | lstrip('\\n')) }}",
        ),
        ("{{ m.get('x').get('y', [1, 2]) }}", "{{ ((m['x'])['y'] | default( [1, 2])) }}"),
        (
            "{% if not (a + b).startswith('q') and x is not none %}{% endif %}",
            "{% if not ((a + b) is startingwith('q')) and x not in [none] %}{% endif %}",
        ),
        ("{{ ', '.join(xs) }}{{ d | tojson(indent=4) }}", "{{ (xs | join(', ')) }}{{ d | tojson }}"),
        ("{{ 'a' 'b'.upper() }}", "{{ ('a' 'b' | upper()) }}"),
        ("text.strip() {{ 'x.strip()' }}\n", "text.strip() {{ 'x.strip()' }}"),
        ("{% generation %}a{% endgeneration -%} b", "{# #}a{# -#} b"),
        ("{{ key }}:{\n{%- if x %}{% endif %}", "{{ key }}:{\n{%- if x %}{% endif %}"),
    ],
)
def test_methods_become_filters(template, expected):
    assert minijinja.translated(template) == expected


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'].strip() + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}\n"
)
THINKING = (
    "{%- for m in messages %}{%- if m.role == 'assistant' and '</think>' in m.content %}"
    "{{- 'A' + m.content.split('</think>')[-1].lstrip('\\n') + eos_token }}{%- else %}"
    "{{- m.role[0] + m.content }}{% endif %}{%- endfor %}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    found = reading.from_huggingface(checkpoint(tmp_path_factory.mktemp("t")))
    found.backend.add_special_tokens(["<s>"])
    return dataclasses.replace(found, special={"bos_token": "<s>", "eos_token": "</s>"})


def with_template(tokenizer, template, starts=True):
    prefix = (tokenizer.backend.token_to_id("<s>"),) if starts else ()
    return dataclasses.replace(tokenizer, chat_template=template, prefix_ids=prefix)


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("template", [CHATML, THINKING, "{{ bos_token }}" + CHATML, "<s>" + THINKING])
def test_what_goes_along_writes_the_same(tokenizer, template, starts):
    """BOS stands before every text by the bundle, or is written by the template: never both, never neither."""
    own = with_template(tokenizer, template, starts)
    found = templates.carry(own)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": " Hi\n"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "<think>x</think>\n\n4 "}]},
        {"role": "user", "content": [{"type": "text", "text": "Yes"}]},
    ]
    text = minijinja.render(found.source, messages, {"add_generation_prompt": True, "enable_thinking": False}, NOW)
    expected = own.render_chat(messages, enable_thinking=False)
    assert ("<s>" if starts and found.opens_bos else "") + text == expected


def test_bos_before_later_turns(tokenizer):
    """Llama 2's form: the bundle puts the first, the template the others."""
    template = "{% for m in messages %}{{ bos_token + m.content + eos_token }}{% endfor %}"
    found = templates.carry(with_template(tokenizer, template))
    assert minijinja.render(found.source, SAID, {}, NOW) == "SYS</s><s> U1 </s>"


def test_the_end_of_an_answer(tokenizer):
    assert templates.carry(with_template(tokenizer, CHATML)).turn_end == "<|im_end|>\n"


TURNS = (
    "{%% for m in messages %%}{{ '<%%s>' %% m.role + m.content%s + '</%%s>\n' %% m.role }}{%% endfor %%}"
    "{{ '<assistant>' if add_generation_prompt }}"
)
AROUND = {role: (f"<{role}>", f"</{role}>\n") for role in ("system", "user")} | {
    "model": ("<assistant>", "</assistant>\n")
}


def test_what_minijinja_lacks_is_said_by_prefixes_and_suffixes(tokenizer):
    """As Jinja of ours: LiteRT-LM would take the texts for Jinja, and drop newlines that they begin with."""
    own = with_template(tokenizer, TURNS % "")
    found = templates.carry(own)
    assert not found.affixes and "%" not in found.source.replace("{%", "").replace("%}", "")
    messages = [*SAID, {"role": "assistant", "content": "{{ A }}\n"}, {"role": "user", "content": "🙂"}]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages[2:]]
    rendered = minijinja.render(found.source, [*SAID, *parts], {"add_generation_prompt": True}, NOW)
    assert rendered == own.render_chat(messages)
    assert rendered.startswith("<system>SYS</system>\n<user> U1 </user>\n<assistant>{{ A }}\n</assistant>\n<user>🙂")


@pytest.mark.parametrize(
    ("template", "affixes", "changes"),
    [
        (TURNS % "", AROUND, False),
        ("{{ bos_token }}" + TURNS % ".strip()", AROUND, True),
        (TURNS % "" + "{{ '<think></think>' if not enable_thinking | default(true) }}", AROUND, False),
        ("{% if messages[0].role != 'system' %}You are kind.{% endif %}" + TURNS % "", {}, False),
        (
            "{{ raise_exception('no') if messages[0].role == 'system' }}" + TURNS % "",
            {role: AROUND[role] for role in ("user", "model")},
            False,
        ),
    ],
)
def test_what_a_task_file_holds(tokenizer, template, affixes, changes):
    """Which is not Jinja, so that what MiniJinja lacks is no hindrance."""
    found = templates.around_turns(with_template(tokenizer, template))
    assert (dict(found.affixes), found.changes_texts, found.source) == (affixes, changes, "")
    assert found.turn_end == "</assistant>\n"


def test_prefixes_of_any_characters(tokenizer):
    affixes = {"user": ("🙂 é\u2028", "\\n'\"{{ x }}\t"), "model": ("M\x7f", "")}
    own = with_template(tokenizer, bundle.affixes_template(affixes, "🙃"))
    assert own.render_chat([{"role": "user", "content": "Q"}]) == "🙃🙂 é\u2028Q\\n'\"{{ x }}\tM\x7f"


# Of prefixes and suffixes in a bundle; None where LiteRT-LM fails.
SPLICED = [
    ({"user": ("<u>", "</u>\n"), "model": ("<m>", "</m>\n"), "system": ("<s>", "</s>\n")},
     "<s>S</s>\n<u> U\n</u>\n<m>A</m>\n<u>Q?</u>\n<m>"),
    ({"user": ("\n<u>\n", " </u>\n\n"), "model": (" \n<m>\n", "\n"), "system": ("\n\n", "  ")},
     "\nS  <u>\n U\n </u>\n\n \n<m>\nA<u>\nQ? </u>\n\n \n<m>\n"),
    ({"user": ("", "E"), "model": ("M", ""), "system": ("", "")}, "S U\nEMAQ?EM"),
    ({"user": ("", "x"), "model": ("", ""), "system": ("", "")}, "S U\nxAQ?x"),
    ({"user": ("{{ 'x' }}{% if %}", "{#a#}"), "model": ("<m>", ""), "system": ("", "")}, None),
]  # fmt: skip


@pytest.mark.parametrize(("affixes", "expected"), SPLICED)
def test_prefixes_and_suffixes_of_a_bundle_are_jinja_to_litert_lm(tokenizer, affixes, expected):
    own = with_template(tokenizer, bundle.spliced_template(affixes))
    said = (("system", "S"), ("user", " U\n"), ("assistant", "A"), ("user", "Q?"))
    messages = [{"role": role, "content": text} for role, text in said]
    if expected is None:
        with pytest.raises(TokenizerError, match="the chat template is broken"):
            own.render_chat(messages)
        return
    assert own.render_chat(messages) == expected
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    (prefix, suffix), begin = affixes["user"], affixes["model"][0]
    joined = own.render_chat([{"role": "user", "content": parts}, {"role": "tool", "content": "T"}])
    assert joined == prefix.removeprefix("\n") + "onetwo" + suffix + "T" + begin


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }", "broken in line 1: unexpected '}'"),
        ("{% for m in messages %}{{ m.content.count('i') }}{% endfor %}", "no attribute 'count'"),
        ("{% for m in messages %}{{ '%s' % m.content }}{% endfor %}", "% of a text"),
        ("{% for m in messages %}Try x.strip() {{ m.content }}{% endfor %}", r"expected 'Try x.strip\(\) Hi"),
        ("{{ raise_exception('no') }}", "it refuses every conversation: the chat template refuses them: no;"),
        ("{% include 'x' %}", "it refuses every conversation: the chat template cannot use them: "),
        ("{% for m in messages %}{{ m }}{% endfor %}", "expected .* it writes"),
    ],
)
def test_what_cannot_go_along_is_one_line(tokenizer, template, reason):
    with pytest.raises(TokenizerError, match=reason) as caught:
        templates.carry(with_template(tokenizer, template))
    message = str(caught.value)
    assert "\n" not in message and "--chat-template FILE" in message


@pytest.mark.parametrize(
    ("before", "calls"),
    [
        ("{% if tools %}{{ tools | tojson }}{% endif %}", True),
        ("", False),
        ("{{ raise_exception('no tools') if tools }}", False),
        ("{% if tools %}{{ '%s' % tools[0].function.name }}{% endif %}", False),
    ],
)
def test_calls_of_functions(tokenizer, before, calls):
    """Only of a template that names tools does a bundle say that it has them."""
    template = before + "{% for m in messages %}{{ m.role }}{{ m.content or '' }}{% endfor %}"
    assert templates.carry(with_template(tokenizer, template)).tools is calls


def test_no_template(tokenizer):
    own = with_template(tokenizer, "")
    assert templates.carry(own) == templates.around_turns(own) == templates.Carried()
