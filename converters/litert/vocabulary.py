"""A tokenizer as a bundle holds it: ``tokenizer.json``, or a SentencePiece model."""

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from converters.litert.container import Section, packed_json
from converters.litert.templates import Carried
from converters.mediapipe.vocabulary import read_vocabulary, tell_differing
from converters.readers.mediapipe.source import MediapipeSource
from converters.readers.source import Source
from llmjax.checkpoint.graph_source import GraphSource
from llmjax.checkpoint.loading import read_tokenizer
from llmjax.checkpoint.plan import Override
from llmjax.errors import ConfigError, RequestError, TokenizerError, named
from llmjax.text import bundle, mediapipe
from llmjax.text.bundle import Ends
from llmjax.text.export import tokenizer_json
from llmjax.text.mediapipe import MediapipeTokenizer, for_transformers
from llmjax.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)


def tokenizer_of(source: Source, override: Override, vocab_size: int) -> Tokenizer:
    """A checkpoint's tokenizer, with special tokens found in texts.

    Raises:
      TokenizerError: there is none, it has tokens that the model has no row for, or it begins texts with several, where
        a bundle has one.
    """
    found = read_tokenizer(source, override)
    if found is None:
        raise TokenizerError(
            f"{source.path}: no tokenizer, which a bundle needs; put tokenizer.json or tokenizer.model beside the "
            "weights, or write the graph alone (--to tflite)"
        )
    if isinstance(found, MediapipeTokenizer) and (vocabulary := _model_of(source)):
        found = for_transformers(found, vocabulary)
    beyond = {i for i in found.backend.get_vocab(with_added_tokens=False).values() if i >= vocab_size}
    if beyond:
        raise TokenizerError(
            f"{found.where}: the vocabulary has {found.vocab_size:,} tokens, the model's embedding only "
            f"{vocab_size:,} rows: it is another model's, or some rows are lost"
        )
    begin = ", ".join(f"{named(found.piece(i))} ({i})" for i in found.prefix_ids)
    if any(i >= vocab_size for i in found.prefix_ids):
        raise TokenizerError(
            f"{found.where}: it begins texts with {begin}, beyond the {vocab_size:,} rows of the model's embedding: it "
            "is another model's, or some rows are lost"
        )
    if len(found.prefix_ids) > 1:
        raise TokenizerError(
            f"{found.where}: it begins texts with {begin}, where LiteRT-LM and MediaPipe put one token; leave one in "
            "post_processor of a copy's tokenizer.json"
        )
    return found


def section(source: Source, tokenizer: Tokenizer, vocab_size: int) -> Section:
    """The tokenizer of a ``.litertlm`` file.

    Added tokens that the model has no row for (Gemma 3's for images) are left out: no text may turn into them.

    Raises:
      TokenizerError: neither form can say what it does.
    """
    if tokenizer.dummy_prefix:
        if model := _model_of(source):
            _check_chat(bundle.from_sentencepiece(model, tokenizer.where, Ends()), tokenizer, _chats(tokenizer))
            return Section("SP_Tokenizer", model)
        raise TokenizerError(
            f"{tokenizer.where}: neither tokenizer.json nor a SentencePiece model can say what this tokenizer does"
        )
    state = tokenizer_json(tokenizer)
    beyond = [token for token in state["added_tokens"] if token["id"] >= vocab_size]
    if beyond:
        names = ", ".join(named(token["content"]) for token in beyond[:5])
        _LOG.warning(
            f"{tokenizer.where}: {len(beyond)} added tokens ({names}) are beyond the {vocab_size:,} rows of the "
            "model's embedding; the bundle leaves them out"
        )
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < vocab_size]
    data = json.dumps(state, ensure_ascii=False, separators=(",", ":")).encode()
    return Section("HF_Tokenizer_Zlib", packed_json(data))


def sentencepiece(
    source: Source, tokenizer: Tokenizer, carried: Carried, vocab: str | Path | None
) -> tuple[bytes, bool, str]:
    """The SentencePiece model of a ``.task`` file; whether its pieces are spelled in GPT-2's characters for bytes; and
    where it is from.

    Args:
      source: the checkpoint.
      tokenizer: its tokenizer.
      carried: its chat template.
      vocab: a file or a directory to read instead.

    Raises:
      ConfigError: there is none.
      TokenizerError: it is damaged, or has no words for the chat template.
    """
    model = None if vocab else _model_of(source)
    if model:
        where, spelled = str(source.path), isinstance(source, MediapipeSource) and tokenizer.kind == "bpe"
    elif vocab is None and source.format in ("gguf", "graph"):
        raise ConfigError(
            f"{source.path}: a .task file needs a SentencePiece model, and this source has none; give vocab (--vocab): "
            "a tokenizer.model, or a directory with tokenizer.json; or write a .litertlm file"
        )
    else:
        try:
            model, where = read_vocabulary(vocab or source.directory, given=vocab is not None)
        except TokenizerError as error:
            raise TokenizerError(f"{error}; a .litertlm file holds a tokenizer.json as it is") from None
        spelled = Path(where).name == "tokenizer.json"
    if spelled:
        _LOG.warning(
            f"{where}: its pieces are spelled in GPT-2's characters for bytes, as MediaPipe spells texts and LiteRT-LM "
            "does not: write a .litertlm file for that"
        )
    theirs = mediapipe.read(model, where, start_id=None, stop=(), bytes_to_unicode=spelled)
    tell_differing(theirs, tokenizer, "a .litertlm file keeps that as it is")
    _check_chat(theirs, tokenizer, [f"{prefix}Hi.{suffix}" for prefix, suffix in carried.affixes.values()])
    return model, spelled, where


def _chats(tokenizer: Tokenizer) -> Iterator[str]:
    """Conversations in the words of the chat template."""
    said = [{"role": role, "content": "Hi."} for role in ("user", "assistant", "user")]
    for messages in (said[:1], said) if tokenizer.chat_template else ():
        with contextlib.suppress(RequestError):  # it refuses these
            yield tokenizer.render_chat(messages)


def _check_chat(theirs: Tokenizer, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Refuses a chat template whose special tokens would be text."""
    if any(theirs.encode(text, add_bos=False) != tokenizer.encode(text, add_bos=False) for text in texts):
        raise TokenizerError(
            f"{tokenizer.where}: its chat template writes special tokens, which are taken for text with a "
            "SentencePiece model; write a .litertlm file of a checkpoint with tokenizer.json (save_pretrained() of "
            "transformers), or leave the template out (--chat-template none)"
        )


def _model_of(source: Source) -> bytes | None:
    """The SentencePiece model that a source has."""
    if isinstance(source, MediapipeSource | GraphSource):
        return source.vocabulary or None
    path = source.directory / "tokenizer.model"
    return path.read_bytes() if source.format not in ("gguf", "graph") and path.is_file() else None
