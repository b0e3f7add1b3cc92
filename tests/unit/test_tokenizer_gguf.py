"""Tokenizers of GGUF files: how each kind splits a text, defaults, and metadata that cannot be used."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from converters.readers.gguf import GgufSource
from llmjax import TokenizerError
from llmjax.text.pretokenizers import PRE_TOKENIZERS
from llmjax.text.reading import from_gguf, from_huggingface

DATA = Path(__file__).parents[1] / "data/tokenizers"
HARD = (
    "I'm 12345 + 67.8e-9, DON'T, we'LL",
    "  two\t\ttabs\r\n\r\n  x \n",
    "日本語 é e\u0301 \u0301 👩‍👩‍👧 ⅷ ½ ²³ ١٢٣",
    "camelCase HTTPServer a/b//c $x+=1; `y`~z|",
    "<|im_start|>user\nhi<|im_end|>",
    "\u00a0\u3000\u200b\0",
)


def llama(**changes):
    """A small SentencePiece vocabulary: bytes, two letters, a pair of them with and without a space."""
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<x>", 4)]
    pieces += [(f"<0x{b:02X}>", 6) for b in range(256)] + [(p, 1) for p in ("▁a", "ab", "▁", "a", "b")]
    metadata = {
        "model": "llama",
        "tokens": [p for p, _ in pieces],
        "token_type": np.array([t for _, t in pieces], np.int32),
        "scores": -np.arange(len(pieces), dtype=np.float32),
    } | changes
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}


def byte_level(pre="gpt-2", **changes):
    letters = from_huggingface(DATA / "llama").backend
    tokens = sorted((t for t, i in letters.get_vocab().items() if i < 256), key=letters.token_to_id)
    tokens += ["ab", "Ġab", "cab", "<|end|>", "<tool>"]
    types = [1] * 259 + [3, 4]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": ["a b", "Ġ ab"],
        "bos_token_id": 259,
        "eos_token_id": 259,
    } | changes
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}


def read(metadata):
    return from_gguf(metadata, Path("x.gguf"))


def pieces(tokenizer, text):
    return [tokenizer.piece(i) for i in tokenizer.encode(text, add_bos=False)]


def parts(name, text):
    """How a kind splits a text."""
    split = read(byte_level(name)).backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in split]


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_kind_keeps_all_of_a_text(name):
    tokenizer = read(byte_level(name))
    for text in HARD[:4] + HARD[5:]:
        if not PRE_TOKENIZERS[name].nfc:
            assert "".join(parts(name, text)) == text
            assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", ["I", "'m", " 12345", "  ", " x", "!?", "\n", "\n", "y"]),
        ("smollm", ["I", "'m", " ", "1", "2", "3", "4", "5", "  ", " x", "!?", "\n", "\n", "y"]),
        ("llama-bpe", ["I", "'m", " ", "123", "45", "  ", " x", "!?\n\n", "y"]),
        ("qwen2", ["I", "'m", " ", "1", "2", "3", "4", "5", "  ", " x", "!?\n\n", "y"]),
        ("falcon", ["I", "'", "m", " ", "123", "45", "  ", " x", "!?", "\n", "\n", "y"]),
        ("default", ["I", "'", "m", " ", "123", "45", "  ", " x", "!?", "\n", "\n", "y"]),
        ("deepseek-v3", ["I", "'m", " ", "123", "45", "  ", " x", "!?\n\n", "y"]),
        ("deepseek-llm", ["I", "'", "m", " ", "12345", "  ", " x", "!?", "\n", "\n", "y"]),
        ("deepseek-coder", ["I", "'", "m", " ", "1", "2", "3", "4", "5", "  ", " x", "!?", "\n", "\n", "y"]),
        ("gpt-4o", ["I'm", " ", "123", "45", "  ", " x", "!?\n\n", "y"]),
        ("tekken", ["I", "'m", " ", "1", "2", "3", "4", "5", "  ", " x", "!?\n\n", "y"]),
        ("minicpm5", ["I", "'m", " ", "123", "45", "  ", " x", "!?\n\n", "y"]),
        ("seed-coder", ["I", "'m", " ", "1", "2", "3", "4", "5", "  ", " x", "!?", "\n\n", "y"]),
        ("viking", ["I'm", " ", "1", "2", "3", "4", "5", "  ", " x", "!?\n\n", "y"]),
    ],
)
def test_how_kinds_split(name, expected):
    assert parts(name, "I'm 12345   x!?\n\ny") == expected


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (
            "smollm",
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
        ),
    ],
)
def test_kinds_that_the_library_has_itself(name, reference):
    """What these models' own tokenizer.json files hold."""
    for text in HARD:
        assert read(byte_level(name)).backend.pre_tokenizer.pre_tokenize_str(text) == reference.pre_tokenize_str(text)


def test_qwen_composes_characters_and_gpt2_does_not():
    for name in "qwen2", "olmo", "stablelm2":
        assert read(byte_level(name)).encode("e\u0301") == read(byte_level(name)).encode("é")
    assert read(byte_level("gpt-2")).encode("e\u0301") != read(byte_level("gpt-2")).encode("é")


def test_marks_belong_to_words():
    """Of Qwen3.5's, whose own pattern llama.cpp cites; Qwen2's cut in front of each."""
    text = " a\u0302\u0301b !\u0302c\u0302"
    assert parts("qwen35", text) == [" a\u0302\u0301b", " !", "\u0302c\u0302"]
    assert parts("qwen2", text) != parts("qwen35", text)


def test_whole_words_before_merges():
    assert pieces(read(byte_level("llama-bpe")), "cab") == ["cab"]
    assert pieces(read(byte_level("gpt-2")), "cab") == ["c", "ab"]


def test_special_and_user_defined_tokens():
    tokenizer = read(byte_level())
    ids = tokenizer.encode("ab<|end|><tool> ab")
    assert ids == [256, 259, 260, 257]
    assert tokenizer.decode(ids) == "ab<tool> ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "ab<|end|><tool> ab"
    assert (tokenizer.token_bytes(259), tokenizer.token_bytes(260), tokenizer.token_bytes(257)) == (
        b"",
        b"<tool>",
        b" ab",
    )


def test_user_defined_tokens_are_no_bytes():
    """DeepSeek Coder's "ü", as llama.cpp writes it; in a byte-level vocabulary ü spells the byte FC."""
    changes = {n: v[f"tokenizer.ggml.{n}"] for v in [byte_level()] for n in ("tokens", "token_type")}
    tokens = [t for t in changes["tokens"] if t != "ü"]
    tokenizer = read(byte_level(tokens=[*tokens, "ü"], token_type=[*changes["token_type"][1:], 4]))
    ids = tokenizer.encode("abü é<|end|>")
    assert ids[1] == 260 and tokenizer.decode(ids) == "abü é"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "abü é<|end|>"
    assert "".join(map(tokenizer.detokenizer().push, ids)) == "abü é"


@pytest.mark.parametrize(
    ("metadata", "bos"),
    [
        (byte_level("gpt-2"), False),
        (byte_level("llama-bpe"), True),
        (byte_level("llama-bpe", add_bos_token=False), False),
        (byte_level("gpt-2", add_bos_token=True), True),
        (byte_level("llama-bpe", bos_token_id=None), False),
        (llama(), True),
        (llama(add_bos_token=False), False),
    ],
)
def test_bos_by_the_file_or_llama_cpps_default(metadata, bos):
    tokenizer = read(metadata)
    assert tokenizer.add_bos is bos
    assert (tokenizer.encode("ab")[0] == tokenizer.bos_id) is bos
    assert tokenizer.encode("ab", add_bos=False)[0] != tokenizer.bos_id


def test_eos_behind_a_text_where_the_file_wants_it():
    tokenizer = read(llama(add_eos_token=True))
    assert tokenizer.encode("a") == [1, tokenizer.encode("a", add_bos=False)[0], 2]


def test_all_ends_of_a_text():
    assert read(byte_level(eot_token_id=260, eom_token_id=258)).eos_ids == (258, 259, 260)
    assert read(byte_level(fim_sep_token_id=258)).eos_ids == (258, 259)
    # So does a token by the name of one, as in llama.cpp.
    assert read(byte_level(eos_token_id=0xFFFFFFFF, bos_token_id=None)).eos_ids == (259,)


ENDS = (
    "</s> <eos> <|endoftext|> <|end_of_text|> <end_of_turn> <|eot_id|> <|eom_id|> <|im_end|> <|end|> <EOT> _<EOT> "
    "[EOT] [EOS] <end_of_utterance> <turn|> <|fim_pad|> <|repo_name|> <|file_sep|> <PAD> <reponame>".split()
)


@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize("end", ENDS)
def test_names_of_ends_are_special_whatever_their_type(kind, end):
    names = {"eos_token_id": 260, "bos_token_id": None}
    tokens = byte_level()["tokenizer.ggml.tokens"][:259] + [end, "<tool>"]
    tokenizer = read(byte_level(**names, tokens=tokens, token_type=[1] * 259 + [kind, 4]))
    assert tokenizer.eos_ids == (259, 260)
    assert tokenizer.encode(f"ab{end}ab") == [256, 259, 256]
    assert tokenizer.decode([256, 259]) == "ab"
    changes = {"tokens": list(llama()["tokenizer.ggml.tokens"]), "token_type": llama()["tokenizer.ggml.token_type"]}
    if end not in changes["tokens"]:
        changes["tokens"][3], changes["token_type"][3] = end, kind
        tokenizer = read(llama(**changes))
        assert tokenizer.eos_ids == (2, 3)
        assert pieces(tokenizer, f"a{end}a") == ["▁a", end, "▁a"]
        assert tokenizer.decode([3, 261]) == "ab"


def test_names_that_end_nothing_in_some_vocabularies():
    tokens = byte_level()["tokenizer.ggml.tokens"][:258]
    harmony = byte_level(tokens=[*tokens, "<|return|>", "<|call|>", "<|end|>"], eos_token_id=258, bos_token_id=None)
    assert read(harmony).eos_ids == (258, 259)
    # Gemma's is HTML.
    metadata = llama(eos_token_id=3, token_type=[2, 3, 4, 4] + [6] * 256 + [1] * 5)
    gemma = read(metadata | {"general.architecture": "gemma2"})
    assert (gemma.eos_ids, gemma.decode([261, 2])) == ((3,), "ab</s>")
    assert read(metadata).eos_ids == (2, 3)


def test_sentencepiece_defaults_and_dummy_prefix():
    tokenizer = read(llama())
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.kind) == (1, (2,), "sentencepiece")
    assert pieces(tokenizer, "ab") == ["▁a", "b"]
    assert pieces(tokenizer, " ab") == ["▁", "▁a", "b"]
    # As in llama.cpp, every stretch between special tokens begins with a space.
    assert pieces(tokenizer, "<s>a<x>a") == ["<s>", "▁a", "<x>", "▁a"]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"
    assert pieces(read(llama(add_space_prefix=False)), "ab") == ["ab"]
    assert pieces(tokenizer, "é") == ["▁", "<0xC3>", "<0xA9>"]


def test_phi3_swallows_the_space_behind_its_special_tokens():
    """Its chat template puts a line break there, which its tokenizer.json drops (``rstrip``)."""
    phi3 = {"general.architecture": "phi3"}
    assert pieces(read(llama() | phi3), "</s>\n a<s> a") == ["</s>", "▁a", "<s>", "▁", "▁a"]
    assert pieces(read(llama()), "</s>\n a") == ["</s>", "▁", "<0x0A>", "▁a"]


def test_scores_decide_what_merges_first():
    low = llama()["tokenizer.ggml.scores"].copy()
    low[260] = -1e6
    assert pieces(read(llama(scores=low)), "ab") == ["▁", "ab"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (llama(model="t5"), "tokenizer.ggml.model 't5' is not supported; expected 'gpt2'"),
        (llama(model=None), "tokenizer.ggml.model is missing"),
        (byte_level(None), "tokenizer.ggml.pre is missing"),
        (byte_level("smol"), "tokenizer.ggml.pre 'smol' is not supported .* expected one of .*smollm"),
        (byte_level(merges=None), "tokenizer.ggml.merges is missing"),
        (byte_level(merges=["a b", 5]), r"merges\[1\]: expected a string, found int 5"),
        (byte_level(merges=["a b", "ab"]), r"merges\[1\]: expected two pieces, found 'ab'"),
        (byte_level(merges=["a 日"]), r"merges\[0\] 'a 日' needs '日', which is not among the tokens"),
        (byte_level(merges=["a a"]), r"merges\[0\] 'a a' needs 'aa', which is not among the tokens"),
        (byte_level(tokens="abc"), "tokens: expected list, found str 'abc'"),
        (byte_level(tokens=["a"] * 261), "'a' appears twice: ids 0 and"),
        (llama(tokens=["a"] * 265), "'a' appears twice: ids 0 and"),
        (byte_level(token_type=[1]), "token_type has 1 entries for 261 tokens"),
        (byte_level(token_type=["a"] * 261), "token_type: expected a list of finite numbers"),
        (byte_level(token_type=[[1], [1, 2]]), "token_type: expected a list of finite numbers"),
        (llama(scores=None), "scores is missing"),
        (llama(scores=[0.0]), "scores has 1 entries for 265 tokens"),
        (llama(scores=[float("nan")] * 265), "scores: expected a list of finite numbers"),
        (llama(bos_token_id=265), "bos_token_id: expected an id below 265, found 265"),
        (llama(bos_token_id="1"), "bos_token_id: expected a token id, found str '1'"),
        (llama(remove_extra_whitespaces=True), "remove_extra_whitespaces: true is not supported .* 'llama'"),
        (byte_level(add_space_prefix=True), "add_space_prefix: true is not supported .* 'gpt2', expected false"),
        (llama(normalizer="nfkc"), "normalizer: expected a key that llmjax knows, found str 'nfkc'"),
        (llama(add_bos_token=1), "add_bos_token: expected bool, found int 1"),
        (llama() | {"tokenizer.chat_template": 5}, "tokenizer.chat_template: expected a string, found int"),
        (llama() | {"tokenizer.chat_template.tool_use": 5}, "tokenizer.chat_template.tool_use: expected a string"),
    ],
)
def test_metadata_that_cannot_be_used(metadata, message):
    with pytest.raises(TokenizerError, match=f"^x.gguf: .*{message}") as caught:
        read(metadata)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_tokens(caplog):
    """llama.cpp leaves such tokens out; of padding they are common, for it has no part in a text."""
    found = read(llama(padding_token_id=265, eot_token_id=300))
    assert "pad_token" not in found.special and found.eos_ids == read(llama()).eos_ids
    assert "x.gguf: tokenizer.ggml.padding_token_id: 265 is none of the 265 tokens" in caplog.text


def test_a_template_for_tools():
    """By the keys of gguf's own writer."""
    keys = gguf.Keys.Tokenizer
    found = read(llama() | {keys.CHAT_TEMPLATE: "plain", keys.CHAT_TEMPLATE_N.format(name="tool_use"): "tools"})
    texts = [found.render_chat([{"role": "user", "content": "x"}], tools=tools) for tools in (None, [])]
    assert texts == ["plain", "tools"]


def test_the_demo_model_splits_digits_and_keeps_any_text(smollm2_path):
    tokenizer = from_gguf(GgufSource(smollm2_path).metadata, smollm2_path)
    assert tokenizer.vocab_size == 49152
    assert [tokenizer.piece(i) for i in tokenizer.encode("a 123 x²")] == ["a", "Ġ", "1", "2", "3", "Ġx", "Â²"]
    for text in HARD:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_gemma4_merges_with_spaces_and_bytes_as_tokens():
    """The file's tokenizer.json has the same vocabulary, merges and added tokens; transformers runs it."""
    found = json.loads((DATA / "gemma_2b" / "tokenizer.json").read_text(encoding="utf-8"))
    ids = found["model"]["vocab"] | {t["content"]: t["id"] for t in found["added_tokens"]}
    types = dict.fromkeys(ids, 1) | {t["content"]: 3 if t["special"] else 4 for t in found["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    tokenizer = read(
        {
            "tokenizer.ggml.model": "gemma4",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [types[t] for t in tokens],
            "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in found["model"]["merges"]],
            "tokenizer.ggml.unknown_token_id": ids["<unk>"],
            "tokenizer.ggml.bos_token_id": ids["<bos>"],
        }
    )
    theirs = tokenizers.Tokenizer.from_file(str(DATA / "gemma_2b" / "tokenizer.json"))
    for text in (*HARD, "The quick  brown fox\n\n\tjumps", "<start_of_turn>user\nhi<end_of_turn>", "   a  "):
        wanted = theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == [ids["<bos>"], *wanted]
        assert tokenizer.decode(wanted) == theirs.decode(wanted)
