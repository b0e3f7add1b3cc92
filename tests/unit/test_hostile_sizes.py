"""Numbers in a checkpoint's headers that no model has: refused in a moment, in every format, before anything is made of
that size."""

import gc
import json
import re
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmjax
from converters.mediapipe.bin_file import BinWriter
from converters.readers.mediapipe import parameters
from converters.readers.mediapipe.container import BACKEND, MODEL_TYPE, PARAMETERS, VOCABULARY, BinFile, Entry
from llmjax.checkpoint.gguf_config import hf_config
from llmjax.errors import CheckpointError, ConfigError, LlmjaxError, LoraError
from llmjax.lora.config import LoraConfig
from llmjax.models.registry import read_config
from tests import gguf_files
from tests.tiny import checkpoint

GEMMA = Path(__file__).parents[1] / "data" / "mediapipe" / "GEMMA_2B_gpu_int8_mp0.10.21.bin"
SMALL = {"num_hidden_layers": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WRONG = [
    ({"num_hidden_layers": 20_000}, "num_hidden_layers: expected at most 1,024, found 20000"),
    ({"num_hidden_layers": 1_000}, "num_hidden_layers: 1000, but no tensor is of a layer after number 1"),
    ({"num_hidden_layers": 1e400}, "num_hidden_layers: expected a positive integer, found inf"),
    ({"head_dim": 2**33}, "head_dim: expected at most 65,536, found 8589934592"),
    ({"head_dim": 2**16}, r"k_proj.weight: expected shape \[131072, 48\], found \[16, 48\]"),
    ({"hidden_size": 2**33}, "hidden_size: expected at most 1,048,576"),
    ({"num_attention_heads": 2**30}, "num_attention_heads: expected at most 65,536"),
    ({"intermediate_size": 2**62}, "intermediate_size: expected at most 4,194,304"),
    ({"vocab_size": 2**40}, "vocab_size: expected at most 16,777,216"),
    ({"max_position_embeddings": 2**80}, "max_position_embeddings: expected at most 2,147,483,647"),
    ({"hidden_size": 10**400}, "hidden_size: expected at most 1,048,576, found 1000"),
    ({"rms_norm_eps": 1e400}, "rms_norm_eps: expected a positive number, found inf"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps: expected a positive number, found 1000"),
    ({"rms_norm_eps": 1e-50}, "rms_norm_eps: expected a positive number, found 1e-50"),
    ({"rope_theta": float("nan")}, "rope_theta: expected a positive number, found nan"),
    ({"partial_rotary_factor": True}, r"partial_rotary_factor: expected a number in \(0, 1\], found True"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 1e400}}, "factor: expected a positive number, found inf"),
    ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 1e400}}, "original_max.*: expected a positive n"),
    (
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8, "low_freq_factor": 4.0}},
        "high_freq_factor: expected above low_freq_factor 4, found 4",
    ),
    ({"eos_token_id": 1e400}, "eos_token_id: expected a token id or a list of them, found inf"),
    ({"eos_token_id": 2**80}, "eos_token_id: expected a token id or a list of them, found 1208925819614629174706176"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("sizes") / "hf")


@pytest.fixture(scope="module")
def packed(folder):
    return llmjax.convert(folder, folder.parent / "packed", quantize={"attention": "int4", "feed_forward": "int4"})


@pytest.fixture(params=["hf", "llmjax"])
def changed(request, folder, packed):
    """Changes ``config.json``, and gives it back as it was."""
    path = folder if request.param == "hf" else packed
    before = (path / "config.json").read_text()

    def change(**values):
        (path / "config.json").write_text(json.dumps(json.loads(before) | values))
        return path

    yield change
    (path / "config.json").write_text(before)
    gc.enable()


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_a_configuration(changed, values, message):
    path = changed(**values)
    llmjax.inspect(path)  # what is made but once is made
    gc.disable()  # what other tests left is not to be collected on the clock
    tracemalloc.start()
    began = time.process_time()
    report = llmjax.inspect(path)
    taken, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not report.supported and taken < 1 and peak < 30e6
    if "k_proj" not in message or report.format == "huggingface":
        assert re.search(message, "\n".join(report.problems))
    assert len(report.to_text()) < 10_000


def test_large_numbers_that_cost_nothing_are_taken(changed):
    assert llmjax.inspect(changed(max_position_embeddings=2**31 - 1, eos_token_id=2**31 - 1)).supported


@pytest.mark.parametrize(
    "changes",
    [
        {
            "llama.attention.key_length": 2**33,
            "llama.attention.value_length": 2**33,
            "llama.rope.dimension_count": 2**33,
        },
        {"llama.feed_forward_length": 2**63},
        {"llama.embedding_length": 2**63, "llama.attention.head_count": 2**62, "llama.attention.head_count_kv": 2**62},
        {"llama.context_length": 2**63},
    ],
)
def test_metadata_of_a_gguf(changes):
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    shapes = {"token_embd.weight": (100, 64), "blk.0.ffn_down.weight": (64, 96)}
    read_config(hf_config(metadata, shapes, "x.gguf"), "x.gguf")
    with pytest.raises(ConfigError, match="expected at most"):
        read_config(hf_config(metadata | changes, shapes, "x.gguf"), "x.gguf")


def test_a_whole_gguf(tmp_path):
    def add(writer):
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            writer.add_uint32(f"llama.{key}", 2**31)

    folder = checkpoint(tmp_path / "hf", rope_theta=10000.0)
    report = llmjax.inspect(gguf_files.write(folder, tmp_path / "x.gguf", add=add))
    assert "head_dim: expected at most 65,536, found 2147483648" in report.problems[0]


def rebuilt(path, change=lambda p: None, vector=0):
    """A ``.bin`` file with other dimensions, or with a norm that has so many bytes less."""
    file = BinFile(GEMMA)
    blobs = {key: file.blob(key) or b"" for key in (PARAMETERS, VOCABULARY, BACKEND)}
    message = parameters.read(blobs[PARAMETERS], "x")
    change(message)
    blobs[PARAMETERS] = message.SerializeToString()
    name = "params.lm.final_ln.scale"
    entries = dict(file.entries)
    size = entries[name].nbytes - vector
    entries[name] = Entry(name, "FLOAT32", (size,), size)
    writer = BinWriter(path, file.name, "gpu", list(entries.values()), blobs, {MODEL_TYPE: 6})
    for n, entry in entries.items():
        writer.write(n, file.raw(n)[: entry.nbytes])
    writer.close()
    return path


@pytest.mark.parametrize("field", ["embedding_dim", "hidden_dimension", "head_dimension", "num_heads", "num_stacks"])
def test_dimensions_of_a_bin(tmp_path, field):
    path = rebuilt(tmp_path / "x.bin", lambda p: setattr(p.transformer_parameters, field, 2**31 - 1))
    with pytest.raises(LlmjaxError, match=r"expected (\[|at most)"):
        llmjax.load(path)


@pytest.mark.parametrize("less", [1, 2, 3])
def test_a_vector_of_a_bin_that_is_not_whole(tmp_path, less):
    with pytest.raises(CheckpointError, match=r"tensor params.lm.final_ln.scale: FLOAT32 \[\d+\]: expected a weight"):
        llmjax.load(rebuilt(tmp_path / "x.bin", vector=less))


@pytest.mark.parametrize(
    ("scheme", "rows"),
    [
        ({"group": 1}, 48),
        ({"group": 3}, 16),
        ({"zero": 128}, 1),
        ({"zero": -113}, 1),
        ({"bits": 8, "zero": 1, "group": 24}, 1),
        ({"bits": 5}, 1),
        ({"bits": 2**40}, 1),
        ({"group": 2**70}, 1),
        ({"group": 0}, 1),
        ({"group": -48}, 1),
    ],
)
def test_a_scheme_that_is_none(packed, tmp_path, scheme, rows):
    """Values of fewer than 8 bits lie in pairs, and ``n - zero`` is an int8."""
    file = packed / "model.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    metadata = json.loads(file.read_bytes()[8 : 8 + size])["__metadata__"]
    schemes, tensors = json.loads(metadata["quantization"]), load_file(file)
    name = "layers.0.attn.q.weight"
    schemes[name] |= scheme
    tensors[f"{name}.scales"] = np.ones((48, rows), np.float32)
    save_file(tensors, tmp_path / "model.safetensors", metadata | {"quantization": json.dumps(schemes)})
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    with pytest.raises(CheckpointError, match=f"tensor {name}: (bits .*: no such scheme|fifth: expected)"):
        llmjax.load(tmp_path)


def test_an_adapter():
    for values in ({"r": 2**40}, {"r": 1e400}, {"lora_alpha": 1e400}, {"lora_alpha": 10**400}):
        with pytest.raises(LoraError, match="expected (at most|a positive)"):
            LoraConfig.from_peft({"peft_type": "LORA"} | values, "adapter_config.json")
    for key in ("rank_pattern", "alpha_pattern"):
        for value in (1e400, 10**400, float("nan"), True, -1):
            with pytest.raises(LoraError, match=f"{key}: q: expected"):
                LoraConfig.from_peft({"peft_type": "LORA", key: {"q": value}}, "adapter_config.json")
