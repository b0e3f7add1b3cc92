"""MediaPipe's .bin files, read and run."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

import llmjax
from converters.mediapipe.bin_file import BinWriter
from converters.readers.mediapipe import parameters
from converters.readers.mediapipe.container import (
    BACKEND,
    MODEL_TYPE,
    PARAMETERS,
    VOCABULARY,
    BinFile,
    Entry,
)
from converters.readers.opening import open_source
from llmjax.checkpoint.inspection import inspect
from llmjax.checkpoint.loading import fitting_plan, read_tokenizer
from llmjax.checkpoint.parameters import read_all
from llmjax.errors import CheckpointError, ConfigError, LlmjaxError
from tests.mediapipe_files import BINS, DATA, GEMMA, facts
from tests.tiny import slow, some

WEB = json.loads((DATA / "web_runtime.json").read_text())["results"]


@pytest.mark.parametrize("path", BINS, ids=lambda path: path.stem)
def test_equal_to_its_source_quantized_in_memory(path):
    kind, _, (attention, feed_forward, embedding) = facts(path)
    bits = {"attention": attention, "feed_forward": feed_forward, "embedding": embedding}
    recipe = {role: f"int{n}" for role, n in bits.items()}
    ours = llmjax.load(path)
    if embedding == 4:
        with pytest.warns(UserWarning, match="int4 for the embedding"):
            theirs = llmjax.load(DATA / kind, quantize=recipe)
    else:
        theirs = llmjax.load(DATA / kind, quantize=recipe)
    assert ours.config == theirs.config
    assert jax.tree.structure(ours.params) == jax.tree.structure(theirs.params)
    leaves = jax.tree_util.tree_leaves_with_path(ours.params)
    for (where, a), b in zip(leaves, jax.tree.leaves(theirs.params), strict=True):
        # Norms and biases are float32 in the file, whatever they were.
        assert np.array_equal(a, np.asarray(b, a.dtype)), where
    if path == GEMMA:  # one will do: equal parameters give equal logits
        ids = [5, 60, 7, 99]
        np.testing.assert_allclose(ours.logits([ids])[0], theirs.logits([ids])[0], atol=1e-6)


def test_tokens_come_from_the_file():
    model = llmjax.load(GEMMA)
    assert model.tokenizer.encode("the quick brown fox") == [2, 27, 26, 50, 59, 56, 21, 19]
    assert model.tokenizer.encode("a  box ", add_bos=False) == [45, 72]
    assert model.eos_ids == (1,)
    options = llmjax.LlmInferenceOptions(str(GEMMA), max_tokens=12, temperature=0, top_k=1)
    with llmjax.LlmInference.create_from_options(options) as task:
        assert task.generate_response("hello").startswith("llollo")
        assert task.size_in_tokens("hello") == 2


@pytest.mark.parametrize("name", some(list(WEB)[:1], WEB))
def test_logits_and_tokens_of_the_web_runtime(name):
    model = llmjax.load(DATA / f"{name}.bin", numerics="mediapipe_gpu")
    for case in WEB[name].values():
        ids, tokens = case["prompt_ids"], case["generated_ids"]
        expected = np.array(case["logits_first_steps"], np.float32)
        found = model.logits([ids + tokens[:-1]])[0][len(ids) - 1 :]
        assert np.abs(found[: len(expected)] - expected).max() <= 2e-5 * np.abs(expected).max()
        assert found.argmax(-1).tolist() == tokens


@pytest.mark.slow
def test_profiles_are_formulas_of_their_own():
    """At these sizes 2e-5 would not tell the two forms of GELU apart: the web runtime's own source says erf."""
    reference = llmjax.load(GEMMA)
    gpu = llmjax.load(GEMMA, numerics="mediapipe_gpu")
    assert (reference.config.hidden_act, gpu.config.hidden_act) == ("gelu_pytorch_tanh", "gelu")
    assert gpu.config == dataclasses.replace(reference.config, hidden_act="gelu")
    case = WEB[GEMMA.stem]["the quick brown fox"]
    expected = np.array(case["logits_first_steps"][0])
    errors = [np.abs(m.logits([case["prompt_ids"]])[0][-1] - expected).max() for m in (reference, gpu)]
    assert errors[1] < errors[0]
    path = DATA / "GEMMA2_2B_cpu_int8_mp0.10.21.bin"
    cpu = llmjax.load(path, numerics="mediapipe_cpu")
    assert (cpu.config.windows, cpu.config.final_logit_softcapping) == ((None, None), None)
    assert cpu.config.attn_logit_softcapping == 50 and llmjax.load(path).config.windows == (4096, None)
    assert cpu.numerics.digits == 1 and "not validated" in cpu.numerics.label
    assert np.isfinite(cpu.logits([[2, 5, 6]])[0]).all()
    with pytest.raises(
        ConfigError, match="MediaPipe's runtimes know falcon, gemma, gemma2, phi, stablelm, found llama"
    ):
        llmjax.load("config:smollm2-135m-instruct", random_weights=True, numerics="mediapipe_gpu")


def test_a_configuration_may_be_given(tmp_path):
    (tmp_path / "c.json").write_text('{"max_position_embeddings": 64}')
    assert llmjax.load(GEMMA, config=tmp_path / "c.json").context_length == 64
    whole = json.loads((DATA / "GEMMA_2B" / "config.json").read_text()) | {"rope_theta": 500.0}
    assert llmjax.load(GEMMA, config=whole).config.rope.theta == 500
    for config, kind, message in (
        ("config:gemma-2b", CheckpointError, r"expected shape \[256000, 2048\], found \[128, 32\]"),
        ({"no_such_key": 1}, ConfigError, "does not know this key"),
        (tmp_path / "missing", ConfigError, "no such file"),
    ):
        with pytest.raises(kind, match=message):
            llmjax.load(GEMMA, config=config)


def test_inspect_names_every_tensor():
    report = inspect(DATA / "PHI_2_gpu_int4_mp0.10.21.bin")
    assert report.supported and report.format == "mediapipe" and report.model_type == "phi"
    assert all(len(t["fills"]) == 1 for t in report.tensors)
    assert {t["dtype"] for t in report.tensors} == {"F32", "INT4"}


def _rebuilt(path, change=lambda p: None, entries=lambda e: e, numbers=lambda n: n, data=lambda name, x: x):
    """GEMMA with something changed."""
    file = BinFile(GEMMA)
    blobs = {key: file.blob(key) or b"" for key in (PARAMETERS, VOCABULARY, BACKEND)}
    message = parameters.read(blobs[PARAMETERS], "x")
    change(message)
    blobs[PARAMETERS] = message.SerializeToString()
    kept = entries(dict(file.entries))
    writer = BinWriter(path, file.name, "gpu", list(kept.values()), blobs, numbers({MODEL_TYPE: 6}))
    for name in kept:
        if name in file.entries:
            writer.write(name, data(name, file.raw(name)))
    writer.close()
    return path


Q = "params.lm.transformer.x_layers_0.self_attention.q.w"


def _set(**values):
    return lambda p: [setattr(p.transformer_parameters, k, v) for k, v in values.items()]


def _zero_first(name, x):
    return np.concatenate([x[:1] ^ np.uint8(1), x[1:]]) if name == Q else x


WRONG = {
    "expected [48, 32], 1536 bytes as INT8": {"change": _set(num_heads=3)},
    "num_stacks: expected at most 512 layers": {"change": _set(num_stacks=1 << 30)},
    "pre_norm: expected RMS_NORM, found LAYER_NORM": {"change": _set(pre_norm=3)},
    "missing tensor params.lm.transformer.x_layers_2": {"change": _set(num_stacks=3)},
    "x_layers_1.ff_layer.ffn_layer1.w [64, 32] is not part of": {"change": _set(num_stacks=1)},
    "model type 38 is not supported": {"numbers": lambda n: {MODEL_TYPE: 38}},
    "LoRA weights of rank 4": {"numbers": lambda n: n | {"lora_rank": 4}},
    f"{Q}.sum_i is missing": {"entries": lambda e: {k: v for k, v in e.items() if k != Q + ".sum_i"}},
    "there is no quantized tensor it belongs to": {"entries": lambda e: {k: v for k, v in e.items() if k != Q}},
    "1 of 32 rows do not have the sum the file gives": {"data": _zero_first},
    "expected a weight or a vector of floats": {"entries": lambda e: e | {"x.w": Entry("x.w", "INT8", (16,), 16)}},
}


@pytest.mark.parametrize("message", WRONG)
def test_files_that_contradict_themselves(message, tmp_path):
    path = _rebuilt(tmp_path / "x.bin", **WRONG[message])
    with pytest.raises(LlmjaxError) as error:
        llmjax.load(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_fields_of_later_versions_are_no_harm(tmp_path):
    unknown = b"\xf8\x06\x01"  # field 111
    path = _rebuilt(tmp_path / "x.bin", change=lambda p: p.MergeFromString(unknown))
    assert llmjax.load(path).config == llmjax.load(GEMMA).config


def test_not_such_a_file(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"\x1c\0\0\0TFL3" + b"\xff" * 100)
    with pytest.raises(CheckpointError, match="x.bin: truncated or damaged file"):
        llmjax.load(path)
    path.write_bytes(b"\x1c\0\0\0TFL4" + b"\0" * 100)
    with pytest.raises(CheckpointError, match=f"^{path}: not a PyTorch weights file, nor one of MediaPipe's"):
        open_source(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"^{path}: the file is empty$"):
        open_source(path)


@pytest.mark.parametrize("seed", [0, slow(1)])
def test_damaged_files_are_refused_or_read(seed, tmp_path):
    """Cut, or with bytes and offsets of the header changed: an error of ours or a model, never anything else."""
    rng = random.Random(seed)
    path, accepted = tmp_path / "x.bin", 0
    words = [b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\x80"]
    for _ in range(120):
        data = bytearray(rng.choice(BINS).read_bytes())
        if rng.random() < 0.15:
            data = data[: rng.randrange(1, len(data))]
        else:
            first, span = (65536, 80) if rng.random() < 0.2 else (0, 9000)
            for _ in range(rng.choice([1, 1, 2, 4])):
                at = first + rng.randrange(span)
                number = rng.randrange(1 << rng.choice([8, 14, 32]))
                data[at : at + 4] = rng.choice([*words, number.to_bytes(4, "little")])
        path.write_bytes(data)
        try:
            source = open_source(path)
            for _ in read_all(source, fitting_plan(source, None), None, None):
                pass
            read_tokenizer(source)
            accepted += 1
        except LlmjaxError:
            pass
    assert 0 < accepted < 60
