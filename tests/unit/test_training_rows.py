"""Rows of training data: which tokens are learned, and why some rows are left out."""

import dataclasses
import gzip

import numpy as np
import pytest

import llmjax
from llmjax.errors import RequestError
from llmjax.training.lines import BLANK, read_rows
from llmjax.training.rows import continuation, make_examples
from tests.tiny import checkpoint, random_model

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRIPPED = CHATML.replace(
    "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}think {% endif %}{{ m.content }}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Tokens are bytes; 256 is the end."""
    folder = checkpoint(tmp_path_factory.mktemp("rows") / "model", num_hidden_layers=1)
    loaded = llmjax.load(folder)
    return dataclasses.replace(loaded, tokenizer=dataclasses.replace(loaded.tokenizer, chat_template=CHATML))


def learned(model, row, **options) -> tuple[str, str]:
    """The whole text and what is learned of it, an end token as ``$``."""
    (example,) = make_examples([row], model, **options).examples
    return text(model, example.ids), text(model, example.ids[example.learned])


def text(model, ids) -> str:
    return "".join("$" if i == 256 else model.tokenizer.decode([i]) for i in ids)


@pytest.mark.parametrize(("row", "whole", "part"), [
    ({"prompt": "one:", "completion": " two"}, "one: two$", " two$"),
    ({"prompt": "", "completion": "two"}, "two$", "wo$"),  # nothing predicts the first
    ({"text": "one two", "id": 7}, "one two$", "ne two$"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
     "<|user|>a$\n<|assistant|>b$\n", "b$"),
    ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                   {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
                   {"role": "assistant", "content": [{"type": "text", "text": "d"}]}]},
     "<|system|>s$\n<|user|>a$\n<|assistant|>b$\n<|user|>c$\n<|assistant|>d$\n", "b$d$"),
    ({"messages": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]},
     "<|assistant|>b$\n", "|assistant|>b$"),  # it spoke first: nobody opened its turn; what follows the last is no use
])  # fmt: skip
def test_texts(model, row, whole, part):
    assert learned(model, row) == (whole, part)


ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
SAID = [[{"role": "assistant", "content": text}] for text in "bc"]
EARLIER = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
WHOLE = "<|system|>s$\n<|user|>a$\n<|assistant|>"


@pytest.mark.parametrize(("row", "prompt", "chosen", "rejected"), [
    ({"prompt": "one:", "chosen": " two", "rejected": " six"}, "one:", " two$", " six$"),
    ({"chosen": "H: a\n\nA: no one", "rejected": "H: a\n\nA: no two"}, "H: a\n\nA: no", " one$", " two$"),
    ({"chosen": "H: a or b", "rejected": "H: a old"}, "H: a o", "r b$", "ld$"),
    ({"prompt_ids": [64, 65], "chosen_ids": [66, 256], "rejected_ids": [67]}, "ab", "c$", "d"),
    ({"prompt": ASKED, "chosen": SAID[0], "rejected": SAID[1], "tools": None}, WHOLE, "b$", "c$"),
    ({"chosen": ASKED + SAID[0], "rejected": ASKED + SAID[1], "id": 1}, WHOLE, "b$", "c$"),
    ({"prompt": "a", "chosen": ASKED + SAID[0], "rejected": ASKED + SAID[1]}, WHOLE, "b$", "c$"),
    ({"prompt": None, "chosen": ASKED + SAID[0], "rejected": ASKED + SAID[1], "text": None}, WHOLE, "b$", "c$"),
    ({"prompt": EARLIER + ASKED[1:], "chosen": SAID[0], "rejected": SAID[1]},  # what it said before is not learned
     "<|user|>x$\n<|assistant|>y$\n<|user|>a$\n<|assistant|>", "b$", "c$"),
    ({"prompt": ASKED, "chosen": SAID[0] + EARLIER, "rejected": SAID[1]}, WHOLE, "b$y$", "c$"),
])  # fmt: skip
def test_preferences(model, row, prompt, chosen, rejected):
    data = make_examples([row], model, dpo=True)
    (pair,) = data.examples
    assert not data.unused and pair.tokens == len(chosen) + len(rejected)

    for half, said in ((pair.chosen, chosen), (pair.rejected, rejected)):
        assert text(model, half.ids).startswith(prompt) and text(model, half.ids[half.learned]) == said
        assert not half.learned[: len(prompt)].any()


@pytest.mark.parametrize(("row", "why"), [
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected: empty"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same tokens"),
    ({"prompt": "", "chosen": "b", "rejected": "c"}, "prompt: no token"),
    ({"prompt": "a", "chosen": "b", "rejected": "c" * 40}, "rejected: 42 tokens, longer than 32"),
    ({"prompt": "a", "chosen": "b", "rejected": 3}, "prompt, chosen, rejected: expected a prompt and two texts, or"),
    ({"chosen": "ab", "rejected": "a"}, "rejected: no text behind what chosen and rejected begin with in common"),
    ({"chosen": "ab", "rejected": ["a"]}, "chosen, rejected: expected a prompt and two texts, or lists of messages"),
    ({"prompt": "a", "chosen": ASKED + SAID[0], "rejected": SAID[1]}, "a prompt that the conversations begin with"),
    ({"prompt": "b", "chosen": ASKED + SAID[0], "rejected": ASKED + SAID[1]}, "a prompt that the conversations begin"),
    ({"prompt": "b", "chosen": ["b"], "rejected": ["b"]}, "a prompt that the conversations begin with"),
    ({"prompt": ASKED, "chosen": ASKED + SAID[0], "rejected": SAID[1]}, "chosen: begins with a message of 'system'"),
    ({"prompt": ASKED, "chosen": [], "rejected": SAID[1]}, "chosen: no message behind"),
    ({"prompt": ASKED, "chosen": [{"content": "b"}], "rejected": SAID[1]}, "chosen: messages[2]"),
    ({"chosen": SAID[0], "rejected": SAID[1]}, "chosen: no message that chosen and rejected both follow"),
    ({"chosen": ASKED + SAID[0], "rejected": ASKED + SAID[0]}, "chosen: no message behind"),
    ({"prompt": 5, "chosen": SAID[0], "rejected": SAID[1]}, "prompt: expected a list, found 5"),
    ({"prompt": "a", "completion": "b", "chosen": None, "rejected": None}, "completion: no preferences; train without"),
    ({"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [600]}, "rejected: ids: token id 600 is outside"),
    ({"prompt_ids": [5], "chosen_ids": [], "rejected_ids": [7]}, "chosen_ids: empty"),
    ({"prompt": "a", "chosen": "b"}, "fields prompt, chosen; expected one of: prompt_ids and chosen_ids and"),
    ({"prompt": "a", "completion": "b"}, "fields prompt, completion: no preferences; train without dpo, or give one"),
])  # fmt: skip
def test_bad_preferences(model, row, why):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    data = make_examples([row, good], model, max_length=32, dpo=True)
    assert [(bad.row, why in bad.why) for bad in data.bad] == [(0, True)], data.bad
    assert [pair.row for pair in data.examples] == [1]


def test_preferences_without_dpo(model):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3
    with pytest.raises(RequestError) as caught:
        make_examples(rows, model)
    assert "each of them: fields prompt, chosen, rejected: preferences; train with dpo (--dpo)" in str(caught.value)


def test_ids(model):
    for row in (
        {"ids": [5, 6, 7, 8], "loss_mask": [1, 0, 1, 0], "prompt": "not this", "completion": "nor this"},
        {"ids": np.array([5, 6, 7, 8]), "loss_mask": [0, 0, 1, 0]},
    ):
        (example,) = make_examples([row], model).examples
        assert example.ids.tolist() == [5, 6, 7, 8] and example.learned.tolist() == [False, False, True, False]
    (example,) = make_examples(
        [{"prompt_ids": [5], "completion_ids": [6, 7]}], random_model(num_hidden_layers=1)
    ).examples
    assert example.ids.tolist() == [5, 6, 7] and example.learned.tolist() == [False, True, True]


@pytest.mark.parametrize(("row", "why"), [
    ({"prompt": "a", "completion": 3}, "completion: expected a string, found 3"),
    ({"prompt": "a"}, "fields prompt; expected one of: ids; "),
    ({}, "fields none"),
    ({"text": " "}, "text: empty"),
    ({"ids": [5, 6], "loss_mask": [1]}, "loss_mask: expected 2 zeros and ones"),
    ({"ids": [5, 6], "loss_mask": [0, 0.5]}, "loss_mask: expected 2 zeros and ones"),
    ({"ids": [5, 600]}, "token id 600 is outside the vocabulary"),
    ({"ids": [5, "a"]}, "expected a list of token ids"),
    ({"ids": []}, "empty, expected at least one token"),
    ({"ids": [5]}, "no token to learn"),
    ({"ids": "abc"}, "ids: expected a list"),
    ({"prompt_ids": [5], "completion_ids": []}, "completion_ids: empty"),
    ({"messages": []}, "messages: expected a non-empty list"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant"),
    ({"messages": [{"role": "assistant"}]}, "content: expected a string"),
    ({"text": "\ud800"}, "half a surrogate"),
    ({"text": "x" * 40}, "41 tokens, longer than 32, max_length"),
    ([1], "expected an object"),
])  # fmt: skip
def test_bad_rows(model, row, why):
    data = make_examples([row, {"text": "fine"}], model, max_length=32)
    assert [(bad.row, why in bad.why) for bad in data.bad] == [(0, True)], data.bad
    assert [example.row for example in data.examples] == [1]


def test_a_template_that_takes_earlier_turns_back(model):
    stripping = dataclasses.replace(model, tokenizer=dataclasses.replace(model.tokenizer, chat_template=STRIPPED))
    one = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert learned(stripping, {"messages": one})[1] == "think b$"
    data = make_examples([{"messages": [*one, *one]}, {"messages": one}], stripping)
    assert "messages[1]: the chat template writes this turn otherwise" in data.bad[0].why


def test_unused_fields_are_told(model):
    data = make_examples([{"text": "a b", "source": "x"}, {"text": "c d", "source": "y", "id": 1}], model, where="rows")
    assert data.notes() == ["rows: fields that are not used: source (2 rows)"]
    talk = {"messages": [*ASKED, *SAID[0]], "tools": [{"name": "look"}]}  # which the template does not write
    assert make_examples([talk], model).notes() == ["rows: fields that are not used: tools (1 row)"]
    own = dataclasses.replace(model.tokenizer, tools_template=f"{{{{ tools[0].name }}}}{model.tokenizer.chat_template}")
    assert not make_examples([talk], dataclasses.replace(model, tokenizer=own)).notes()


def test_a_text_goes_on(model):
    """A tokenizer that puts a space before every text must not put one into the middle."""
    spaced = dataclasses.replace(model.tokenizer, dummy_prefix=True)
    assert spaced.decode(spaced.encode("ab")) == " ab"
    assert spaced.decode(continuation(spaced, "ab", "cd")) == "cd"


def test_files_of_rows(tmp_path):
    rows, file = b'{"text": "a"}\n\n{"text": "b", "text": "c"}\n[1', tmp_path / "rows.jsonl"
    for data in (rows, b"\xef\xbb\xbf" + rows, gzip.compress(rows)):
        file.write_bytes(data)
        found = read_rows(file)
        assert found[:2] == [{"text": "a"}, BLANK]
        assert "text is there twice" in str(found[2]) and "not valid JSON" in str(found[3])
    for data, message in (
        (gzip.compress(rows * 99)[:-60], "cannot read the file"),
        (gzip.compress(rows)[:12] + b"xxxxxxxxxxxxxxx", "cannot read the file"),
        (b"version https://git-lfs.github.com/spec/v1\noid x", "a git-lfs pointer"),
        ("text".encode("utf-16"), "not UTF-8"),
    ):
        file.write_bytes(data)
        with pytest.raises(RequestError, match=f"^{file}: {message}"):
            read_rows(file)


@pytest.mark.parametrize("rows", [5, None, b"text", {"text": "a"}])
def test_no_rows(model, rows):
    with pytest.raises(RequestError, match="^rows: expected a JSONL file's path or objects, found"):
        make_examples(rows, model)


def test_a_row_beyond_the_context(model):
    (bad,) = make_examples([{"text": "x" * 300}, {"text": "fine"}], model).bad
    assert bad.why.startswith("301 tokens, longer than 200, the model's context; shorten it, or load the model with")
