"""The figures of scripts/quality.py, against plain formulas on small distributions."""

import numpy as np
import pytest

from scripts import quality


def logits(seed: int, rows: int = 150, width: int = 11) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32) * 3


def test_figures_follow_their_definitions():
    p, q = logits(0), logits(1)
    ids = np.random.default_rng(2).integers(0, 11, 150).tolist()
    tokens = quality.compare(p, q, ids)
    assert len(tokens.kl) == 149  # three blocks of rows; the last token predicts nothing
    for row in (0, 63, 64, 148):
        a, b = (np.exp(x[row].astype(float)) / np.exp(x[row].astype(float)).sum() for x in (p, q))
        assert tokens.reference[row] == pytest.approx(np.log(a[ids[row + 1]]))
        assert tokens.candidate[row] == pytest.approx(np.log(b[ids[row + 1]]))
        assert tokens.kl[row] == pytest.approx((a * np.log(a / b)).sum())
        assert tokens.same_top[row] == (a.argmax() == b.argmax())
    figures = quality.summary(tokens)
    assert figures["perplexity"] == pytest.approx(np.exp(-tokens.candidate.mean()))
    assert figures["perplexity_ratio"] == pytest.approx(np.exp((tokens.reference - tokens.candidate).mean()))
    below, above = np.sort(tokens.kl)[146:148]  # 0.99 * 148 = 146.52
    assert below < figures["kl_99"] < above
    assert figures["same_top"] == tokens.same_top.mean()


def test_a_model_beside_itself():
    tokens = quality.compare(logits(0), logits(0), [1] * 150)
    figures = quality.summary(tokens)
    assert figures["kl_max"] == 0 and figures["same_top"] == 1
    assert (figures["perplexity_ratio"], figures["perplexity_ratio_standard_error"]) == (1, 0)


class Letters:
    """Token id = code point, after the tokens in front of every text."""

    def __init__(self, before: list[int]):
        self.before = before

    def encode(self, text: str) -> list[int]:
        return self.before + [ord(c) for c in text]


@pytest.mark.parametrize("before", [[], [2]])
def test_windows_are_whole_and_lose_nothing(before):
    text = "".join(chr(100 + i % 700) for i in range(1200))
    found = quality.windows(Letters(before), text)
    assert [len(w) for w in found] == [512, 512]
    assert all(w[: len(before)] == before for w in found)
    assert "".join(chr(i) for w in found for i in w[len(before) :]) == text[: 2 * (512 - len(before))]


def test_the_text_is_long_and_the_same_each_time():
    assert len(quality.text()) == quality.CHARACTERS
    assert quality.text() == quality.text()
