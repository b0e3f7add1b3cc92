"""What is asked of a model: prompts, conversations and parameters, checked and settled before anything runs."""

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import numpy as np

from llmjax.errors import RequestError, TokenizerError, TooLongError, shown
from llmjax.model import Model, check_ids, outside
from llmjax.outside.values import plain
from llmjax.runtime.generation import sampling_defaults, suppressed
from llmjax.runtime.logits import bad_word_ids, row_controls
from llmjax.runtime.params import SamplingParams
from llmjax.runtime.row import Request, special_stops
from llmjax.runtime.sampling import row_seed
from llmjax.text.dates import Date
from llmjax.text.folding import folded
from llmjax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = dict[str, Any]
Params = SamplingParams | Mapping[str, Any] | None

# Of the context, what a prompt that is cut short leaves for the answer at most: one part in so many.
_ANSWER_PART = 8


class ChatOptions(TypedDict, total=False):
    """How a conversation is rendered.

    Attributes:
      date: a day or a time in ISO's form, for templates that ask for it; None for now.
      chat_template: Jinja source, instead of the checkpoint's own.
      chat_template_kwargs: further names the template may use (``enable_thinking``, ``tools``, ...), as in vLLM.
      fold_system: put system messages before what the user says first, for templates that refuse them.
    """

    date: Date | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    fold_system: bool | None


class Asking:
    """The half of ``LLM`` that runs nothing.

    Args:
      model: the model.
      seed: the job's.
      loras: names of resident adapters.
      truncate_prompt: see ``LLM``.
      generation_config: see ``LLM``.
      chat: what conversations are rendered with that do not say otherwise.
    """

    def __init__(
        self,
        model: Model,
        seed: int,
        loras: Sequence[str],
        truncate_prompt: bool,
        generation_config: str,
        chat: ChatOptions,
    ):
        if generation_config not in ("auto", "none"):
            raise RequestError(f"generation_config: expected 'auto' or 'none', found {shown(generation_config)}")
        self.model, self.loras, self.truncate_prompt = model, tuple(loras), truncate_prompt
        self.seed = SamplingParams(seed=seed).seed or 0  # refused where it is none
        own = model.generation_config if generation_config == "auto" else {}
        where = f"{model.path}: {model.generation_file}"
        self.generation = sampling_defaults(own, model.context_length, where)
        self.suppressed = suppressed(own, model.config.vocab_size, where)
        self.chat_options = _checked_chat(chat)
        if "chat_template" in self.chat_options:  # a broken one fails before the first of many rows
            with contextlib.suppress(RequestError):
                self.rendered([{"role": "user", "content": ""}])

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
          TokenizerError: the checkpoint has none.
        """
        if self.model.tokenizer is None:
            raise TokenizerError(f"{self.model.path}: no tokenizer files, so prompts must be token ids")
        return self.model.tokenizer

    def sampling_params(self, given: Params = None) -> SamplingParams:
        """Parameters as they are; or, where they are named one by one or not at all, those over the model's own
        (``generation``), and these over llmjax's.

        Raises:
          RequestError: they are none, or out of range.
        """
        if isinstance(given, SamplingParams):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise RequestError(
                f"sampling_params: expected SamplingParams, or a mapping of its fields, found {shown(given)}"
            )
        return SamplingParams.from_dict(
            {**self.generation, **{k: v for k, v in (given or {}).items() if v is not None}}
        )

    def request(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        request_id: str | None = None,
        forced: Sequence[int] = (),
        lora: str | None = None,
    ) -> Request:
        """Checks a prompt and its parameters and settles everything they leave open.

        Args:
          prompt: text, or token ids taken as they are.
          params: see ``sampling_params``.
          request_id: names the row; None for a single prompt, which draws with the job's seed itself.
          forced: see ``Request``.
          lora: the name of a resident adapter.

        Raises:
          RequestError: an empty prompt, ids outside the vocabulary, or bad words that leave nothing.
          TooLongError: a prompt longer than the context.
          TokenizerError: text, stop strings or bad words for a model without a tokenizer.
        """
        params = self.sampling_params(params)
        self._check_lora(lora)
        text = prompt if isinstance(prompt, str) else None
        whole = self.ids_of(prompt, "prompt")
        ids = self._fitting(whole, params.max_tokens)
        check_ids(ids, self.model, "prompt")
        self._warn_without_bos(ids)
        if params.stop:
            named = special_stops(self.tokenizer, params.stop)
            params = dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *named))
        bad_words = bad_word_ids(self.tokenizer, params.bad_words) if params.bad_words else ()
        bad_words = (*bad_words, *((token,) for token in self.suppressed))
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
        row_controls(params, bad_words, self.model.config.vocab_size)  # refuses what leaves nothing to draw
        if self.model.tokenizer and not params.ignore_eos:
            params = dataclasses.replace(params, stop=(*params.stop, *self.model.tokenizer.stop))
        room = self.model.context_length - len(ids)
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
            truncated=len(whole) - len(ids),
        )

    def _fitting(self, ids: list[int], max_tokens: int | None) -> list[int]:
        """A prompt's ids; of one that the context does not hold the last, behind BOS, where that was asked for."""
        context = self.model.context_length
        if len(ids) < context:
            return ids
        if not self.truncate_prompt:
            raise TooLongError(
                f"prompt: {len(ids)} tokens, longer than the model's context of {context} less one for the answer; "
                f"shorten it, or ask for truncation (truncate_prompt, --truncate-prompt){self.model.longer_context}"
            )
        room = min(max_tokens or context, max(1, context // _ANSWER_PART))
        bos = ids[:1] if ids[0] == (self.model.tokenizer and self.model.tokenizer.bos_id) else []
        return bos + ids[len(ids) - (context - room) + len(bos) :]

    def score_request(self, text: Prompt, *, request_id: str, lora: str | None = None) -> Request:
        """As ``request``, for a text that is scored; it may fill the context.

        Raises:
          RequestError: it is empty, or longer than the context.
        """
        self._check_lora(lora)
        ids = self.ids_of(text, "text")
        check_ids(ids, self.model, "text")
        return Request(request_id, text if isinstance(text, str) else None, ids, SamplingParams(), 0, lora=lora)

    def ids_of(self, prompt: Prompt, what: str) -> list[int]:
        """The token ids of a text, or of a list of them.

        Args:
          prompt: text, or token ids taken as they are.
          what: how messages call it.

        Raises:
          RequestError: it is neither, or empty.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            warn_of_two_starts(ids, self.tokenizer)
        else:
            ids = list(map(plain, listed(prompt, what, "a text or a list of token ids")))
        if not ids or (isinstance(prompt, str) and not prompt):
            raise RequestError(f"{what}: empty, expected some text or at least one token id")
        return ids

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
        params: Params = None,
        *,
        request_id: str | None = None,
        lora: str | None = None,
        **chat: Unpack[ChatOptions],
    ) -> Request:
        """As ``request``, for a conversation rendered with a chat template (which writes BOS itself)."""
        text = self.rendered(messages, **chat)
        ids = self.tokenizer.encode_rendered(text)
        return dataclasses.replace(self.request(ids, params, request_id=request_id, lora=lora), prompt=text)

    def rendered(self, messages: Sequence[Message], **chat: Unpack[ChatOptions]) -> str:
        """A conversation as the template writes it.

        Raises:
          RequestError: the messages or the options are malformed, or the template refuses them.
          TokenizerError: there is no template, or it is broken.
        """
        from llmjax.text.chat import check_messages  # imports Jinja

        own = _checked_chat(chat)
        both = self.chat_options | own
        names = {**(self.chat_options.get("chat_template_kwargs") or {}), **(own.get("chat_template_kwargs") or {})}
        tokenizer, template = self.tokenizer, both.get("chat_template")
        if template is not None:
            tokenizer = tokenizer.with_template(template, "chat_template")
        if both.get("fold_system"):
            check_messages(messages)
            messages = folded(messages)  # type: ignore[assignment]
        return tokenizer.render_chat(messages, date=both.get("date"), **names)


def warn_of_two_starts(ids: Sequence[int], tokenizer: Tokenizer) -> None:
    """Warns of a text that begins with the token which is put before every text; models answer such worse."""
    bos = tokenizer.bos_id
    if tokenizer.add_bos and list(ids[:2]) == [bos, bos]:
        warnings.warn(
            f"the text begins with {tokenizer.piece(bos or 0)!r}, which is put before every text: it is there twice; "
            "leave it out",
            stacklevel=3,
        )


def listed(value: Any, what: str, expected: str) -> list[Any]:
    """A list of anything that is one, arrays and iterators included.

    Raises:
      RequestError: it is none: a text, bytes, an object.
    """
    if callable(getattr(value, "tolist", None)):
        value = value.tolist()
    if isinstance(value, str | bytes | bytearray | Mapping | set) or not isinstance(value, Iterable):
        raise RequestError(f"{what}: expected {expected}, found {shown(value)}")
    return list(value)


def prompt_list(prompts: Any, what: str) -> tuple[list[Any], bool]:
    """Prompts as a list, and whether they are a single one: a text, or a list of ids.

    Raises:
      RequestError: they are neither prompts nor a list.
    """
    if isinstance(prompts, str):
        return [prompts], True
    found = listed(prompts, what, "a text, a list of token ids, or a list of those")
    if found and isinstance(found[0], int | np.integer):
        return [found], True
    return found, False


def for_each(value: Any, count: int, name: str, kind: Any) -> list[Any]:
    """One value for each of ``count`` prompts, from one for all of them or a list.

    Raises:
      RequestError: the list is of another length, or it is none.
    """
    if value is None or isinstance(value, kind):
        return [value] * count
    found = listed(value, name, f"one, or one for each of {count} prompts")
    if len(found) != count:
        raise RequestError(f"{name}: expected one, or one for each of {count} prompts, found {len(found)}")
    return found


def _checked_chat(chat: ChatOptions) -> ChatOptions:
    """Those that are given.

    Raises:
      RequestError: one is of another type, or ``chat_template_kwargs`` holds what the messages or llmjax give.
    """
    if unknown := sorted(set(chat) - set(ChatOptions.__annotations__)):
        known = ", ".join(ChatOptions.__annotations__)
        raise TypeError(f"unknown option of a chat {', '.join(unknown)}; expected {known}")
    for name, kind, what in (
        ("chat_template", str, "a template's text"),
        ("chat_template_kwargs", Mapping, "an object of names and values"),
        ("fold_system", bool, "true or false"),
    ):
        value = chat.get(name)
        if value is not None and not isinstance(value, kind):
            raise RequestError(f"{name}: expected {what}, found {shown(value)}")
    for name in chat.get("chat_template_kwargs") or ():
        if not isinstance(name, str) or name in ("messages", "date", "self"):
            raise RequestError(
                f"chat_template_kwargs: {shown(name)} is not a name that a template can be given this way"
            )
    return {name: value for name, value in chat.items() if value is not None}  # type: ignore[return-value]
