"""Graphs that are written compute what their models do, hold their weights as LiteRT's own tools would, and are the
same bytes every time."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest

import llmjax
from converters.litert.export import export_graph
from converters.litert.follow import GraphRuns
from converters.litert.graph import FLOAT32, File, Form, Graph, Weight
from converters.litert.weights import quantized
from converters.readers.litert import tflite
from llmjax import writing
from llmjax.errors import ConfigError, LlmjaxError
from llmjax.litert import ports
from llmjax.litert.graph import numerics_for, settled
from llmjax.litert.kernels import TYPES
from llmjax.litert.loading import open_graph
from llmjax.quant.qtensor import QTensor, dequantize
from tests import tiny
from tests.lite import HIDDEN, Lite
from tests.official import Operators
from tests.parity import golden
from tests.parity.test_cases import FOLDER as CASES
from tests.unit.test_litert import DATA, unpacked
from tests.unit.test_lora import by_hand, write_adapter

SIZES = {"context": 24, "prefill_lengths": (8,)}
# The context a rope was first trained for, which a graph cannot go beyond.
FIRST = {"llama_dynamic_old": 16, "phi35_mini_longrope": 16}
# Each with something that no other has.
QUICK = {"falcon_rw", "gemma2", "lfm2", "phi_gqa_qk_norm", "qwen3_moe"}
KINDS = sorted({*golden.NAMES, *(folder.name for folder in CASES.iterdir())} - {"qwen3_5_cond"})  # refused


def case(name, folder):
    """A checkpoint on disk, a text, transformers' logits of it, and how far off they may be."""
    if name in golden.NAMES:
        stored = golden.arrays(name)
        wanted = stored["logits_short"]
        return golden.write(name, folder), stored["short"], wanted, golden.TOLERANCE * np.abs(wanted).max()
    with np.load(CASES / name / "expected.npz") as file:
        of = ("short", "short_logits") if "short_logits" in file.files else ("ids", "logits")
        ids, wanted, far = file[of[0]], file[of[1]], float(file["atol"])
    if name in FIRST:  # the longer text's angles are others
        ids = ids[: FIRST[name]]
        (wanted,) = llmjax.load(CASES / name).logits([ids.tolist()])
    return CASES / name, ids, wanted, far


@pytest.mark.parametrize("name", tiny.some(QUICK, KINDS))
def test_logits_are_those_of_transformers(name, tmp_path):
    """Through prefills that are full and padded, then through decode, up to the last place of the caches."""
    path, ids, wanted, far = case(name, tmp_path / "hf")
    export_graph(path, tmp_path / "x.tflite", context=len(ids), prefill_lengths=(4,))
    lite = Lite(tmp_path / "x.tflite")
    ids = ids.tolist()
    for at, count in ((0, 4), (4, 3)):
        lite.feed(ids[at : at + count], at, 4)
    for at in range(7, len(ids)):
        assert np.abs(lite.feed(ids[at : at + 1], at, 1) - wanted[at]).max() <= far


def test_what_the_callers_mask_hides_is_not_seen(llama, tmp_path):
    """Though it stands before the token; and a row that sees nothing, as of padding, is no NaN."""
    export_graph(llama, tmp_path / "x.tflite", **SIZES)
    lite, found = Lite(tmp_path / "x.tflite"), []
    lite.feed([5, 6, 7, 8], 0, 8)
    assert all(np.isfinite(cache).all() for cache in lite.caches.values())
    for hidden, noise in ((True, 1.0), (True, 9.0), (False, 9.0)):
        mask = np.where(np.arange(24) <= 4, np.float32(0), np.float32(HIDDEN)).reshape(1, 1, 1, 24)
        mask[..., 2] = HIDDEN if hidden else 0
        caches = {name: cache.copy() for name, cache in lite.caches.items()}
        for name, cache in caches.items():
            cache[..., 2, :] += noise if "_k_" in name else 0
            cache[..., 2] += noise if "_v_" in name else 0
        ids, place = np.array([[9]], np.int32), np.array([4], np.int32)
        found.append(lite.run("decode", tokens=ids, input_pos=place, mask=mask, **caches)["logits"])
    assert np.array_equal(found[0], found[1]) and np.abs(found[2] - found[1]).max() > 0.1


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.checkpoint(
        tmp_path_factory.mktemp("llama"), hidden_size=64, intermediate_size=128, num_attention_heads=4
    )


def constants(path):
    """Of a file: by type, shape and bytes, each constant of few bits with its scales."""
    file = tflite.read_file(path)
    found = {}
    for graph in file.subgraphs:
        for t in graph.tensors:
            if (q := t.quantization) and file.is_constant(t):
                scales = q.scales if q.scales is not None else file.data(graph.tensors[q.scales_tensor])
                found[t.type, t.shape, file.data(t).tobytes(), scales.tobytes()] = t.name
    return found


def test_weights_in_blocks_are_those_of_the_quantizer_bit_for_bit(tmp_path):
    with pytest.warns(UserWarning, match="int4-g32 for the embedding"):
        export_graph(DATA / "qwen2", tmp_path / "x.tflite", quantize="int4-g32", **SIZES)
    theirs = constants(unpacked("qwen2_int4.tflite", tmp_path))
    assert len(theirs) == 15 and set(constants(tmp_path / "x.tflite")) == set(theirs)


def test_the_rule_of_quantizing():
    """ai-edge-quantizer's: scales of blocks are rounded before values are, and nothing is -8 or -128."""
    w = np.array([[-7.03, 3.5, 1.0, 0.0] * 8], np.float32)
    n, scales = quantized(w, Form("INT4", 32))
    step = np.float32(7.03 / 7).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert scales == step and n[0, :4].tolist() == [-7, 3, 1, 0]
    n, scales = quantized(w, Form("INT8"))
    assert scales == np.float32(7.03) / np.float32(127) and n[0, :4].tolist() == [-127, 63, 18, 0]
    assert not quantized(np.zeros((2, 4), np.float32), Form("INT8"))[0].any()


def test_the_same_bytes_every_time_and_every_weight_once(llama, tmp_path):
    written = [export_graph(llama, tmp_path / "a", quantize="int8", **SIZES)]
    with jax.enable_x64(True), jax.default_matmul_precision("bfloat16"), jax.numpy_rank_promotion("raise"):
        sizes = {"context": np.int64(24), "prefill_lengths": np.array([8, 8])}
        written.append(export_graph(llama, tmp_path / "b", quantize="int8", **sizes))
    first, second = ((tmp_path / name).read_bytes() for name in ("a", "b"))
    assert first == second and len(first) == written[0].size
    file = tflite.read_file(tmp_path / "a")
    assert list(file.signatures) == list(written[0].signatures) == ["prefill_8", "decode"]
    weights = [{t.name: t for t in graph.tensors if t.quantization} for graph in file.subgraphs]
    places = {t.buffer for graph in weights for t in graph.values()}
    assert len(places) == len(weights[1]) == 16 and weights[0].keys() <= weights[1].keys()
    assert "layers.1.mlp.down.weight" not in weights[0]  # what a prompt's last layer makes of it nobody asks for
    assert sum(len(file.data(t)) + 4 * t.shape[0] for t in weights[1].values()) < written[0].size < 2 * 136_000


def test_few_bits_stay_what_they_are(llama, tmp_path):
    llmjax.convert(llama, tmp_path / "packed", quantize={"attention": "int8", "feed_forward": "int4-g32"})
    export_graph(tmp_path / "packed", tmp_path / "x.tflite", **SIZES)
    params = llmjax.load(tmp_path / "packed").params
    file = tflite.read_file(tmp_path / "x.tflite")
    tensors = {t.name: t for t in file.subgraphs[1].tensors}
    attention = tensors["layers.0.attn.k.weight"]
    assert np.array_equal(file.data(attention).view(np.int8).reshape(attention.shape), np.asarray(attn(params).values))
    # Scales of blocks that LiteRT would round are none of its own.
    assert tensors["layers.0.mlp.up.weight"].type == "FLOAT32"
    up = np.asarray(dequantize(params["layers_0"]["mlp"]["up"]["weight"]))
    assert np.array_equal(file.data(tensors["layers.0.mlp.up.weight"]).view(np.float32).reshape(up.shape), up)


@pytest.mark.parametrize(
    "name, packed", [("qwen3_moe", True), tiny.slow("qwen3_moe", False), tiny.slow("gemma4_moe", False)]
)
def test_each_expert_has_scales_of_its_own(name, packed, tmp_path):
    """Whether the writer rounds it or it comes packed; in Gemma 4 two of them lie in one tensor."""
    path, experts = CASES / name, llmjax.load(CASES / name).params["layers_1"]["experts"]
    if packed:
        path = llmjax.convert(path, tmp_path / "packed", quantize="int8")
    export_graph(path, tmp_path / "x.tflite", quantize=None if packed else "int8", **SIZES)
    lite = Lite(tmp_path / "x.tflite")
    number = lite.file.signatures["decode"].subgraph
    tensors = {t.name: i for i, t in enumerate(lite.file.subgraphs[number].tensors)}
    for role in ("gate", "up", "down"):
        for i, w in enumerate(np.asarray(experts[role]["weight"], np.float32)):
            n, scales = quantized(w, Form("INT8"))
            found = lite.constant(number, tensors[f"layers.1.experts.{role}.weight.{i}"])
            assert np.array_equal(found, n.astype(np.float32) * scales)


def attn(params) -> QTensor:
    return params["layers_0"]["attn"]["k"]["weight"]


def leaves(params):
    """Arrays by place; of packed weights the values and the scales, float16's as float32."""
    found = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    return {place: x if x.dtype.kind in "iu" else x.astype(np.float32) for place, x in found.items()}


def test_what_was_written_is_had_back(llama, tmp_path):
    """Floats to the bit, few bits as they are; and the configuration, but for where it once was read from."""
    recipe = {"attention": "int8", "feed_forward": "int4-g32"}
    config = {**json.loads((llama / "config.json").read_text()), "_name_or_path": "a folder of mine"}
    export_graph(llama, tmp_path / "x.tflite", quantize=recipe, config=config, **SIZES)
    llmjax.convert(tmp_path / "x.tflite", tmp_path / "back")
    ours, source = llmjax.load(tmp_path / "back"), llmjax.load(llama)
    assert ours.config == source.config and ours.eos_ids == source.eos_ids
    assert b"a folder of mine" not in (tmp_path / "x.tflite").read_bytes()
    found, wanted, packed = leaves(ours.params), leaves(source.params), 0
    for place, x in wanted.items():
        if place in found:
            assert np.array_equal(found[place], x)
            continue
        packed += 1
        form = Form("INT8") if "attn" in place else Form("INT4", 32)
        n, scales = quantized(x, form)
        values = found[f"{place}.values"]
        values = values if form.bits == 8 else np.stack([values & 15, values >> 4], -1).reshape(n.shape).astype(int) - 8
        assert np.array_equal(values, n) and np.array_equal(found[f"{place}.scales"], scales.astype(np.float32))
    assert packed == 14


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_had_back(name, tmp_path):
    path = case(name, tmp_path / "hf")[0]
    export_graph(path, tmp_path / "x.tflite", context=16, prefill_lengths=(4,))
    llmjax.convert(tmp_path / "x.tflite", tmp_path / "back", to="hf")
    found, wanted = (leaves(llmjax.load(p).params) for p in (tmp_path / "back", path))
    assert found.keys() == wanted.keys() and all(np.array_equal(found[place], x) for place, x in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_proven_layer_by_layer(name, tmp_path):
    """And not in one piece: where the stream behind each layer stands, both sides know."""
    told: list[str] = []
    options = {"context": FIRST.get(name, 24), "prefill_lengths": [4], "verify": True, "announce": told.append}
    writing.convert(case(name, tmp_path / "hf")[0], tmp_path / "x.tflite", to="tflite", **options)
    assert told[-1].startswith("verdict: equivalent")
    file = tflite.read_file(tmp_path / "x.tflite")
    prefills, decode = ports.read(file)
    runs = GraphRuns(file, [*prefills, decode], settled(file, numerics_for("reference")))
    layers = sum(name.startswith("kv_cache_k") for name in decode.states)
    assert all(len(signature.parts) >= layers for signature in runs._signatures.values())


def test_a_damaged_record_is_one_line(llama, tmp_path):
    export_graph(llama, tmp_path / "x.tflite", **SIZES)
    data = (tmp_path / "x.tflite").read_bytes()
    for old, new in ((b'"shapes"', b'"shaped"'), (b'{"config"', b'["config"'), (b"[64]", b"[63]")):
        assert old in data
        (tmp_path / "y.tflite").write_bytes(data.replace(old, new))
        with pytest.raises(LlmjaxError) as error:
            llmjax.convert(tmp_path / "y.tflite", tmp_path / "back")
        assert "\n" not in str(error.value) and "y.tflite" in str(error.value)


def test_an_adapter_is_merged(llama, tmp_path):
    """Into floats, and into what is then quantized."""
    adapter = write_adapter(llama, tmp_path / "adapter")
    by_hand(llama, adapter, tmp_path / "merged", 5.0 / 3)
    for quantize in ("int8", None):
        for path, lora, name in ((llama, adapter, "a"), (tmp_path / "merged", None, "b")):
            export_graph(path, tmp_path / name, quantize=quantize, lora=lora, **SIZES)
        ours, wanted = (Lite(tmp_path / name) for name in ("a", "b"))
        far = [np.abs(a - b).max() for a, b in zip(ours.weights(), wanted.weights(), strict=True)]
        assert max(far) <= (2e-2 if quantize else 1e-6)  # a step of rounding, or float32's


def test_activations_that_are_not_rounded_meet_expanded_weights(llama, tmp_path):
    export_graph(llama, tmp_path / "x.tflite", quantize="int8", activations="float", **SIZES)
    graph = tflite.read_file(tmp_path / "x.tflite").subgraphs[1]
    products = [op for op in graph.operators if op.name == "FULLY_CONNECTED"]
    assert len(products) == 15 and all(graph.tensors[op.inputs[1]].type == "FLOAT32" for op in products)
    assert sum(op.name == "DEQUANTIZE" for op in graph.operators) == 15


WRONG = {
    "quantize: int8-asym: LiteRT has int8, int4, int4-g32, int4-g64": {"quantize": "int8-asym"},
    "quantize: int4-g128: LiteRT has": {"quantize": "int4-g128"},
    "quantize: int8-g32: LiteRT has": {"quantize": "int8-g32"},
    "activations: unknown 'int8'; expected one of dynamic-int8, float": {"activations": "int8"},
    "LiteRT expands weights of blocks to zeros": {"quantize": {"attention": "int4-g32"}, "activations": "float"},
    "context: expected 1 to 200 tokens, the model's own, found 201": {"context": 201},
    "context: expected 1 to 200 tokens, the model's own, found True": {"context": True},
    "prefill_lengths: expected numbers from 1 to the context, 24, found [8, 25]": {"prefill_lengths": [8, 25]},
    "prefill_lengths: expected numbers from 1 to the context, 24, found []": {"prefill_lengths": []},
    "prefill_lengths: expected numbers from 1 to the context, 24, found '8'": {"prefill_lengths": "8"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_one_line_and_no_file(message, llama, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        export_graph(llama, tmp_path / "x.tflite", **{**SIZES, **WRONG[message]})
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_layers_that_carry_a_state_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="layers carry a state from token to token"):
        export_graph(CASES / "qwen3_5_cond", tmp_path / "x.tflite", **SIZES)
    assert not list(tmp_path.iterdir())


def test_a_rope_that_follows_the_text_is_refused_beyond_its_first_context(tmp_path):
    with pytest.raises(ConfigError, match="context: 17: the model's rope changes"):
        export_graph(CASES / "phi35_mini_longrope", tmp_path / "x.tflite", context=17, prefill_lengths=(8,))


def test_weights_beyond_the_flatbuffer_begin_where_they_should_beyond_4_gigabytes():
    """Nothing of that size is written: places alone."""
    graph = Graph("decode")
    weights = {f"w{i}": Weight(f"w{i}", (1 << 15, 1 << 14), FLOAT32) for i in range(4)}
    ids = graph.input("ids", (1,), "INT32")
    for i, weight in enumerate(weights.values()):
        graph.outputs[f"y{i}"] = graph.op("EMBEDDING_LOOKUP", [ids, graph.weight(weight)], (1, 1 << 14))
    file = File([graph.pruned()], weights)
    places = [file.places[name][0] for name in weights]
    assert np.diff(places).tolist() == [1 << 31] * 3 and file.size == places[-1] + (1 << 31) > 8 << 30
    assert all(place.to_bytes(8, "little") in file.header() for place in places)


@pytest.mark.parametrize("quantize", [None, "int8", "mixed"])
def test_runs_in_litert(quantize, llama, tmp_path):
    """The official interpreter gives what ours gives for the same file."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="extra litert")
    recipe = {"attention": "int4-g32", "feed_forward": "int4", "embedding": "int8"} if quantize == "mixed" else quantize
    export_graph(llama, tmp_path / "x.tflite", quantize=recipe, **SIZES)
    decode = interpreter.Interpreter(str(tmp_path / "x.tflite"), num_threads=1).get_signature_runner("decode")
    inputs = {k: np.zeros(v["shape"], v["dtype"]) for k, v in decode.get_input_details().items()}
    inputs["tokens"][:] = 7
    inputs["mask"][..., 1:] = HIDDEN
    (ours,) = llmjax.load(tmp_path / "x.tflite").logits([[7]])
    assert np.abs(decode(**inputs)["logits"].reshape(1, -1) - ours).max() <= 5e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:quantize")
@pytest.mark.parametrize("quantize", ["int8", "int4-g32", "int4-g64"])
def test_each_operator_is_litert_s(quantize, llama, tmp_path):
    """From the official interpreter's own inputs: what is before it decides no rounding."""
    pytest.importorskip("ai_edge_litert.interpreter", reason="extra litert")
    export_graph(llama, tmp_path / "x.tflite", quantize=quantize, **SIZES)
    graph = open_graph(tmp_path / "x.tflite")
    tensors = {name: graph.tensor("decode", name) for name in graph.signatures["decode"].inputs}
    r = np.random.default_rng(0)
    inputs = {name: r.normal(size=t.shape).astype(TYPES[t.type]) for name, t in tensors.items()}
    inputs["tokens"][:], inputs["input_pos"][:] = 7, 20
    inputs["mask"][:] = np.where(np.arange(24) <= 20, 0, HIDDEN)
    found = Operators(tmp_path / "x.tflite", graph, "decode").distances(**inputs)
    # Root's reciprocal begins with an instruction that differs between processors, as do orders of sums.
    assert all(share <= 1e-6 for share in found.values()), found
