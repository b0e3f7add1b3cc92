"""A byte-level ``tokenizer.json`` as a SentencePiece model, as MediaPipe's converter makes it.

A piece's score is minus its id, so pairs merge in the order of the ids and not of ``merges``: ids of a text may differ
from Hugging Face's.  MediaPipe's runtime spells a text in GPT-2's characters for bytes before SentencePiece sees it.
Added tokens that are ``normalized`` follow as user-defined pieces, whatever their ids; MediaPipe subtracts from an
unsigned number for their scores, which gives 2^64.

Source: ``vocab_convert_utils.cc`` of https://github.com/google-ai-edge/mediapipe.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

from converters.readers.jsonfile import read_json
from llmjax.errors import CheckpointError, ConfigError, TokenizerError
from llmjax.outside.paths import checked_path
from llmjax.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4
# Texts that vocabularies cut differently, if any.
_SAMPLES = (
    "The quick brown fox jumps over the lazy dog. In 1905 she wrote: 3.14 is not 22/7, but it is near.",
    "  two  spaces,\n\ta tab; naïve façades, 東京 and 🙂.",
    "def f(x):\n    return {'a': [x, x * 2]}  # Überprüfung\n",
)


def tell_differing(written: Tokenizer, own: Tokenizer, advice: str) -> None:
    """Says in the log where the tokenizer that is written cuts texts otherwise than the checkpoint's own does."""
    differing = [text for text in _SAMPLES if written.encode(text, add_bos=False) != own.encode(text, add_bos=False)]
    if differing:
        _LOG.warning(
            f"{written.where}: as a SentencePiece model it cuts {len(differing)} of {len(_SAMPLES)} sample texts into "
            f"other tokens than the checkpoint's own tokenizer does; {advice}"
        )


def from_huggingface(directory: Path) -> bytes:
    """The SentencePiece model of ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
      TokenizerError: files are missing or damaged, or the vocabulary is none that can be converted.
    """
    path = directory / "tokenizer.json"
    tokenizer, config = _object(path), _object(directory / "tokenizer_config.json")
    pieces = _pieces(tokenizer, path)
    unknown = config.get("unk_token")
    unknown = unknown.get("content") if isinstance(unknown, dict) else unknown
    if not isinstance(unknown, str) or not unknown:
        raise TokenizerError(
            f"{directory / 'tokenizer_config.json'}: unk_token: expected a token, which the format needs, "
            f"found {unknown!r}"
        )
    added = _added(tokenizer, path)
    if unknown not in pieces:
        # MediaPipe makes a model without it, which SentencePiece refuses.
        if (len(pieces), unknown) not in [(number, content) for number, content, _ in added]:
            raise TokenizerError(f"{path}: unk_token {unknown!r} of tokenizer_config.json is not in model.vocab")
        pieces.append(unknown)
    return _model(pieces, unknown, [(number, content) for number, content, normalized in added if normalized], path)


def _model(pieces: list[str], unknown: str, added: list[tuple[int, str]], path: Path) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # generated code, without types
    model = proto.ModelProto()
    for number, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=-number, type=_UNKNOWN if piece == unknown else _NORMAL)
    known = set(pieces)
    for index, (number, piece) in enumerate(added):
        if piece in known:
            raise TokenizerError(f"{path}: added token {piece!r} is in model.vocab or added twice; expected it once")
        known.add(piece)
        if number != len(model.pieces):
            warnings.warn(
                f"{path}: added token {piece!r} has id {number} and gets {len(model.pieces)}, as MediaPipe gives it",
                stacklevel=2,
            )
        model.pieces.add(piece=piece, score=float(2**64 - len(pieces) - index), type=_USER_DEFINED)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(model.pieces)
    for spec in (model.normalizer_spec, model.denormalizer_spec):
        spec.add_dummy_prefix = spec.remove_extra_whitespaces = spec.escape_whitespaces = False
    return model.SerializeToString()


def _object(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None
    if found is None:
        raise TokenizerError(f"{path}: no such file")
    return found


def _pieces(tokenizer: dict[str, Any], path: Path) -> list[str]:
    """The vocabulary in the order of its ids."""
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise TokenizerError(f"{path}: model: expected a BPE vocabulary, found {kind!r}")
    vocab = model["vocab"]
    if model.get("byte_fallback") or "Ġ" not in vocab and any(piece.startswith("▁") for piece in vocab):
        raise TokenizerError(
            f"{path}: a SentencePiece vocabulary, expected a byte-level one; give the model's tokenizer.model"
        )
    if not vocab or sorted(vocab.values(), key=str) != sorted(range(len(vocab)), key=str):
        raise TokenizerError(f"{path}: model.vocab: expected the ids 0 to {len(vocab) - 1}, each of them once")
    if "" in vocab or not all(map(_is_text, vocab)):
        raise TokenizerError(f"{path}: model.vocab: a piece is empty, or no valid Unicode text")
    return sorted(vocab, key=vocab.__getitem__)


def _added(tokenizer: dict[str, Any], path: Path) -> list[tuple[int, str, bool]]:
    """Added tokens: id, text, whether they are ``normalized``."""
    found = tokenizer.get("added_tokens") or []
    keys = {"id": int, "content": str, "normalized": bool}
    for entry in found if isinstance(found, list) else [found]:
        wrong = not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in keys.items())
        if wrong or not entry["content"] or not _is_text(entry["content"]):
            raise TokenizerError(
                f"{path}: added_tokens: expected objects with id, content and normalized, found {entry!r:.80}"
            )
    return [(entry["id"], entry["content"], entry["normalized"]) for entry in found]


def _is_text(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def read_vocabulary(path: str | Path, *, given: bool) -> tuple[bytes, str]:
    """A SentencePiece model from a file, or from a directory's ``tokenizer.model`` or ``tokenizer.json``.

    Raises:
      ConfigError: there is none.
      TokenizerError: it is damaged.
    """
    path = checked_path("vocab_model_file", path, ConfigError)
    if path.is_dir():
        model = path / "tokenizer.model"
        if not model.is_file() and (path / "tokenizer.json").is_file():
            return from_huggingface(path), str(path / "tokenizer.json")
        if not model.is_file():
            raise ConfigError(
                f"{path}: neither tokenizer.model nor tokenizer.json"
                + ("" if given else "; give vocab_model_file: a SentencePiece model, or a directory with one of these")
            )
        path = model
    try:
        return path.read_bytes(), str(path)
    except OSError as error:
        raise ConfigError(f"vocab_model_file: {path}: cannot read it: {error.strerror}") from None
