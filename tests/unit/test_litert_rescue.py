"""Checkpoints out of op graphs: ``qwen2.tflite`` was made of ``qwen2`` (``tests/data/litert``) by litert-torch 0.10.0,
``gemma2_int4.tflite`` of a Gemma 2 whose configuration is known, ``lfm2_zeros.tflite`` of an LFM2, whose large weights
were then made zero, ``smollm3_zeros.tflite`` of a SmolLM3 likewise; ``olmo2_w8.tflite`` of an OLMo 2, its weights
rounded to 8 bits and no activation."""

import json
import lzma
from pathlib import Path

import jax
import numpy as np
import pytest

import llmjax
from converters.readers.litert import tflite
from llmjax.checkpoint import against, weight_error
from llmjax.checkpoint.graph_config import _ropes
from llmjax.checkpoint.graph_source import GraphSource
from llmjax.errors import CheckpointError, ConfigError
from llmjax.models.rope import Rope
from llmjax.models.scalings import Llama3Scaling

DATA = Path(__file__).parents[1] / "data" / "litert"
IDS = [7, 290, 13, 101, 55, 4, 250, 18]


def unpacked(name: str, folder: Path) -> Path:
    path = folder / f"{name}.tflite"
    path.write_bytes(lzma.decompress((DATA / f"{name}.tflite.xz").read_bytes()))
    return path


def test_a_float_graph_gives_its_checkpoint_back(tmp_path):
    llmjax.convert(unpacked("qwen2", tmp_path), tmp_path / "out", to="hf")
    ours, source = llmjax.load(tmp_path / "out"), llmjax.load(DATA / "qwen2")
    assert jax.tree.structure(ours.params) == jax.tree.structure(source.params)
    assert all(map(np.array_equal, jax.tree.leaves(ours.params), jax.tree.leaves(source.params)))
    found, known = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", DATA / "qwen2"))
    # A cache is as long as the exporter was told, and no graph knows its padding; the rest is the model's own.
    assert {k for k in found if found[k] != known.get(k)} == {"max_position_embeddings", "pad_token_id"}
    assert found["pad_token_id"] is None  # and not the kind's own, which may be no token of this vocabulary
    graph = tmp_path / "qwen2.tflite"
    assert against.differences(graph, DATA / "qwen2") == {"max_position_embeddings": (64, 512)}
    assert all(e.max == 0 for e in weight_error.errors(graph, DATA / "qwen2"))


@pytest.mark.slow
def test_norms_behind_the_branches(tmp_path):
    """OLMo 2's, whose checkpoint computes what LiteRT's interpreter gave for its graph."""
    llmjax.convert(unpacked("olmo2_w8", tmp_path), tmp_path / "out", to="llmjax")
    ours = llmjax.load(tmp_path / "out")
    assert np.abs(ours.logits([IDS])[0] - np.load(DATA / "olmo2_w8.npz")["logits"]).max() < 2e-5
    assert (ours.config.rms_norm_eps, ours.config.rope.theta, ours.config.num_key_value_heads) == (1e-5, 10000.0, 2)
    assert ours.stored()["int8"]


def test_a_convolution_has_its_bias(tmp_path):
    """``model.layers.0.conv.conv`` of the checkpoint that the graph was made of."""
    source = GraphSource(unpacked("lfm2_zeros", tmp_path))
    bias, kernel = (source.read(f"layers.0.conv.conv.{name}") for name in ("bias", "weight"))
    assert bias.shape == (32,) and kernel.shape == (32, 1, 3)
    theirs = (0.0027776945, -0.31915283, -0.10912379, -0.26737341, -0.25403658)
    assert np.array_equal(bias[:5], np.float32(theirs))
    assert np.array_equal(kernel[1, 0], np.float32((0.26622897, 0.2891995, 0.83696878)))


def test_queries_without_a_rope_are_known_beside_a_single_key_head(tmp_path):
    """The exporter gives their product the name of another layer's attention, too, and the keys' product theirs; their
    scale is in their weight."""
    source = GraphSource(unpacked("smollm3_zeros", tmp_path))
    shapes = {name: source.spec(f"layers.2.self_attn.{name}.weight").shape for name in ("q_proj", "k_proj", "v_proj")}
    assert shapes == {"q_proj": (42, 42), "k_proj": (14, 42), "v_proj": (14, 42)}
    assert "layers.0.self_attn.weight" not in source.names()
    assert source.model.roles.steps["layers.2.self_attn.q_proj"].factor == 14**-0.5
    assert source.config["no_rope_layers"] == [1, 1, 0]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A graph whose norms hold 1 + w, and whose head is divided by a soft-cap; and the packed checkpoint of it."""
    folder = tmp_path_factory.mktemp("gemma")
    path = unpacked("gemma2_int4", folder)
    llmjax.convert(path, folder / "out", to="llmjax")
    return path, folder / "out"


@pytest.mark.slow
def test_what_was_folded_is_taken_out_again_and_integers_are_kept(gemma):
    path, out = gemma
    graph, ours = llmjax.load(path, numerics="reference"), llmjax.load(out)
    (theirs,), (logits,) = graph.logits([IDS]), ours.logits([IDS])
    assert np.abs(theirs - logits).max() < 2e-5
    config = json.loads((out / "config.json").read_text())
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (2.0, 3.0)
    assert (config["query_pre_attn_scalar"], config["sliding_window"], config["rms_norm_eps"]) == (20, 8, 1e-6)
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert all(kind == "float32" or kind.startswith("int4") for kind in ours.stored())
    step = graph.roles.steps["layers.1.mlp.up_proj"]
    packed = graph.module.graphs["model"].constant(graph.roles.index, step.weight)
    mine = ours.params["layers_1"]["mlp"]["up"]["weight"]
    assert np.array_equal(packed.values, mine.values) and np.array_equal(packed.scales, mine.scales)


def test_what_computes_something_else_is_not_written(tmp_path):
    path = unpacked("qwen2", tmp_path)
    data = bytearray(path.read_bytes())
    file = tflite.read(memoryview(data), str(path))
    graph = file.subgraphs[file.signatures["decode"].subgraph]
    # The scale of the queries, which the architecture fixes.
    scale = next(t for t in graph.tensors if t.shape == () and t.type == "FLOAT32" and is_scale(file, t))
    file.data(scale).view("<f4")[0] *= 2
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"compute\s+logits .* from the graph's .*nothing is written"):
        llmjax.convert(path, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_rotated_weights_are_told(tmp_path):
    """ai-edge-quantizer's ``hr`` recipes put products with Hadamard's matrix before those with weights."""
    path = unpacked("qwen2", tmp_path)
    data, matrix = bytearray(path.read_bytes()), np.float32([[1]])
    file = tflite.read(memoryview(data), str(path))
    graph = file.subgraphs[file.signatures["decode"].subgraph]
    products = (graph.tensors[op.inputs[1]] for op in graph.operators if op.name == "FULLY_CONNECTED")
    square = next(weight for weight in products if len(set(weight.shape)) == 1)
    while len(matrix) < square.shape[0]:
        matrix = np.kron(matrix, np.float32([[1, 1], [1, -1]]) / np.sqrt(np.float32(2)))
    file.data(square).view("<f4")[:] = matrix.reshape(-1)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="qwen2.tflite: its weights were rotated .by Hadamard's matrix. before"):
        llmjax.convert(path, tmp_path / "out", to="hf")


def test_what_was_folded_for_good_is_told(tmp_path):
    path = unpacked("qwen2", tmp_path)
    path.write_bytes(path.read_bytes().replace(b"models.qwen2.modeling_qwen2.", b"models.granite.modeling_gra."))
    with pytest.raises(ConfigError, match="made of granite, whose .* .residual_multiplier and logits_scaling are"):
        llmjax.convert(path, tmp_path / "out", to="hf")


def is_scale(file, tensor) -> bool:
    return file.is_constant(tensor) and abs(file.data(tensor).view("<f4")[0] - 8**-0.5) < 1e-6


@pytest.mark.parametrize(
    "rope",
    [
        Rope(10000.0, 16),
        Rope(500000.0, 64),
        Rope(1000000.0, 256, linear=8.0),
        Rope(500000.0, 64, llama3=Llama3Scaling(32.0, 1.0, 4.0, 8192)),
        Rope(5e6, 8),
    ],
)
def test_a_base_is_found_by_its_angles(rope):
    found = rope.frequencies()
    first = next(p for p, r in _ropes(found, rope.dims) if np.allclose(r.frequencies(), found, rtol=3e-6, atol=0))
    assert first["rope_theta"] == rope.theta
    assert first.get("factor", 1.0) == (rope.llama3.factor if rope.llama3 else rope.linear)


@pytest.mark.parametrize("name", ["gemma4.litertlm"])
def test_families_whose_names_are_not_known_say_so(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(lzma.decompress((DATA / f"{name}.xz").read_bytes()))
    with pytest.raises(llmjax.LlmjaxError, match="made of gemma4, whose weights llmjax cannot take out"):
        llmjax.convert(path, tmp_path / "out", to="hf")
