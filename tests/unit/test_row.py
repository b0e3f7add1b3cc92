"""Stop strings and finish reasons, on a tokenizer whose tokens are single characters."""

from collections.abc import Sequence

import pytest

from llmjax.runtime.params import SamplingParams
from llmjax.runtime.row import Request, Row

EOS = 0


class Letters:
    """Token id = code point; enough of Tokenizer for a Row."""

    def detokenizer(self):
        class Plain:
            push = staticmethod(chr)
            flush = staticmethod(lambda: "")

        return Plain()


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


def test_the_ending_token_is_not_text():
    assert run([ord("a"), EOS])[1].text == "a"
    assert run("ab", stop_token_ids=[ord("b")])[1].text == "a"
