"""Thoughts before an answer: marks stay in texts, and what takes a text apart takes them out."""

from typing import Any

import pytest
import tokenizers

from llmjax.batch import native, openai
from llmjax.runtime.params import SamplingParams
from llmjax.runtime.row import Request, Row
from llmjax.text import reading
from llmjax.text.thinking import parted
from tests import tiny

TEMPLATE = """
{%- macro strip(text) -%}
    {%- for part in text.split('<channel|>') -%}{{- part.split('<|channel>')[0] -}}{%- endfor -%}
{%- endmacro -%}
{%- if enable_thinking | default(false) -%}{{- '<|turn>system\n<|think|><turn|>\n' -}}{%- endif -%}
{%- for message in messages -%}
    {{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' -}}
    {{- strip(message.content) | trim + '<turn|>\n' -}}
{%- endfor -%}
{{- '<|turn>model\n' if add_generation_prompt -}}
"""
NO_LOGPROBS: Any = None  # an answer without them is looked at for nothing else
MARKS = ["<|channel>", "<channel|>", "<|turn>", "<turn|>", "<|think|>"]


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def folder(request, tmp_path_factory):
    """A vocabulary with Gemma 4's marks, all of them special, of either kind."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("thinks"))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if request.param == "pieces":
        letters = {letter: i for i, letter in enumerate([*map(chr, range(33, 127)), "\n", "▁"])}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
        backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        steps = (tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse())
        backend.decoder = tokenizers.decoders.Sequence(list(steps))
    backend.add_special_tokens(["</s>", *MARKS])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.mark.parametrize(
    ("text", "prompt", "wanted"),
    [
        ("plain", "", (None, "plain")),
        (" kept as it is\n", "", (None, " kept as it is\n")),
        ("<|channel>thought\nhm\n<channel|>Yes.", "", ("hm", "Yes.")),
        ("<|channel>thought\n<channel|>Yes.", "", ("", "Yes.")),
        ("<|channel>thought\nin the mid", "", ("in the mid", "")),
        ("<|channel>thought\na<channel|>b <|channel>thought\nc<channel|>d", "", ("a\nc", "b d")),
        ("a<channel|>b", "<|turn>model\n<|channel>thought\n", ("a", "b")),
        ("Yes.", "<|turn>model\n<|channel>thought\n<channel|>", (None, "Yes.")),
        ("<think>\nhm\n</think>\n\nYes.", "", ("hm", "Yes.")),
        ("hm\n</think>\n\nYes.", "<think>\n", ("hm", "Yes.")),
        ("hm\n</think>\n\nYes.", "", ("hm", "Yes.")),
        ("hm", "<|im_start|>assistant\n<think>\n", ("hm", "")),
        ("Yes.", "<think>\n\n</think>\n\n", (None, "Yes.")),
    ],
)
def test_parts(text, prompt, wanted):
    assert parted(text, prompt) == wanted


def test_marks_stay_in_texts_and_other_special_tokens_do_not(folder):
    tokenizer = reading.from_huggingface(folder)
    whole = "<|turn>model\n<|channel>thought\nhm<channel|>Yes.<turn|>"
    ids = tokenizer.encode(whole, add_bos=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == whole
    shown = "model\n<|channel>thought\nhm<channel|>Yes."
    assert tokenizer.decode(ids) == shown
    stream = tokenizer.detokenizer()
    assert "".join(map(stream.push, ids)) + stream.flush() == shown


def test_what_is_no_token_is_no_mark(folder):
    """Text about tags is text."""
    tokenizer = reading.from_huggingface(folder)
    assert tokenizer.parted("a <think>b</think> c") == (None, "a <think>b</think> c")
    assert tokenizer.parted("<|channel>thought\nb<channel|>c") == ("b", "c")


def answered(folder, text, prompt):
    tokenizer = reading.from_huggingface(folder)
    ids = [*tokenizer.encode(text, add_bos=False), *tokenizer.encode("<turn|>", add_bos=False)]
    row = Row(Request("0", prompt, [1], SamplingParams(max_tokens=99), 0), tokenizer, ids[-1:])
    for token in ids:
        row.push(token, -1.0, {})
    return row.completion()


def test_answers_come_in_parts_at_every_door(folder):
    done = answered(folder, "<|channel>thought\nhm\n<channel|>Yes.", "<|turn>model\n")
    assert (done.reasoning, done.answer) == ("hm", "Yes.")
    assert done.text == "<|channel>thought\nhm\n<channel|>Yes."
    row = native._completion(done)
    assert (row["text"], row["reasoning"], row["answer"]) == (done.text, "hm", "Yes.")
    message = openai._chat_choice(done, NO_LOGPROBS, None)["message"]
    assert message == {"role": "assistant", "content": "Yes.", "reasoning_content": "hm", "refusal": None}
    plain = answered(folder, "Yes.", "<|turn>model\n")
    assert (plain.reasoning, plain.answer) == (None, "Yes.")
    assert "reasoning" not in native._completion(plain)
    message = openai._chat_choice(plain, NO_LOGPROBS, None)["message"]
    assert message == {"role": "assistant", "content": "Yes.", "refusal": None}


def test_a_thought_does_not_come_back_in_the_next_turn(folder):
    tokenizer = reading.from_huggingface(folder)
    said = answered(folder, "<|channel>thought\nhm\n<channel|>Yes.", "").text
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}]
    turns = "<|turn>user\nhi<turn|>\n<|turn>model\nYes.<turn|>\n<|turn>model\n"
    assert tokenizer.render_chat(messages) == turns
    thinking = "<|turn>system\n<|think|><turn|>\n"
    assert tokenizer.render_chat(messages, enable_thinking=True) == thinking + turns
