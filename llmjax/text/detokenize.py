"""Text as it grows token by token, never half a UTF-8 character.

A decoder of a tokenizer file is one of three kinds here, each with constant work per token:

* ``ByteStream``: every token is bytes (GPT-2, Llama 3, Qwen, ...).
* ``PieceStream``: tokens are text, with byte tokens ``<0xE2>`` for what the vocabulary lacks
  (SentencePiece: Gemma, Llama 2, ...).
* ``WholeText``: any other decoder; its text comes out at the end only.
"""

import codecs
import functools
import re
from collections.abc import Callable, Sequence
from typing import Protocol

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>", re.ASCII)


class IncrementalDetokenizer(Protocol):
    """Decodes a growing list of ids; the pieces joined are exactly ``Tokenizer.decode`` of all ids.

    A character is given out when its last byte has arrived, a replacement character (U+FFFD) when
    the bytes can no longer become valid.
    """

    def push(self, token: int) -> str:
        """Takes the next id; returns new text that can no longer change, often empty."""

    def flush(self) -> str:
        """Ends the text and returns what was held back, complete or not."""


class ByteStream:
    """For decoders that join the tokens' bytes and read them as UTF-8.

    Args:
      token_bytes: what an id contributes; empty for special tokens.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """See ``IncrementalDetokenizer``."""
        return self._utf8.decode(self._token_bytes(token))

    def flush(self) -> str:
        """See ``IncrementalDetokenizer``."""
        return self._utf8.decode(b"", final=True)


class PieceStream:
    """For SentencePiece-type decoders.

    Their rule for byte tokens is SentencePiece's own: whole characters stay, and every byte that is part of none
    becomes one replacement character.  (The `tokenizers` library, and so transformers, replaces a whole run of byte
    tokens if any byte of it is invalid, so that a character in it were certain only when the run ends.)

    Args:
      piece: an id's text or byte, or None where it contributes nothing (it then ends no run).
      strip: how many spaces to take off the beginning of the text.
    """

    def __init__(self, piece: Callable[[int], str | bytes | None], strip: int):
        self._piece = piece
        self._strip = strip
        self._bytes = b""  # the beginning of a character

    def push(self, token: int) -> str:
        """See ``IncrementalDetokenizer``."""
        piece = self._piece(token)
        if piece is None:
            return ""
        if isinstance(piece, bytes):
            return self._stripped(self._decoded(piece, final=False))
        return self._stripped(self._decoded(b"", final=True) + piece)

    def flush(self) -> str:
        """See ``IncrementalDetokenizer``."""
        return self._stripped(self._decoded(b"", final=True))

    def _decoded(self, more: bytes, final: bool) -> str:
        """What is certain of the bytes held back and of ``more``."""
        text, self._bytes = "", self._bytes + more
        while True:
            try:
                whole, used = codecs.utf_8_decode(self._bytes, "strict", final)
            except UnicodeDecodeError as error:
                text += self._bytes[: error.start].decode() + "\ufffd" * (error.end - error.start)
                self._bytes = self._bytes[error.end :]
            else:
                self._bytes = self._bytes[used:]
                return text + whole

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            self._strip -= 1
            text = text[1:]
        return text


class WholeText:
    """For decoders whose text can change with every further token.

    Args:
      decode: ids to text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []

    def push(self, token: int) -> str:
        """See ``IncrementalDetokenizer``."""
        self._ids.append(token)
        return ""

    def flush(self) -> str:
        """See ``IncrementalDetokenizer``."""
        ids, self._ids = self._ids, []
        return self._decode(ids)


def sentencepiece_piece(piece: str) -> str | bytes:
    """What a SentencePiece entry stands for: a byte for ``<0xE2>``, else text with real spaces."""
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(match[1]) if match else piece.replace("▁", " ")


def byte_level_bytes(piece: str) -> bytes:
    """What an entry of a byte-level vocabulary stands for.

    Entries spell each byte as one printable character; an added token that uses any other
    character is plain text.
    """
    alphabet = _byte_alphabet()
    try:
        return bytes(alphabet[char] for char in piece)
    except KeyError:
        return piece.encode()


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the other bytes from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
