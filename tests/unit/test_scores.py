"""Scores: the statistics by their definition, and in time that grows as the text does."""

import json
import math

import numpy as np
import pytest

from llmjax.batch.scoring import describe
from llmjax.runtime.outputs import Pooled, Score


class Counted(list):
    """A list that counts how often it is gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_statistics_are_numpys():
    p = np.random.default_rng(0).uniform(-9, 0, 501)
    score = Score([], [None, *p], [])
    assert score.nll == pytest.approx(-p.mean(), rel=1e-12)
    assert score.nll_standard_error == pytest.approx(p.std(ddof=1) / math.sqrt(501), rel=1e-12)
    assert score.perplexity == pytest.approx(np.exp(-p.mean()), rel=1e-12)
    assert score.perplexity_standard_error == pytest.approx(score.perplexity * score.nll_standard_error, rel=1e-12)


@pytest.mark.parametrize("what", ["nll_standard_error", "perplexity_standard_error"])
def test_a_list_is_gone_through_a_few_times_however_long(what):
    passes = []
    for tokens in (10, 1000):
        logprobs = Counted([-1.0, -2.0] * (tokens // 2))
        getattr(Score([], logprobs, []), what)
        passes.append(logprobs.passes)
    assert passes[0] == passes[1] < 10


def test_the_summary_of_many_tokens():
    """As many as a job has: a second pass over them for each took nine minutes for 3,000 short texts."""
    pooled = Pooled()
    for _ in range(50):
        pooled.add([-1.0, -3.0] * 1000)
    assert describe(pooled.to_dict()) == "100,000 tokens, NLL 2.00000 ± 0.00316, perplexity 7.3891 ± 0.0234"
    assert pooled.tokens == 100_000


def test_texts_pooled_are_as_one():
    """However the tokens lie in texts, some of them empty or of one token."""
    p = np.random.default_rng(1).uniform(-9, 0, 501)
    pooled = Pooled()
    for part in np.split(p, [0, 1, 7, 7, 300]):
        pooled.add(part.tolist())
    whole = Score([], [None, *p], [])
    for name, value in whole.pooled.to_dict().items():
        assert pooled.to_dict()[name] == pytest.approx(value, rel=1e-12), name


def test_no_perplexity_beyond_floating_point():
    score = Score([1, 2, 3], [None, -800.0, -900.0], [None, 0, 0])
    assert score.perplexity == math.inf
    values = json.loads(json.dumps(score.to_dict(), allow_nan=False))
    assert values["nll"] == 850 and values["perplexity"] is None and values["perplexity_standard_error"] is None
