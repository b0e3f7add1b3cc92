"""What a bundle says beside its graph: heeded as LiteRT-LM 0.18.1 heeds it, or told."""

import json
import lzma
import re
from pathlib import Path

import numpy as np
import pytest

import llmjax
from converters.litert import container
from converters.readers.litert import tflite
from converters.readers.mediapipe.package import Package
from converters.readers.mediapipe.parameters import LlmMetadata
from llmjax.checkpoint import bundles
from llmjax.errors import CheckpointError, TokenizerError
from llmjax.text.reading import from_huggingface
from tests.tiny import checkpoint

DATA = Path(__file__).parents[1] / "data" / "litert"
MODEL = {"model_type": "tf_lite_prefill_decode"}


def graph(padding: int) -> bytes:
    """An LFM2 whose prefill takes this token for padding: its convolution carries text along, and no padding."""
    data = bytearray(lzma.decompress((DATA / "lfm2_zeros.tflite.xz").read_bytes()))
    file, random, done = tflite.read(memoryview(data), "lfm2"), np.random.default_rng(1), set()
    for part in file.subgraphs:
        for tensor in filter(file.is_constant, part.tensors):
            if tensor.type == "FLOAT32" and tensor.buffer not in done and not (values := file.data(tensor)).any():
                values.view("<f4")[:] = random.normal(0, 0.3, values.nbytes // 4)
                done.add(tensor.buffer)
        for op in part.operators:
            if op.name == "NOT_EQUAL":
                file.data(part.tensors[op.inputs[1]]).view("<i4")[:] = padding
    return bytes(data)


def tokenizer(rows: int) -> bytes:
    model = {"type": "WordLevel", "vocab": {f"<{i}>": i for i in range(rows)}, "unk_token": "<0>"}
    nothing = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return container.packed_json(json.dumps({"version": "1.0", "added_tokens": [], "model": model} | nothing).encode())


def bundle(folder: Path, data: bytes | None = None, rows: int = 64, graphs: int = 1, **facts) -> Path:
    path, facts = folder / "m.litertlm", {"stop_tokens": [{"token_ids": {"ids": [3]}}], **facts}
    sections = [
        container.Section("LlmMetadataProto", LlmMetadata(**facts).SerializeToString()),
        container.Section("HF_Tokenizer_Zlib", tokenizer(rows)),
        *[container.Section("TFLiteModel", data or graph(0), MODEL)] * graphs,
    ]
    with open(path, "xb") as file:
        container.write(file, sections, {})
    return path


@pytest.mark.parametrize("said", [{"token_ids": {"ids": [7]}}, {"token_str": "<7>"}, None])
def test_prompts_are_filled_up_with_the_pad_token(tmp_path, caplog, said):
    path = bundle(tmp_path, graph(7), **({"pad_token": said} if said else {}))
    assert llmjax.load(path).module.padding == (7 if said else 0)
    assert ("filled up with token 0, as its pad_token has it, where the graph takes 7" in caplog.text) != bool(said)


def test_a_pad_token_that_is_none(tmp_path):
    path = bundle(tmp_path, pad_token={"token_ids": {"ids": [999]}})
    with pytest.raises(TokenizerError, match=r"m.litertlm: pad_token: expected one token below 64, found \[999\]"):
        llmjax.load(path)


@pytest.mark.slow
def test_padding_is_not_carried_along(tmp_path):
    """The logits behind a prompt that was filled up are those behind its tokens one by one; they differed by 8."""
    path = tmp_path / "m.tflite"
    path.write_bytes(graph(7))
    model, ids = llmjax.load(path), [11, 40, 20, 5, 57, 13]
    assert model.module.padding == 7 and np.abs(model.logits([ids])[0]).max() > 0.1
    assert np.abs(model.logits([ids], prefill=5)[0] - model.logits([ids])[0][5:]).max() < 1e-5


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"type": 2, "k": 64, "p": 0.95, "temperature": 0.7}, {"top_k": 64, "top_p": 0.95, "temperature": 0.7}),
        ({"type": 1, "k": 5, "temperature": 0.5}, {"top_k": 5, "temperature": 0.5}),
        ({"type": 2, "k": 5, "p": 0.5, "temperature": 0}, {"do_sample": False}),
        ({"type": 2, "k": 5, "p": 0, "temperature": 1}, {"do_sample": False}),
        ({"type": 3}, {"do_sample": False}),
        ({"k": 5}, {}),
    ],
)
def test_texts_are_sampled_as_the_bundle_says(tmp_path, said, expected):
    model = llmjax.load(bundle(tmp_path, sampler_params=said))
    assert (model.generation_config, model.generation_file) == (expected, "LlmMetadata")


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"jinja_prompt_template": "{% for m in %}"}, "the chat template is broken in line 1: .*; conversations need"),
        ({"stop_tokens": [{"token_str": ""}, {"token_ids": {"ids": [3]}}]}, "a stop token is empty, and ends nothing"),
        ({"stop_tokens": [{"token_ids": {}}]}, "which token ends a text: answers go on to max_tokens"),
        ({"stop_tokens": []}, "which token ends a text: answers go on to max_tokens"),
        ({"stop_tokens": [{"token_ids": {"ids": [999]}}]}, "the stop token 999 is beyond the graph's 64, and ends"),
        (
            {"stop_tokens": [{"token_ids": {"ids": [4, 999]}}]},
            r"999 is not in this vocabulary, so \(4, 999\) ends nothing",
        ),
        ({"rows": 70}, "70 tokens, and the graph knows 64: texts with the others are refused"),
    ],
)
def test_what_is_passed_over_is_told(tmp_path, caplog, facts, line):
    path = bundle(tmp_path, **facts)
    for read in llmjax.load, bundles.inspect:
        caplog.clear()
        read(path)
        assert re.search(f"{re.escape(str(path))}.*{line}", caplog.text)
    assert "<4>" not in llmjax.load(path).tokenizer.stop  # half of (4, 999) ended a text


def test_a_broken_template_of_a_directory_is_told(tmp_path, caplog):
    folder = checkpoint(tmp_path / "m")
    from_huggingface(folder)
    assert not caplog.text
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }")
    from_huggingface(folder)
    assert "the chat template is broken in line 1" in caplog.text


def test_inspect_and_load_agree(tmp_path):
    path = bundle(tmp_path, graphs=2)
    assert bundles.inspect(path).problems == ["two graphs for model"]
    with pytest.raises(CheckpointError, match="two graphs for model"):
        llmjax.load(path)
    path.unlink()
    without = lzma.decompress((DATA / "gemma4.litertlm.xz").read_bytes())
    (tmp_path / "gemma4.litertlm").write_bytes(without)
    whole = Package(tmp_path / "gemma4.litertlm")
    parts = [p for p in whole.parts if p.notes.get("model_type") != "tf_lite_embedder"]
    with open(path, "xb") as file:
        container.write(file, [container.Section(p.name, bytes(whole.view(p)), p.notes) for p in parts], {})
    lacking = "its graph takes embeddings, and there is no embedder to make them"
    assert bundles.inspect(path).problems == [f"{path}: {lacking}"]
    with pytest.raises(CheckpointError, match=lacking):
        llmjax.load(path)


def test_a_vocabulary_without_its_checksum(tmp_path):
    found, path = Package(bundle(tmp_path)), tmp_path / "cut.litertlm"
    sections = [container.Section(p.name, bytes(found.view(p)), p.notes) for p in found.parts]
    sections[1] = container.Section("HF_Tokenizer_Zlib", tokenizer(64)[:-4])
    with open(path, "xb") as file:
        container.write(file, sections, {})
    with pytest.raises(CheckpointError, match="HF_Tokenizer_Zlib: it ends before its checksum"):
        llmjax.load(path)
