"""What generation and scoring return, in vLLM's names."""

import dataclasses
import math
from typing import Any

from llmjax.errors import LlmjaxError
from llmjax.runtime.params import SamplingParams


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One continuation.

    Attributes:
      index: which of the request's samples.
      text: without the stop string or end-of-text token.
      token_ids: all generated tokens, the one that ended the text included.
      cumulative_logprob: sum of the tokens' log-probabilities.
      token_logprobs: natural log of each token's probability under the model (before temperature and filters).
      logprobs: for each token the most likely ids and their log-probabilities, the chosen one included; None if not
        asked for.
      finish_reason: ``stop`` or ``length``.
      stop_reason: the stop string or token id that ended the text; None for the model's own end-of-text token or
        ``length``.
      seed: what this sample drew with: as the seed of a prompt with ``n`` 1 it draws the same tokens again.
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


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """The answer to one prompt.

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


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probabilities of a given text.

    Attributes:
      token_ids: the text's tokens, BOS included where the checkpoint adds it.
      logprobs: natural log of the probability of each token given those before it; None for the first, which nothing
        precedes.
      top1: the most likely token at each place; None for the first.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    top1: list[int | None]

    @property
    def scored(self) -> list[float]:
        """The log-probabilities that exist."""
        return [p for p in self.logprobs if p is not None]

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats a token; NaN for a single token."""
        return -math.fsum(self.scored) / len(self.scored) if self.scored else math.nan

    @property
    def nll_standard_error(self) -> float:
        """Standard error of ``nll``, tokens taken as independent; NaN below two tokens."""
        scored, nll = self.scored, self.nll
        n = len(scored)
        if n < 2:
            return math.nan
        return math.sqrt(math.fsum((-p - nll) ** 2 for p in scored) / (n - 1) / n)

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
        logprobs = [None if p is None or not math.isfinite(p) else p for p in self.logprobs]
        finite = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        return {**dataclasses.asdict(self), "logprobs": logprobs, **finite}
