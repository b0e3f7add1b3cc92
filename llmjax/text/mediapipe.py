"""The tokenizer in a ``.bin`` file of MediaPipe's: a SentencePiece model, and tokens that start and stop a text.

It does what the official runtimes do, not what transformers would: strings of special tokens in a text are text, the
whole text is normalized before user-defined pieces are found in it, and a generated text keeps its first space.
Where the web runtime prints special and byte tokens by their names, llmjax leaves out the former and joins the latter.
Measured with npm's @mediapipe/tasks-genai 0.10.24.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Collection, Sequence

from tokenizers import normalizers

from llmjax.errors import TokenizerError
from llmjax.text import sentencepiece
from llmjax.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class MediapipeTokenizer(Tokenizer):
    """A tokenizer as MediaPipe's runtimes have it.

    Attributes:
      normalizer: what is done to the whole text first.
      bytes_to_unicode: it spells the text's bytes.
    """

    normalizer: normalizers.Normalizer
    bytes_to_unicode: bool

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """See ``Tokenizer``; strings of special tokens are text."""
        try:
            text = self.normalizer.normalize_str(text)
        except (TypeError, UnicodeEncodeError):
            pass  # no text, which is refused below
        return super().encode(text, add_bos=add_bos)

    def fingerprint(self) -> str:
        """See ``Tokenizer``."""
        return hashlib.sha256(f"{super().fingerprint()}\n{self.normalizer.__getstate__()!r}".encode()).hexdigest()


def read(
    model: bytes,
    where: str,
    *,
    start_id: int | None,
    stop: Sequence[str],
    rows: int | None = None,
    bytes_to_unicode: bool = False,
) -> MediapipeTokenizer:
    """A tokenizer whose texts begin with ``start_id`` and end at ``stop``.

    Args:
      model: the SentencePiece model.
      where: the file, for messages.
      start_id: put before every text.
      stop: what ends a text: tokens, or strings in it.
      rows: of the model's embedding, V; None asks for nothing.
      bytes_to_unicode: texts are spelled in GPT-2's characters for bytes before SentencePiece sees them.

    Raises:
      TokenizerError: the model is damaged, of a kind llmjax does not have, or lacks these tokens.
    """
    vocabulary = sentencepiece.parse(model, where, bytes_to_unicode=bytes_to_unicode)
    check_tokens(vocabulary.pieces, vocabulary.eos_id, start_id, stop, rows, where)
    backend, _ = sentencepiece.build(vocabulary, where, dummy_prefix=False, bytes_to_unicode=bytes_to_unicode)
    prefix = [normalizers.Prepend("▁")] if vocabulary.add_dummy_prefix else []
    normalizer = normalizers.Sequence([backend.normalizer, *prefix])
    backend.normalizer = normalizers.Sequence([])
    backend.encode_special_tokens = True
    ids = [backend.token_to_id(text) for text in stop]
    return MediapipeTokenizer(
        backend=backend,
        bos_id=start_id,
        eos_ids=tuple(sorted({i for i in ids if i is not None})),
        prefix_ids=() if start_id is None else (start_id,),
        suffix_ids=(),
        chat_template=None,
        special=sentencepiece.special_tokens(vocabulary),
        where=where,
        stop=tuple(text for text in stop if text),
        normalizer=normalizer,
        bytes_to_unicode=bytes_to_unicode,
    )


def check_tokens(
    pieces: Collection[str], eos_id: int | None, start_id: int | None, stop: Sequence[str], rows: int | None, where: str
) -> None:
    """Refuses another model's vocabulary, under which texts would be other ids than the model was trained with.

    Two things are logged alone.  A text that should end an answer and is no piece, where the vocabulary has an end of
    its own: MediaPipe's runtimes look for the text, and run such files.  And a start that the embedding has no row for:
    it is the model that is smaller than the published one, and token ids still run.

    Args:
      pieces: the vocabulary's.
      eos_id: its own piece that ends a text.
      start_id: put before every text.
      stop: what ends a text.
      rows: of the model's embedding, V.
      where: the file, for messages.

    Raises:
      TokenizerError: it lacks the token that begins every prompt, or any that ends an answer.
    """
    lacking = []
    if start_id is not None and start_id >= len(pieces):
        if rows is not None and start_id >= rows:
            _LOG.warning(
                f"{where}: every text begins with the id {start_id}, for which this model's {rows} rows have no place: "
                "it takes token ids, and no text"
            )
        else:
            lacking.append(f"the id {start_id}, which begins every prompt")
    ends = [text for text in stop if text]
    if ends and not set(ends) & set(pieces):
        names = " or ".join(map(repr, ends))
        if eos_id is None:
            lacking.append(f"{names}, which ends an answer")
        else:
            _LOG.warning(f"{where}: no piece {names}: answers end at this text alone; is it the model's?")
    if lacking:
        raise TokenizerError(
            f"{where}: this vocabulary of {len(pieces)} pieces belongs to another model: it lacks "
            f"{' and '.join(lacking)}; convert the model anew with its own vocabulary"
        )


def for_transformers(tokenizer: MediapipeTokenizer, model: bytes) -> Tokenizer:
    """The same vocabulary as Hugging Face's files can say it: special tokens are found in texts.

    Args:
      tokenizer: what ``read`` returned.
      model: of which.

    Raises:
      TokenizerError: as ``read``.
    """
    plain = sentencepiece.read(model, tokenizer.where, add_bos=False, bytes_to_unicode=tokenizer.bytes_to_unicode)
    # A start token beyond the vocabulary has no text.
    prefix = tuple(i for i in tokenizer.prefix_ids if plain.piece(i))
    bos = tokenizer.bos_id if prefix else None
    return dataclasses.replace(
        plain,
        bos_id=bos,
        prefix_ids=prefix,
        eos_ids=tokenizer.eos_ids,
        stop=tokenizer.stop,
        special={**plain.special, **tokenizer.special},
        chat_template=tokenizer.chat_template,
        tools_template=tokenizer.tools_template,
    )
