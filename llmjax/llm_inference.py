"""``LlmInference``: the face of MediaPipe's LLM Inference API, option for option."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from llmjax.errors import RequestError
from llmjax.llm import LLM
from llmjax.runtime.params import SamplingParams

ResultListener = Callable[[str, bool], None]
ErrorListener = Callable[[Exception], None]


@dataclasses.dataclass(frozen=True)
class LlmInferenceOptions:
    """MediaPipe's options, with its names and defaults.

    Attributes:
      model_path: a checkpoint ``llmjax.load`` reads.
      max_tokens: tokens of prompt and output together.
      top_k: candidates of each draw.
      temperature: randomness; 0 is greedy.
      random_seed: fixes the draws.  (The values drawn are llmjax's own: MediaPipe's GPU sampler is closed source.)
      lora_path: a LoRA adapter that changes the model: a PEFT directory.
      result_listener: called by ``generate_response_async`` with ``(partial_result, done)``.
      error_listener: called with the error where ``generate_response_async`` fails.
    """

    model_path: str
    max_tokens: int = 512
    top_k: int = 40
    temperature: float = 0.8
    random_seed: int = 0
    lora_path: str | None = None
    result_listener: ResultListener | None = None
    error_listener: ErrorListener | None = None


class LlmInference:
    """A task made by ``create_from_options``; a context manager that closes itself.

    The prompt is fed as it is: chat markup is the caller's, as in MediaPipe.
    """

    def __init__(self, options: LlmInferenceOptions, llm: LLM):
        self._options, self._llm = options, llm
        self._closed = False
        self._busy = threading.Lock()

    @classmethod
    def create_from_options(cls, options: LlmInferenceOptions) -> "LlmInference":
        """Loads the model.

        Raises:
          RequestError: an option out of range.
          LlmjaxError: the model cannot be loaded.
        """
        _params(options, 1)
        if not isinstance(options.max_tokens, int) or options.max_tokens < 2:
            raise RequestError(f"max_tokens: expected an integer of at least 2, found {options.max_tokens!r}")
        if options.top_k < 1:
            raise RequestError(f"top_k: expected a positive integer, found {options.top_k!r}")
        return cls(options, LLM(options.model_path, max_batch=1, lora=options.lora_path))

    def _pieces(self, text: str) -> Iterator[str]:
        if self._closed:
            raise RequestError("LlmInference: this task is closed")
        tokens = len(self._llm.tokenizer.encode(text))
        room = min(self._options.max_tokens, self._llm.model.context_length) - tokens
        if room < 1:
            raise RequestError(
                f"prompt: {tokens} tokens leave no room for an answer within max_tokens {self._options.max_tokens} "
                f"(prompt and output together) and the model's context of {self._llm.model.context_length}"
            )
        yield from self._llm.stream(text, _params(self._options, room))

    def generate_response(self, text: str) -> str:
        """The whole answer to ``text``."""
        return "".join(self._pieces(text))

    def generate_response_async(self, text: str) -> "Future[str]":
        """Answers in another thread.

        ``result_listener`` gets ``(piece, False)`` as text arrives and ``("", True)`` at the end.

        Returns:
          a future of the whole answer, which also carries the error.

        Raises:
          RequestError: no result_listener was given, an answer is still under way, or the task is closed.
        """
        listener, on_error = self._options.result_listener, self._options.error_listener
        if listener is None:
            raise RequestError("result_listener: generate_response_async needs one in the options")
        if self._closed:
            raise RequestError("LlmInference: this task is closed")
        if not self._busy.acquire(blocking=False):
            raise RequestError("generate_response_async: the previous answer is still under way")
        future: Future[str] = Future()

        def work() -> None:
            try:
                pieces = []
                try:
                    for piece in self._pieces(text):
                        pieces.append(piece)
                        listener(piece, False)
                finally:
                    self._busy.release()
                listener("", True)
                future.set_result("".join(pieces))
            except Exception as error:  # handed on, to the listener and through the future
                if on_error is not None:
                    on_error(error)
                future.set_exception(error)

        threading.Thread(target=work, name="llmjax-generate", daemon=True).start()
        return future

    def size_in_tokens(self, text: str) -> int:
        """How many tokens ``text`` is, without the start token the model puts before it."""
        return len(self._llm.tokenizer.encode(text, add_bos=False))

    def close(self) -> None:
        """Frees the model; later calls are refused."""
        self._closed = True
        del self._llm

    def __enter__(self) -> "LlmInference":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _params(options: LlmInferenceOptions, max_tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.random_seed,
        max_tokens=max_tokens,
    )
