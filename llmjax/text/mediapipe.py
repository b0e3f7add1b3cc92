"""The tokenizer in a ``.bin`` file of MediaPipe's: a SentencePiece model, and tokens that start and stop a text."""

import dataclasses
from collections.abc import Sequence

from llmjax.text import sentencepiece
from llmjax.text.tokenizer import Tokenizer


def read(
    model: bytes, where: str, *, start_id: int | None, stop: Sequence[str], bytes_to_unicode: bool = False
) -> Tokenizer:
    """A tokenizer whose texts begin with ``start_id`` and end at ``stop``.

    Args:
      model: the SentencePiece model.
      where: the file, for messages.
      start_id: put before every text; may lie beyond the vocabulary, as the file's dimensions do not limit it.
      stop: what ends a text: tokens, or strings in it.
      bytes_to_unicode: texts are spelled in GPT-2's characters for bytes before SentencePiece sees them.

    Raises:
      TokenizerError: the model is damaged, or of a kind llmjax does not have.
    """
    tokenizer = sentencepiece.read(model, where, add_bos=False, chat_template=None, bytes_to_unicode=bytes_to_unicode)
    ids = [tokenizer.backend.token_to_id(text) for text in stop]
    return dataclasses.replace(
        tokenizer,
        bos_id=start_id,
        prefix_ids=() if start_id is None else (start_id,),
        eos_ids=tuple(sorted({i for i in ids if i is not None})),
        stop=tuple(text for text in stop if text),
    )
