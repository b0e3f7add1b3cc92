"""Text token by token: the same as decoding everything, and never half a character."""

import functools
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from llmjax.text.detokenize import ByteStream, PieceStream, byte_level_bytes, sentencepiece_piece
from llmjax.text.reading import from_huggingface
from llmjax.text.tokenizer import decoder_form

DATA = Path(__file__).parents[1] / "data/tokenizers"
NAMES = sorted(p.name for p in DATA.iterdir())


@functools.cache
def load(name):
    return from_huggingface(DATA / name)


@functools.cache
def short_pieces(name):
    """Ids of single bytes and characters: what random sequences of break UTF-8 most often."""
    tokenizer = load(name)
    return [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) < 2]


def streamed(tokenizer, ids):
    stream = tokenizer.detokenizer()
    return [stream.push(i) for i in ids] + [stream.flush()]


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_pieces_join_to_decode(name, data):
    tokenizer = load(name)
    any_id = st.integers(0, tokenizer.vocab_size + 5)
    ids = data.draw(st.lists(any_id | st.sampled_from(short_pieces(name)), max_size=40))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(max_size=30))
def test_valid_text_never_shows_a_replacement_character(name, text):
    tokenizer = load(name)
    ids = tokenizer.encode(text, add_bos=False)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte():
    stream = ByteStream(lambda i: bytes([i]))
    assert [stream.push(b) for b in "é😀x".encode()] == ["", "é", "", "", "", "😀", "x"]


def test_a_damaged_character_is_replaced_as_soon_as_it_is_known():
    stream = ByteStream(lambda i: bytes([i]))
    assert [stream.push(b) for b in b"\xe2\x82A\xe2"] == ["", "", "\ufffdA", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(ord("z")) == "z"  # a flushed stream begins anew


def pieces(*entries, strip=0):
    parts = [None if e is None else sentencepiece_piece(e) for e in entries]
    stream = PieceStream(lambda i: parts[i], strip)
    return [stream.push(i) for i in range(len(parts))] + [stream.flush()]


def byte_pieces(data):
    return pieces(*(f"<0x{b:02X}>" for b in data))


def test_characters_of_byte_tokens_come_with_their_last_byte():
    assert byte_pieces("\né😀日\n".encode()) == ["\n", "", "é", "", "", "", "😀", "", "", "日", "\n", ""]
    assert pieces("<0xC3>", "<0xA9>", "▁a") == ["", "é", " a", ""]


def test_bytes_of_no_character_are_replaced_one_by_one():
    assert byte_pieces(b"\xc3\xa9\xff") == ["", "é", "\ufffd", ""]
    assert byte_pieces(b"\xe2\x82A\xe2\x82") == ["", "", "\ufffd\ufffdA", "", "", "\ufffd\ufffd"]
    assert pieces("<0xE2>", "<0x82>", "a") == ["", "", "\ufffd\ufffda", ""]


def test_a_skipped_token_does_not_end_a_run():
    assert pieces("<0xC3>", None, "<0xA9>") == ["", "", "é", ""]


@given(data=st.data())
def test_byte_tokens_decode_as_sentencepiece_decodes_them(data):
    tokenizer = load("gemma_2b")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "gemma_2b/tokenizer.model"))
    byte = [i for i in range(reference.get_piece_size()) if reference.is_byte(i)]
    text = data.draw(st.text(max_size=6).map(str.encode) | st.binary(max_size=8))
    ids = [byte[b] for b in text[: data.draw(st.integers(0, 20))] + data.draw(st.binary(max_size=3))]
    assert tokenizer.decode(ids) == reference.decode(ids) == "".join(streamed(tokenizer, ids))


@given(data=st.data())
def test_text_is_what_the_library_decodes_unless_bytes_are_invalid(data):
    tokenizer = load("gemma_2b")
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    for skip in True, False:
        text = tokenizer.backend.decode(ids, skip_special_tokens=skip)
        if "\ufffd" not in text:
            assert tokenizer.decode(ids, skip_special_tokens=skip) == text


def test_spaces_at_the_beginning():
    assert pieces("▁▁a", "▁b", strip=1) == [" a", " b", ""]
    assert pieces("a", "▁b", strip=1) == ["a", " b", ""]
    assert pieces("▁", "▁a", strip=1) == ["", " a", ""]
    assert pieces("<0x20>", "a", strip=1) == ["", "a", ""]
    assert pieces("▁a", strip=0) == [" a", ""]


def test_what_pieces_stand_for():
    assert byte_level_bytes("Ġé") == b" \xe9"
    assert byte_level_bytes("<|日|>") == "<|日|>".encode()  # an added token outside the alphabet
    assert sentencepiece_piece("<0xE2>") == b"\xe2"
    assert [sentencepiece_piece(p) for p in ("<0xE>", "<0xGG>", "▁x")] == ["<0xE>", "<0xGG>", " x"]


def test_a_decoder_of_another_kind_gives_its_text_at_the_end():
    tokenizer = load("falcon_rw")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.decoder = tokenizers.decoders.WordPiece()
    assert decoder_form(backend) == ("whole", 0)
    other = type(tokenizer)(backend, None, (), (), (), None, {}, "x")
    ids = tokenizer.encode("some text here")
    assert streamed(other, ids) == [""] * len(ids) + [other.decode(ids)]
