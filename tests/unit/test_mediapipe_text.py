"""Vocabularies of MediaPipe's files: made from Hugging Face's, and run with bytes spelled as GPT-2 does."""

import json
import random
import shutil

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import normalizers

import llmjax
from converters import convert_checkpoint
from converters.mediapipe import job, vocabulary
from converters.readers.mediapipe.container import VOCABULARY, BinFile
from llmjax.cli.main import main
from llmjax.errors import LlmjaxError, RequestError, TokenizerError
from llmjax.text import mediapipe
from llmjax.text.reading import from_huggingface
from tests.mediapipe_files import DATA, config
from tests.mediapipe_files import vocabulary as vocabulary_file

HF = DATA / "hf_tok"
TOKENIZERS = DATA.parent / "tokenizers"
WEB = json.loads((DATA / "web_runtime.json").read_text())["results"]


def test_equal_to_the_real_converters(tmp_path):
    real = (HF / "spm.model").read_bytes()
    assert vocabulary.from_huggingface(HF) == real
    convert_checkpoint(config("PHI_2", "gpu", tmp_path, vocab_model_file=str(HF)))
    assert BinFile(tmp_path / "out" / "model.tflite").blob(VOCABULARY) == real
    assert (tmp_path / "out" / "spm.model").read_bytes() == real


def _changed(folder, tokenizer=None, config=None, vocab=None):
    shutil.copytree(HF, folder / "tok")
    for name, changes in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        path = folder / "tok" / name
        state = json.loads(path.read_text()) | (changes or {})
        if vocab and name == "tokenizer.json":
            state["model"]["vocab"] = vocab
        path.write_text(json.dumps(state))
    return folder / "tok"


def _token(number, content, normalized=True):
    return {"id": number, "content": content, "normalized": normalized}


WRONG = {
    "unk_token: expected a token, which the format needs, found None": {"config": {"unk_token": None}},
    "unk_token 'x' of tokenizer_config.json is not in model.vocab": {"config": {"unk_token": "x"}},
    "expected a BPE vocabulary, found 'Unigram'": {"tokenizer": {"model": {"type": "Unigram", "vocab": []}}},
    "expected the ids 0 to 1, each of them once": {"vocab": {"<|endoftext|>": 0, "a": 2}},
    "ids 0 to 2, each": {"vocab": {"<|endoftext|>": 0, "a": 1, "b": 1}},
    "ids 0 to 1, each": {"vocab": {"<|endoftext|>": "0", "a": 1}},
    "give the model's tokenizer.model": {"vocab": {"<|endoftext|>": 0, "▁a": 1}},
    "added token 'ab' is in model.vocab or added twice": {"tokenizer": {"added_tokens": [_token(7, "ab")]}},
    "expected objects with id, content and normalized": {"tokenizer": {"added_tokens": [{"id": 7}]}},
    "found 'text'": {"tokenizer": {"added_tokens": "text"}},
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_vocabularies(message, tmp_path):
    with pytest.raises(TokenizerError) as error:
        vocabulary.from_huggingface(_changed(tmp_path, **WRONG[message]))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_files_that_are_missing(tmp_path):
    folder = _changed(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(LlmjaxError, match="tokenizer_config.json: no such file"):
        convert_checkpoint(config("PHI_2", "cpu", tmp_path, vocab_model_file=str(folder)))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LlmjaxError, match="neither tokenizer.model nor tokenizer.json"):
        convert_checkpoint(config("PHI_2", "cpu", tmp_path, vocab_model_file=str(folder)))
    assert not (tmp_path / "out").exists()


def test_ids_that_move_are_told(tmp_path):
    folder = _changed(tmp_path, tokenizer={"added_tokens": [_token(9, "  ")]})
    with pytest.warns(UserWarning, match="added token '  ' has id 9 and gets 7"):
        vocabulary.from_huggingface(folder)


def _texts():
    rng = random.Random(0)
    alphabet = ["a", "b", " ", "  ", "the ", "ing", "\n", "é", "日本", "🙂", "▁", "\t\t", "0", "...", "<", "\u00a0"]
    return ["", " ", "hello world", *("".join(rng.choices(alphabet, k=rng.randrange(1, 12))) for _ in range(300))]


@pytest.mark.parametrize("name", ["stablelm_3b", "phi2", "falcon_rw"])
def test_ids_are_sentencepieces(name):
    """As MediaPipe's runtime does it: SentencePiece on the spelled text."""
    model = vocabulary.from_huggingface(TOKENIZERS / name)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = mediapipe.read(model, "x", start_id=0, stop=["<|endoftext|>"], bytes_to_unicode=True)
    spell = normalizers.ByteLevel().normalize_str
    for text in _texts():
        ids = tokenizer.encode(text)
        assert ids == [0, *reference.encode(spell(text) if text else "")], text
        ids = ids[1:]
        assert tokenizer.decode(ids) == text
        stream = tokenizer.detokenizer()
        assert "".join([*map(stream.push, ids), stream.flush()]) == text
    assert tokenizer.stop == ("<|endoftext|>",)


# Ids that npm's @mediapipe/tasks-genai 0.10.24 feeds for these texts, and how many `sizeInTokens` counts.
AS_TEXT = {
    "<eos>": [73, 3, 75, 74, 80, 3],
    "<unk>": [73, 3, 81, 85, 93, 3],
    "<bos>o": [73, 3, 88, 74, 80, 3, 74],
    "<start_of_turn>hello": [73, 4, 8, 54],
    "日本": [73, 3],
}
IN_THE_WEB = {
    "GEMMA_2B_gpu_int8_mp0.10.21": AS_TEXT
    | {"hello <eos> o": [60, 54, 73, 3, 75, 74, 80, 3, 22], " ": [], "hello\nbox": [60, 54, 72]},
    "FALCON_RW_1B_gpu_int8_mp0.10.21": AS_TEXT
    | {"hello <eos> o": [60, 54, 3, 75, 74, 80, 3, 74], " ": [73, 3], "hello\nbox": [60, 54, 3, 88, 19]},
}


@pytest.mark.parametrize("name", IN_THE_WEB)
def test_special_tokens_and_spaces_as_the_web_runtime_takes_them(name):
    """Special tokens are text there, user-defined ones are found in the text as it is after normalization."""
    tokenizer = llmjax.load(DATA / f"{name}.bin").tokenizer
    assert {text: tokenizer.encode(text)[1:] for text in IN_THE_WEB[name]} == IN_THE_WEB[name]
    for text in (5, "\ud800"):
        with pytest.raises(RequestError):
            tokenizer.encode(text)


@pytest.mark.parametrize("spelled", [False, True])
def test_ids_are_sentencepieces_whatever_its_pieces(spelled):
    file = BinFile(DATA / "GEMMA_2B_gpu_int8_mp0.10.21.bin")
    model = file.blob(VOCABULARY)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = mediapipe.read(model, "x", start_id=2, stop=["<eos>"], bytes_to_unicode=spelled)
    spell = normalizers.ByteLevel().normalize_str if spelled else str
    rng = random.Random(1)
    parts = ["<start_of_turn>", "<end_of_turn>", "<bos>", "<unk>", " ", "  ", "the fox", "\n", "é", "ﬁ", "o"]
    for text in ["", *("".join(rng.choices(parts, k=rng.randrange(1, 9))) for _ in range(300))]:
        assert tokenizer.encode(text)[1:] == reference.encode(spell(text) if text else ""), text


def test_a_rescued_tokenizer_finds_special_tokens(tmp_path):
    llmjax.convert(DATA / "GEMMA_2B_gpu_int8_mp0.10.21.bin", tmp_path / "hf", to="hf")
    assert from_huggingface(tmp_path / "hf").encode("hello<eos>") == [2, 60, 54, 1]


@pytest.mark.parametrize("name", WEB)
def test_ids_and_texts_of_the_web_runtime(name):
    tokenizer = llmjax.load(DATA / f"{name}.bin").tokenizer
    for text, case in WEB[name].items():
        ids = tokenizer.encode(text)
        assert ids[1:] == case["prompt_ids"][1:]
        assert (ids[0], case["prompt_ids"][0]) == ((50256, 127) if "PHI_2" in name else (ids[0], ids[0]))
        known = [i for i in case["generated_ids"] if i < tokenizer.vocab_size]
        if known == case["generated_ids"]:  # the vocabulary was longer there
            assert tokenizer.decode(known) == case["text"]


@pytest.mark.slow
def test_stop_tokens_end_a_text_as_strings(monkeypatch):
    import dataclasses

    model = llmjax.load(DATA / "GEMMA_2B_gpu_int8_mp0.10.21.bin", numerics="reference")
    params = llmjax.SamplingParams(temperature=0, max_tokens=12)
    assert llmjax.LLM(model, max_batch=1).generate(["hello"], params)[0].outputs[0].text.startswith("llollo")
    # No piece of the vocabulary, but in the text.
    stopped = dataclasses.replace(model, tokenizer=dataclasses.replace(model.tokenizer, stop=("oll",)))
    output = llmjax.LLM(stopped, max_batch=1).generate(["hello"], params)[0].outputs[0]
    assert (output.text, output.finish_reason) == ("ll", "stop")
    ignored = dataclasses.replace(params, ignore_eos=True)
    assert llmjax.LLM(stopped, max_batch=1).generate(["hello"], ignored)[0].outputs[0].finish_reason == "length"


def test_another_models_vocabulary_is_refused(monkeypatch, tmp_path):
    """When a file is made, in every way there is to make one, and when it is loaded, whoever made it."""
    spm = vocabulary_file(tmp_path)  # of Gemma's tokens
    start = "lacks the id 50256, which begins every prompt; convert the model anew with its own vocabulary"
    with pytest.raises(TokenizerError, match=start):
        job.check_vocabulary(spm.read_bytes(), 51_200, job.MODEL_TYPES["PHI_2"], "a")
    with pytest.raises(TokenizerError, match=start):
        mediapipe.read(spm.read_bytes(), "a", start_id=50_256, stop=["<eos>"], rows=51_200)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(spm.read_bytes())
    model.pieces[1].piece, model.trainer_spec.eos_id = "<other>", -1
    other = tmp_path / "other.model"
    other.write_bytes(model.SerializeToString())
    for foreign in (HF, other):
        with pytest.raises(TokenizerError, match="it lacks '<eos>', which ends an answer"):
            convert_checkpoint(config("GEMMA_2B", "gpu", tmp_path, vocab_model_file=str(foreign)))
    assert not (tmp_path / "out" / "model.tflite").exists() and not (tmp_path / "a.bin").exists()
    with monkeypatch.context() as unchecked:
        unchecked.setattr(mediapipe, "check_tokens", lambda *_: None)
        convert_checkpoint(config("GEMMA_2B", "gpu", tmp_path, vocab_model_file=str(other)))
    with pytest.raises(TokenizerError, match="it lacks '<eos>', which ends an answer"):
        llmjax.load(tmp_path / "out" / "model.tflite")
    assert main(["generate", "--model", str(tmp_path / "out" / "model.tflite"), "--prompt", "a"]) == 2


def test_a_model_too_small_for_its_start_token_takes_ids(caplog, tmp_path):
    """As MediaPipe's own converter writes it: the vocabulary is not at fault."""
    told = "every text begins with the id 50256, for which this model's 128 rows have no place"
    path = tmp_path / "a.bin"
    llmjax.convert(DATA / "PHI_2", path, to="mediapipe", backend="gpu", vocab=vocabulary_file(tmp_path))
    assert caplog.text.count(told) == 1
    llm = llmjax.LLM(DATA / "PHI_2_gpu_int4_mp0.10.21.bin", numerics="mediapipe_gpu", max_batch=1)
    assert caplog.text.count(told) == 2
    cases = WEB["PHI_2_gpu_int4_mp0.10.21"].values()
    params = llmjax.SamplingParams(temperature=0, max_tokens=11)
    outputs = llm.generate([case["prompt_ids"] for case in cases], params)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [case["generated_ids"][:11] for case in cases]
    with pytest.raises(RequestError, match="token id 50256 is outside the vocabulary"):
        llm.generate(["hello"])


def test_a_stop_text_that_is_no_piece_is_told(caplog):
    """MediaPipe's runtimes look for the text, so such files run."""
    llmjax.load(DATA / "STABLELM_4E1T_3B_gpu_int8_mp0.10.21.bin")
    assert "no piece '<|endoftext|>': answers end at this text alone" in caplog.text
