"""``.litertlm`` and ``.task`` files: what is in them, that they run as their checkpoint does, and what is refused."""

import dataclasses
import hashlib
import json
import shutil
import types
import zlib
from pathlib import Path

import numpy as np
import pytest

import llmjax
from converters.litert import container, convert, metadata, proof, vocabulary, weights
from converters.litert.export import ExportedGraph
from converters.litert.graph import FLOAT32, Form
from converters.litert.templates import Carried
from converters.readers.mediapipe.package import Package
from converters.readers.opening import open_source
from llmjax import writing
from llmjax.checkpoint.parameters import Stored
from llmjax.cli.main import main
from llmjax.errors import CheckpointError, ConfigError, LlmjaxError, OutputError, RequestError, TokenizerError
from llmjax.litert.loading import read_tokenizer
from llmjax.text import bundle, reading
from tests.mediapipe_files import DATA
from tests.tiny import checkpoint

REAL = Path(__file__).parents[1] / "data" / "bundles" / "litert_lm_0.18.1.litertlm"
TOKENIZERS = Path(__file__).parents[1] / "data" / "tokenizers"
CHAT = "{% for m in messages %}{{ '<u>' + m['content'] + '</s>' }}{% endfor %}{{ '<m>' if add_generation_prompt }}"
SMALL = {"context": 16, "prefill_lengths": [4]}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny Llama whose tokenizer starts texts with ``<s>``, has one token more than the embedding has rows, and whose
    configuration names further ends, one of them beyond."""
    folder = checkpoint(tmp_path_factory.mktemp("source") / "m", max_position_embeddings=64, vocab_size=260)
    state = json.loads((folder / "tokenizer.json").read_text())
    for number, text in ((257, "<s>"), (258, "<u>"), (259, "<m>"), (260, "<image>")):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        state["added_tokens"].append({"id": number, "content": text, "special": True, **flags})
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(state))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "chat_template": CHAT})
    )
    sampling = {"do_sample": True, "top_k": 5, "top_p": 0.5, "temperature": 0.75, "suppress_tokens": [7, 260]}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 259, 300], **sampling}))
    return folder


def test_a_graph_without_its_checksum(tmp_path):
    """Which nothing else may tell from one that computes something."""
    path = shutil.copy(DATA / "tiny_bundle_0.10.21.task", tmp_path)
    (graph,) = (part for part in Package(Path(path)).parts if part.kind == "graph")
    whole = bytearray(Path(path).read_bytes())
    with pytest.raises(CheckpointError, match="no language model's graph"):
        llmjax.load(path)
    whole[graph.start + graph.nbytes - 1] ^= 1
    Path(path).write_bytes(whole)
    with pytest.raises(CheckpointError, match="damaged .*: entry TF_LITE_PREFILL_DECODE does not have the checksum"):
        llmjax.load(path)


def copied(source: Path, folder: Path, **files) -> Path:
    shutil.copytree(source, folder)
    for name, change in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@pytest.fixture(scope="module")
def written(source, tmp_path_factory) -> Path:
    told: list[str] = []
    path = tmp_path_factory.mktemp("out") / "m.litertlm"
    writing.convert(source, path, to="litertlm", announce=told.append, verify=False, **SMALL)
    assert "2 layers, 260 tokens; prefill_4, decode; about 0.3 MB" in told[0]
    assert "caches of 16 tokens" in told[0] and "it is not run against the checkpoint" in told[0]
    return path


@pytest.fixture
def quick(monkeypatch, written):
    """The graph that was written before, whatever is asked for."""
    part = Package(written).parts[-1]
    graph = written.read_bytes()[part.start :]

    def export(*args):
        context = args[-2]
        caches = {"kv_cache_k_0": (1, 2, context, 8)}
        facts = ExportedGraph(None, ("prefill_4", "decode"), context, caches, len(graph), 9)
        return types.SimpleNamespace(graph=facts, forms={}, write=lambda file, report: file.write(graph))

    monkeypatch.setattr(convert, "Export", export)


def test_the_real_builders_file_again(tmp_path):
    """Taken apart and written anew, every section is where litert-lm-builder put it."""
    real = Package(REAL)
    sections = [container.Section(p.name, bytes(real.view(p)), p.notes) for p in real.parts]
    path = tmp_path / "again.litertlm"
    with open(path, "xb") as file:
        container.write(file, sections, {"Authors": "llmjax"})
    ours = Package(path)
    assert (ours.version, ours.notes) == (real.version, {"Authors": "llmjax"})
    assert [(p.name, p.start, p.nbytes, p.notes) for p in ours.parts] == [
        (p.name, p.start, p.nbytes, p.notes) for p in real.parts
    ]
    assert path.read_bytes()[16384:] == REAL.read_bytes()[16384:]


def test_the_same_bytes_on_any_machine(tmp_path):
    sections = [
        container.Section("LlmMetadataProto", b"facts"),
        container.Section("TFLiteModel", b"graph", {"model_type": "tf_lite_prefill_decode"}),
    ]
    with open(tmp_path / "a", "xb") as file:
        container.write(file, sections, {"Authors": "llmjax"})
    assert (
        hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
        == "27c18e69205c1333ed274b52cd5f7b8e875e4e728e3ee7f933c129c0d2b68f74"
    )
    packed = container.packed_json(b"{}" * 9)
    assert packed[:10].hex() == "1200000000000000789c" and zlib.decompress(packed[8:]) == b"{}" * 9


def test_a_header_that_is_too_long(tmp_path):
    with open(tmp_path / "a", "xb") as file, pytest.raises(CheckpointError, match="shorter notes"):
        container.write(file, [container.Section("TFLiteModel", b"x", {"k": "v" * 20_000})], {})


def test_what_litert_lm_is_told(written):
    package = Package(written)
    assert [p.name for p in package.parts] == ["LlmMetadataProto", "HF_Tokenizer_Zlib", "TFLiteModel"]
    facts = package.metadata(package.parts[0])
    assert list(facts.start_token.token_ids.ids) == [257]
    # Those of generation_config.json; the template's end of an answer is among them.
    assert [list(stop.token_ids.ids) for stop in facts.stop_tokens] == [[256], [259]]
    assert list(facts.pad_token.token_ids.ids) == [256]
    assert facts.llm_model_type.HasField("generic_model") and facts.max_num_tokens == 16
    sampler = facts.sampler_params
    assert (sampler.type, sampler.k, sampler.p, sampler.temperature) == (2, 5, 0.5, 0.75)
    assert list(facts.suppress_tokens.ids) == [7]
    assert facts.HasField("supports_thinking") and not facts.supports_thinking


def test_it_runs_as_its_checkpoint_does(source, written):
    """Our own reader: the same ids of a text, of a conversation, and the same logits."""
    ours, bundle = llmjax.load(source), llmjax.load(written)
    assert bundle.tokenizer.encode("Hi <u>") == ours.tokenizer.encode("Hi <u>")
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert bundle.tokenizer.encode_chat(messages) == [257, *ours.tokenizer.encode_chat(messages)]
    assert bundle.eos_ids == (256, 259) and ours.eos_ids == (256, 259, 300)
    ids = ours.tokenizer.encode("Hi <u>")
    (a,), (b,) = ours.logits([ids]), bundle.logits([ids])
    assert np.abs(a - b).max() < 5e-5


def test_the_same_file_every_time(source, written, tmp_path):
    writing.convert(source, tmp_path / "m.litertlm", to="litertlm", verify=False, **SMALL)
    assert (tmp_path / "m.litertlm").read_bytes() == written.read_bytes()


def test_a_file_that_fails_never_gets_its_name(source, tmp_path, monkeypatch, quick):
    logits = {"kl_mean": 0.5, "kl_max": 2.0}
    report = types.SimpleNamespace(
        verdict="different", explained_by=None, reason="off", logits=logits, coverage={"tokens": 3}
    )
    monkeypatch.setattr(proof, "prove", lambda *args: proof.Proof((report,), None, None))
    with pytest.raises(CheckpointError, match="does not compute what the checkpoint does: off"):
        writing.convert(source, tmp_path / "m.litertlm", to="litertlm", **SMALL)
    assert not list(tmp_path.iterdir())


def test_logits_that_are_no_numbers(source, tmp_path, monkeypatch, quick):
    def refused(*args):
        raise RequestError("candidate: logits: NaN")

    monkeypatch.setattr(proof, "prove", refused)
    with pytest.raises(CheckpointError, match="cannot be run against the checkpoint: candidate: logits: NaN"):
        writing.convert(source, tmp_path / "m.litertlm", to="litertlm", **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8", "mixed-8-4-8"])
def test_a_fault_is_found(source, tmp_path, monkeypatch, quantize):
    """One weight's rows one place further, in the file alone; and the layer is named."""
    from converters.litert import weights

    whole = weights._rows

    def wrong(parameter, weight):
        for rows, scales in whole(parameter, weight):
            row = len(rows) // parameter.shape[0] if parameter.name == "layers.1.attn.k.weight" else 0
            yield rows[row:] + rows[:row], scales

    folder = copied(source, tmp_path / "m")
    monkeypatch.setattr(weights, "_rows", wrong)
    with pytest.raises(CheckpointError, match="does not compute what the checkpoint does, in layers.1: "):
        writing.convert(folder, tmp_path / "m.litertlm", to="litertlm", quantize=quantize, **SMALL)
    monkeypatch.undo()
    told: list[str] = []
    writing.convert(folder, tmp_path / "m.litertlm", to="litertlm", quantize=quantize, announce=told.append, **SMALL)
    assert "verdict: equivalent" in told[-1]
    assert ("activations in int8" in told[-1]) == (quantize is not None)


def tokenizer_of(folder: Path, **changes):
    return dataclasses.replace(reading.from_huggingface(folder), **changes)


@pytest.mark.parametrize(
    ("model_type", "tokens", "family"),
    [
        ("gemma3_text", (), "gemma3"),
        ("gemma3_text", ("<start_function_call>",), "function_gemma"),
        ("gemma4_text", ("<|tool_call>",), "gemma4"),
        ("qwen2", (), "qwen2p5"),
        ("qwen3_moe", (), "qwen3"),
        ("lfm2", (), "lfm2"),
        ("falcon", (), "generic_model"),
        ("lfm2", None, "generic_model"),
    ],
)
def test_families(source, model_type, tokens, family):
    """LiteRT-LM has no template of its own for some, and loads no file of theirs without one."""
    tokenizer, carried = tokenizer_of(source), Carried("" if tokens is None else "{{ messages }}")
    tokenizer.backend.add_special_tokens(list(tokens or ()))
    found = metadata.llm_metadata(tokenizer, carried, model_type, 16, 260, {}, "f").llm_model_type
    assert [field.name for field, _ in found.ListFields()] == [family]
    if family == "gemma4":
        assert (found.gemma4.code_fence_start, found.gemma4.open_quote) == ("<|tool_call>", "")


def test_no_start_token_where_the_tokenizer_adds_none(source):
    tokenizer = tokenizer_of(source, prefix_ids=())
    assert tokenizer.bos_id == 257  # which its files name
    assert not metadata.llm_metadata(tokenizer, Carried(), "llama", 16, 260, {}, "f").HasField("start_token")


def test_the_token_behind_an_answer_stops_it(source):
    tokenizer = tokenizer_of(source, eos_ids=(259,))
    assert metadata.stop_ids(tokenizer, Carried(turn_end="</s>\n"), 260) == [256, 259]
    assert metadata.stop_ids(tokenizer, Carried(turn_end=" </s> and more"), 260) == [259]


def test_texts_that_end_a_text(source, tmp_path, quick):
    """Those of ``generation_config.json``: a special token among them is its id; and back again."""
    folder = copied(source, tmp_path / "m", generation_config__json={"stop_strings": ["<u>", "END", "\n"]})
    writing.convert(folder, tmp_path / "m.litertlm", to="litertlm", verify=False, **SMALL)
    package = Package(tmp_path / "m.litertlm")
    stops = package.metadata(package.parts[0]).stop_tokens
    assert [(list(stop.token_ids.ids), stop.token_str) for stop in stops] == [
        ([256], ""),
        ([258], ""),
        ([259], ""),
        ([], "END"),
        ([], "\n"),
    ]
    read = llmjax.load(tmp_path / "m.litertlm").tokenizer
    assert (read.stop, read.eos_ids) == (("END", "\n"), (256, 258, 259))
    writing.convert(tmp_path / "m.litertlm", tmp_path / "back", to="hf")
    back = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert (back["stop_strings"], back["eos_token_id"]) == (["END", "\n"], [256, 258, 259])


@pytest.mark.parametrize("stops", [3, [""], [["a"]]])
def test_what_is_no_text_that_ends_one(source, tmp_path, stops):
    folder = copied(source, tmp_path / "m", generation_config__json={"stop_strings": stops})
    with pytest.raises(LlmjaxError, match="generation_config.json: stop_strings: stop: expected"):
        writing.convert(folder, tmp_path / "m.litertlm", to="litertlm", **SMALL)


def test_thoughts_are_a_channel(source):
    tokenizer = tokenizer_of(source)
    tokenizer.backend.add_special_tokens(["<think>", "</think>"])
    found = metadata.llm_metadata(tokenizer, Carried("<think>"), "qwen3", 16, 260, {}, "f")
    assert [(c.channel_name, c.start, c.end) for c in found.channels] == [("thought", "<think>", "</think>")]
    assert found.supports_thinking


def test_no_end_at_all(source):
    with pytest.raises(TokenizerError, match="no token of the model ends a text.*eos_token_id"):
        metadata.llm_metadata(tokenizer_of(source, eos_ids=(9999,)), Carried(), "llama", 16, 260, {}, "f")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (260, 1.0, 1.0)),
        ({"top_k": 0, "top_p": 0.5}, (260, 0.5, 1.0)),
        ({"top_k": 999, "temperature": 0.5}, (260, 1.0, 0.5)),
        ({"top_p": 0.5, "temperature": 0.0}, (1, 1.0, 1.0)),
    ],
)
def test_sampling_that_litert_lm_has(source, config, expected):
    """It refuses to run top-k alone, and top-p without a number of tokens."""
    said = {"do_sample": True, **config}
    facts = metadata.llm_metadata(tokenizer_of(source), Carried(), "llama", 16, 260, said, "f")
    sampler = facts.sampler_params
    assert (sampler.type, sampler.k, sampler.p, sampler.temperature) == (2, *expected)


@pytest.mark.parametrize(
    "config",
    [
        {"top_p": 2},
        {"top_k": "5"},
        {"temperature": None, "top_k": -1},
        {"suppress_tokens": [-1]},
        {"do_sample": "true"},
    ],
)
def test_odd_sampling(source, config):
    with pytest.raises(ConfigError, match="^config.json: "):
        tokenizer = tokenizer_of(source)
        metadata.llm_metadata(tokenizer, Carried(), "llama", 16, 260, {"do_sample": True, **config}, "config.json")


def test_added_tokens_beyond_the_embedding(source, caplog):
    """Gemma 3's token for images has no row in its text models."""
    tokenizer = tokenizer_of(source)
    assert tokenizer.vocab_size == 261
    section = vocabulary.section(types.SimpleNamespace(), tokenizer, 260)
    state = json.loads(zlib.decompress(section.content[8:]))
    assert [t["content"] for t in state["added_tokens"]] == ["</s>", "<s>", "<u>", "<m>"]
    assert "1 added tokens (<image>) are beyond the 260 rows" in caplog.text


@pytest.mark.parametrize("template", [None, "{{ bos_token }}{{ messages[0].content }}"])
def test_a_sentencepiece_model_goes_along_as_it_is(tmp_path, template):
    """Where a space belongs before every text, which tokenizer.json has no words for; special tokens are text there."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((TOKENIZERS / "gemma_2b" / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = True
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    tokenizer = tokenizer_of(tmp_path, chat_template=template)
    assert tokenizer.dummy_prefix
    source = types.SimpleNamespace(directory=tmp_path, format="huggingface")
    if template:
        with pytest.raises(TokenizerError, match="its chat template writes special tokens.*--chat-template none"):
            vocabulary.section(source, tokenizer, 10**6)
    else:
        assert vocabulary.section(source, tokenizer, 10**6).content == model.SerializeToString()


WRONG = {
    "expected a name that ends in .litertlm": {"destination": "m.bin"},
    "context: expected 1 to 64 tokens": {"context": 65},
    "context: expected a positive integer, found '16'": {"context": "16"},
    "context: expected a positive integer, found True": {"context": True},
    "prefill_lengths: expected numbers from 1 to the context, 16, found \\[17\\]": {"prefill_lengths": [17]},
    "prefill_lengths: expected numbers": {"prefill_lengths": []},
    "prefill_lengths: expected numbers .* found \\[4, None, '8'\\]": {"prefill_lengths": [4, None, "8"]},
    "activations: unknown 'int8'": {"activations": "int8"},
    "vocab: only for task files": {"vocab": "x"},
    "chat_template: .*/nowhere: cannot read it: No such file or directory": {"chat_template": "/nowhere"},
    "dtype: floats are float32": {"dtype": "bfloat16"},
    "check_finite: LiteRT's files hold finite": {"check_finite": True},
    "verify: expected true or false": {"verify": "no"},
    "int8-asym: LiteRT has": {"quantize": "int8-asym"},
    "no such file": {"lora": "/nowhere"},
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_options_are_one_line(source, tmp_path, reason):
    options = {"destination": "m.litertlm", **SMALL, **WRONG[reason]}
    destination = tmp_path / options.pop("destination")
    with pytest.raises(LlmjaxError, match=reason) as caught:
        writing.convert(source, destination, to="litertlm", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_taken(source, written):
    before = written.read_bytes()
    with pytest.raises(CheckpointError, match="exists; expected a new file"):
        writing.convert(source, written, to="litertlm", **SMALL)
    assert written.read_bytes() == before


def test_a_full_disk_is_told_before(source, tmp_path, monkeypatch, quick):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OutputError, match="MB of .*, which has 0 MB left"):
        writing.convert(source, tmp_path / "m.litertlm", to="litertlm", **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(source, tmp_path, monkeypatch, quick):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container, "write", full)
    with pytest.raises(OutputError, match="cannot write it: No space left on device; nothing is left behind"):
        writing.convert(source, tmp_path / "m.litertlm", to="litertlm", verify=False, **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_under_the_graph(source, tmp_path, monkeypatch):
    """Which is written to a place that no user knows."""

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "write", full)
    path = tmp_path / "m.litertlm"
    with pytest.raises(OutputError, match=f"^{path}: cannot write it: No space left on device; nothing is left"):
        writing.convert(source, path, to="litertlm", verify=False, **SMALL)
    assert not list(tmp_path.iterdir())


def test_another_conversion_was_quicker(source, tmp_path, monkeypatch, quick):
    path = tmp_path / "m.litertlm"
    told = lambda line: path.write_bytes(b"theirs")  # noqa: E731
    with pytest.raises(CheckpointError, match="exists; expected a new file"):
        writing.convert(source, path, to="litertlm", verify=False, announce=told, **SMALL)
    assert path.read_bytes() == b"theirs" and [p.name for p in tmp_path.iterdir()] == ["m.litertlm"]


def test_memory_for_the_proof(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert.memory, "available", lambda: 1000)
    with pytest.raises(CheckpointError, match="verify: running the file .* --no-verify"):
        writing.convert(source, tmp_path / "m.litertlm", to="litertlm", **SMALL)


def test_no_tokenizer(source, tmp_path):
    folder = copied(source, tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="no tokenizer, which a bundle needs.*--to tflite"):
        writing.convert(folder, tmp_path / "m.litertlm", to="litertlm", **SMALL)


def test_another_models_vocabulary(source, tmp_path):
    folder = checkpoint(tmp_path / "m", vocab_size=200)
    with pytest.raises(TokenizerError, match="has 257 tokens, the model's embedding only 200 rows"):
        writing.convert(folder, tmp_path / "m.litertlm", to="litertlm", **SMALL)


def beginning(folder: Path, *tokens: int) -> Path:
    """With these before every text, of a tokenizer that knows one more than the model."""
    state = json.loads((folder / "tokenizer.json").read_text())
    texts = {t["id"]: t["content"] for t in state["added_tokens"]}
    single = [{"SpecialToken": {"id": texts[i], "type_id": 0}} for i in tokens]
    state["post_processor"]["single"] = [*single, {"Sequence": {"id": "A", "type_id": 0}}]
    state["post_processor"]["special_tokens"] = {
        texts[i]: {"id": texts[i], "ids": [i], "tokens": [texts[i]]} for i in texts
    }
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ((260,), "it begins texts with '?<image>'? .260., beyond the 260 rows"),
        ((257, 258), "it begins texts with '?<s>'? .257., '?<u>'? .258., where LiteRT-LM and MediaPipe put one token"),
    ],
)
def test_what_a_text_cannot_begin_with(source, tmp_path, tokens, reason):
    """LiteRT-LM drops a start token that it does not know, and all but the first of several."""
    folder = beginning(copied(source, tmp_path / "m"), *tokens)
    with pytest.raises(TokenizerError, match=reason):
        writing.convert(folder, tmp_path / "m.litertlm", to="litertlm", **SMALL)


def test_several_start_tokens_of_a_file(source):
    state = (source / "tokenizer.json").read_bytes()
    found = bundle.from_huggingface(state, "x", bundle.Ends(start=(257, 258), stop=((256,),)))
    assert found.encode("a") == [257, *found.encode("a", add_bos=False)]


@pytest.mark.parametrize("stop", [(-1,), (-300,), (256, -1)])
def test_a_stop_token_that_is_none(source, stop):
    """Counted from the end, -1 was the vocabulary's last."""
    state = (source / "tokenizer.json").read_bytes()
    with pytest.raises(TokenizerError, match=f"x: the stop token {min(stop)} is no token"):
        bundle.from_huggingface(state, "x", bundle.Ends(stop=((257,), stop)))
    assert bundle.from_huggingface(state, "x", bundle.Ends(stop=((9999,),))).eos_ids == (9999,)


def test_two_sections_that_say_which_tokens_end(written, tmp_path):
    found = Package(written)
    parts = [container.Section(part.name, bytes(found.read(part)), part.notes) for part in found.parts]
    with open(tmp_path / "m.litertlm", "wb") as file:
        container.write(file, [*parts, parts[0]], {})
    with pytest.raises(CheckpointError, match="expected one LlmMetadataProto, found 2"):
        llmjax.load(tmp_path / "m.litertlm")


def test_a_template_that_cannot_go_along(source, tmp_path, caplog, quick):
    folder = copied(source, tmp_path / "m", tokenizer_config__json={"chat_template": "{{ messages.count(1) }}"})
    with pytest.raises(TokenizerError, match="cannot be carried over.*--chat-template none"):
        writing.convert(folder, tmp_path / "m.litertlm", to="litertlm", **SMALL)
    writing.convert(folder, tmp_path / "m.litertlm", to="litertlm", chat_template="none", verify=False, **SMALL)
    assert "no chat template goes along" in caplog.text
    assert llmjax.load(tmp_path / "m.litertlm").tokenizer.chat_template is None


def test_a_template_for_tools_stays_behind(source, tmp_path, caplog, quick):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    each = [{"name": name, "template": template} for name in ("default", "tool_use")]
    folder = copied(source, tmp_path / "m", tokenizer_config__json={"chat_template": each})
    writing.convert(folder, tmp_path / "m.litertlm", to="litertlm", verify=False, **SMALL)
    assert "the template for conversations with tools (tool_use) stays behind" in caplog.text


def test_a_task_file_of_a_bin_file(tmp_path, quick):
    """MediaPipe's container, by the bundler's own code: texts for tokens, the SentencePiece model as it was."""
    source, path = DATA / "GEMMA_2B_gpu_int8_mp0.10.21.bin", tmp_path / "m.task"
    writing.convert(source, path, to="task", verify=False, **SMALL)
    package = Package(path)
    parts = {part.name: part for part in package.parts}
    assert bytes(package.view(parts["TOKENIZER_MODEL"])) == open_source(source).vocabulary
    facts = package.metadata(parts["METADATA"])
    assert (facts.start_token, list(facts.stop_tokens)) == ("<bos>", ["<eos>"])
    ours = llmjax.load(source).tokenizer
    assert read_tokenizer(package).encode("the cat") == ours.encode("the cat")


def test_pieces_that_are_spelled(tmp_path, caplog, quick):
    """Measured: LiteRT-LM gives such a vocabulary other tokens than MediaPipe does."""
    source = DATA / "FALCON_RW_1B_gpu_int8_mp0.10.21.bin"
    writing.convert(source, tmp_path / "m.task", to="task", verify=False, **SMALL)
    assert "as MediaPipe spells texts and LiteRT-LM does not: write a .litertlm file" in caplog.text


def test_the_chat_template_of_a_task_file(tmp_path, caplog, quick):
    """What stands around each turn, in words that its SentencePiece model has tokens for."""
    source, path = DATA / "GEMMA_2B_gpu_int8_mp0.10.21.bin", tmp_path / "m.task"
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content.strip() + '\\n' }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"
    )
    options = {"to": "task", "verify": False, "chat_template": template, **SMALL}
    writing.convert(source, path, **options)
    assert "chat template trims or changes texts" in caplog.text
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "a"}]
    assert llmjax.load(path).tokenizer.render_chat(said) == "user: Hi\nassistant: Yo\nuser: a\nassistant: "
    template.write_text(template.read_text().replace("strip() + '", "strip() + '<eos>"))
    path.unlink()
    with pytest.raises(TokenizerError, match="its chat template writes special tokens.*--chat-template none"):
        writing.convert(source, path, **options)
    template.write_text("{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}")
    writing.convert(source, path, **options)
    assert "no chat template goes along: a .task file holds what stands around each turn" in caplog.text


def test_a_task_file_needs_a_sentencepiece_model(source, tmp_path, quick):
    with pytest.raises(LlmjaxError, match="unk_token: expected a token, which the format needs.*; a .litertlm file"):
        writing.convert(source, tmp_path / "m.task", to="task", verify=False, **SMALL)


def test_options_of_the_command_line(source, tmp_path, capsys, quick):
    arguments = ["convert", str(source), str(tmp_path / "m.litertlm"), "--to", "litertlm"]
    assert main([*arguments, "--backend", "cpu"]) == 2
    assert "--backend: only with --to mediapipe" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "d"), "--to", "hf", "--context", "8"]) == 2
    assert "--context: only with --to litertlm or task or tflite" in capsys.readouterr().err
    assert main([*arguments, "--context", "16", "--prefill-lengths", "4", "--no-verify"]) == 0
    said = capsys.readouterr().err
    assert "prefill_4, decode" in said and "it is not run against the checkpoint" in said


def test_the_proof_rounds_anew_what_the_file_does(monkeypatch):
    """Of a GGUF's weights in other bits: as floats, then as the recipe says."""
    w = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    monkeypatch.setattr(proof.weights_lib, "held", lambda packed: Form("INT4"))
    stored = Stored("x", w.shape, lambda start, stop: w[start:stop], lambda: types.SimpleNamespace())
    scale = np.abs(w).max(1, keepdims=True) / np.float32(127)
    np.testing.assert_array_equal(proof._values(stored, Form("INT8")), np.rint(w / scale) * scale)
    np.testing.assert_array_equal(proof._values(stored, FLOAT32), w)
