"""What generation and scoring return, in vLLM's names."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from llmjax.errors import LlmjaxError
from llmjax.runtime.params import SamplingParams


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One continuation.

    Attributes:
      index: which of the request's samples.
      text: without the stop string or end-of-text token; with what the model thought first, between its marks.
      token_ids: all generated tokens, the one that ended the text included.
      cumulative_logprob: sum of the tokens' log-probabilities.
      token_logprobs: natural log of each token's probability under the model (before temperature and filters).
      logprobs: for each token the most likely ids and their log-probabilities, the chosen one included; None if not
        asked for.
      finish_reason: ``stop`` or ``length``.
      stop_reason: the stop string or token id that ended the text; None for the model's own end-of-text token or
        ``length``.
      seed: what this sample drew with: as the seed of a prompt with ``n`` 1 it draws the same tokens again.
      reasoning: what the model thought before its answer; None where nothing in the text marks a thought, see
        ``llmjax.text.thinking``.
      answer: the text without that.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    token_logprobs: list[float]
    logprobs: list[dict[int, float]] | None
    finish_reason: str
    stop_reason: str | int | None
    seed: int
    reasoning: str | None
    answer: str


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    r"""The answer to one prompt.

    Attributes:
      request_id: the row's id; a prompt's place in the list unless one was given.
      prompt: the text, None when the prompt was given as ids.
      prompt_token_ids: the ids as fed, BOS included.
      outputs: the continuations, in the order of their index.
      params: what was in force; ``max_tokens`` is what the context left room for.
      seed: alone with these ids and params it gives the same tokens again; the first sample's own.
      numerics: the profile.
      prompt_logprobs: for each token of the prompt the most likely ids and their log-probabilities, the token itself
        included; None for the first, which nothing precedes; None altogether if not asked for.
      truncated_prompt_tokens: how many were dropped from the prompt's beginning, since it was too long.
      error: why there are no outputs, in ``LLM.outputs`` alone: others raise it.
      model: its name: that of its file or folder.
      token_texts: of every token that has a log-probability in ``logprobs`` or ``prompt_logprobs``, by id; a special
        token by its name, a part of a character as ``bytes:\xe2``.  None if neither was asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    params: SamplingParams
    seed: int
    numerics: str
    prompt_logprobs: list[dict[int, float] | None] | None = None
    truncated_prompt_tokens: int = 0
    error: LlmjaxError | None = None
    model: str = ""
    token_texts: dict[int, str] | None = None


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probabilities of a given text.

    Attributes:
      token_ids: the text's tokens, BOS included where the checkpoint adds it.
      logprobs: natural log of the probability of each token given those before it; None for the first, which nothing
        precedes.
      top1: the most likely token at each place; None for the first.
      tokens: the tokens' texts, see ``RequestOutput.token_texts``.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    top1: list[int | None]
    tokens: list[str] = dataclasses.field(default_factory=list)

    @property
    def scored(self) -> list[float]:
        """The log-probabilities that exist."""
        return [p for p in self.logprobs if p is not None]

    @property
    def pooled(self) -> "Pooled":
        """Their statistics."""
        found = Pooled()
        found.add(self.scored)
        return found

    @property
    def nll(self) -> float:
        """See ``Pooled``."""
        return self.pooled.nll

    @property
    def nll_standard_error(self) -> float:
        """See ``Pooled``."""
        return self.pooled.nll_standard_error

    @property
    def perplexity(self) -> float:
        """See ``Pooled``."""
        return self.pooled.perplexity

    @property
    def perplexity_standard_error(self) -> float:
        """See ``Pooled``."""
        return self.pooled.perplexity_standard_error

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it; what is not finite becomes null."""
        logprobs = [None if p is None or not math.isfinite(p) else p for p in self.logprobs]
        numbers = self.pooled.to_dict()
        del numbers["tokens"]
        return {**dataclasses.asdict(self), "logprobs": logprobs, **numbers}


@dataclasses.dataclass
class Pooled:
    """Log-probabilities of any number of texts as those of one, of which nothing is kept but two sums.

    Attributes:
      tokens: so many.
      total: their negative sum.
      squares: sum of the squares of their deviations from the mean.
    """

    tokens: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, logprobs: Sequence[float]) -> None:
        """Takes in those of a text (Chan, Golub & LeVeque 1979)."""
        count = len(logprobs)
        if not count:
            return
        total = -math.fsum(logprobs)
        mean = total / count
        squares = math.fsum((-p - mean) ** 2 for p in logprobs) if math.isfinite(mean) else math.nan
        if self.tokens:
            apart = mean - self.total / self.tokens
            squares += apart**2 * self.tokens * count / (self.tokens + count)
        self.tokens, self.total, self.squares = self.tokens + count, self.total + total, self.squares + squares

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats a token; NaN where there is none, as of a text of one token."""
        return self.total / self.tokens if self.tokens else math.nan

    @property
    def nll_standard_error(self) -> float:
        """Standard error of ``nll``, tokens taken as independent; NaN below two tokens."""
        if self.tokens < 2:
            return math.nan
        return math.sqrt(self.squares / (self.tokens - 1) / self.tokens)

    @property
    def perplexity(self) -> float:
        """``exp(nll)``; infinite where no float holds it."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    @property
    def perplexity_standard_error(self) -> float:
        """First-order: ``perplexity * nll_standard_error``."""
        return self.perplexity * self.nll_standard_error

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it; what is not finite becomes null."""
        numbers = {
            name: getattr(self, name)
            for name in ("nll", "nll_standard_error", "perplexity", "perplexity_standard_error")
        }
        return {"tokens": self.tokens, **{k: v if math.isfinite(v) else None for k, v in numbers.items()}}


@dataclasses.dataclass(frozen=True)
class ScoreOutput:
    """What became of one text of many.

    Attributes:
      request_id: the row's id.
      prompt_token_ids: the text's tokens.
      score: None if it could not be scored.
      error: why not.
      identity: names all that the numbers depend on.
      outputs: none: nothing is generated.
    """

    request_id: str
    prompt_token_ids: list[int]
    score: Score | None
    error: LlmjaxError | None = None
    identity: str = ""
    outputs: tuple[()] = ()
