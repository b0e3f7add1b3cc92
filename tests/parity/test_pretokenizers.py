"""Pre-tokenizer kinds against transformers, which builds these models' own in Python."""

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from llmjax.text.pretokenizers import PRE_TOKENIZERS
from llmjax.text.reading import from_gguf

transformers = pytest.importorskip("transformers", reason="parity extra not installed")

# Whatever splits texts, and a byte-level vocabulary without merges.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(["'s", "'LL", "don't", "12345", "½ⅷ", "x²", "  ", "\r\n", " \n", "日本", "e\u0301", "👩‍👧"]),
        st.text(max_size=8),
    ),
    max_size=12,
).map("".join)
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {letter: i for i, letter in enumerate(LETTERS)}
METADATA = {"model": "gpt2", "tokens": LETTERS, "token_type": [1] * 256, "merges": []}


@pytest.mark.parametrize(
    ("name", "their_class"),
    [
        ("gpt-2", transformers.GPT2Tokenizer),
        ("phi-2", transformers.GPT2Tokenizer),
        ("olmo", transformers.GPTNeoXTokenizer),
        ("command-r", transformers.CohereTokenizer),
        ("qwen2", transformers.Qwen2Tokenizer),
        ("stablelm2", transformers.Qwen2Tokenizer),
    ],
)
def test_same_parts(name, their_class):
    theirs = their_class(vocab=VOCABULARY, merges=[]).backend_tokenizer
    metadata = {f"tokenizer.ggml.{k}": v for k, v in (METADATA | {"pre": name}).items()}
    ours = from_gguf(metadata, "x.gguf").backend
    nothing = normalizers.Sequence([])

    @hypothesis.settings(max_examples=300)
    @hypothesis.given(TEXTS)
    def compare(text):
        normal = (theirs.normalizer or nothing).normalize_str(text)
        assert (ours.normalizer or nothing).normalize_str(text) == normal
        expected = [part for part, _ in theirs.pre_tokenizer.pre_tokenize_str(normal)]
        assert [part for part, _ in ours.pre_tokenizer.pre_tokenize_str(normal)] == expected

    compare()
    assert PRE_TOKENIZERS[name].nfc == (theirs.normalizer is not None)
