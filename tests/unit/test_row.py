"""Stop strings and finish reasons, on a tokenizer whose tokens are single characters."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from llmjax.runtime.params import SamplingParams
from llmjax.runtime.row import Request, Row, special_stops
from llmjax.text.reading import from_huggingface

DATA = Path(__file__).parents[1] / "data/tokenizers"
EOS = 0


class Letters:
    """Token id = code point; enough of Tokenizer for a Row."""

    def detokenizer(self):
        class Plain:
            push = staticmethod(chr)
            flush = staticmethod(lambda: "")

        return Plain()

    def parted(self, text, prompt):
        return None, text


def run(text: str | Sequence[int], **params):
    ids = [ord(c) for c in text] if isinstance(text, str) else text
    params = {"max_tokens": 100} | params
    row = Row(Request("r", None, [1], SamplingParams(**params), 0), Letters(), [EOS])
    pieces = []
    for token in ids:
        pieces.append(row.push(token, -0.5, {}))
        if row.finish_reason:
            break
    out = row.completion() if row.finish_reason else None
    return pieces, out


def test_stop_string_is_cut_and_never_shown():
    pieces, out = run("hello STOP world", stop=["STOP"])
    assert out.text == "hello " == "".join(pieces)
    assert (out.finish_reason, out.stop_reason) == ("stop", "STOP")
    assert len(out.token_ids) == len("hello STOP")
    assert all("S" not in p for p in pieces)


def test_a_beginning_that_leads_nowhere_is_shown_late_but_whole():
    pieces, _ = run("an STO end", stop=["STOP"])
    assert "".join(pieces) == "an STO end"
    assert pieces[3:6] == ["", "", ""]


def test_the_earliest_stop_wins():
    _, out = run("aabbcc", stop=["bc", "ab"])
    assert (out.text, out.stop_reason) == ("a", "ab")


def test_overlapping_beginnings():
    _, out = run("aaab!", stop=["aab"])
    assert (out.text, out.stop_reason) == ("a", "aab")


def test_held_back_text_appears_at_the_end():
    pieces, out = run("xyST", stop=["STOP"], max_tokens=4)
    assert out.text == "xyST" == "".join(pieces)
    assert out.finish_reason == "length"


@pytest.mark.parametrize(
    ("params", "reason", "stop", "count"),
    [
        ({}, "stop", None, 3),
        ({"stop_token_ids": [ord("b")]}, "stop", ord("b"), 2),
        ({"ignore_eos": True, "max_tokens": 4}, "length", None, 4),
        ({"max_tokens": 2}, "length", None, 2),
        ({"min_tokens": 3, "max_tokens": 5}, "length", None, 5),
    ],
)
def test_what_ends_a_row(params, reason, stop, count):
    _, out = run([ord("a"), ord("b"), EOS, ord("c"), ord("d")], **params)
    assert (out.finish_reason, out.stop_reason, len(out.token_ids)) == (reason, stop, count)


@pytest.mark.parametrize(
    ("min_tokens", "text"),
    [(0, "a "), (5, "a "), (6, "a STOP b "), (7, "a STOP b "), (12, "a STOP b "), (13, "a STOP b STOP")],
)
def test_no_stop_string_fires_before_min_tokens(min_tokens, text):
    """It fires with the token that completes it, if that may end the row, and takes back what it began with."""
    pieces, out = run("a STOP b STOP", stop=["STOP"], min_tokens=min_tokens, max_tokens=13)
    assert out.text == text == "".join(pieces)
    assert (out.finish_reason, out.stop_reason) == (("length", None) if min_tokens == 13 else ("stop", "STOP"))


def test_a_stop_string_that_was_passed_over_may_begin_another():
    pieces, out = run("aaa", stop=["aa"], min_tokens=2)
    assert out.text == "a" == "".join(pieces)


@pytest.mark.parametrize(("text", "stop", "count"), [("\n", "\n", 1), ("x\n\ny", "\n\n", 3), ("a😀b", "😀", 5)])
def test_a_stop_string_of_byte_tokens_fires_with_its_last_byte(text, stop, count):
    tokenizer = from_huggingface(DATA / "gemma_2b")
    byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if tokenizer.piece(i).startswith("<0x")}
    row = Row(Request("r", None, [1], SamplingParams(stop=stop), 0), tokenizer, [EOS])
    for value in text.encode():
        row.push(byte[bytes([value])], -0.5, {})
        if row.finish_reason:
            break
    assert (row.completion().text, len(row.completion().token_ids)) == (text.partition(stop)[0], count)


def test_stop_strings_that_name_special_tokens():
    tokenizer = from_huggingface(DATA / "llama")
    assert special_stops(tokenizer, ["text", "<|end_of_text|>", "<|begin_of_text|>"]) == [411, 410]
    with pytest.warns(UserWarning, match=r"'<\|end_of_text\|>\\n' holds the special token '<\|end_of_text\|>'"):
        assert special_stops(tokenizer, ["<|end_of_text|>\n"]) == []


def test_the_ending_token_is_not_text():
    assert run([ord("a"), EOS])[1].text == "a"
    assert run("ab", stop_token_ids=[ord("b")])[1].text == "a"
