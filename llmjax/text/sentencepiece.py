"""SentencePiece BPE vocabularies as `tokenizers` objects.

Such a vocabulary stores no merges: two pieces may merge whenever the joined piece exists, the best
score first.  CONTROL pieces become special tokens, so their strings in a text become their ids
(SentencePiece itself would split them as text; transformers does not, and llmjax follows it).
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from llmjax.errors import TokenizerError
from llmjax.text.tokenizer import Tokenizer, add_tokens, load_backend

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Pieces of a SentencePiece BPE model.

    Attributes:
      pieces: in id order, ``▁`` for a space.
      scores: as stored; higher merges first.
      types: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED or BYTE.
      add_dummy_prefix: put a space before the text.
      bos_id: None where there is none.
      eos_id: None where there is none.
      unk_id: of the UNKNOWN piece.
      charsmap: SentencePiece's compiled rules of Unicode normalization; empty for none.
      single_spaces: remove spaces around the text, and all but one of several within it.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    add_dummy_prefix: bool
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    charsmap: bytes = b""
    single_spaces: bool = False


def read(data: bytes, where: str, *, add_bos: bool, bytes_to_unicode: bool = False) -> Tokenizer:
    """The tokenizer of a ``tokenizer.model``, without a chat template.

    Args:
      data: the file's bytes.
      where: how messages call them.
      add_bos: whether ``encode`` begins with BOS; the file itself does not say.
      bytes_to_unicode: see ``build``.

    Raises:
      TokenizerError: see ``parse``.
    """
    vocabulary = parse(data, where, bytes_to_unicode=bytes_to_unicode)
    backend, dummy_prefix = build(vocabulary, where, bytes_to_unicode=bytes_to_unicode)
    bos, eos = vocabulary.bos_id, vocabulary.eos_id
    return Tokenizer(
        backend=backend,
        bos_id=bos,
        eos_ids=() if eos is None else (eos,),
        prefix_ids=(bos,) if add_bos and bos is not None else (),
        suffix_ids=(),
        chat_template=None,
        special=special_tokens(vocabulary),
        where=where,
        dummy_prefix=dummy_prefix,
    )


def some_pieces(data: bytes, most: int = 256) -> dict[int, str]:
    """Pieces of a ``tokenizer.model`` by id, evenly from among those that stand for text; none of a file of another
    kind, which may have that name, too."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # generated code, without types
    model = proto.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:  # protobuf's own class
        return {}
    normal = [i for i, piece in enumerate(model.pieces) if piece.type == NORMAL]
    return {i: model.pieces[i].piece for i in normal[:: -(-len(normal) // most) or 1]}


def parse(data: bytes, where: str, *, bytes_to_unicode: bool = False) -> Vocabulary:
    """Reads a ``tokenizer.model``; with ``bytes_to_unicode`` (see ``build``) it need not mark spaces.

    Raises:
      TokenizerError: it is damaged, not a BPE model, or normalizes text in a way llmjax does not.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # generated code, without types

    model = proto.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's own class
        raise _damaged(where, error) from None
    processor = processor_of(data, where)
    spec, trainer = model.normalizer_spec, model.trainer_spec
    refused = []
    if trainer.model_type != proto.TrainerSpec.BPE:
        kind = proto.TrainerSpec.ModelType.Name(trainer.model_type)
        refused.append(f"model type: expected BPE, found {kind}")
    if not spec.escape_whitespaces and not (bytes_to_unicode and not spec.add_dummy_prefix):
        refused.append("escape_whitespaces: expected true, found false")
    if trainer.treat_whitespace_as_suffix:
        refused.append("treat_whitespace_as_suffix: expected false, found true")
    if refused:
        raise TokenizerError(f"{where}: SentencePiece model not supported: {'; '.join(refused)}")
    bos, eos, unk = processor.bos_id(), processor.eos_id(), processor.unk_id()
    return Vocabulary(
        pieces=[p.piece for p in model.pieces],
        scores=[p.score for p in model.pieces],
        types=[p.type for p in model.pieces],
        add_dummy_prefix=spec.add_dummy_prefix,
        bos_id=bos if bos >= 0 else None,
        eos_id=eos if eos >= 0 else None,
        unk_id=unk if unk >= 0 else None,
        charsmap=spec.precompiled_charsmap,
        single_spaces=spec.remove_extra_whitespaces,
    )


def processor_of(data: bytes, where: str) -> Any:
    """The library's own ``SentencePieceProcessor`` of a ``tokenizer.model``, of any kind.

    Raises:
      TokenizerError: it is damaged, or empty.
    """
    import sentencepiece

    if not data:
        raise TokenizerError(f"{where}: not a SentencePiece model: it has no pieces")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except Exception as error:  # RuntimeError and others
        raise _damaged(where, error) from None


def _damaged(where: str, error: Exception) -> TokenizerError:
    return TokenizerError(f"{where}: not a SentencePiece model, or a damaged one: {error or 'it does not parse'}")


def special_tokens(model: Vocabulary) -> dict[str, str]:
    """``bos_token`` and so on, by the names of Hugging Face."""
    ids = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id}
    return {name: model.pieces[i] for name, i in ids.items() if i is not None}


def build(
    model: Vocabulary,
    where: str,
    *,
    dummy_prefix: bool | None = None,
    everywhere: bool = False,
    strip_after: Collection[str] = (),
    bytes_to_unicode: bool = False,
) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer of a vocabulary, and whether the caller must still put the dummy prefix.

    Args:
      model: the vocabulary.
      where: the file, for messages.
      dummy_prefix: instead of the vocabulary's own.
      everywhere: begin every stretch between added tokens with the dummy prefix (llama.cpp, and
        transformers' "legacy" mode), not only the text.
      strip_after: special and user-defined tokens that swallow the white space behind them.
      bytes_to_unicode: the vocabulary spells bytes as GPT-2 does, and so must a text before anything else is done to
        it (MediaPipe's files of Phi-2, Falcon and StableLM).

    Raises:
      TokenizerError: a piece appears twice, or there is none for unknown text.
    """
    vocab = {piece: i for i, piece in enumerate(model.pieces)}
    if len(vocab) != len(model.pieces):
        i, twice = next((i, p) for i, p in enumerate(model.pieces) if vocab[p] != i)
        raise TokenizerError(f"{where}: piece {twice!r} appears twice: ids {i} and {vocab[twice]}")
    if model.unk_id is None:
        raise TokenizerError(f"{where}: the vocabulary has no piece for unknown text")
    unk = model.pieces[model.unk_id]
    prefix = model.add_dummy_prefix if dummy_prefix is None else dummy_prefix
    backend = load_backend(
        lambda: tokenizers.Tokenizer(
            models.BPE(
                vocab,
                _merges(model),
                unk_token=unk,
                fuse_unk=True,
                byte_fallback=BYTE in model.types,
            )
        ),
        where,
    )
    # A space that is put before the text would be removed, or spelled as a byte.
    everywhere |= model.single_spaces or bytes_to_unicode
    steps: list[normalizers.Normalizer] = [normalizers.ByteLevel()] if bytes_to_unicode else []
    steps += _cleaning(model, where)
    if prefix and everywhere:
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = _decoder(model, prefix, bytes_to_unicode)
    typed = list(zip(model.pieces, model.types, strict=True))

    def added(kinds: Sequence[int], normalized: bool) -> list[tokenizers.AddedToken]:
        return [
            tokenizers.AddedToken(p, normalized=normalized, rstrip=p in strip_after) for p, t in typed if t in kinds
        ]

    add_tokens(backend, added((CONTROL, UNKNOWN), normalized=False), special=True)
    # SentencePiece finds these in the normalized text ("▁▁" for two spaces).  The library would
    # normalize their own strings, too, which a prepended space spoils.
    user_defined = added((USER_DEFINED,), normalized=not steps)
    if bytes_to_unicode:  # they are found in the spelled text, where "  " is "ĠĠ"
        user_defined = [
            t for t in user_defined if t.content.isascii() and t.content.isprintable() and " " not in t.content
        ]
    add_tokens(backend, user_defined, special=False)
    return backend, prefix and not everywhere


def _decoder(model: Vocabulary, prefix: bool, bytes_to_unicode: bool) -> decoders.Decoder:
    if not bytes_to_unicode:
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if any("▁" in piece for piece in model.pieces):
        # No vocabulary of this kind should have it.  MediaPipe makes an invalid byte of it: here U+FFFD, spelled.
        return decoders.Sequence([decoders.Replace("▁", "ï¿½"), decoders.ByteLevel()])
    return decoders.ByteLevel()


def _cleaning(model: Vocabulary, where: str) -> list[normalizers.Normalizer]:
    """What SentencePiece does to a text before it marks the spaces."""
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        try:
            steps.append(normalizers.Precompiled(model.charsmap))
        except Exception as error:  # the library raises no other class
            raise TokenizerError(f"{where}: the rules of normalization are damaged: {error}") from None
    if model.single_spaces:
        # Of spaces alone, where normalizers.Strip takes all white space.
        for pattern, text in ((r"\A +| +\z", ""), (" {2,}", " ")):
            steps.append(normalizers.Replace(tokenizers.Regex(pattern), text))
    return steps


def _merges(model: Vocabulary) -> list[tuple[str, str]]:
    """Pairs that join to a piece, best first; among the splits of one piece, the longest left part
    first, as in the published conversions."""
    usable = {p for p, t in zip(model.pieces, model.types, strict=True) if t in (NORMAL, USER_DEFINED, UNUSED)}
    found = [
        (-score, -i, piece)
        for piece, score in zip(model.pieces, model.scores, strict=True)
        if len(piece) > 1 and piece in usable
        for i in range(1, len(piece))
        if piece[:i] in usable and piece[i:] in usable
    ]
    found.sort(key=lambda item: item[:2])
    return [(piece[:-i], piece[-i:]) for _, i, piece in found]
