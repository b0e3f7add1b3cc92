"""``LLM``: generate, stream, chat and score, with vLLM's names."""

import contextlib
import dataclasses
import itertools
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from llmjax.checkpoint.loading import LoadOptions, as_asked
from llmjax.errors import NoRoomError, RequestError, TokenizerError, TooLongError
from llmjax.lora.adapter import AnyLora
from llmjax.lora.resident import with_adapters
from llmjax.model import Model, check_ids, outside, plain
from llmjax.runtime.decode import BURST
from llmjax.runtime.engine import Engine, Update
from llmjax.runtime.logits import LogitsProcessor, bad_word_ids, row_controls
from llmjax.runtime.memory import parse as parse_size
from llmjax.runtime.outputs import RequestOutput, Score
from llmjax.runtime.params import SamplingParams
from llmjax.runtime.row import Request, special_stops
from llmjax.runtime.samples import Samples
from llmjax.runtime.sampling import row_seed
from llmjax.text.dates import Date, settled
from llmjax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = dict[str, Any]

# Of the context, what a prompt that is cut short leaves for the answer at most: one part in so many.
_ANSWER_PART = 8
# Tokens of an answer that memory is had for before it begins; it grows with a longer one.
_ANSWER = 256


class LLM:
    """A model ready to generate.

    Args:
      model: a path (see ``llmjax.load``) or a loaded ``Model``, whose weights are taken as they are.
      max_batch: decode slots of the compiled program; part of what fixes a result's last bits.
      numerics: the profile everything is computed under; None takes ``fast`` for a path and leaves a loaded model as it
        is (see ``llmjax.numerics``).
      loras: adapters by name, kept beside the weights; each row may use one (``lora=NAME``).
      seed: the job's seed: rows without their own draw by it and their id; a single prompt uses it as it is.
      chunk: prompt tokens a prefill call takes.
      block: cache positions attention folds at a time.
      truncate_prompt: keep the last tokens of a prompt that the context does not hold, instead of refusing it; an
        eighth of the context is left for the answer, less where ``max_tokens`` asks for less.
      memory: what the weights and all else may take: bytes, or a text such as ``6GB``.  None for the weights and three
        quarters of what is free beside them.  No bit depends on it; a row that does not fit fails (``NoRoomError``).
      logits_processor: for research: a pure function, compiled into every decode step, of the model's logits (float32
        ``[B, V]``, a row per slot) and ``llmjax.runtime.logits.Tokens`` (the rows' tokens ``ids [B, S]``,
        ``prompt_length [B]``, ``length [B]``, ``active [B]``); returns the logits, before bars, biases, penalties and
        the draw.  A row's result must depend on that row alone, or it will depend on its neighbours.
      enable_prefix_caching: compute a beginning that prompts share once (whole chunks, or all of a prompt); results are
        the same in every bit.
      loading: for a path alone, whatever ``llmjax.load`` takes: ``dtype``, ``quantize``, ``config``, ``lora``,
        ``lora_mode``, ``check_finite``, ``random_weights``.

    Raises:
      RequestError: a loaded model with a parameter of ``llmjax.load`` that would want it loaded again.
      LlmjaxError: see ``llmjax.load``.
    """

    def __init__(
        self,
        model: Model | str | Path,
        *,
        max_batch: int = 8,
        numerics: str | None = None,
        loras: Mapping[str, AnyLora] | None = None,
        seed: int = 0,
        chunk: int = 128,
        block: int = 128,
        truncate_prompt: bool = False,
        memory: float | str | None = None,
        logits_processor: LogitsProcessor | None = None,
        enable_prefix_caching: bool = True,
        **loading: Unpack[LoadOptions],
    ):
        model = as_asked(model, numerics, loading)
        if loras:
            model = with_adapters(model, loras)
        self.loras = tuple(loras or ())
        self.model = model
        self.seed = SamplingParams(seed=seed).seed or 0  # refused where it is none
        self.truncate_prompt = truncate_prompt
        self.engine = Engine(
            model,
            slots=max_batch,
            chunk=chunk,
            block=block,
            logits_processor=logits_processor,
            enable_prefix_caching=enable_prefix_caching,
            adapters={name: place for place, name in enumerate(self.loras, 1)},
            memory=None if memory is None else parse_size(memory),
        )
        self._lock = threading.Lock()  # one run at a time owns the slots
        self._owner: int | None = None  # the thread whose run that is

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
          TokenizerError: the checkpoint has none.
        """
        if self.model.tokenizer is None:
            raise TokenizerError(f"{self.model.path}: no tokenizer files, so prompts must be token ids")
        return self.model.tokenizer

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        forced: Sequence[int] = (),
        lora: str | None = None,
    ) -> Request:
        """Checks a prompt and its parameters and settles everything they leave open.

        Args:
          prompt: text, or token ids taken as they are.
          params: defaults to ``SamplingParams()``.
          request_id: names the row; None for a single prompt, which draws with the job's seed itself.
          forced: see ``Request``.
          lora: the name of a resident adapter.

        Raises:
          RequestError: an empty prompt, one longer than the context, ids outside the vocabulary, or bad words that
            leave nothing.
          TokenizerError: text, stop strings or bad words for a model without a tokenizer.
        """
        params = params or SamplingParams()
        self._check_lora(lora)
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(map(plain, prompt))
        if text == "" or not ids:
            raise RequestError("prompt: empty, expected some text or at least one token id")
        context, whole = self.model.context_length, len(ids)
        if whole >= context:
            if not self.truncate_prompt:
                raise TooLongError(
                    f"prompt: {whole} tokens, longer than the model's context of {context} less one for the answer; "
                    "shorten it, or ask for truncation (truncate_prompt, --truncate-prompt)"
                )
            room = min(params.max_tokens or context, max(1, context // _ANSWER_PART))
            bos = ids[:1] if ids[0] == (self.model.tokenizer and self.model.tokenizer.bos_id) else []
            ids = bos + ids[whole - (context - room) + len(bos) :]
        check_ids(ids, self.model, "prompt")
        self._warn_without_bos(ids)
        if params.stop:
            named = special_stops(self.tokenizer, params.stop)
            params = dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *named))
        bad_words = bad_word_ids(self.tokenizer, params.bad_words) if params.bad_words else ()
        used = {
            "stop_token_ids": params.stop_token_ids,
            "bad_words": itertools.chain(*bad_words),
            "allowed_token_ids": params.allowed_token_ids or (),
            "logit_bias": params.logit_bias or (),
            "forced": forced,
        }
        for name, tokens in used.items():
            for token in tokens:
                if token >= self.model.config.vocab_size:
                    raise RequestError(f"{name}: {outside(token, self.model)}")
        row_controls(params, bad_words, self.model.config.vocab_size)
        if self.model.tokenizer and not params.ignore_eos:
            params = dataclasses.replace(params, stop=(*params.stop, *self.model.tokenizer.stop))
        room = context - len(ids)
        params = dataclasses.replace(
            params, max_tokens=min(params.max_tokens or room, room), min_tokens=min(params.min_tokens, room)
        )
        seed = params.seed
        if seed is None:
            seed = self.seed if request_id is None else row_seed(self.seed, request_id)
        return Request(
            "0" if request_id is None else request_id,
            text,
            ids,
            params,
            seed,
            tuple(forced),
            bad_words=bad_words,
            lora=lora,
            truncated=whole - len(ids),
        )

    def _check_lora(self, lora: str | None) -> None:
        if lora is not None and lora not in self.loras:
            known = ", ".join(self.loras) or "none (loras, --lora-modules)"
            raise RequestError(f"lora: no adapter named {lora!r}; resident are {known}")

    def _warn_without_bos(self, ids: list[int]) -> None:
        bos = self.model.tokenizer.bos_id if self.model.tokenizer else None
        if self.model.architecture.needs_bos and bos is not None and ids[0] != bos:
            warnings.warn(
                f"prompt does not begin with BOS (id {bos}); {self.model.architecture.model_type} models answer such "
                "prompts with nonsense",
                stacklevel=3,
            )

    def chat_request(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        lora: str | None = None,
        date: Date | None = None,
    ) -> Request:
        """As ``request``, for a conversation rendered with the checkpoint's chat template (which writes BOS itself);
        ``date`` is what a template that asks for it is told."""
        text = self.tokenizer.render_chat(messages, date=date)
        ids = self.tokenizer.encode(text, add_bos=False)
        return dataclasses.replace(self.request(ids, params, request_id=request_id, lora=lora), prompt=text)

    def run(self, requests: Iterable[Request], *, burst: int = BURST, reserve: Sequence[int] = ()) -> Iterator[Update]:
        """``Engine.run``, one run at a time: another thread waits for its turn.

        Raises:
          RequestError: this thread is in the middle of another run, such as a stream that was not read to its end; or
            a request wants several samples, whose text cannot come as one stream.
          NoRoomError: a row does not fit the memory.
        """

        def checked() -> Iterator[Request]:
            for request in requests:
                if request.params.n > 1:
                    raise RequestError(f"n: a stream is one sample, found {request.params.n}; use generate or batch")
                yield request

        with self._turn():
            for update in self.engine.run(checked(), burst=burst, reserve=_reserve(requests, reserve)):
                if update.row.error is not None:
                    raise update.row.error
                yield update

    def outputs(
        self,
        requests: Iterable[Request],
        *,
        reserve: Sequence[int] = (),
        on_update: Callable[[], None] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Runs requests and yields each answer, all its ``n`` samples in it, as soon as it is whole, in any order.

        Args:
          requests: of any number; taken one by one, as slots become free.
          reserve: see ``Engine.run``.
          on_update: called whenever rows have new tokens; what it raises ends the run.

        Raises:
          RequestError: this thread is in the middle of another run.
        """
        samples = Samples(requests, self.model.numerics.label)
        with self._turn():
            for update in self.engine.run(samples.rows(), reserve=_reserve(requests, reserve)):
                if update.row.finish_reason and (output := samples.add(update.row)):
                    yield output
                if on_update is not None:
                    on_update()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        if self._owner == threading.get_ident():
            raise RequestError("this LLM is in the middle of a run; read the stream to its end, or close() it, first")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Continues one prompt or many.

        Args:
          prompts: a text, a list of token ids, or a list of those.
          sampling_params: for all, or one for each.
          lora: the resident adapter of all, or of each.

        Returns:
          an output for each prompt, in order.

        Raises:
          RequestError: before anything runs, naming the prompt by its place.
          NoRoomError: a prompt and its answer do not fit the memory.
        """
        single = _is_single(prompts)
        many: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]
        params = _per_prompt(sampling_params, len(many), "sampling_params")
        adapters = _per_prompt(lora, len(many), "lora")
        requests = []
        for i, (prompt, p, adapter) in enumerate(zip(many, params, adapters, strict=True)):
            try:
                requests.append(self.request(prompt, p, request_id=None if single else str(i), lora=adapter))
            except RequestError as error:
                raise error if single else RequestError(f"prompt {i}: {error}") from None
        return self._finished(requests)

    def _finished(self, requests: list[Request]) -> list[RequestOutput]:
        done = {output.request_id: output for output in self.outputs(requests)}
        for i, request in enumerate(requests):
            if error := done[request.request_id].error:
                raise error if len(requests) == 1 else NoRoomError(f"prompt {i}: {error}")
        return [done[r.request_id] for r in requests]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, lora: str | None = None
    ) -> Iterator[str]:
        """Pieces of text as they become certain; concatenated they are what ``generate`` returns.

        Raises:
          RequestError: a bad prompt, or ``n`` above 1.
        """
        for update in self.run([self.request(prompt, sampling_params, lora=lora)], burst=1):
            if update.piece:
                yield update.piece

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | None = None,
        *,
        lora: str | None = None,
        date: Date | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or many, rendered with the checkpoint's own chat template.

        Args:
          messages: ``[{"role": "user", "content": "..."}, ...]``, or a list of those; a content may be text parts.
          sampling_params: for all.
          lora: the resident adapter of all.
          date: a day or a time in ISO's form, for templates that ask for it; None for now.
        """
        date = settled(date)
        single = len(messages) > 0 and isinstance(messages[0], dict)
        chats: list[Any] = [messages] if single else list(messages)
        requests = [
            self.chat_request(chat, sampling_params, request_id=None if single else str(i), lora=lora, date=date)
            for i, chat in enumerate(chats)
        ]
        return self._finished(requests)

    def score(self, texts_or_ids: Prompt | Sequence[Prompt], *, lora: str | None = None) -> list[Score]:
        """Per-token log-probabilities of given texts or token ids, teacher forced through the chunked prefill, under
        the resident adapter ``lora``.

        Raises:
          RequestError: an empty text, or one longer than the context.
          NoRoomError: one that does not fit the memory.
        """
        single = _is_single(texts_or_ids)
        many: list[Prompt] = [texts_or_ids] if single else list(texts_or_ids)  # type: ignore[list-item, arg-type]
        self._check_lora(lora)
        scores = []
        for i, text in enumerate(many):
            if len(text) == 0:
                raise RequestError(f"text {i}: empty, expected some text or at least one token id")
            ids = self.tokenizer.encode(text) if isinstance(text, str) else list(map(plain, text))
            check_ids(ids, self.model, f"text {i}")
            with self._turn():
                logprobs, best = self.engine.score(ids, lora)
            scores.append(Score(list(ids), [None, *map(float, logprobs)], [None, *map(int, best)]))
        return scores


def _reserve(requests: Iterable[Request], reserve: Sequence[int]) -> Sequence[int]:
    """Lengths of rows to begin with room for: those of a list, with answers that are not very long."""
    if reserve or not isinstance(requests, list):
        return reserve
    return [len(r.ids) + min(r.params.max_tokens or 0, _ANSWER) for r in requests for _ in range(r.params.n)]


def _is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt (a text or a list of ids) rather than a list of them."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))


def _per_prompt(value: Any, count: int, name: str) -> Sequence[Any]:
    if value is None or isinstance(value, SamplingParams | str):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name}: expected one, or one for each of {count} prompts, found {len(value)}")
    return list(value)
