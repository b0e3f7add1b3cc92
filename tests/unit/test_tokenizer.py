"""Tokenizers: ids of the files' own library for every kind of file, BOS policy, bad files, and text token by token."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from converters.readers.gguf import GgufSource
from llmjax import RequestError, TokenizerError
from llmjax.text import sentencepiece
from llmjax.text.reading import from_gguf, from_huggingface

DATA = Path(__file__).parents[1] / "data/tokenizers"
NAMES = sorted(p.name for p in DATA.iterdir())


def cases(name):
    return json.loads((DATA / name / "tokenizer_cases.json").read_text())


def without_json(name, folder):
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(DATA / name / file, folder)
    return folder


def gguf_metadata(name):
    """What llama.cpp's converter would write for a SentencePiece model."""
    file = DATA / name / "tokenizer.model"
    model = sentencepiece.parse(file.read_bytes(), str(file))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(model.pieces),
        "tokenizer.ggml.scores": np.array(model.scores, np.float32),
        "tokenizer.ggml.token_type": np.array(model.types),
        "tokenizer.ggml.bos_token_id": model.bos_id,
        "tokenizer.ggml.eos_token_id": model.eos_id,
        "tokenizer.ggml.unknown_token_id": model.unk_id,
        "tokenizer.ggml.add_space_prefix": model.add_dummy_prefix,
    }


def byte_level_metadata(name, pre):
    state = json.loads((DATA / name / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"] | {t["content"]: t["id"] for t in state["added_tokens"]}
    added = {t["content"]: 3 if t["special"] else 4 for t in state["added_tokens"]}
    tokens = sorted(vocab, key=vocab.get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([added.get(t, 1) for t in tokens]),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": vocab.get("<|begin_of_text|>", 0),
        "tokenizer.ggml.add_bos_token": name == "llama",
    }


def check(tokenizer, name):
    for row in cases(name)["rows"]:
        assert tokenizer.encode(row["text"], add_bos=False) == row["ids"], row["text"]
        assert tokenizer.encode(row["text"]) == row["ids_with_special"], row["text"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=False) == row["decoded"]


@pytest.mark.parametrize("name", NAMES)
def test_huggingface_json(name):
    check(from_huggingface(DATA / name), name)


def test_sentencepiece_model(tmp_path):
    check(from_huggingface(without_json("gemma_2b", tmp_path)), "gemma_2b")


def test_tokens_that_only_the_config_calls_special(tmp_path):
    """User-defined pieces of the model: transformers leaves them out of a text, too."""
    tokenizer = from_huggingface(without_json("gemma_2b", tmp_path))
    ids = tokenizer.encode("a<end_of_turn>\n", add_bos=False)
    assert ids[1:] == [7, 8] and tokenizer.special_tokens["<end_of_turn>"] == 7
    detokenizer = tokenizer.detokenizer()
    assert tokenizer.decode(ids) == "a\n" == "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<end_of_turn>\n"


def test_gguf_sentencepiece():
    check(from_gguf(gguf_metadata("gemma_2b"), Path("x.gguf")), "gemma_2b")


@pytest.mark.parametrize(("name", "pre"), [("llama", "llama-bpe"), ("phi2", "phi-2")])
def test_gguf_byte_level(name, pre):
    check(from_gguf(byte_level_metadata(name, pre), Path("x.gguf")), name)


def test_the_pre_tokenizer_kind_matters():
    tokenizer = from_gguf(byte_level_metadata("llama", "gpt-2"), Path("x.gguf"))
    assert any(tokenizer.encode(r["text"], add_bos=False) != r["ids"] for r in cases("llama")["rows"])


def tokenizers_of_all_kinds():
    return [from_huggingface(DATA / n) for n in NAMES]


@pytest.mark.parametrize("tokenizer", tokenizers_of_all_kinds(), ids=NAMES)
def test_incremental_text_is_decode_for_any_ids(tokenizer):
    """Random ids: broken UTF-8, byte runs cut anywhere, special tokens, ids beyond the vocabulary."""
    rng = np.random.default_rng(0)
    bytes_first = np.argsort([len(tokenizer.piece(i)) > 6 for i in range(tokenizer.vocab_size)])
    for length in [*range(8)] * 40 + [300] * 5:
        ids = rng.integers(0, tokenizer.vocab_size + 5, length)
        if length % 2:  # more single bytes than chance would bring
            ids = rng.choice(bytes_first[:270], length)
        ids = ids.tolist()
        detokenizer = tokenizer.detokenizer()
        pieces = [detokenizer.push(i) for i in ids]
        assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids), ids


@pytest.mark.parametrize("tokenizer", tokenizers_of_all_kinds(), ids=NAMES)
def test_no_half_characters(tokenizer):
    text = "naïve 日本 👩‍👩‍👧 e\u0301 ½"
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(i) for i in tokenizer.encode(text, add_bos=False)] + [detokenizer.flush()]
    assert "\ufffd" not in "".join(pieces)
    assert all("\ufffd" not in p for p in pieces)


def test_chat_template():
    tokenizer, example = from_huggingface(DATA / "gemma_2b"), cases("gemma_2b")["report"]["chat_example"]
    assert tokenizer.render_chat(example["messages"]) == example["rendered"]
    ids = tokenizer.encode_chat(example["messages"])
    assert ids.count(tokenizer.bos_id) == 1 == ids.index(106) if 106 in ids else ids[0] == tokenizer.bos_id
    with pytest.raises(RequestError, match="the chat template refuses them: .*alternate"):
        tokenizer.render_chat([{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize("messages", [[], "hi", [{"role": "user"}], [{"content": "x"}], [3]])
def test_malformed_messages(messages):
    with pytest.raises(RequestError, match="messages"):
        from_huggingface(DATA / "gemma_2b").render_chat(messages)


def test_chat_without_a_template():
    with pytest.raises(TokenizerError, match="no chat template"):
        from_huggingface(DATA / "llama").render_chat([{"role": "user", "content": "x"}])


def test_templates_run_in_a_sandbox(tmp_path):
    shutil.copytree(DATA / "llama", tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(TokenizerError, match="chat template failed"):
        from_huggingface(tmp_path).render_chat([{"role": "user", "content": "x"}])


def test_chat_template_file_wins(tmp_path):
    shutil.copytree(DATA / "gemma_2b", tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}\n<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    )
    rendered = from_huggingface(tmp_path).render_chat([{"role": "user", "content": "x"}])
    assert rendered == "<user>x\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "klingon"}, "tokenizer.ggml.pre 'klingon' is not supported"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.tokens": 5}, "tokenizer.ggml.tokens: expected list, found int"),
        ({"tokenizer.ggml.tokens": ["a"] * 413}, "'a' appears twice"),
        ({"tokenizer.ggml.token_type": np.ones(5)}, "token_type has 5 entries for 413 tokens"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "expected two pieces, found 'a b c'"),
        ({"tokenizer.ggml.merges": ["no such"]}, "cannot be built"),
        ({"tokenizer.ggml.bos_token_id": 413}, "bos_token_id: expected an id below 413, found 413"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "add_bos_token: expected bool"),
    ],
)
def test_bad_gguf_metadata(change, message):
    with pytest.raises(TokenizerError, match=f"x.gguf: .*{message}"):
        from_gguf(byte_level_metadata("llama", "llama-bpe") | change, Path("x.gguf"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {}}', b"\xff\xfe"])
def test_damaged_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match="tokenizer.json"):
        from_huggingface(tmp_path)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x0a\xff\xff\xff\xff\x0f"])
def test_damaged_tokenizer_model(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match="tokenizer.model"):
        from_huggingface(tmp_path)


def test_no_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="expected tokenizer.json or tokenizer.model"):
        from_huggingface(tmp_path)


def test_the_demo_model(smollm2_path):
    source = GgufSource(smollm2_path)
    tokenizer = from_gguf(source.metadata, smollm2_path)
    assert tokenizer.encode("The capital of France is 123") == [504, 3575, 282, 4649, 314, 216, 33, 34, 35]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (0, 2, 4), False)
    rendered = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI") and rendered.endswith(
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "ids", [[1.5], [True], ["a"], [None], None, 5, "ab", b"ab", {1: 2}, {1}, [[1]], np.array([1.0])]
)
def test_no_ids(ids):
    with pytest.raises(RequestError, match="^ids: expected a list of token ids, found"):
        from_huggingface(DATA / "llama").decode(ids)


def test_every_kind_of_integers_is_decoded():
    tokenizer = from_huggingface(DATA / "llama")
    for ids in (np.array([40, 41]), iter([np.int64(40), 41]), (40, 41), range(40, 42)):
        assert tokenizer.decode(ids) == tokenizer.decode([40, 41]) != ""


def test_an_id_far_beyond_the_others(tmp_path):
    state = json.loads((DATA / "llama" / "tokenizer.json").read_text())
    for beyond, told in ((2**31, True), (60_000, False)):
        state["model"]["vocab"][next(iter(state["model"]["vocab"]))] = beyond
        (tmp_path / "tokenizer.json").write_text(json.dumps(state))
        tokenizer = from_huggingface(tmp_path)
        if told:
            with pytest.raises(TokenizerError, match=f"^{tmp_path}/tokenizer.json: .* tokens, of which one has the id"):
                tokenizer.encode("a") and tokenizer.decode([40])
        else:
            assert tokenizer.vocab_size == beyond + 1


def test_half_a_surrogate_pair_in_a_file(tmp_path):
    shutil.copy(DATA / "llama" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"additional_special_tokens": ["\\ud800"]}')
    with pytest.raises(TokenizerError, match=f"^{tmp_path}/tokenizer_config.json: not valid JSON: .*surrogate"):
        from_huggingface(tmp_path)
