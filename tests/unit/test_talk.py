"""``generate`` and ``chat`` on the command line: conversations that outlive mistakes, and text in any encoding."""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import time

import pytest

from llmjax import LLM
from llmjax.cli import loading
from llmjax.cli.main import _parser, main
from tests import tiny

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ mood }}"
FLAGS = ["--model", "x", "--max-tokens", "4", "--temperature", "0"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tiny.checkpoint(tmp_path_factory.mktemp("tiny"))
    (folder / "generation_config.json").write_text('{"top_k": 7, "temperature": 0.6}')
    return tiny.roomy(LLM(folder, max_batch=4, chunk=16, block=16, chat_template=TEMPLATE))


@pytest.fixture
def asked(llm, monkeypatch):
    """The verbs run on one model; what was asked of it is noted."""
    conversations = []
    request = llm.chat_request

    def recorded(messages, *args, **options):
        conversations.append([m["content"] for m in messages])
        return request(messages, *args, **options)

    monkeypatch.setattr(llm, "chat_request", recorded)
    monkeypatch.setattr(loading, "load_llm", lambda args, slots=None: (llm, 0.0))
    return conversations


def say(monkeypatch, text: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))


def test_a_conversation_outlives_what_cannot_be_answered(asked, capsys, monkeypatch):
    say(monkeypatch, b"\xef\xbb\xbfhi\n" + b"long " * 60 + b"\nso\ncaf\xe9\nyes\n/undo\nno\n/reset\n\nnew\n")
    assert main(["chat", *FLAGS]) == 1
    out, err = capsys.readouterr()
    answers = out.removesuffix("\n").split("\n")
    assert asked[0] == ["hi"] and asked[2] == ["hi", answers[0], "so"]
    assert asked[3] == [*asked[2], answers[1], "yes"]
    assert asked[4] == [*asked[2], answers[1], "no"]
    assert asked[5] == ["new"]
    assert "longer than the model's context of 200" in err and "the conversation is as it was before (/undo" in err
    assert "stdin: expected UTF-8 text, found byte 0xe9 after 3 characters" in err


@pytest.mark.parametrize(("number", "goes_on"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
@pytest.mark.usefixtures("in_a_terminal")
def test_only_ctrl_c_ends_an_answer_alone(asked, llm, capsys, monkeypatch, number, goes_on):
    """What asks the process to end ends it, also in the middle of an answer."""
    run = llm.run

    def signalled(requests, **options):
        if len(asked) == 1:
            os.kill(os.getpid(), number)
            time.sleep(1)
        return run(requests, **options)

    monkeypatch.setattr(llm, "run", signalled)
    say(monkeypatch, b"hi\nso\n")
    assert main(["chat", *FLAGS]) == (0 if goes_on else 130)
    assert len(asked) == (2 if goes_on else 1)
    assert ("the conversation goes on" in capsys.readouterr().err) is goes_on


def test_an_interrupted_answer_stays_as_far_as_it_came(asked, llm, capsys, monkeypatch):
    run, calls = llm.run, []

    def interrupted(requests, **options):
        calls.append(1)
        with contextlib.closing(run(requests, **options)) as updates:
            for i, update in enumerate(updates):
                if len(calls) == 1 and i == 2:
                    raise KeyboardInterrupt
                yield update

    monkeypatch.setattr(llm, "run", interrupted)
    say(monkeypatch, b"hi\nso\n")
    assert main(["chat", *FLAGS]) == 0
    out, err = capsys.readouterr()
    answers = out.split("\n")
    assert "llmjax: interrupted; the conversation goes on" in err
    assert asked[1] == ["hi", answers[0], "so"] and answers[0] and answers[1]
    monkeypatch.setattr(llm, "run", run)
    say(monkeypatch, b"hi\n")
    assert main(["chat", *FLAGS]) == 0
    whole = capsys.readouterr().out.split("\n")[0]
    assert whole.startswith(answers[0]) and len(whole) > len(answers[0])


def test_text_that_is_none(asked, capsys, monkeypatch):
    say(monkeypatch, b"caf\xe9")
    assert main(["generate", *FLAGS, "--prompt", "-"]) == 2
    assert capsys.readouterr().err == "llmjax: stdin: expected UTF-8 text, found byte 0xe9 after 3 characters\n"
    assert main(["generate", *FLAGS, "--prompt", "caf\udce9"]) == 2
    assert "prompt: expected UTF-8 text, found byte 0xe9" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", *FLAGS, "--prompt", "-"]) == 2
    assert capsys.readouterr().err == "llmjax: prompt: stdin is closed\n"


def test_a_stdout_of_another_encoding(asked, llm, capsys, monkeypatch):
    out = io.BytesIO()
    stdout = io.TextIOWrapper(out, encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert main(["generate", *FLAGS, "--prompt", "abc"]) == 0
    expected = llm.generate("abc", {"max_tokens": 4, "temperature": 0})[0].outputs[0].text
    assert not expected.isascii()
    assert out.getvalue() == f"{expected}\n".encode("ascii", "backslashreplace")


def test_speed_memory_and_the_models_own_settings_are_told(asked, capsys):
    assert main(["generate", *FLAGS, "--prompt", "xyz", "--verbose"]) == 0
    err = capsys.readouterr().err
    assert "llmjax: generation_config.json: top_k 7 (--generation-config none for the plain defaults)\n" in err
    told = r"prompt 3 tokens.*, [\d,.]+ tok/s; answer 4 tokens, [\d,.]+ tok/s; memory: weights 0.4 MB.*[\d.]+ GB\n$"
    assert re.search(told, err)
    assert main(["generate", *FLAGS, "--prompt", "abc", "--top-k", "3"]) == 0
    assert capsys.readouterr().err == ""


def test_flags_reach_the_model(llm, tmp_path):
    (tmp_path / "t.jinja").write_text("<{{ messages[0].content }}{{ mood }}>", encoding="utf-8-sig")
    flags = ["--model", str(llm.model.path), "--prompt", "x", "--chat", "--generation-config", "none"]
    flags += ["--chat-template", str(tmp_path / "t.jinja"), "--chat-template-kwargs", '{"mood": "!"}', "--fold-system"]
    loaded, _ = loading.load_llm(_parser().parse_args(["generate", *flags]))
    assert loaded.rendered([{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]) == "<be\n\nhi!>"
    assert loaded.generation == {} and llm.generation == {"top_k": 7, "temperature": 0.6}


def test_a_broken_template_is_told_before_anything_runs(llm, capsys, tmp_path):
    (tmp_path / "t.jinja").write_text("{% if %}")
    flags = ["--model", str(llm.model.path), "--prompt", "x", "--chat", "--chat-template", str(tmp_path / "t.jinja")]
    assert main(["generate", *flags]) == 2
    assert "llmjax: chat_template: the chat template is broken in line 1" in capsys.readouterr().err
    assert main(["generate", *flags[:-1], str(tmp_path / "none")]) == 2
    assert "none: cannot read the file: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["batch", "--lora-modules", "a=x", "a=y"], "'a' is there twice"),
        (["batch", "--lora-modules", "a=x", "--lora-modules", "a=y"], "'a' is there twice"),
        (["batch", "--lora-modules", "a"], "expected NAME=PATH, found 'a'"),
        (["generate", "--logit-bias", "1:2,1:3"], "a token is there twice in '1:2,1:3'"),
        (["generate", "--chat-template-kwargs", "[1]"], "expected a JSON object, found '[1]'"),
        (["generate", "--chat-template-kwargs", '{"a": 1, "a": 2}'], "not valid JSON: a is there twice"),
        (["generate", "--logprobs", "2"], "llmjax generate: error: unrecognized arguments: --logprobs"),
        (["generate", "--max-token", "2"], "arguments: --max-token; did you mean --max-tokens? (llmjax generate"),
        (["generate", "-x"], "llmjax generate: error: unrecognized arguments: -x (llmjax generate --help)"),
        (["generate", "--stop", "--end"], "argument --stop: expected one argument, which if it begins with -"),
        (["score", "--max-batch", "2"], "unrecognized arguments: --max-batch"),
        (["trace", "--truncate-prompt"], "unrecognized arguments: --truncate-prompt"),
        (["generate", "--prompt", "y"], "argument --prompt: given twice, expected once"),
        (["generate", "--seed", "1", "--seed=1"], "argument --seed: given twice, expected once"),
        (["batch", "--model", "y"], "argument --model: given twice, expected once"),
        (["trace", "--taps", "a", "--taps", "b", "--output", "p"], "argument --output: given twice, expected once"),
    ],
)
def test_what_is_said_twice_or_means_nothing(capsys, args, message):
    needed = {"generate": ["--prompt", "x"], "trace": ["--ids", "1", "--output", "o"]}
    needed = needed.get(args[0], ["--input", "i", "--output", "o"])
    with pytest.raises(SystemExit) as stopped:
        main([args[0], "--model", "x", *needed, *args[1:]])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--verison", "llmjax: error: unrecognized arguments: --verison; did you mean --version? (llmjax --help)"),
        ("lora --model", "llmjax lora: error: unrecognized arguments: --model"),
        ("batch --model x --inpt y --output z", "unrecognized arguments: --inpt; did you mean --input? (llmjax batch"),
        ("inspect a b", "llmjax inspect: error: unrecognized arguments: b (llmjax inspect --help)"),
    ],
)
def test_a_slip_of_the_keyboard_is_what_is_told(capsys, words, message):
    """It was that --input is missing, and of an unknown flag the usage of no verb."""
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1


def every_verb():
    """By its words, the parser of each."""
    verbs = {(): _parser()}
    for words in ((), ("lora",)):
        [inner] = [a.choices for a in verbs[words]._actions if isinstance(a, argparse._SubParsersAction)]
        verbs |= {(*words, name): parser for name, parser in inner.items()}
    assert len(verbs) > 15
    return verbs


def test_every_verb_and_flag_says_what_it_is():
    for words, parser in every_verb().items():
        assert parser.description, words
        assert not [a.option_strings or a.dest for a in parser._actions[1:] if not a.help and a.nargs != "A..."], words


def test_no_flag_of_one_value_is_given_twice(capsys):
    """Of every verb, whoever adds the flag; ``append`` takes several, and a switch twice says the same."""
    values = {"--logit-bias": "1:1", "--chat-template-kwargs": "{}", "--shuffle": "on"}
    for words, parser in every_verb().items():
        for flag in parser._actions:
            if flag.nargs is not None or not flag.option_strings or isinstance(flag, argparse._AppendAction):
                continue
            name = flag.option_strings[-1]
            value = str(next(iter(flag.choices or [values.get(name, "1")])))
            with pytest.raises(SystemExit):
                main([*words, name, value, name, value])
            assert f"{name}: given twice, expected once" in capsys.readouterr().err, (words, name)
    with pytest.raises(SystemExit):
        main(["convert", "a", "b", "--to", "task", "--verify", "--no-verify"])
    assert "--verify/--no-verify: given twice, expected once" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == "llmjax 0.1.0\n"
