"""Op graphs in ``compare``: an export is proven right by the checkpoint it was made of (``qwen2`` and, made of it by
litert-torch 0.10.0, ``qwen2.tflite``), and what is wrong in it is named."""

import lzma
from pathlib import Path

import numpy as np
import pytest

import llmjax
from converters.readers.litert import tflite
from llmjax.litert import loading
from llmjax.litert.module import MAIN

DATA = Path(__file__).parents[1] / "data" / "litert"
IDS = [7, 290, 13, 101, 55, 4, 250, 18]


@pytest.fixture(scope="module")
def source():
    return llmjax.load(DATA / "qwen2")


def graph(change=None):
    """The float export, with constants changed in place."""
    path = DATA / "qwen2.tflite.xz"
    file = tflite.read(memoryview(bytearray(lzma.decompress(path.read_bytes()))), str(path))
    model = loading.model_of({MAIN: file}, path)
    if change is None:
        return model
    change(file, model.roles)
    return loading.model_of({MAIN: file}, path)


@pytest.fixture(scope="module")
def export():
    return graph()


def test_names_in_the_file_are_mapped_to_ours(source, export):
    roles = export.roles
    constants = {f"{m}.weight": s.weight for m, s in roles.steps.items()} | {"embed_tokens.weight": roles.table}
    stored = {tensor: roles.file.data(roles.graph.tensors[tensor]).view("<f4") for tensor in constants.values()}
    params = source.params["layers_1"]
    expected = {
        "embed_tokens": source.params["embed"],
        "lm_head": source.params["embed"],
        "norm": source.params["final_norm"],
        "layers.1.input_layernorm": params["attn_norm"],
        "layers.1.post_attention_layernorm": params["mlp_norm"],
        **{f"layers.1.self_attn.{n}_proj": params["attn"][n] for n in "qkvo"},
        **{f"layers.1.mlp.{n}_proj": params["mlp"][n] for n in ("gate", "up", "down")},
    }
    for module, found in expected.items():
        assert np.array_equal(stored[constants[f"{module}.weight"]], np.asarray(found["weight"]).reshape(-1)), module
    assert len(constants) == 2 * 9 + 3 and roles.layers == 2
    attention = roles.attentions["layers.1.self_attn"]
    assert attention.scale == pytest.approx(8**-0.5) and (attention.softcap, attention.window) == (None, None)


def test_an_export_is_proven_right(source, export):
    report = llmjax.compare(source, export, token_ids=IDS)
    assert (report.verdict, report.explained_by) == ("equivalent", "float32")
    assert report.coverage["taps"] == report.coverage["of"] and not report.coverage["missing"]
    assert report.logits["max_abs_logprob"] < 5e-5 and report.logits["flips"] == 0


@pytest.mark.slow
def test_one_weight_changed_is_named(source):
    def change(file, roles):
        weight = roles.graph.tensors[roles.steps["layers.1.mlp.up_proj"].weight]
        file.data(weight).view("<f4").reshape(weight.shape)[5] *= 1.1

    report = llmjax.compare(source, graph(change), token_ids=IDS)
    assert report.verdict == "different"
    (fault,) = report.faults
    assert (fault["module"], fault["causes"][0]["cause"]) == ("layers.1.mlp.up", "weight")


@pytest.mark.slow
def test_a_trace_of_a_graph_compares_without_it(source, export, tmp_path):
    llmjax.trace(export, IDS, "*").save(tmp_path / "trace")
    report = llmjax.compare(source, tmp_path / "trace")
    assert (report.verdict, report.explained_by) == ("equivalent", "float32")
    # All but the scores: they hold the places behind the text, too.
    assert report.coverage["missing"] == ["layers.0.attn.probs", "layers.1.attn.probs"]


@pytest.mark.slow
def test_a_graph_may_be_the_reference(source, export, tmp_path):
    assert llmjax.compare(export, source, token_ids=IDS).verdict == "equivalent"
    llmjax.trace(export, IDS, "*_proj*").save(tmp_path / "trace")
    report = llmjax.compare(export, tmp_path / "trace")
    assert report.verdict == "identical" and report.coverage["taps"] > 14
