"""``SamplingParams``: what a request asks of the sampler and the stopping rules, in vLLM's names."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.errors import RequestError, named, shown
from llmjax.outside.values import FLAG, INT32, TEXT, Rule, check, each, integer, number, plain, settle

MAX_LOGPROBS = 20
MAX_SAMPLES = 16384  # vLLM's
_INT64 = 2**63 - 1
_DIGITS = re.compile(r"0|[1-9][0-9]{0,19}")


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    ``llmjax.runtime.logits`` defines what bars, biases and penalties do to the logits; the draw
    (``llmjax.runtime.sampling``) then orders candidates, ties by lower id, applies temperature, top-k, top-p, min-p.

    Attributes:
      n: samples of each prompt, each drawn with a key of its own; they share the prompt's computation.  1 with
        temperature 0, where all would be the same.
      temperature: divides the logits; 0 is greedy (the highest logit, ties to the lower id).
      top_k: keep the k best candidates; 0 or -1 keeps all.
      top_p: keep the shortest run of best candidates whose probability reaches this; in (0, 1].
      min_p: keep candidates at least this fraction as probable as the best; in [0, 1].
      seed: 0 to 2**64 - 1, or its digits as text, since many readers of JSON round large numbers.  None: derived from
        the job's seed and the row's id; every result names the seed it used.
      max_tokens: most tokens to generate; None for as many as the context holds.
      min_tokens: nothing ends the text before this many: no end-of-text or stop token is drawn, and a stop string that
        is whole by then is text like any other.
      stop: strings that end the text; cut from it, wherever the token borders fall.  One that is the text of a special
        token, which a generated text never shows, means that token: it joins ``stop_token_ids``.
      stop_token_ids: tokens that end the text, beside the model's own.
      ignore_eos: do not stop at the model's end-of-text tokens.
      logprobs: report this many most likely tokens at each step (at most 20) under the model's own logits, before bars,
        biases, penalties and temperature; None for none.
      prompt_logprobs: the same for the prompt's tokens, the first excepted.
      repetition_penalty: above 1 makes tokens of the prompt and of the generated text less likely, below 1 more.
      presence_penalty: taken off the logit of every token generated before; -2 to 2.
      frequency_penalty: taken off once for each time it was; -2 to 2.
      logit_bias: added to tokens' logits, ``{id: -100 to 100}``.
      allowed_token_ids: only these can be drawn; None for all.
      bad_words: texts never generated, at the beginning of a word or within one: the last token of each cannot follow
        the others.

    Raises:
      RequestError: a value out of range, with the field, the value and the range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 256
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        settle(self)
        for field in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            value = getattr(self, field)
            if isinstance(value, str):
                value = (value,)
            if value is None and field not in _OPTIONAL:
                value = ()
            if isinstance(value, list | tuple):
                value = tuple(map(plain, value))
            object.__setattr__(self, field, value)
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        object.__setattr__(self, "seed", _number(self.seed))
        if isinstance(self.logit_bias, Mapping):
            biases = {_number(plain(token)): plain(bias) for token, bias in self.logit_bias.items()}
            if len(biases) < len(self.logit_bias):
                raise RequestError(
                    f"logit_bias: a token is there twice, as a number and as text: {shown(self.logit_bias)}"
                )
            object.__setattr__(self, "logit_bias", biases)
        for field, rule in _RULES.items():
            value = getattr(self, field)
            if value is not None or field not in _OPTIONAL:
                check(field, value, rule)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens: expected at most max_tokens {self.max_tokens}, found {self.min_tokens}")
        if self.n > 1 and self.temperature == 0:
            raise RequestError(f"n: expected 1 with temperature 0, where all samples are the same, found {self.n}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """From parsed JSON.

        Raises:
          RequestError: it is no object, a key is no field, or a value is out of range.
        """
        if not isinstance(values, Mapping):
            raise RequestError(f"sampling parameters: expected an object, found {shown(values)}")
        unknown = sorted(named(str(key)) for key in set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            known = ", ".join(f.name for f in dataclasses.fields(cls))
            raise RequestError(f"unknown sampling parameter {', '.join(unknown)}; expected {known}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return dataclasses.asdict(self)


def _number(value: Any) -> Any:
    """JSON has keys as text, and large numbers are safe in it only so; anything but digits stays as it is."""
    return int(value) if isinstance(value, str) and _DIGITS.fullmatch(value) else value


_OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs", "logit_bias", "allowed_token_ids"}
_ID = integer(0, INT32)
_BIAS = number(-100, 100)
# Half a surrogate pair, or a byte that is no UTF-8, is in no text that a model generates.
_GENERATED = Rule(
    "a non-empty string of whole characters",
    lambda v: TEXT.holds(v) and not any("\ud800" <= char <= "\udfff" for char in v),
)
_RULES: dict[str, Rule] = {
    "n": integer(1, MAX_SAMPLES),
    "temperature": number(0, 100, "a number from 0 (greedy) to 100"),
    "top_k": integer(0, INT32, "an integer from 0 (all) to 2**31 - 1, or -1"),
    "top_p": number(math.ulp(0), 1, "a number above 0 and at most 1"),
    "min_p": number(0, 1),
    "seed": integer(0, 2**64 - 1, "an integer from 0 to 2**64 - 1 (or its digits as text)"),
    "max_tokens": integer(1, _INT64, "a positive integer below 2**63"),
    "min_tokens": integer(0, _INT64, "an integer from 0, below 2**63"),
    "stop": each(_GENERATED, "non-empty strings of whole characters"),
    "stop_token_ids": each(_ID, "token ids"),
    "ignore_eos": FLAG,
    "logprobs": integer(0, MAX_LOGPROBS),
    "prompt_logprobs": integer(0, MAX_LOGPROBS),
    "repetition_penalty": number(1e-6, 1e6),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": Rule(
        "token ids with numbers from -100 to 100",
        lambda v: isinstance(v, Mapping) and all(map(_ID.holds, v)) and all(map(_BIAS.holds, v.values())),
    ),
    "allowed_token_ids": each(_ID, "token ids, at least one", least=1),
    "bad_words": each(_GENERATED, "non-empty strings of whole characters"),
}
