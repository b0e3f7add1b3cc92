"""``LLM``: generate, stream, chat and score, with vLLM's names."""

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, Unpack

from llmjax.checkpoint.loading import LoadOptions, as_asked
from llmjax.errors import LlmjaxError, RequestError
from llmjax.lora.adapter import AnyLora
from llmjax.lora.resident import with_adapters
from llmjax.model import Model
from llmjax.models.interventions import Interventions
from llmjax.outside.values import FLAG, POSITIVE, check, plain
from llmjax.runtime.asking import Asking, ChatOptions, Message, Params, Prompt, for_each, listed, prompt_list
from llmjax.runtime.decode import BURST
from llmjax.runtime.engine import Engine, Update
from llmjax.runtime.logits import LogitsProcessor, check_processor
from llmjax.runtime.memory import parse as parse_size
from llmjax.runtime.outputs import RequestOutput, Score, ScoreOutput
from llmjax.runtime.params import SamplingParams
from llmjax.runtime.row import Request, Requests
from llmjax.runtime.samples import Samples
from llmjax.text.dates import settled
from llmjax.text.tokenizer import token_text

# Tokens of an answer that memory is had for before it begins; it grows with a longer one.
_ANSWER = 256


class LLM(Asking):
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
      interventions: for research: functions or arrays that take the place of activations in every program, see
        ``Model.intervened``.
      enable_prefix_caching: compute a beginning that prompts share once (whole chunks, or all of a prompt); results are
        the same in every bit.
      generation_config: ``auto``: what the checkpoint's ``generation_config.json`` says of sampling holds where nobody
        says otherwise (no ``SamplingParams``, or a mapping without the field); ``none`` leaves it out.
      chat_template: Jinja source for every conversation, instead of the checkpoint's own.
      chat_template_kwargs: see ``ChatOptions``; a call's own win.
      fold_system: put system messages into the user's first, for templates that refuse them.
      loading: for a path alone, whatever ``llmjax.load`` takes: ``dtype``, ``quantize``, ``config``, ``lora``,
        ``lora_mode``, ``check_finite``, ``random_weights``, ``context_length``, ``mesh``.

    Raises:
      RequestError: an option out of range, a loaded model with a parameter of ``llmjax.load`` that would want it
        loaded again, or a ``logits_processor`` that is none.
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
        interventions: Interventions = MappingProxyType({}),
        enable_prefix_caching: bool = True,
        generation_config: str = "auto",
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        fold_system: bool = False,
        **loading: Unpack[LoadOptions],
    ):
        check("max_batch", max_batch := plain(max_batch), POSITIVE)
        check("truncate_prompt", truncate_prompt := plain(truncate_prompt), FLAG)
        check("enable_prefix_caching", enable_prefix_caching := plain(enable_prefix_caching), FLAG)
        model = as_asked(model, numerics, loading).intervened(interventions)
        if loras:
            model = with_adapters(model, loras)
        super().__init__(
            model,
            seed,
            tuple(loras or ()),
            truncate_prompt,
            generation_config,
            {
                "chat_template": chat_template,
                "chat_template_kwargs": chat_template_kwargs,
                "fold_system": fold_system or None,
            },
        )
        self.engine = Engine(
            model,
            slots=max_batch,
            chunk=plain(chunk),
            block=plain(block),
            logits_processor=logits_processor,
            enable_prefix_caching=enable_prefix_caching,
            adapters={name: place for place, name in enumerate(self.loras, 1)},
            memory=None if memory is None else parse_size(memory),
        )
        check_processor(logits_processor, self.engine.slots, model.config.vocab_size)
        self._lock = threading.Lock()  # one run at a time owns the slots
        self._owner: int | None = None  # the thread whose run that is

    def __repr__(self) -> str:
        engine, adapters = self.engine, f"; adapters {', '.join(self.loras)}" if self.loras else ""
        return f"LLM({self.model!r}; {engine.slots} slots{adapters}; memory: {engine.store.memory.describe()})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an LLM holds compiled programs and a cache, which neither pickle nor copy can take along; make one in "
            "each process, of a path or of a Model, which can be pickled"
        )

    def run(
        self, requests: Iterable[Request], *, burst: int = BURST, reserve: Sequence[int] = ()
    ) -> Generator[Update, None, None]:
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

    def outputs(self, requests: Requests, *, reserve: Sequence[int] = ()) -> Generator[RequestOutput, None, None]:
        """Runs requests and yields each answer, all its ``n`` samples in it, as soon as it is whole, in any order.

        Args:
          requests: of any number; taken one by one, as slots become free.
          reserve: see ``Engine.run``.

        Raises:
          RequestError: this thread is in the middle of another run.
        """
        samples = Samples(requests, self.model)
        with self._turn():
            for update in self.engine.run(samples.rows(), reserve=_reserve(requests, reserve)):
                if update.row.finish_reason and (output := samples.add(update.row)):
                    yield output

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
        sampling_params: Params | Sequence[Params] = None,
        *,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Continues one prompt or many.

        Args:
          prompts: a text, a list of token ids, or a list of those.
          sampling_params: for all, or one for each; a mapping, or none, leaves the rest to the model's own
            (``sampling_params``).
          lora: the resident adapter of all, or of each.

        Returns:
          an output for each prompt, in order.

        Raises:
          RequestError: before anything runs, naming the prompt by its place.
          TokenizerError: a text, for a model without a tokenizer.
          NoRoomError: a prompt and its answer do not fit the memory.
          CheckpointError: the model computes NaN for one, whose place is named.
        """
        many, single = prompt_list(prompts, "prompts")
        return self._answers("prompt", many, single, self.request, sampling_params, lora)

    def _answers(
        self, what: str, many: list[Any], single: bool, ask: Callable[..., Request], params: Any, lora: Any
    ) -> list[RequestOutput]:
        """Asks for each with its parameters and adapter, then runs them."""
        each = for_each(params, len(many), "sampling_params", SamplingParams | Mapping)
        adapters = for_each(lora, len(many), "lora", str)
        requests = []
        for i, (prompt, own, adapter) in enumerate(zip(many, each, adapters, strict=True)):
            try:
                requests.append(ask(prompt, own, request_id=None if single else str(i), lora=adapter))
            except RequestError as error:
                raise error if single else type(error)(f"{what} {i}: {error}") from None
        return self._finished(requests)

    def _finished(self, requests: list[Request]) -> list[RequestOutput]:
        done = {output.request_id: output for output in self.outputs(requests)}
        for i, request in enumerate(requests):
            if error := done[request.request_id].error:
                raise error if len(requests) == 1 else type(error)(f"prompt {i}: {error}")
        return [done[r.request_id] for r in requests]

    def stream(self, prompt: Prompt, sampling_params: Params = None, *, lora: str | None = None) -> Iterator[str]:
        """Pieces of text as they become certain; concatenated they are what ``generate`` returns.

        Raises:
          RequestError: a bad prompt, ``n`` above 1, or log-probabilities, which a text has no place for.
        """
        request = self.request(prompt, sampling_params, lora=lora)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(request.params, name) is not None:
                raise RequestError(f"{name}: a stream is text alone; use generate")
        for update in self.run([request], burst=1):
            if update.piece:
                yield update.piece

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params | Sequence[Params] = None,
        *,
        lora: str | Sequence[str | None] | None = None,
        **chat: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Answers one conversation or many, rendered with the checkpoint's own chat template or another.

        Args:
          messages: ``[{"role": "user", "content": "..."}, ...]``, or a list of those; a content may be text parts.
          sampling_params: see ``generate``.
          lora: the resident adapter of all, or of each.
          chat: see ``ChatOptions``.

        Raises:
          RequestError: before anything runs, naming the conversation by its place.
          TokenizerError: there is no tokenizer or no chat template, or a broken one.
          NoRoomError: a conversation and its answer do not fit the memory.
        """
        found = listed(messages, "messages", "a list of messages, or a list of those")
        single = bool(found) and isinstance(found[0], Mapping)
        chat["date"] = settled(chat.get("date"))

        def ask(conversation: Sequence[Message], params: Params, **options: Any) -> Request:
            return self.chat_request(conversation, params, **options, **chat)

        return self._answers("conversation", [found] if single else found, single, ask, sampling_params, lora)

    def score(self, texts_or_ids: Prompt | Sequence[Prompt], *, lora: str | None = None) -> list[Score]:
        """Per-token log-probabilities of given texts or token ids, teacher forced through the chunked prefill, under
        the resident adapter ``lora``.

        Raises:
          RequestError: an empty text, or one longer than the context.
          NoRoomError: one that does not fit the memory.
        """
        many, single = prompt_list(texts_or_ids, "texts")
        requests = []
        for i, text in enumerate(many):
            try:
                requests.append(self.score_request(text, request_id=str(i), lora=lora))
            except RequestError as error:
                raise error if single else type(error)(f"text {i}: {error}") from None
        scores = []
        for output in self.scores(requests):
            if output.score is None:
                why = output.error or RequestError("not scored")
                raise why if single else type(why)(f"text {output.request_id}: {why}")
            scores.append(output.score)
        return scores

    def scores(self, requests: Requests) -> Generator[ScoreOutput, None, None]:
        """Scores requests (``score_request``), in their order, each as soon as it is done.

        Raises:
          RequestError: this thread is in the middle of another run.
        """
        with self._turn():
            for request, found in self.engine.scores(requests):
                if isinstance(found, LlmjaxError):
                    yield ScoreOutput(request.request_id, request.ids, None, found)
                    continue
                logprobs, best = found
                texts = [token_text(i, self.model.tokenizer) for i in request.ids]
                score = Score(request.ids, [None, *map(float, logprobs)], [None, *map(int, best)], texts)
                yield ScoreOutput(request.request_id, request.ids, score)


def _reserve(requests: Requests, reserve: Sequence[int]) -> Sequence[int]:
    """Lengths of rows to begin with room for: those of a list, with answers that are not very long."""
    if reserve or not isinstance(requests, list):
        return reserve
    return [len(r.ids) + min(r.params.max_tokens or 0, _ANSWER) for r in requests for _ in range(r.params.n)]
