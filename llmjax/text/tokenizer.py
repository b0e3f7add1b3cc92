"""``Tokenizer``: one face over the `tokenizers` library, whatever file the vocabulary came from."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from llmjax.errors import TokenizerError
from llmjax.text.detokenize import IncrementalDetokenizer, decoder_kind


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: the `tokenizers` object; its post-processor is not used, BOS is put by ``encode``.
      kind: ``bpe`` (byte-level) or ``sentencepiece``.
      bos_id: None where the vocabulary has none.
      eos_ids: tokens that end a text, of the tokenizer's files alone.
      add_bos: whether ``encode`` begins with BOS, as the checkpoint's files say.
      chat_template: Jinja source, or None.
      special: strings a chat template may name: ``bos_token``, ``eos_token``, ...
      where: the file, for messages.
    """

    backend: tokenizers.Tokenizer
    kind: str
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    chat_template: str | None
    special: Mapping[str, str]
    where: str

    @functools.cached_property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows: one more than the highest."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids; special-token strings in the text become their ids, as in transformers.

        Args:
          text: any string.
          add_bos: None for the checkpoint's own policy.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if self.bos_id is not None and (self.add_bos if add_bos is None else add_bos):
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``.  Ids beyond the vocabulary (padding rows of real embeddings) are nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def piece(self, token: int) -> str:
        """The vocabulary's entry as stored; empty for an id beyond it."""
        return self.backend.id_to_token(token) or ""

    def detokenizer(self) -> IncrementalDetokenizer:
        """A fresh incremental decoder."""
        return IncrementalDetokenizer(self._text_piece, *self._decoder_kind)

    @functools.cached_property
    def _decoder_kind(self) -> tuple[bool, bool]:
        return decoder_kind(self.backend, self.where)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def _text_piece(self, token: int) -> str:
        return "" if token in self._special_ids else self.piece(token)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as the checkpoint's template writes it.

        Raises:
          TokenizerError: the checkpoint has no template, or it is broken.
          RequestError: the messages are malformed, or the template refuses them.
        """
        from llmjax.text.chat import render

        if self.chat_template is None:
            raise TokenizerError(f"{self.where}: no chat template; give a plain prompt instead")
        return render(self.chat_template, messages, add_generation_prompt, self.special, self.where)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of the rendered conversation; the template writes BOS itself where it wants one."""
        return self.encode(self.render_chat(messages, add_generation_prompt=add_generation_prompt), add_bos=False)

    def fingerprint(self) -> str:
        """sha256 of everything that decides ids."""
        state = f"{self.backend.to_str()}\n{self.bos_id}\n{self.add_bos}"
        return hashlib.sha256(state.encode()).hexdigest()


def from_huggingface(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory: ``tokenizer.json``, else ``tokenizer.model``.

    Raises:
      TokenizerError: files are missing, damaged, or of an unknown kind.
    """
    from llmjax.text import huggingface

    return huggingface.read(Path(directory))


def from_gguf(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata.

    Raises:
      TokenizerError: entries are missing, of the wrong type or length, or of an unknown kind.
    """
    from llmjax.text import gguf

    return gguf.read(metadata, path)


def load_backend(build: Any, where: str) -> tokenizers.Tokenizer:
    """Runs ``build()``, whose failures (the library raises bare ``Exception``) become a TokenizerError."""
    try:
        return build()
    except TokenizerError:
        raise
    except Exception as error:
        raise TokenizerError(f"{where}: the tokenizer cannot be built: {error}") from None
