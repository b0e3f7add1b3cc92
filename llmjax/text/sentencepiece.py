"""SentencePiece vocabularies as `tokenizers` objects, by the rules the published ``tokenizer.json`` files were made
with.

Merges are not stored in such a vocabulary: two pieces may merge whenever the joined piece exists, the best score first.
CONTROL and USER_DEFINED pieces become added tokens, so their strings in a text become their ids (SentencePiece itself
would split a CONTROL piece's string; transformers does not, and llmjax follows transformers).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from llmjax.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Pieces of a SentencePiece BPE model.

    Attributes:
      pieces: in id order.
      scores: as stored; higher merges first.
      types: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED or BYTE.
      add_dummy_prefix: put a space before the text.
      bos_id: None where there is none.
      eos_id: None where there is none.
      unk_id: of the UNKNOWN piece.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    add_dummy_prefix: bool
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None


def parse(data: bytes, where: str) -> Vocabulary:
    """Reads a ``tokenizer.model``.

    Raises:
      TokenizerError: it is damaged, or not a BPE model.
    """
    import sentencepiece as spm
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # generated code, without types

    model = proto.ModelProto()
    try:
        model.ParseFromString(data)
        processor = spm.SentencePieceProcessor(model_proto=data)
    except Exception as error:
        raise TokenizerError(f"{where}: not a SentencePiece model, or a damaged one: {error}") from None
    if model.trainer_spec.model_type != proto.TrainerSpec.BPE:
        kind = proto.TrainerSpec.ModelType.Name(model.trainer_spec.model_type)
        raise TokenizerError(f"{where}: SentencePiece model of type {kind}; expected BPE")
    if model.normalizer_spec.precompiled_charsmap:
        raise TokenizerError(f"{where}: normalizer {model.normalizer_spec.name!r} is not supported; expected identity")
    ids = [i if i >= 0 else None for i in (processor.bos_id(), processor.eos_id(), processor.unk_id())]
    return Vocabulary(
        [p.piece for p in model.pieces],
        [p.score for p in model.pieces],
        [p.type for p in model.pieces],
        model.normalizer_spec.add_dummy_prefix,
        *ids,
    )


def special_tokens(model: Vocabulary) -> dict[str, str]:
    """``bos_token`` and so on, by the names of Hugging Face."""
    ids = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id}
    return {name: model.pieces[i] for name, i in ids.items() if i is not None}


def build(model: Vocabulary, where: str) -> tokenizers.Tokenizer:
    """The tokenizer of a vocabulary.

    Raises:
      TokenizerError: a piece appears twice, or there is none for unknown text.
    """
    vocab = {piece: i for i, piece in enumerate(model.pieces)}
    if len(vocab) != len(model.pieces):
        twice = next(p for i, p in enumerate(model.pieces) if vocab[p] != i)
        raise TokenizerError(f"{where}: piece {twice!r} appears twice in the vocabulary")
    if model.unk_id is None:
        raise TokenizerError(f"{where}: the vocabulary has no unknown piece")
    mergeable = {p: i for p, i in vocab.items() if model.types[i] in (NORMAL, USER_DEFINED, UNUSED) and len(p) > 1}
    merges = sorted(
        ((-model.scores[i], vocab[a], vocab[b], a, b) for p, i in mergeable.items() for a, b in _splits(p, vocab)),
    )
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            [(a, b) for *_, a, b in merges],
            unk_token=model.pieces[model.unk_id],
            fuse_unk=True,
            byte_fallback=BYTE in model.types,
        )
    )
    steps = [normalizers.Prepend("▁")] if model.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    for piece, kind in zip(model.pieces, model.types, strict=True):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            special = kind != USER_DEFINED
            backend.add_tokens([tokenizers.AddedToken(piece, special=special, normalized=False)])
    return backend


def _splits(piece: str, vocab: dict[str, int]) -> list[tuple[str, str]]:
    pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
    return [(a, b) for a, b in pairs if a in vocab and b in vocab]
