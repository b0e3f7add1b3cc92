"""``llmjax inspect`` for .task and .litertlm files, whole and damaged."""

import json
import random
import struct
import zipfile
import zlib

import flatbuffers
import pytest
import tflite

import llmjax
from converters import BundleConfig, create_bundle
from converters.mediapipe import bundle
from converters.readers.mediapipe import package, parameters
from converters.readers.mediapipe.package import Package
from llmjax.checkpoint.inspection import inspect
from llmjax.cli.main import main
from llmjax.errors import CheckpointError, LlmjaxError
from tests.mediapipe_files import DATA, vocabulary

TASK = DATA / "tiny_bundle_0.10.21.task"


def _vector(b, offsets):
    b.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        b.PrependUOffsetTRelative(offset)
    return b.EndVector()


def _table(b, *fields):
    """Fields by number: (method, value, default) or None."""
    b.StartObject(len(fields))
    for index, entry in enumerate(fields):
        if entry:
            getattr(b, f"Prepend{entry[0]}Slot")(index, entry[1], 0)
    return b.EndObject()


def tflite_file(signatures=("prefill_8", "decode"), dims=(1, 8)):
    """A graph with a subgraph of one operator for each signature; the last dimension of its input is not fixed."""
    b = flatbuffers.Builder(1024)
    graphs, defs = [], []
    for index, signature in enumerate(signatures):
        tensors = []
        for name, kind in (("tokens", 2), ("logits", 0)):
            label = b.CreateString(name)
            b.StartVector(4, 2, 4)
            for size in reversed(dims):
                b.PrependInt32(size)
            shape = b.EndVector()
            b.StartVector(4, 2, 4)
            for size in (-1, dims[0]):
                b.PrependInt32(size)
            dynamic = b.EndVector()
            tflite.TensorStart(b)
            tflite.TensorAddShape(b, shape)
            if kind == 2:
                tflite.TensorAddShapeSignature(b, dynamic)
            tflite.TensorAddType(b, kind)
            tflite.TensorAddName(b, label)
            tensors.append(tflite.TensorEnd(b))
        listed = _vector(b, tensors)
        tflite.OperatorStart(b)
        operators = _vector(b, [tflite.OperatorEnd(b)])
        tflite.SubGraphStart(b)
        tflite.SubGraphAddTensors(b, listed)
        tflite.SubGraphAddOperators(b, operators)
        graphs.append(tflite.SubGraphEnd(b))
        maps = []
        for name in ("tokens", "logits"):
            label = b.CreateString(name)
            tflite.TensorMapStart(b)
            tflite.TensorMapAddName(b, label)
            tflite.TensorMapAddTensorIndex(b, len(maps))
            maps.append(_vector(b, [tflite.TensorMapEnd(b)]))
        key = b.CreateString(signature)
        tflite.SignatureDefStart(b)
        tflite.SignatureDefAddInputs(b, maps[0])
        tflite.SignatureDefAddOutputs(b, maps[1])
        tflite.SignatureDefAddSignatureKey(b, key)
        tflite.SignatureDefAddSubgraphIndex(b, index)
        defs.append(tflite.SignatureDefEnd(b))
    subgraphs, signed = _vector(b, graphs), _vector(b, defs)
    data = b.CreateByteVector(bytes(4000))
    tflite.BufferStart(b)
    tflite.BufferAddData(b, data)
    buffers = _vector(b, [tflite.BufferEnd(b)])
    tflite.ModelStart(b)
    tflite.ModelAddVersion(b, 3)
    tflite.ModelAddSubgraphs(b, subgraphs)
    tflite.ModelAddSignatureDefs(b, signed)
    tflite.ModelAddBuffers(b, buffers)
    b.Finish(tflite.ModelEnd(b), b"TFL3")
    return bytes(b.Output())


def litertlm_file(path, sections, version=(1, 1, 0)):
    """LiteRT-LM's layout: sections as (kind, bytes, notes)."""
    b = flatbuffers.Builder(1024)

    def note(key, value):
        label, number = b.CreateString(key), 3
        if isinstance(value, str):
            text, number = b.CreateString(value), 9
            held = _table(b, ("UOffsetTRelative", text))
        else:
            held = _table(b, ("Uint16", value))
        return _table(b, ("UOffsetTRelative", label), ("Uint8", number), ("UOffsetTRelative", held))

    objects, at, body = [], 16384, b""
    for kind, data, notes in sections:
        items = _vector(b, [note(*entry) for entry in notes.items()])
        end = at + len(body) + len(data)
        fields = (("UOffsetTRelative", items), ("Uint64", at + len(body)), ("Uint64", end), ("Uint8", kind))
        objects.append(_table(b, *fields))
        body += data + bytes(-len(data) % 16384)
    about = _table(b, ("UOffsetTRelative", _vector(b, [note("Author", "us"), note("year", 2026)])))
    listed = _table(b, ("UOffsetTRelative", _vector(b, objects)))
    b.Finish(_table(b, ("UOffsetTRelative", about), ("UOffsetTRelative", listed)))
    header = bytes(b.Output())
    start = b"LITERTLM" + struct.pack("<4IQ", *version, 0, 32 + len(header))
    path.write_bytes((start + header).ljust(16384, b"\0") + body)
    return path


def _litertlm(folder, **options):
    message = parameters.LlmMetadata(max_num_tokens=1280)
    message.start_token.token_ids.ids.append(2)
    message.stop_tokens.add(token_str="<eos>")
    message.sampler_params.k = 40
    json_file = (DATA.parent / "tokenizers" / "gemma_2b" / "tokenizer.json").read_bytes()
    sections = [
        (5, message.SerializeToString(), {}),
        (4, vocabulary(folder).read_bytes(), {}),
        (6, len(json_file).to_bytes(8, "little") + zlib.compress(json_file), {}),
        (3, tflite_file(), {"model_type": "tf_lite_prefill_decode"}),
        (1, b"anything", {"n": 7}),
    ]
    return litertlm_file(folder / "x.litertlm", sections, **options)


def _task(folder):
    (folder / "graph.tflite").write_bytes(tflite_file())
    config = BundleConfig(
        str(folder / "graph.tflite"), str(vocabulary(folder)), "<bos>", ["<eos>"], str(folder / "x"), system_prompt="S"
    )
    return create_bundle(config)


def _check_graph(found, part):
    assert (found["part"], found["subgraphs"], found["operators"]) == (part, 2, 2)
    assert [s["name"] for s in found["signatures"]] == ["prefill_8", "decode"]
    for signature in found["signatures"]:
        assert signature["operators"] == 1
        assert signature["inputs"] == [{"name": "tokens", "type": "INT32", "shape": (1, -1)}]
        assert signature["outputs"] == [{"name": "logits", "type": "FLOAT32", "shape": (1, 8)}]


def test_task(tmp_path, capsys):
    path = _task(tmp_path)
    found = inspect(path)
    assert (found.format, found.supported) == ("task", False)
    assert [p["name"] for p in found.parts] == [bundle.MODEL, bundle.TOKENIZER, bundle.METADATA]
    assert found.metadata["start_token"] == "<bos>" and found.metadata["stop_tokens"] == ["<eos>"]
    assert found.metadata["prompt_template"] == {"session_prefix": "S"}
    assert found.tokenizer["vocab_size"] == 100 and found.tokenizer["bos_token"] == "<bos>"
    _check_graph(found.graphs[0], bundle.MODEL)
    assert found.problems[0] == "prefill_8: operator 0 (code 0 of 0) is not supported"
    assert main(["inspect", str(path)]) == 1
    text = capsys.readouterr().out
    assert "prefill_8: 1 operator\n" in text and "input  tokens" in text and "[1, -1]" in text
    assert main(["inspect", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["graphs"][0]["signatures"][1]["name"] == "decode"


def test_a_bundle_of_weights():
    found = inspect(TASK)
    assert "no graph but named weights, as in a .bin file" in found.problems[0]
    assert found.metadata["input_output_normalizations"] == ["BYTES_TO_UNICODE"]


def test_litertlm(tmp_path, capsys):
    path = _litertlm(tmp_path)
    found = inspect(path)
    assert (found.format, found.version, found.notes) == ("litertlm", "1.1.0", {"Author": "us", "year": 2026})
    assert found.metadata == {
        "start_token": {"token_ids": {"ids": [2]}},
        "stop_tokens": [{"token_str": "<eos>"}],
        "sampler_params": {"k": 40},
        "max_num_tokens": 1280,
    }
    assert found.tokenizer["kind"] == "sentencepiece"
    _check_graph(found.graphs[0], "TFLiteModel")
    assert [p["notes"] for p in found.parts][-2:] == [{"model_type": "tf_lite_prefill_decode"}, {"n": 7}]
    file = Package(path)
    zipped = next(p for p in file.parts if p.kind == package.HUGGINGFACE)
    assert json.loads(file.unpacked(zipped))["model"]["type"] == "BPE"
    assert main(["inspect", str(path)]) == 1
    assert "model_type=tf_lite_prefill_decode" in capsys.readouterr().out


def test_litertlm_of_the_real_builder():
    """LiteRT-LM's own, litert-lm-builder 0.18.1."""
    found = inspect(DATA.parent / "bundles" / "litert_lm_0.18.1.litertlm")
    assert found.version == "1.7.0"
    assert {"Authors": "llmjax", "i": -3, "f": 1.5, "b": True, "u": 2**63}.items() <= found.notes.items()
    assert found.metadata["stop_tokens"] == [{"token_str": "<eos>"}, {"token_ids": {"ids": [5]}}]
    assert found.metadata["sampler_params"] == {"type": "TOP_P", "k": 64, "p": 0.5}
    assert found.tokenizer["vocab_size"] == 100
    assert [s["name"] for s in found.graphs[0]["signatures"]] == ["prefill_8", "decode"]
    assert not any("named weights" in problem for problem in found.problems)


def test_what_other_models_in_a_bundle_have_is_left_out(tmp_path):
    """As LiteRT-LM 0.18.1 does, tried with bundles of its builder: a vocabulary goes with the model that it names."""
    ours, others = {"Model_Type": "TF_LITE_PREFILL_DECODE"}, {"model_type": "tf_lite_text_encoder"}
    sections = [(3, b"no graph", others), (3, tflite_file(), ours), (4, b"no vocabulary", others)]
    found = inspect(litertlm_file(tmp_path / "x.litertlm", sections))
    assert (found.unused, len(found.graphs), found.tokenizer) == (["TFLiteModel (tf_lite_text_encoder)"], 1, None)
    assert "not run: TFLiteModel (tf_lite_text_encoder)" in found.to_text()
    sections.append((4, vocabulary(tmp_path).read_bytes(), ours))
    assert inspect(litertlm_file(tmp_path / "x.litertlm", sections)).tokenizer["vocab_size"] == 100
    path = litertlm_file(tmp_path / "y.litertlm", [(3, tflite_file(), {"model_type": "tf_lite_artisan_text_decoder"})])
    assert inspect(path).problems == ["there is no model's graph"]
    with pytest.raises(CheckpointError, match=r"holds TFLiteModel \(tf_lite_artisan_text_decoder\)"):
        llmjax.load(path)


@pytest.mark.parametrize("make", [_task, _litertlm])
def test_not_to_be_loaded(make, tmp_path, capsys):
    path = make(tmp_path)
    with pytest.raises(CheckpointError, match="llmjax does not run this model") as error:
        llmjax.load(path)
    assert "decode: expected tokens or embeddings, and positions, found tokens" in str(error.value)
    assert main(["generate", "--model", str(path), "--prompt", "x"]) == 2
    nameless = path.rename(tmp_path / "nameless")  # what it begins with is enough
    with pytest.raises(CheckpointError, match="llmjax does not run this model"):
        llmjax.load(nameless)


def test_contradictions(tmp_path):
    with pytest.raises(CheckpointError, match="version 2.0.0 are not supported, expected 1"):
        inspect(_litertlm(tmp_path, version=(2, 0, 0)))
    with pytest.raises(CheckpointError, match="without a TFLite graph; it holds GenericBinaryData"):
        inspect(litertlm_file(tmp_path / "y.litertlm", [(1, b"x", {})]))
    bomb = (10**6).to_bytes(8, "little") + zlib.compress(bytes(1 << 20))
    path = litertlm_file(tmp_path / "z.litertlm", [(3, tflite_file(), {}), (6, bomb, {})])
    with pytest.raises(
        CheckpointError, match="HF_Tokenizer_Zlib: expected 1000000 bytes unpacked, found 1000001 or more"
    ):
        inspect(path)
    (tmp_path / "no.task").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="no.task: truncated or damaged"):
        inspect(tmp_path / "no.task")


def test_entries_that_lie_are_named(tmp_path):
    """Beyond the file's end they were "madvise start out of bounds", and one entry of two too many of 256."""
    path = _task(tmp_path)
    whole = path.read_bytes()
    header, listed = whole.rfind(b"PK\3\4"), whole.rfind(b"PK\1\2")
    for at, value, message in (
        (header + 26, b"\xff\xff", r"METADATA ends at byte \d+, the file has \d+$"),
        (listed + 42, (len(whole) - 10).to_bytes(4, "little"), "entry METADATA has no header at byte"),
    ):
        path.write_bytes(whole[:at] + value + whole[at + len(value) :])
        with pytest.raises(CheckpointError, match=message):
            inspect(path)
    path.write_bytes(whole)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("METADATA", b"")
    with pytest.raises(CheckpointError, match="again: two entries METADATA$"):
        inspect(path)


@pytest.mark.parametrize("make", [_task, _litertlm])
def test_damaged_files(make, tmp_path):
    """Cut, or with bits and numbers of the headers changed: one line, or a report; never anything else."""
    rng = random.Random(0)
    whole = make(tmp_path).read_bytes()
    path = tmp_path / make(tmp_path).name
    end = whole.rfind(b"PK\1\2") if make is _task else 0
    places = [(0, 700), (end - 700, 900)] if make is _task else [(0, 700), (16384, 100)]
    found = whole.find(b"TFL3")
    places += [(found - 4, 2000), (found + 4000, 1500)]
    refused = 0
    for _ in range(250):
        data = bytearray(whole)
        if rng.random() < 0.2:
            data = data[: rng.randrange(1, len(data))]
        else:
            first, span = rng.choice(places)
            at = min(max(first, 0) + rng.randrange(span), len(data) - 4)
            if rng.random() < 0.5:
                data[at] ^= 1 << rng.randrange(8)
            else:
                data[at : at + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\0\0\0\0"])
        path.write_bytes(data)
        try:
            inspect(path).to_text()
        except LlmjaxError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 500
    assert 50 < refused < 240
