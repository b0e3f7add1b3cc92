"""``Tokenizer``: one face over the `tokenizers` library, whatever file the vocabulary came from."""

import dataclasses
import functools
import hashlib
import json
import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Self

import tokenizers

from llmjax.errors import RequestError, TokenizerError, lfs_pointer, shown
from llmjax.text import detokenize
from llmjax.text.dates import Date
from llmjax.text.detokenize import IncrementalDetokenizer
from llmjax.text.thinking import KINDS, MARKS, parted

_LOG = logging.getLogger(__name__)
# Ids that a vocabulary may leave out, however small it is.
_MOST_HOLES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: the `tokenizers` object; its post-processor, padding and truncation are not used.
      bos_id: None where the vocabulary has none.
      eos_ids: tokens that end a text, in ascending order: of the tokenizer's files, and of the checkpoint's
        configuration where it was read with that.
      prefix_ids: what ``encode`` puts before a text by the checkpoint's policy: BOS, or nothing.
      suffix_ids: what it puts behind one: nothing, for almost every checkpoint.
      chat_template: Jinja source, or None.
      special: strings a chat template may name: ``bos_token``, ``eos_token``, ...
      where: the file, for messages.
      dummy_prefix: ``encode`` puts a space before a text that does not begin with a special token
        (SentencePiece's ``add_dummy_prefix``, where ``backend`` does not do it itself).
      stop: strings that end a text as ``eos_ids`` do, whatever tokens they are made of (MediaPipe's files).
      always_prefix: ``prefix_ids`` stand before a text that a chat template wrote, too (LiteRT-LM's bundles).
      verbatim: tokens of a byte-level vocabulary that stand for the text they are, not for bytes (GGUF's user-defined).
      tools_template: Jinja source for conversations with ``tools``, where the files have one of its own.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    chat_template: str | None
    special: Mapping[str, str]
    where: str
    dummy_prefix: bool = False
    stop: tuple[str, ...] = ()
    always_prefix: bool = False
    verbatim: frozenset[int] = frozenset()
    tools_template: str | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.where!r}: {self.kind}, {self.vocab_size:,} tokens)"

    @property
    def add_bos(self) -> bool:
        """Whether ``encode`` begins with BOS unless told otherwise."""
        return self.bos_id is not None and self.bos_id in self.prefix_ids

    @functools.cached_property
    def kind(self) -> str:
        """``bpe`` (byte-level) or ``sentencepiece``."""
        return "sentencepiece" if self._decoder[0] == "pieces" else "bpe"

    @functools.cached_property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, added tokens included: one more than the highest.

        Raises:
          TokenizerError: ids far beyond their number, which would cost time and memory for each that is left out.
        """
        ids = self.backend.get_vocab(with_added_tokens=True).values()
        size = max(ids, default=-1) + 1
        if size > 2 * len(ids) + _MOST_HOLES:
            raise TokenizerError(
                f"{self.where}: {len(ids):,} tokens, of which one has the id {size - 1:,}; the vocabulary is damaged"
            )
        return size

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids; special-token strings in the text become their ids, as in transformers.

        Args:
          text: any string.
          add_bos: None for the checkpoint's own policy (which may put EOS behind the text, too).

        Raises:
          RequestError: the text is no valid Unicode text, or BOS is wanted and there is none.
        """
        if add_bos and self.bos_id is None:
            raise RequestError(f"add_bos: {self.where} has no BOS token; leave add_bos out")
        if self.dummy_prefix and isinstance(text, str) and text and not text.startswith(tuple(self.special_tokens)):
            text = " " + text
        try:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise RequestError(_not_text(text)) from None
        if add_bos is None:
            return [*self.prefix_ids, *ids, *self.suffix_ids]
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``, as transformers gives it without ``clean_up_tokenization_spaces``; of special tokens, those
        around a thought stay (``llmjax.text.thinking``).

        Ids from ``vocab_size`` on (embeddings of real models have padding rows) decode to nothing.  Of byte tokens that
        are not valid UTF-8 more is kept than transformers keeps (``llmjax.text.detokenize.PieceStream``), so that a
        text can be shown while it grows.

        Raises:
          RequestError: what are no token ids, or an id is negative.
        """
        try:
            known = [i for i in map(_token_id, _sequence(ids)) if i < self.vocab_size]
        except TypeError:
            raise RequestError(f"ids: expected a list of token ids, found {shown(ids)}") from None
        if min(known, default=0) < 0:
            raise RequestError(f"ids: expected token ids from 0 on, found {min(known)}")
        form, strip = self._decoder
        stream: IncrementalDetokenizer
        if form == "bytes" and (self.verbatim or (skip_special_tokens and self._special_ids < self._skipped_ids)):
            stream = detokenize.ByteStream(self.token_bytes if skip_special_tokens else self._any_bytes)
        elif form != "pieces":
            return self.backend.decode(known, skip_special_tokens=skip_special_tokens)
        else:
            stream = detokenize.PieceStream(self._part if skip_special_tokens else self._any_part, strip)
        return "".join(map(stream.push, known)) + stream.flush()

    def piece(self, token: int) -> str:
        """The vocabulary's entry as stored; empty for an id it does not know."""
        return self.backend.id_to_token(token) or "" if 0 <= token < self.vocab_size else ""

    def token_bytes(self, token: int) -> bytes:
        """What a token contributes to a text; empty for special and unknown ids."""
        if token in self._special_ids:
            return b""
        form, _ = self._decoder
        if form == "bytes":
            return self._any_bytes(token)
        if form == "whole":
            return self.decode([token]).encode()
        part = detokenize.sentencepiece_piece(self.piece(token))
        return part if isinstance(part, bytes) else part.encode()

    def detokenizer(self) -> IncrementalDetokenizer:
        """A fresh incremental decoder, special tokens skipped."""
        form, strip = self._decoder
        if form == "bytes":
            return detokenize.ByteStream(self._remembered)
        if form == "whole":
            return detokenize.WholeText(self.decode)
        return detokenize.PieceStream(self._remembered, strip)

    def _remembered(self, token: int) -> Any:
        """What a detokenizer asks at every token of every row, while a device waits."""
        if token not in self._parts:
            self._parts[token] = self.token_bytes(token) if self._decoder[0] == "bytes" else self._part(token)
        return self._parts[token]

    @functools.cached_property
    def _parts(self) -> dict[int, str | bytes | None]:
        return {}

    def parted(self, text: str, prompt: str = "") -> tuple[str | None, str]:
        """Thoughts and answer of what the model wrote after a prompt, see ``llmjax.text.thinking``."""
        return parted(text, prompt, self._thinking)

    @functools.cached_property
    def _thinking(self) -> tuple[tuple[str, str, str], ...]:
        return tuple(kind for kind in KINDS if None not in map(self.backend.token_to_id, kind[:2]))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        date: Date | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the checkpoint's template writes it.

        Args:
          messages: each with ``role`` and ``content``.
          add_generation_prompt: end with the opening of the model's turn.
          date: what the template takes for the present, see ``llmjax.text.dates``.
          **variables: further names the template may use (``tools``, ``enable_thinking``, ...).

        Raises:
          TokenizerError: the checkpoint has no template, or it is broken.
          RequestError: the messages are malformed, or the template refuses them.
        """
        from llmjax.text import chat  # imports Jinja

        with_tools = variables.get("tools") is not None and self.tools_template is not None
        template = self.tools_template if with_tools else self.chat_template
        if template is None:
            but = "" if self.tools_template is None else " but one for tools"
            raise TokenizerError(
                f"{self.where}: no chat template{but}; give a plain prompt, or put the model's "
                "chat_template.jinja beside tokenizer.json"
            )
        names = {**self.special, **variables, "add_generation_prompt": add_generation_prompt}
        return chat.render(template, messages, names, self.where, date)

    def told(self) -> Self:
        """The same, after its broken templates were logged: plain texts need none, so only conversations fail."""
        for template in filter(None, (self.chat_template, self.tools_template)):
            from llmjax.text import chat  # imports Jinja

            try:
                chat.compiled_template(template, self.where)
            except TokenizerError as error:
                _LOG.warning(f"{error}; conversations need another one (--chat-template FILE), plain texts run")
        return self

    def with_template(self, template: str | None, where: str) -> Self:
        """The same with another chat template, from ``where``, for conversations with tools, too."""
        return dataclasses.replace(self, chat_template=template, tools_template=None, where=where)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Ids of the rendered conversation (see ``render_chat``); the template writes BOS itself where it wants one."""
        return self.encode_rendered(self.render_chat(messages, **variables))

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of what a chat template wrote, BOS where it wanted one; ``always_prefix`` adds it where it did not."""
        if not self.always_prefix:
            return self.encode(text, add_bos=False)
        return [*self.prefix_ids, *self.encode(text.removeprefix(self.piece(self.prefix_ids[0])), add_bos=False)]

    def fingerprint(self) -> str:
        """sha256, in hex, of everything that decides ids."""
        rest = [self.bos_id, self.eos_ids, self.prefix_ids, self.suffix_ids, self.dummy_prefix]
        rest += [True] * self.always_prefix
        return hashlib.sha256(f"{self.backend.to_str()}\n{rest}".encode()).hexdigest()

    @functools.cached_property
    def _decoder(self) -> tuple[str, int]:
        return decoder_form(self.backend)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i in self._skipped_ids if self.piece(i) not in MARKS)

    @functools.cached_property
    def _skipped_ids(self) -> frozenset[int]:
        # By what decoding leaves out: the flag of an added token is not updated when the token is named special later
        # on, and one that is normalized to another text is not left out for all its flag.
        added, decode = self.backend.get_added_tokens_decoder(), self.backend.decode
        texts = {i: decode([i], skip_special_tokens=False) for i in added}
        return frozenset(i for i, t in added.items() if texts[i] != decode([i]) or (t.special and not texts[i]))

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of the tokens that a decoded text leaves out, by their own text."""
        return {text: i for i in sorted(self._special_ids) if (text := self.piece(i))}

    def _any_bytes(self, token: int) -> bytes:
        piece = self.piece(token)
        return piece.encode() if token in self.verbatim else detokenize.byte_level_bytes(piece)

    def _part(self, token: int) -> str | bytes | None:
        return None if token in self._special_ids else self._any_part(token)

    def _any_part(self, token: int) -> str | bytes | None:
        piece = self.piece(token)
        return detokenize.sentencepiece_piece(piece) if piece else None


def _sequence(ids: Any) -> Any:
    if isinstance(ids, bytes | bytearray | Mapping | Set):  # which would give numbers
        raise TypeError
    return ids


def _token_id(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _not_text(text: Any) -> str:
    if not isinstance(text, str):
        return f"text: expected a string, found {type(text).__name__}"
    at = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    # So Python, and a job that reads a table, keep bytes that are no UTF-8.
    byte = f", perhaps of byte {ord(text[at]) - 0xDC00:#04x}" if "\udc80" <= text[at] <= "\udcff" else ""
    return (
        f"text: character {at} is half a surrogate pair ({text[at]!r}{byte}), which no UTF-8 text has; decode its "
        "source anew"
    )


def token_text(token: int, tokenizer: Tokenizer | None) -> str:
    """A token's text; part of a character as OpenAI writes it, a special token by its name, and one that has none by
    number, as vLLM does: tokens are keys in OpenAI's ``top_logprobs``, so no two may look alike."""
    if tokenizer is None:
        return f"token_id:{token}"
    data = tokenizer.token_bytes(token)
    try:
        return data.decode() or tokenizer.piece(token) or f"token_id:{token}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def read_file(path: Path) -> bytes:
    """The file's bytes.

    Raises:
      TokenizerError: it cannot be read, or is a git-lfs pointer.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot read the file: {error.strerror}") from None
    if pointer := lfs_pointer(data):
        raise TokenizerError(f"{path}: {pointer}")
    return data


def load_backend(build: Callable[[], tokenizers.Tokenizer], where: str) -> tokenizers.Tokenizer:
    """Runs ``build()``; what the library raises becomes a TokenizerError."""
    try:
        backend = build()
    except TokenizerError:
        raise
    except BaseException as error:
        # The library raises bare Exception, and a BaseException where its Rust code panics.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        text = " ".join(str(error).split())
        raise TokenizerError(f"{where}: the tokenizer cannot be built: {text}") from None
    backend.no_padding()
    backend.no_truncation()
    return backend


def add_tokens(backend: tokenizers.Tokenizer, tokens: Iterable[tokenizers.AddedToken], *, special: bool) -> None:
    """Adds tokens in one go: every call of the library's rebuilds its search tables."""
    todo = list(tokens)
    if todo:
        (backend.add_special_tokens if special else backend.add_tokens)(todo)


def decoder_form(backend: tokenizers.Tokenizer) -> tuple[str, int]:
    """How the backend turns tokens into text: ``bytes``, ``pieces`` or ``whole`` (see
    ``llmjax.text.detokenize``), and the number of spaces it takes off the beginning."""
    if backend.decoder is None:
        return "whole", 0
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "bytes", 0
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"]:
        return "whole", 0
    if steps[0]["pattern"] != {"String": "▁"} or steps[0]["content"] != " ":
        return "whole", 0
    if kinds[3:] == ["Strip"] and steps[3]["content"] == " " and steps[3]["stop"] == 0:
        return "pieces", steps[3]["start"]
    return ("whole", 0) if kinds[3:] else ("pieces", 0)
