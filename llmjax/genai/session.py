"""Sessions: a conversation with a model, and copies of it that go their own ways."""

import copy
import dataclasses
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any

from llmjax.errors import RequestError, shown
from llmjax.llm_inference import LlmInference, ResultListener, drawn
from llmjax.lora.adapter import AnyLora
from llmjax.outside.values import settle
from llmjax.runtime.params import SamplingParams


@dataclasses.dataclass(frozen=True)
class PromptTemplates:
    """What stands around what each role says: the prefix where a role begins, the suffix where another follows."""

    user_prefix: str = ""
    user_suffix: str = ""
    model_prefix: str = ""
    model_suffix: str = ""
    system_prefix: str = ""
    system_suffix: str = ""

    def between(self, before: str | None, role: str) -> str:
        """What stands where ``role`` (``user``, ``model``, ``system``) begins behind another, or at the beginning."""
        end = getattr(self, f"{before}_suffix") if before else ""
        return "" if before == role else end + getattr(self, f"{role}_prefix")


@dataclasses.dataclass(frozen=True)
class LlmInferenceSessionOptions:
    """MediaPipe's options of a session, with its names and defaults.

    Attributes:
      top_k: candidates of each draw; at most the task's ``max_top_k``.
      top_p: the candidates' probability.
      temperature: randomness; 0 is greedy.
      random_seed: fixes the draws of every answer.
      lora_path: see ``LlmInferenceOptions``; None for the task's own adapter, if it has one.
      prompt_templates: None for none.
      constraint_handle: refused: llmjax has no constraints.
      graph_options: refused: llmjax has no vision and no audio.
    """

    top_k: int = 40
    top_p: float = 1.0
    temperature: float = 0.8
    random_seed: int = 0
    lora_path: AnyLora | None = None
    prompt_templates: PromptTemplates | None = None
    constraint_handle: Any = None
    graph_options: Any = None


class LlmInferenceSession:
    """A conversation: what was added and answered so far.

    It is a text, answers and templates included, and each answer is the one that ``LlmInference`` gives to that text as
    one prompt, in every bit.  What of it the cache holds already (of this session, of one it was cloned from or of any
    other, in whole chunks of ``LLM``) is not computed again.
    """

    def __init__(self, task: LlmInference, options: LlmInferenceSessionOptions, lora: str):
        self._task, self._options, self._lora = task, options, lora
        self._templates = options.prompt_templates or PromptTemplates()
        self._text = ""
        self._role: str | None = None
        self._asked = self._closed = False

    @classmethod
    def create_from_options(
        cls, llm_inference: LlmInference, options: LlmInferenceSessionOptions | None = None
    ) -> "LlmInferenceSession":
        """A session with nothing in it.

        Raises:
          RequestError: an option is out of range or not supported, or the task is closed or busy.
          LoraError: the adapter is damaged or does not fit.
        """
        if not isinstance(llm_inference, LlmInference):
            raise RequestError(f"llm_inference: expected an LlmInference, found {shown(llm_inference)}")
        options = LlmInferenceSessionOptions() if options is None else options
        if not isinstance(options, LlmInferenceSessionOptions):
            raise RequestError(f"options: expected LlmInferenceSessionOptions, found {shown(options)}")
        settle(options)
        for name in ("constraint_handle", "graph_options"):
            if getattr(options, name) is not None:
                raise RequestError(f"{name}: not supported; leave it out")
        templates = options.prompt_templates
        if templates is not None and not isinstance(templates, PromptTemplates):
            raise RequestError(f"prompt_templates: expected PromptTemplates, found {type(templates).__name__}")
        _sampling(options)
        most = max(llm_inference._options.max_top_k, llm_inference._options.top_k)
        if options.top_k > most:
            raise RequestError(f"top_k: {options.top_k}, larger than the task's max_top_k of {most}; raise that")
        _check_free(llm_inference)
        own = llm_inference._lora if options.lora_path is None else llm_inference._with(options.lora_path)
        return cls(llm_inference, options, own)

    def _check(self) -> None:
        self._check_open()
        _check_free(self._task)

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("LlmInferenceSession: this session is closed; make another")

    def add_query_chunk(self, text: str, *, role: str = "user") -> None:
        """Adds to the prompt; chunks of one role are one text.

        Args:
          text: the chunk.
          role: llmjax's own: ``user``, ``system`` or ``model``: whose templates stand around it.

        Raises:
          RequestError: the prompt gets too long, and stays as it was; or the session is closed or busy.
        """
        self._check()
        if role not in ("user", "system", "model"):
            raise RequestError(f"role: expected user, system or model, found {role!r}")
        if not isinstance(text, str):
            raise RequestError(f"text: expected a string, found {type(text).__name__}")
        longer = self._text + self._templates.between(self._role, role) + text
        self._task._room(longer)
        self._text, self._role, self._asked = longer, role, True

    def _pieces(self) -> Generator[str, None, None]:
        """The answer, which is then a part of the session."""
        prompt = self._text + self._templates.between(self._role, "model")
        answer = ""
        for piece in self._task._pieces(prompt, _sampling(self._options), self._lora):
            answer += piece
            yield piece
        self._text, self._role, self._asked = prompt + answer, "model", False

    def _checked_pieces(self) -> Generator[str, None, None]:
        self._check()
        if not self._asked:
            raise RequestError("generate_response: nothing to answer; add_query_chunk first")
        return self._pieces()

    def generate_response(self) -> str:
        """The whole answer to what was added.

        Raises:
          RequestError: nothing was added since the last answer, or the session is closed or busy.
        """
        pieces = self._checked_pieces()
        self._task._begin()
        try:
            return "".join(pieces)
        finally:
            self._task._busy.release()

    def generate_response_async(self, progress_listener: ResultListener | None = None) -> "Future[str]":
        """Answers in another thread.

        Args:
          progress_listener: gets ``(piece, False)`` as text arrives and ``("", True)`` at the end.

        Returns:
          a future of the whole answer, which also carries the error.

        Raises:
          RequestError: as ``generate_response``.
        """
        return self._task._in_background(self._checked_pieces(), progress_listener or (lambda piece, done: None))

    def size_in_tokens(self, text: str) -> int:
        """See ``LlmInference``.

        Raises:
          RequestError: the session is closed.
        """
        self._check_open()
        return self._task.size_in_tokens(text)

    def clone(self) -> "LlmInferenceSession":
        """A session that has said the same and goes its own way from here.

        Raises:
          RequestError: the session is closed or busy.
        """
        self._check()
        return copy.copy(self)

    def close(self) -> None:
        """Ends the session; later calls are refused.  The task stays, and so do clones."""
        self._closed = True

    def __enter__(self) -> "LlmInferenceSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_free(task: LlmInference) -> None:
    if task._busy.locked():
        raise RequestError("LlmInferenceSession: an answer is still under way; wait for it")


def _sampling(options: LlmInferenceSessionOptions) -> SamplingParams:
    return drawn(options.top_k, options.temperature, options.random_seed, options.top_p)
