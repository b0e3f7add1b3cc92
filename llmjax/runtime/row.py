"""One row of a batch on the host: its text as tokens arrive, and the stop strings in it."""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence

from llmjax.errors import LlmjaxError
from llmjax.runtime.outputs import CompletionOutput
from llmjax.runtime.params import SamplingParams
from llmjax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt ready to run.

    Attributes:
      request_id: names the row; a row without a seed of its own draws by it.
      prompt: the text, if it was one.
      ids: token ids, not empty.
      params: ``max_tokens`` is set and fits the context.
      seed: what the row draws with.
      forced: tokens to impose instead of the first draws; their log-probabilities are reported all the same.
      index: which of the prompt's samples this row is.
      bad_words: the params' bad words as token sequences.
      lora: the resident adapter it uses, by name.
      truncated: tokens that were dropped from the beginning of the prompt.
    """

    request_id: str
    prompt: str | None
    ids: list[int]
    params: SamplingParams
    seed: int
    forced: tuple[int, ...] = ()
    index: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    lora: str | None = None
    truncated: int = 0


# Where they are taken one by one: None says that there is none at the moment, and that rows under way should go on.
Requests = Iterable[Request | None]


def special_stops(tokenizer: Tokenizer, stops: Sequence[str]) -> list[int]:
    """Special tokens that stop strings name: a text never shows them, so the strings alone would end nothing."""
    found = []
    for stop in stops:
        token = tokenizer.special_tokens.get(stop)
        if token is not None:
            found.append(token)
        elif inner := next((text for text in tokenizer.special_tokens if text in stop), None):
            warnings.warn(
                f"stop: {stop!r} holds the special token {inner!r}, which a text never shows, so it will not be found; "
                f"stop at {inner!r} alone",
                stacklevel=4,
            )
    return found


class Row:
    """Collects a request's tokens and text and decides when it is finished.

    Args:
      request: what is asked for.
      tokenizer: None gives no text.
      eos_ids: tokens that end it.
      adapter: the place of its LoRA adapter.
      renewal: see ``DecoderConfig.renewal``.

    Attributes:
      finish_reason: None while the row goes on; ``error`` if it cannot.
      error: why not.
      prompt_logprobs: see ``RequestOutput``.
      adapter: the place of its LoRA adapter.
      again: tokens that are to come once more, since the row was put off; they are the same in every bit.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        eos_ids: Sequence[int],
        adapter: int = 0,
        renewal: int | None = None,
    ):
        self.request, self.adapter = request, adapter
        self._renewal = renewal
        self._kept = 0
        self.finish_reason: str | None = None
        self.prompt_logprobs: list[dict[int, float] | None] | None = None
        self.error: LlmjaxError | None = None
        self.again = 0
        self._stop_reason: str | int | None = None
        self._eos = () if request.params.ignore_eos else tuple(eos_ids)
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer() if tokenizer is not None else None
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._alternatives: list[dict[int, float]] = []
        self._text = ""
        self._shown = 0

    @property
    def forced(self) -> tuple[int, ...]:
        """Tokens still to be imposed."""
        return self.request.forced[self.produced :]

    @property
    def produced(self) -> int:
        """Tokens generated since the row last began."""
        return len(self._token_ids) - self.again

    @property
    def is_unscored(self) -> bool:
        """Whether the prompt's log-probabilities are wanted, and not there yet."""
        request = self.request
        return request.params.prompt_logprobs is not None and request.index == 0 and self.prompt_logprobs is None

    def reach(self, more: int) -> int:
        """Tokens in the cache when so many more are generated, as far as they may be; the last is not fed."""
        request = self.request
        assert request.params.max_tokens is not None
        return len(request.ids) + min(self.produced + more, request.params.max_tokens - 1)

    @property
    def ids(self) -> list[int]:
        """What the row begins with: its prompt, and what was generated before it was begun anew."""
        return [*self.request.ids, *self._token_ids[: self._kept]]

    @property
    def until_renewal(self) -> int | None:
        """Tokens to come before the row must be computed anew; None for no such end."""
        length = len(self.request.ids)
        if self._renewal is None or length + self._kept > self._renewal:
            return None
        return self._renewal + 1 - length - self.produced

    def renew(self) -> None:
        """The row will go on, but from its text computed anew."""
        self._kept = self.produced

    def put_off(self) -> None:
        """The row will begin once more."""
        self.again, self._kept = len(self._token_ids), 0

    def fail(self, error: LlmjaxError) -> None:
        """Ends the row without an answer."""
        self.finish_reason, self.error = "error", error

    @property
    def _may_end(self) -> bool:
        """Whether ``min_tokens`` lets the newest token end the row."""
        return len(self._token_ids) > self.request.params.min_tokens

    def push(self, token: int, logprob: float, alternatives: dict[int, float]) -> str:
        """Takes the next token; returns text that can no longer change (a possible beginning of a stop string is held
        back)."""
        if self.again:
            self.again -= 1
            return ""
        params = self.request.params
        self._token_ids.append(token)
        self._logprobs.append(logprob)
        self._alternatives.append({**alternatives, token: logprob})
        if token in params.stop_token_ids and self._may_end:
            self._finish("stop", self._given(token))
        elif token in self._eos and self._may_end:
            self._finish("stop", None)
        else:
            if self._detokenizer is not None:
                self._append(self._detokenizer.push(token))
            if self.finish_reason is None and len(self._token_ids) == params.max_tokens:
                self._finish("length", None)
        return self._show()

    def _finish(self, reason: str, stop: str | int | None) -> None:
        self.finish_reason, self._stop_reason = reason, stop
        if self._detokenizer is not None:
            self._append(self._detokenizer.flush())

    def _given(self, token: int) -> str | int:
        """A stop token as the request gave it: by a stop string that names it, or by its id."""
        stops = self.request.params.stop
        name = self._tokenizer.piece(token) if self._tokenizer is not None and stops else ""
        return name if name in stops else token

    def _append(self, piece: str) -> None:
        before = len(self._text)
        self._text += piece
        if not (stops := self.request.params.stop) or not self._may_end:
            return
        # As in vLLM, what was whole while nothing could end the row stays text: a stop string ends in the new piece.
        found = [(at, s) for s in stops if (at := self._text.find(s, max(0, before - len(s) + 1))) >= 0]
        if found:
            at, stop = min(found)
            self._text = self._text[:at]
            self.finish_reason, self._stop_reason = "stop", stop

    def _show(self) -> str:
        end = len(self._text)
        if self.finish_reason is None and (stops := self.request.params.stop):
            end -= max(_overlap(self._text, s) for s in stops)
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    @property
    def alternatives(self) -> list[dict[int, float]] | None:
        """The most likely tokens at each step; None if not asked for."""
        return None if self.request.params.logprobs is None else self._alternatives

    def completion(self) -> CompletionOutput:
        """The finished row as the caller gets it."""
        assert self.finish_reason is not None
        request = self.request
        parted = self._tokenizer.parted(self._text, request.prompt or "") if self._tokenizer else (None, self._text)
        return CompletionOutput(
            index=request.index,
            text=self._text,
            token_ids=self._token_ids,
            cumulative_logprob=sum(self._logprobs),
            token_logprobs=self._logprobs,
            logprobs=self.alternatives,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            seed=request.seed,
            reasoning=parted[0],
            answer=parted[1],
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of ``stop`` that ``text`` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
