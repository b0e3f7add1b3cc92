"""``LlmInference``: the face of MediaPipe's LLM Inference API, option for option (``llmjax.genai`` lists them)."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from pathlib import Path

from llmjax.device import platform_of
from llmjax.errors import LoraError, RequestError, shown
from llmjax.llm import LLM
from llmjax.lora.adapter import AnyLora, checked_lora, read_adapter, values_of
from llmjax.lora.apply import beside, with_loras
from llmjax.numerics import FAST
from llmjax.outside.values import POSITIVE, Rule, check, each, integer, one_of, settle
from llmjax.runtime.params import SamplingParams

ResultListener = Callable[[str, bool], None]
ErrorListener = Callable[[Exception], None]
BACKENDS: tuple[str, ...] = ("cpu", "gpu")


@dataclasses.dataclass(frozen=True)
class LlmInferenceOptions:
    """MediaPipe's options, with its names and defaults, then those of its later versions, then llmjax's own.

    Attributes:
      model_path: a checkpoint ``llmjax.load`` reads.
      max_tokens: tokens of prompt and output together.
      top_k: candidates of each draw.
      temperature: randomness; 0 is greedy.
      random_seed: fixes the draws.  (The values drawn are llmjax's own: MediaPipe's GPU sampler is closed source.)
      lora_path: a LoRA adapter that changes the model: a MediaPipe LoRA file, a PEFT directory, or a ``LoraSource``.
      result_listener: called by ``generate_response_async`` with ``(partial_result, done)``.
      error_listener: called with the error where ``generate_response_async`` fails.
      max_top_k: no session has a larger ``top_k``.
      supported_lora_ranks: ranks that adapters may have; none for any.
      preferred_backend: ``cpu`` or ``gpu``: what JAX must run on here; None takes what it runs on.
      numerics: the profile everything is computed under (see ``llmjax.numerics``): ``mediapipe_gpu``, say.
    """

    model_path: str
    max_tokens: int = 512
    top_k: int = 40
    temperature: float = 0.8
    random_seed: int = 0
    lora_path: AnyLora | None = None
    result_listener: ResultListener | None = None
    error_listener: ErrorListener | None = None
    max_top_k: int = 40
    supported_lora_ranks: Sequence[int] = ()
    preferred_backend: str | None = None
    numerics: str = FAST


class LlmInference:
    """A task made by ``create_from_options``; a context manager that closes itself.

    The prompt is fed as it is: chat markup is the caller's, as in MediaPipe.  ``llmjax.genai`` has
    sessions for a conversation.
    """

    def __init__(self, options: LlmInferenceOptions, llm: LLM):
        self._options = options
        self._llm: LLM | None = llm
        self._llms = {"": llm}  # by adapter
        self._busy = threading.Lock()
        self._lora = self._with(options.lora_path)

    @classmethod
    def create_from_options(cls, options: LlmInferenceOptions) -> "LlmInference":
        """Loads the model.

        Raises:
          RequestError: an option out of range.
          LlmjaxError: the model or the adapter cannot be loaded.
        """
        _check(options)
        return cls(options, LLM(options.model_path, numerics=options.numerics, max_batch=1))

    def _open(self, lora: str = "") -> LLM:
        if not self._llms:
            raise RequestError("LlmInference: this task is closed; make another")
        return self._llms[lora]

    def _with(self, lora: AnyLora | None) -> str:
        """The key of the engine that runs the model with an adapter: one that was not there is made.

        Engines share the weights, not the programs: what one computes does not depend on which others there are.
        """
        base = self._open()
        if lora is None:
            return ""
        key = str(Path(lora)) if isinstance(lora, str | Path) else repr(checked_lora(lora))
        if key not in self._llms:
            values = values_of(base.model.params)
            adapter = read_adapter(lora, base.model.architecture, base.model.config, values)
            supported = self._options.supported_lora_ranks
            for rank in {delta.rank for delta in adapter.deltas.values()}:
                if supported and rank not in supported:
                    raise LoraError(f"{adapter.path}: rank {rank}, but supported_lora_ranks are {list(supported)}")
            loras = {n: beside(delta, values(n), f"{adapter.path}: {n}") for n, delta in adapter.deltas.items()}
            params = with_loras(base.model.params, loras)
            model = dataclasses.replace(base.model, params=params, lora=adapter.path)
            engine = base.engine
            self._llms[key] = LLM(model, max_batch=engine.slots, chunk=engine.chunk, block=engine.block)
        return key

    def _room(self, text: str) -> int:
        """Tokens left for an answer to ``text``."""
        llm = self._open()
        tokens = len(llm.tokenizer.encode(text))
        most, context = self._options.max_tokens, llm.model.context_length
        room = min(most, context) - tokens
        if room < 1:
            raise RequestError(
                f"prompt: {tokens} tokens leave no room for an answer within max_tokens {most} "
                f"(prompt and output together) and the model's context of {context}; "
                f"shorten it{', or raise max_tokens' if tokens < context else ''}"
            )
        return room

    def _pieces(self, text: str, sampling: SamplingParams, lora: str) -> Generator[str, None, None]:
        """The answer to a whole prompt, as it comes."""
        room = self._room(text)
        yield from self._open(lora).stream(text, dataclasses.replace(sampling, max_tokens=room))

    def generate_response(self, text: str) -> str:
        """The whole answer to ``text``."""
        return "".join(self._pieces(text, _sampling(self._options), self._lora))

    def generate_response_async(self, text: str) -> "Future[str]":
        """Answers in another thread.

        ``result_listener`` gets ``(piece, False)`` as text arrives and ``("", True)`` at the end.

        Returns:
          a future of the whole answer, which also carries the error.

        Raises:
          RequestError: no result_listener was given, an answer is still under way, or the task is closed.
        """
        if self._options.result_listener is None:
            raise RequestError("result_listener: generate_response_async needs one in the options")
        pieces = self._pieces(text, _sampling(self._options), self._lora)
        return self._in_background(pieces, self._options.result_listener)

    def _begin(self) -> None:
        """Takes the turn, which the caller gives back."""
        self._open()
        if not self._busy.acquire(blocking=False):
            raise RequestError("LlmInference: the previous answer is still under way; wait for it")

    def _in_background(self, pieces: Generator[str, None, None], listener: ResultListener) -> "Future[str]":
        """Reads an answer in another thread: see ``generate_response_async``."""
        on_error = self._options.error_listener
        self._begin()
        future: Future[str] = Future()

        def work() -> None:
            try:
                found = []
                try:
                    # A listener that fails leaves an answer unread, and the model with it.
                    with contextlib.closing(pieces):
                        for piece in pieces:
                            found.append(piece)
                            listener(piece, False)
                finally:
                    self._busy.release()
                listener("", True)
                future.set_result("".join(found))
            except BaseException as error:  # handed on, to the listener, which may fail itself, and through the future
                try:
                    if on_error is not None and isinstance(error, Exception):
                        on_error(error)
                finally:
                    future.set_exception(error)

        threading.Thread(target=work, name="llmjax-generate", daemon=True).start()
        return future

    def size_in_tokens(self, text: str) -> int:
        """How many tokens ``text`` is, without the start token the model puts before it."""
        return len(self._open().tokenizer.encode(text, add_bos=False))

    def close(self) -> None:
        """Frees the model; later calls are refused."""
        self._llms, self._llm = {}, None

    def __repr__(self) -> str:
        return f"LlmInference({self._llms[self._lora] if self._llms else 'closed'})"

    def __enter__(self) -> "LlmInference":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def drawn(top_k: int, temperature: float, random_seed: int, top_p: float) -> SamplingParams:
    """MediaPipe's options of the draw.

    Raises:
      RequestError: one is out of range.
    """
    for name, value, least in (("top_k", top_k, 1), ("random_seed", random_seed, 0)):
        check(name, value, integer(least, 2**64 - 1, f"an integer from {least} to 2**64 - 1"))
    return SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=random_seed)


def _sampling(options: LlmInferenceOptions) -> SamplingParams:
    return drawn(options.top_k, options.temperature, options.random_seed, 1.0)


def _check(options: LlmInferenceOptions) -> None:
    """Raises RequestError for an option out of range."""
    if not isinstance(options, LlmInferenceOptions):
        raise RequestError(f"options: expected LlmInferenceOptions, found {shown(options)}")
    settle(options)
    _sampling(options)
    for name, least in (("max_tokens", 2), ("max_top_k", 1)):
        check(name, getattr(options, name), integer(least))
    ranks = each(POSITIVE, "positive integers", kinds=(tuple, list, set, frozenset))
    check("supported_lora_ranks", options.supported_lora_ranks, ranks)
    for name in ("result_listener", "error_listener"):
        check(name, getattr(options, name), Rule("a function", lambda v: v is None or callable(v)))
    backend = options.preferred_backend
    check("preferred_backend", backend, one_of(*BACKENDS, None))
    if backend not in (None, platform_of()):
        raise RequestError(
            f"preferred_backend: {backend}, but JAX runs on {platform_of()} here; install JAX for it, or set "
            "JAX_PLATFORMS before Python starts"
        )
