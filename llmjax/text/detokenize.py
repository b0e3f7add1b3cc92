"""Text as it grows token by token: never half a UTF-8 character, and in the end exactly what decoding all ids gives."""

import codecs
import json
import re
from collections.abc import Callable

import tokenizers

from llmjax.errors import TokenizerError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest for code points from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class IncrementalDetokenizer:
    """Decodes ids one by one; what it has given out never changes.

    Two kinds of decoder exist among the models llmjax runs.  Byte-level ones join bytes and read them as UTF-8.
    SentencePiece ones join pieces, write ``▁`` as a space, and read each *run* of byte pieces as UTF-8 on its own,
    every byte of it as U+FFFD where the run is not valid: a run is therefore held back until it ends.

    Args:
      piece: a token's entry in the vocabulary; empty for what is no text (special tokens, ids beyond the vocabulary).
      byte_level: which kind.
      strip_first_space: drop one space at the very beginning (vocabularies that put one before every text).
    """

    def __init__(self, piece: Callable[[int], str], byte_level: bool, strip_first_space: bool):
        self._piece, self._byte_level, self._strip = piece, byte_level, strip_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()

    def push(self, token: int) -> str:
        """Takes the next id and returns the text that is now certain."""
        piece = self._piece(token)
        if not piece:
            return ""
        if self._byte_level:
            return self._decoder.decode(byte_level_bytes(piece))
        byte = _BYTE.fullmatch(piece)
        if byte:
            self._run.append(int(byte[1], 16))
            return ""
        return self._first(self._end_run() + piece.replace("▁", " "))

    def flush(self) -> str:
        """The text of what is left, complete or not."""
        if self._byte_level:
            return self._decoder.decode(b"", final=True)
        return self._first(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _first(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def byte_level_bytes(piece: str) -> bytes:
    """The bytes a byte-level piece stands for; an added token outside the alphabet stands for its own UTF-8."""
    try:
        return bytes(_ALPHABET[letter] for letter in piece)
    except KeyError:
        return piece.encode()


def decoder_kind(backend: tokenizers.Tokenizer, where: str) -> tuple[bool, bool]:
    """``(byte_level, strip_first_space)`` of a tokenizer's decoder.

    Raises:
      TokenizerError: a decoder of another kind.
    """
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        strip = steps[3] if len(steps) == 4 else None
        expected = [None, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
        if steps[0] == {"type": "Replace", "pattern": {"String": "▁"}, "content": " "} and strip in expected:
            return False, strip is not None
    raise TokenizerError(
        f"{where}: decoder {' + '.join(map(str, kinds))} is not supported; expected ByteLevel, or Replace + ByteFallback + Fuse"
    )
