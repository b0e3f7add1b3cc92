"""Tokenizers of directories and ``tokenizer.model`` files: BOS policy, added tokens, SentencePiece's own ids."""

import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from llmjax import RequestError, TokenizerError
from llmjax.text import export
from llmjax.text.reading import from_huggingface
from llmjax.text.sentencepiece import read

DATA = Path(__file__).parents[1] / "data/tokenizers"
JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MODEL = ("tokenizer.model", *JSON[1:])
TOKEN = {"__type": "AddedToken", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


@pytest.fixture
def directory(tmp_path):
    """Makes a directory of some of a case's files with a changed tokenizer_config.json; ... deletes a key."""

    def make(name, files=JSON, **changes):
        for file in files:
            shutil.copy(DATA / name / file, tmp_path)
        path = tmp_path / "tokenizer_config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        return tmp_path

    return make


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("setting", [True, False, ...])
def test_tokenizer_json_decides_about_bos_alone(directory, setting):
    """As transformers 5 does it."""
    assert from_huggingface(directory("llama", add_bos_token=setting)).add_bos
    assert not from_huggingface(directory("phi2", add_bos_token=setting)).add_bos


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"add_bos_token": True}, [2]),
        ({"add_bos_token": False}, []),
        ({"add_bos_token": ...}, [2]),  # the class's default
        ({"add_bos_token": ..., "tokenizer_class": "T5Tokenizer"}, []),
    ],
)
def test_bos_of_a_sentencepiece_model(directory, changes, first):
    tokenizer = from_huggingface(directory("gemma_2b", MODEL, **changes))
    assert tokenizer.encode("") == first
    assert tokenizer.encode("", add_bos=True) == [2]
    assert tokenizer.encode("", add_bos=False) == []


def test_eos_behind_a_text(directory):
    assert from_huggingface(directory("gemma_2b", MODEL, add_eos_token=True)).encode("") == [2, 1]


def test_bos_where_there_is_none():
    tokenizer = from_huggingface(DATA / "qwen2")
    assert tokenizer.bos_id is None and not tokenizer.add_bos
    with pytest.raises(RequestError, match="has no BOS token"):
        tokenizer.encode("x", add_bos=True)


def test_truncation_and_padding_in_the_file_are_ignored(directory):
    folder = directory("llama")
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    edit(folder / "tokenizer.json", truncation=truncation, padding=padding)
    for text in ("a", "a long text"):
        assert from_huggingface(folder).encode(text) == from_huggingface(DATA / "llama").encode(text)


def test_named_tokens_are_special(directory):
    """transformers makes them so, whether the file does or not; new ones get the next ids."""
    tokenizer = from_huggingface(directory("phi2", pad_token="    ", additional_special_tokens=["<new>"]))
    assert tokenizer.vocab_size == 398
    ids = tokenizer.encode("a    b<new>")
    assert 393 in ids and ids[-1] == 397
    assert tokenizer.decode(ids) == "ab"
    stream = tokenizer.detokenizer()
    assert "".join(map(stream.push, ids)) + stream.flush() == "ab"


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"pad_token": "<x>"},
        {"pad_token": {**TOKEN, "content": "<x>", "special": True}},
        {"pad_token": {**TOKEN, "content": "<new>", "special": True, "rstrip": True}},
        {"additional_special_tokens": ["<x>", "<new>"]},
        {"extra_special_tokens": {"image_token": "<x>"}},
        {"added_tokens_decoder": {"397": {**TOKEN, "content": "<x>", "special": False, "rstrip": True}}},
    ],
    ids=str,
)
def test_spaces_beside_a_token_are_as_transformers_has_them(directory, special, settings):
    """Of a token that is in the vocabulary, a name for it says nothing of them."""
    transformers = pytest.importorskip("transformers", reason="parity extra not installed")
    folder = directory("phi2", **{"added_tokens_decoder": ..., **settings})
    whole = json.loads((folder / "tokenizer.json").read_text())
    flags = {flag: flag == "lstrip" for flag in ("lstrip", "rstrip", "normalized", "single_word")}
    whole["added_tokens"].append({"id": 397, "content": "<x>", "special": special, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    ours, theirs = from_huggingface(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids = theirs("a <x> b <new> c")["input_ids"]
    assert ours.encode("a <x> b <new> c") == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    ("file", "more"),
    [
        ("tokenizer_config.json", "extra_special_tokens"),
        ("tokenizer_config.json", "additional_special_tokens"),
        ("special_tokens_map.json", "extra_special_tokens"),
    ],
)
def test_a_models_own_names(directory, file, more, listed):
    """Of tokens that no other model has: they are special, and a template may write them."""
    transformers = pytest.importorskip("transformers", reason="parity extra not installed")
    template = "{{ audio_token }}|{{ image_token }}|{{ turn }}|{{ add_bos_token }}"
    folder = directory("phi2", chat_template=template, **({} if listed else {"added_tokens_decoder": ...}))
    tokens = {"image_token": {**TOKEN, "content": "<image>"}, "audio_token": "    ", "hop_token": None}
    edit(folder / file, **tokens, **{more: {"turn": "<turn>"}})
    ours, theirs = from_huggingface(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [{"role": "user", "content": "x"}]
    assert ours.render_chat(messages) == theirs.apply_chat_template(messages, tokenize=False)
    assert "<turn>" in ours.render_chat(messages) or (listed and file != "tokenizer_config.json")
    ids = theirs("a    b<image><turn>")["input_ids"]
    assert ours.encode("a    b<image><turn>") == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("said", ["<|endoftext|>", None])
def test_names_of_two_files(directory, listed, said):
    transformers = pytest.importorskip("transformers", reason="parity extra not installed")
    folder = directory("phi2", eos_token=said, **({} if listed else {"added_tokens_decoder": ...}))
    edit(folder / "special_tokens_map.json", eos_token="!")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert from_huggingface(folder).special.get("eos_token") == theirs.eos_token


def test_added_tokens_of_the_config(directory):
    added = {"397": {"content": "<a>", "special": True}, "398": {"content": "<b>"}}
    tokenizer = from_huggingface(directory("phi2", added_tokens_decoder=added))
    assert tokenizer.encode("<a><b>") == [397, 398] and tokenizer.decode([397, 398]) == "<b>"


def test_added_tokens_of_the_older_file(directory):
    folder = directory("phi2", added_tokens_decoder=...)
    (folder / "added_tokens.json").write_text('{"<b>": 398, "<a>": 397}')
    assert from_huggingface(folder).encode("<a><b>") == [397, 398]


def test_ids_beyond_the_vocabulary():
    tokenizer = from_huggingface(DATA / "gemma_2b")
    assert tokenizer.decode([432, 480, 10**12]) == "T"
    assert (tokenizer.piece(480), tokenizer.token_bytes(10**12)) == ("", b"")
    with pytest.raises(RequestError, match="found -1"):
        tokenizer.decode([1, -1])


def test_half_a_surrogate_pair():
    with pytest.raises(RequestError, match="character 1 is half a surrogate pair"):
        from_huggingface(DATA / "llama").encode("a\ud800b")
    with pytest.raises(RequestError, match="expected a string, found bytes"):
        from_huggingface(DATA / "llama").encode(b"a")


def test_fingerprint(directory):
    original = from_huggingface(DATA / "phi2").fingerprint()
    assert original == from_huggingface(directory("phi2")).fingerprint()
    assert original != from_huggingface(directory("phi2", pad_token="<new>")).fingerprint()


def test_named_chat_templates(directory):
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}!"}]
    tokenizer = from_huggingface(directory("gemma_2b", chat_template=templates))
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "<bos>!"
    assert tokenizer.encode_chat([{"role": "user", "content": "x"}])[0] == tokenizer.bos_id
    tokenizer = from_huggingface(directory("phi2", chat_template=templates[:1]))
    with pytest.raises(TokenizerError, match="no chat template but one for tools"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


def test_chat_templates_of_two_files(directory):
    folder = directory("phi2", chat_template={"default": "a", "tool_use": "b"})
    messages = [{"role": "user", "content": "x"}]
    assert [from_huggingface(folder).render_chat(messages, tools=tools) for tools in (None, [])] == ["a", "b"]
    edit(folder / "tokenizer_config.json", chat_template="a")
    (folder / "chat_template.json").write_text('{"chat_template": "c"}')
    with pytest.warns(UserWarning, match="chat_template.json: has another chat template than tokenizer_config.json"):
        assert from_huggingface(folder).render_chat(messages) == "c"


@pytest.mark.parametrize(
    "said",
    [
        {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]},
        {"content": "c", "tool_calls": None, "name": None},
        {"content": "c", "reasoning": "r"},
        {"content": "c", "thinking": "t", "reasoning": "r"},
        {"content": "c", "reasoning_content": "", "reasoning": "r"},
    ],
    ids=str,
)
def test_messages_as_templates_read_them(directory, said):
    """What is null in them is not there, and thoughts have the names that templates read."""
    transformers = pytest.importorskip("transformers", reason="parity extra not installed")
    keys = ("content", "tool_calls", "name", "thinking", "reasoning", "reasoning_content")
    shown = "".join(f"{{{{ '{key}' in m }}}} {{{{ m.{key} }}}}|" for key in keys)
    folder = directory("phi2", chat_template=f"{{% for m in messages %}}{shown}{{% endfor %}}")
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", **said}]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert from_huggingface(folder).render_chat(messages) == theirs.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("place", ["list", "files", "both", "saved"])
def test_a_template_for_tools(directory, tmp_path_factory, place):
    """As transformers chooses it: where there are tools, were they none in number."""
    transformers = pytest.importorskip("transformers", reason="parity extra not installed")
    templates = {"default": "plain {{ messages[0].content }}", "tool_use": "{{ tools | length }} tools"}
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    given = {"files": ..., "both": templates["default"]}.get(place, listed)
    folder = directory("phi2", chat_template=given)
    if place in ("files", "both"):
        if place == "files":
            (folder / "chat_template.jinja").write_text(templates["default"])
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(templates["tool_use"])
    ours = from_huggingface(folder)
    if place == "saved":
        export.save(ours, folder := tmp_path_factory.mktemp("saved"))
        ours = from_huggingface(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [{"role": "user", "content": "x"}]
    for tools in (None, [], [{"type": "function", "function": {"name": "f", "parameters": {}}}]):
        if tools is not None or place != "both":  # theirs has no other template beside a file of one
            expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
            assert ours.render_chat(messages, tools=tools) == expected
        assert ours.render_chat(messages, tools=tools) == ("plain x" if tools is None else f"{len(tools)} tools")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object, found list"),
        ("tokenizer_config.json", '{"bos_token": 5}', "tokenizer_config.json: bos_token: .*found 5"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template: expected a string, found int"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "expected an object of ids to tokens"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"397": 5}}', "added token 397: .*found 5"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"500": "<a>"}}', "'<a>': expected id 500, found 397"),
        ("special_tokens_map.json", '{"eos_token": []}', r"special_tokens_map.json: eos_token: .*found \[\]"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: expected UTF-8 text, found byte 0xff at 0"),
        ("chat_template.json", "3", "chat_template.json: expected a JSON object, found int"),
        ("tokenizer_config.json", '{"bos_token": "a", "bos_token": "b"}', "not valid JSON: bos_token is there twice"),
        ("special_tokens_map.json", '{"eos_token": "a", "eos_token": "b"}', "json: not valid JSON: eos_token is there"),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "merges": [], "vocab": {"a": 0, "a": 1}}}',
            "JSON: a is there tw",
        ),
        ("tokenizer.json", '{"version": "1.0", "model": {"vocab": 1}, "model": {}}', "not valid JSON: model is there"),
        ("tokenizer.json", '{"model": {"type": "BPE", "merges": [], "vocab": {"a": 7, "b": 7}}}', "'a' and 'b' both"),
    ],
)
def test_damaged_files(directory, file, content, message):
    folder = directory("phi2")
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenizerError, match=message):
        from_huggingface(folder)


def test_an_added_token_that_gets_another_id(directory):
    """The library, and so transformers, numbers them by their places alone."""
    path = directory("phi2") / "tokenizer.json"
    state = json.loads(path.read_text())
    last = state["added_tokens"][-1]
    new = last | {"id": last["id"] + 7, "content": "<new>"}
    edit(path, added_tokens=[*state["added_tokens"], new])
    with pytest.warns(UserWarning, match=f"'<new>' has the id {new['id']} there and gets {last['id'] + 1}, as in"):
        tokenizer = from_huggingface(path.parent)
    assert tokenizer.encode("<new>") == [last["id"] + 1]


def test_the_older_gpt2_files_are_named(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(TokenizerError, match="no tokenizer; .*vocab.json and merges.txt alone are not read"):
        from_huggingface(tmp_path)


TEXTS = [
    *" \t\n<>|'-=.0123456789abcdeT",
    "  ",
    "   ",
    "▁",
    "é",
    "日本",
    "😀",
    "the ",
    "software",
    "<x>",
    "<0x41>",
    "aaa",
    " = ",
]


def random_text(rng, length=40):
    return "".join(rng.choice(TEXTS) for _ in range(rng.randrange(length)))


def train(**options):
    """A SentencePiece BPE model, as bytes."""
    rng, model = random.Random(0), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(random_text(rng) for _ in range(300)),
        model_writer=model,
        **{"model_type": "bpe", "vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2}
        | {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "character_coverage": 0.98}
        | options,
    )
    return model.getvalue()


@pytest.mark.parametrize("user_defined", [[], ["\n", "▁▁", "▁▁▁", "<x>", "▁=▁"]], ids=["plain", "user-defined"])
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_the_ids_and_texts_of_sentencepiece(dummy_prefix, byte_fallback, user_defined):
    data = train(add_dummy_prefix=dummy_prefix, byte_fallback=byte_fallback, user_defined_symbols=user_defined)
    tokenizer, own = read(data, "blob", add_bos=True), sentencepiece.SentencePieceProcessor(model_proto=data)
    rng = random.Random(1)
    for _ in range(200):
        text = random_text(rng)
        ids = own.encode(text)
        assert tokenizer.encode(text) == [own.bos_id(), *ids], text
        assert tokenizer.decode(ids) == own.decode([i for i in ids if i != own.unk_id()])


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("single_spaces", [False, True])
def test_texts_are_normalized_as_sentencepiece_does(rule, single_spaces):
    model = train(normalization_rule_name=rule, remove_extra_whitespaces=single_spaces)
    own, tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model), read(model, "blob", add_bos=False)
    rng = random.Random(0)
    parts = ["a", "b ", " ", "  ", "\t", "\n", "é", "ﬁ", "①", "Ａ", "\u200b", "ｶﾞ", "가", "🙂"]
    for _ in range(200):
        text = "".join(rng.choices(parts, k=rng.randrange(9)))
        assert tokenizer.encode(text) == own.encode(text), text


def test_the_dummy_prefix_and_special_tokens(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train(byte_fallback=True))

    def pieces(text):
        tokenizer = from_huggingface(tmp_path)
        return [tokenizer.piece(i) for i in tokenizer.encode(text, add_bos=False)]

    assert pieces("</s>a</s>a") == ["</s>", "a", "</s>", "a"]
    assert pieces("a</s>a")[0][0] == "▁"
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": true}')
    assert [p[0] for p in pieces("</s>a</s>a")] == ["<", "▁", "<", "▁"]
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": false}')
    assert pieces("a</s>a") == ["a", "</s>", "a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "model type: expected BPE, found UNIGRAM"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix: expected false, found true"),
    ],
)
def test_sentencepiece_models_that_are_refused(options, message):
    with pytest.raises(TokenizerError, match=f"^blob: SentencePiece model not supported: .*{message}"):
        read(train(**options), "blob", add_bos=True)


def test_heavy_imports_wait():
    code = "import sys, llmjax.text, llmjax.text.tokenizer; print({'jax', 'jinja2', 'sentencepiece'} & {*sys.modules})"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "set()\n"


def both(folder, name):
    """Gemma's ``tokenizer.model`` beside the ``tokenizer.json`` of some model."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / name / file, folder)
    shutil.copy(DATA / "gemma_2b" / "tokenizer.model", folder)
    return folder / "tokenizer.json"


def test_another_models_tokenizer_beside_a_tokenizer_model(tmp_path):
    both(tmp_path, "llama")
    with pytest.warns(UserWarning, match="another vocabulary than tokenizer.model beside it, in 2.. of 2.. pieces"):
        from_huggingface(tmp_path)


def test_a_tokenizer_of_its_own_beside_a_tokenizer_model(tmp_path):
    """Some pieces may have other names in it, and the other file may be of another kind."""
    file = both(tmp_path, "gemma_2b")
    state = json.loads(file.read_text())
    vocabulary = state["model"]["vocab"]
    renamed = dict(zip(list(vocabulary)[-40:], range(40), strict=True))
    state["model"]["vocab"] = {f"<new{renamed[t]}>" if t in renamed else t: i for t, i in vocabulary.items()}
    state["model"]["merges"] = []
    file.write_text(json.dumps(state))
    assert from_huggingface(tmp_path).vocab_size == len(vocabulary)
    for content in (b"IQ== 0\nIg== 1\nIw== 2\n", b""):  # tiktoken's form
        (tmp_path / "tokenizer.model").write_bytes(content)
        from_huggingface(tmp_path)
