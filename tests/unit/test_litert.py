"""Op graphs: their numbers are those of LiteRT's interpreter (``tests/data/litert``, made by ai-edge-litert 2.3.0 with
its default delegate and by LiteRT-LM 0.18.1), and files that cannot be trusted cost one line."""

import dataclasses
import functools
import json
import lzma
import pickle
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import llmjax
from converters.readers.litert import tflite
from converters.readers.litert.tflite import Operator
from converters.readers.mediapipe.package import Package
from llmjax.errors import CheckpointError, ConfigError, LlmjaxError, RequestError
from llmjax.litert import loading, ports, products
from llmjax.litert.graph import Graph, numerics_for, problems_of
from llmjax.litert.kernels import KERNELS
from llmjax.litert.model import cuts
from llmjax.quant.qtensor import QTensor, pack
from llmjax.runtime.asking import Asking
from tests.tiny import slow

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "litert"
sys.path.insert(0, str(ROOT / "scripts"))
from mutate_litert import mutations, outcome  # noqa: E402


def unpacked(name: str, folder: Path) -> Path:
    path = folder / name
    path.write_bytes(lzma.decompress((DATA / f"{name}.xz").read_bytes()))
    return path


@pytest.fixture(scope="module")
def stored():
    return dict(np.load(DATA / "qwen2_int4.npz"))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return unpacked("qwen2_int4.tflite", tmp_path_factory.mktemp("litert"))


@pytest.fixture(scope="module")
def model(file):
    return llmjax.load(file)


@pytest.fixture(scope="module")
def ops():
    return dict(np.load(DATA / "ops.npz"))


def op(ops, name: str, numerics: str | None = None) -> Graph:
    return Graph(tflite.read(memoryview(ops[f"{name}/model"].tobytes()), name), numerics_for(numerics))


def run(graph: Graph, ops, name: str):
    inputs = {key.split("/")[-1]: value for key, value in ops.items() if key.startswith(f"{name}/in/")}
    outputs, _ = graph.run("main" if "main" in graph.signatures else next(iter(graph.signatures)), inputs)
    return outputs["y"], ops[f"{name}/xnn1/y"]


@pytest.mark.parametrize(
    "name",
    "fc_i8 fc_i4 fc_i2 fc_i4b32f emb_i2 emb_i4b32f deq_fc_i4 deq_fc_i4_zeros deq_fc_u8 dus_-2 softmax_masked gelu_erf "
    "gather_nd hadamard attention attention_one_head attention_body".split(),  # the last the delegate does not take
)
def test_an_operator_is_that_of_the_runtime(ops, name):
    ours, theirs = run(op(ops, name), ops, name)
    assert np.abs(ours - theirs).max() <= 5e-7 * max(1, np.abs(theirs).max())


ROUNDS = dataclasses.replace(numerics_for(None), digits=1)

# Arguments where XNNPACK is farther from the exact function, and what it gives (ai-edge-litert 2.3.0, AVX-512).
APPROXIMATED = {
    "COS": ((8.0, 4.0, 4.110961), (-0.14549997, -0.6536434, -0.56582034)),
    "SIN": ((3.0, 3.4785054, 14.0), (0.1411201, -0.3305751, 0.9906072)),
    "TANH": ((4.206176, -3.4739516, -1.6903521), (0.9995557, -0.9980804, -0.9341919)),
    "EXP": ((5.3, 18.02, 17.31, -15.95, -90), (200.336868, 66986360, 32933424, 1.18305095e-07, 0)),
    "GELU by tanh": ((-3.7594442, -3.5894952, -3.851498), (-0.00021074756, -0.00043089647, -0.00014003598)),
    "GELU": ((-5.1782, -3.9309, -4.3333), (0, -0.00016600148, -3.2156458e-05)),
    "LOG": ((0.97, 1.25, 7.5, 0.0078125), (-0.0304591171, 0.223143533, 2.01490307, -4.85203028)),
    "POW 5": ((0.92000008, 1.29000008, 1.66000009), (0.659081757, 3.57230616, 12.6049328)),
    "LOGISTIC": ((5.27199984, 2.68400002, 2.65199995, -90), (0.994892895, 0.936075866, 0.934134126, 0)),
    "RSQRT": ((15.9793816, 3.9690721, 3.95876288, 4), (0.25016126, 0.501944244, 0.502597451, 0.5)),
    "SQRT": ((13.6597939, 14.5876293, 4.03092766, 0), (3.69591546, 3.81937504, 2.00771689, 0)),
    "SUM": ([(i * 103 % 101 - 20) / 37 for i in range(71)], (41.3513489,)),
    "SOFTMAX": ((-0.87, -1.47, 0.5, 2.06), (0.0413021930, 0.0226671230, 0.1625386029, 0.7734921575)),
    "MEAN": ([(i * 103 % 101 - 20) / 37 for i in range(71)], (0.582413375,)),
    "MEAN of squares": ([(i * 137 % 211 - 90) / 53 for i in range(232)], (1.41166186,)),
}


@pytest.mark.parametrize("name", APPROXIMATED)
def test_functions_before_rounded_activations_are_the_runtimes(name):
    x, theirs = (np.array(values, np.float32) for values in APPROXIMATED[name])
    op = types.SimpleNamespace(options={"approximate": "tanh" in name, "beta": 1.0, "keep_dims": True})
    tensors = [types.SimpleNamespace(shape=theirs.shape)]
    more = [np.array([0])] if name.startswith(("MEAN", "SUM")) else []
    more += [np.array([5], np.float32)] if name == "POW 5" else []

    def found(digits):
        numerics = dataclasses.replace(numerics_for(None), digits=digits)
        kernel = KERNELS[name.split()[0]]
        square = functools.partial(KERNELS["MUL"], Operator("MUL", (0, 0), (1,), {"activation": 0}), out=[])

        def computed(x):
            given = square([x, x], numerics=numerics) if "squares" in name else x
            return kernel(op, [given, *more], tensors, numerics)

        return np.asarray(jax.jit(computed)(x))

    assert np.abs(found(1) - theirs).max() < 2e-8
    assert np.abs(found(None) - theirs).max() > 5e-8  # exact where nothing is rounded behind them


def test_an_exponential_at_its_ends():
    x = np.array([88.5, np.inf, -np.inf, np.nan], np.float32)
    assert KERNELS["EXP"](types.SimpleNamespace(options={}), [x], [], ROUNDS).tolist() == [np.inf, np.inf, 0, 0]


def test_exponents_of_their_own_and_those_that_are_not_whole_are_powers():
    x, op = np.float32([0.92, 1.29, 1.66]), types.SimpleNamespace(options={})
    for exponent in (np.float32([1.3]), np.float32([5, 5, 5]), np.float32([-3]), np.float32([0])):
        assert np.array_equal(KERNELS["POW"](op, [x, exponent], [], ROUNDS), jax.numpy.power(x, exponent))


# Shape, dimensions, what is added up, and ai-edge-litert 2.3.0's sums (AVX-512).
ADDED_UP = {
    "columns": ((40, 3), (0,), (25.7026997, 27.8648663, 27.2972965)),
    "two dimensions": ((2, 3, 25), (1, 2), (43.9459457, 75.0270309)),
    "squares in columns": ((40, 3), (0,), (42.1365929, 45.0321465, 43.661068)),
    "means of squares": (
        (9, 25),
        (1,),
        (0.16362308, 2.28195763, 0.332622319, 2.20379829, 0.323067933, 2.12709999, 0.489086896, 2.05186248, 0.47655228),
    ),
    "means of differences": ((4, 64), (1,), (0.769318819, 0.705097675, 0.909101546, 1.13925123)),
}


@pytest.mark.parametrize("name", ADDED_UP)
def test_sums_before_rounded_activations_are_in_the_runtimes_order(name):
    shape, axes, theirs = ADDED_UP[name]
    x = ((np.arange(np.prod(shape)) * 103 % 101 - 20) / 37).astype(np.float32).reshape(shape)
    first = "SQUARED_DIFFERENCE" if "differences" in name else "MUL"
    op = Operator(first, (0, 1 if "differences" in name else 0), (2,), {"activation": 0, "keep_dims": True})
    tensors = [types.SimpleNamespace(shape=np.shape(theirs))]

    def computed(x):
        other = np.float32(0.3) if "differences" in name else x
        given = x if name in ("columns", "two dimensions") else KERNELS[first](op, [x, other], [], ROUNDS)
        return KERNELS["MEAN" if "means" in name else "SUM"](op, [given, np.array(axes)], tensors, ROUNDS)

    assert np.array_equal(jax.jit(computed)(x), np.float32(theirs))


def test_quotients_are_exact():
    """The compiler would multiply by the divisor's reciprocal."""
    x = (np.arange(1, 101) / 7).astype(np.float32)
    op = types.SimpleNamespace(options={})
    found = jax.jit(lambda x: KERNELS["DIV"](op, [x, np.float32(50)], [], numerics_for(None)))(x)
    assert np.array_equal(found, x / np.float32(50))


def test_a_product_is_rounded_before_another_operator_adds_to_it():
    """The compiler would make one rounding of both; XNNPACK's operators are two."""
    x, less = np.float32(1 + 2**-12), np.float32(-1 - 2**-11)
    op = types.SimpleNamespace(options={}, inputs=(0, 1))

    def both(x, less):
        return KERNELS["ADD"](op, [KERNELS["MUL"](op, [x, x], [], ROUNDS), less], [], ROUNDS)

    assert jax.jit(both)(x, less) == 0  # and not 2**-24
    assert jax.jit(both)(np.int32(3), np.int32(4)).dtype == np.int32


def test_a_block_as_long_as_a_row_has_its_scale_before_the_step():
    """ai-edge-litert 2.3.0's, of blocks of 64: to the bit, with a bias and without.  Taken for a channel's, the scale
    comes after the step of activations, and some of the last bits are others."""
    n = np.arange(4 * 64).reshape(4, 64) * 37 % 101 % 15 - 7
    scales = np.array([[0.01171875], [0.005859375], [0.0234375], [0.0078735351]], np.float16)
    x = ((np.arange(3 * 64).reshape(3, 64) * 53 % 97 - 30) / 29).astype(np.float32)
    bias = (np.array([3, -5, 7, 11]) / 13).astype(np.float32)
    weight = QTensor(pack(n + 8), scales, bits=4, zero=8)
    plain = (
        (-0.0956468731, 0.11296352, 1.07731676, 0.0132684242),
        (-0.556947291, -0.107175454, 0.155780941, 0.0205446556),
        (-0.544700801, -0.0901939645, -0.37109217, -0.0521825328),
    )
    added = (
        (0.135122359, -0.271651864, 1.61577833, 0.859422266),
        (-0.326178044, -0.491790861, 0.694242477, 0.866698503),
        (-0.313931584, -0.474809349, 0.167369395, 0.7939713),
    )
    assert np.array_equal(products.fully_connected(x, weight, None, ROUNDS), np.float32(plain))
    found = products.fully_connected(x, weight, bias, ROUNDS)
    assert np.abs(found - np.float32(added)).max() < 2e-7  # a processor may round before it adds


def test_a_product_with_a_weight_that_the_graph_computes_is_the_runtimes(ops):
    """Gemma 3n's mixing of streams: no product of XNNPACK's, which would round it once with what it is added to."""
    ours, theirs = run(op(ops, "fc_computed").under(ROUNDS), ops, "fc_computed")
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("rows", [2, 12])  # of a decode step, of a prefill
def test_rows_of_a_product_are_added_up_in_order(rows):
    """As ai-edge-litert 2.3.0 does."""
    x = ((np.arange(rows * 64).reshape(1, 1, rows, 64) * 53 % 97 - 48) / 29).astype(np.float32)
    y = ((np.arange(8 * 64).reshape(1, 1, 8, 64) * 71 % 103 - 51) / 31).astype(np.float32)
    theirs = {
        0: (4.642937, 6.942156, -7.944383, 2.94772, -2.0856507, 0.32814285, -0.12235769, -6.988876),
        1: (-3.5506089, 2.8198, -8.6829815, 6.6240253, -5.7953277, 0.34594062, 3.9666295, 0.8275857),
        11: (1.37152362, -7.65294695, 3.0289216, -4.73526096, -2.64627385, 6.88987732, -4.88431644, 6.48498249),
    }
    found = jax.jit(lambda x, y: products.batch_matmul(x, y, False, True, ROUNDS))(x, y)
    for row in theirs.keys() & range(rows):
        assert np.array_equal(found[0, 0, row], np.float32(theirs[row]))


def steps(*shape: int) -> np.ndarray:
    return ((np.arange(np.prod(shape)).reshape(shape) * 53 % 97 - 48) / 29).astype(np.float32)


@pytest.mark.parametrize("biased", [False, True])
def test_float_weights_beside_rounded_ones_are_added_up_in_order(biased):
    """As ai-edge-litert 2.3.0 does, from the bias on: to the bit, rows side by side, too."""
    x = steps(3, 96)
    weight = ((np.arange(5 * 96).reshape(5, 96) * 71 % 103 - 51) / 31).astype(np.float32)
    bias = (np.array([3, -5, 7, 11, 2]) / 13).astype(np.float32) if biased else None
    plain = (
        (5.26362801, 3.73971033, 2.90322614, 0.921023726, 1.23025668),
        (0.744159281, -4.52502823, 3.03782034, -2.68965578, -0.0533925965),
        (0.109009162, 4.15016651, -0.172413304, -7.70300341, -0.79755187),
    )
    added = (
        (5.49439669, 3.35509491, 3.44168758, 1.76717722, 1.38410223),
        (0.974928796, -4.9096427, 3.57628298, -1.84350204, 0.100453459),
        (0.339779407, 3.76555109, 0.366047323, -6.85685015, -0.64370656),
    )
    found = jax.vmap(lambda row: products.fully_connected(row[None], weight, bias, ROUNDS))(x)
    assert np.array_equal(found[:, 0], np.float32(added if biased else plain))


def test_a_float_filter_beside_rounded_weights_is_added_up_in_order():
    """As ai-edge-litert 2.3.0 does: column by column, from the bias on."""
    weight = ((np.arange(18).reshape(1, 3, 3, 2) * 71 % 103 - 51) / 31).astype(np.float32)
    bias = (np.array([3, -5]) / 13).astype(np.float32)
    theirs = (3.17070246, 0.695473552), (3.47659802, -1.70830822), (5.10729837, -1.31787467)
    options = dict.fromkeys(("stride_h", "stride_w", "dilation_h", "dilation_w"), 1) | {"padding": 0}
    found = jax.jit(lambda x: products.depthwise(x, weight, bias, options, ROUNDS))(steps(1, 4, 5, 2))
    assert np.array_equal(found[0, 1, :3], np.float32(theirs))


def test_a_filter_of_integers_rounds_as_the_runtimes_own_kernel():
    """ai-edge-litert 2.3.0's, whose delegate leaves it: a step that is no reciprocal, before the bias a rounding."""
    x = ((np.arange(6 * 4).reshape(1, 1, 6, 4) * 53 % 97 - 40) / 29).astype(np.float32)
    integers = (np.arange(12).reshape(1, 1, 3, 4) * 71 % 103 - 51).astype(np.int8)
    weight = products.Filter(integers, np.float32([0.01, 0.02, 0.03, 0.017]).reshape(1, 1, 1, 4))
    bias = (np.array([3, -5, 7, 11]) / 13).astype(np.float32)
    theirs = (
        (0.725738764, -1.32660329, 1.6334312, 0.871809006),
        (0.589187086, 0.495303422, 1.4844656, -1.0661912),
        (0.452635348, 0.643782139, 1.3355, 1.41574001),
        (0.31608364, -0.881167114, -2.93009853, 1.3981539),
    )
    options = dict.fromkeys(("stride_h", "stride_w", "dilation_h", "dilation_w"), 1) | {"padding": 1}
    found = jax.jit(lambda x: products.depthwise(x, weight, bias, options, ROUNDS))(x)
    assert np.array_equal(found[0, 0], np.float32(theirs))


def test_a_softmax_is_added_up_in_order():
    """As ai-edge-litert 2.3.0 does with AVX-512."""
    x = np.float32([i * i * 37 % 1009 / 1009 for i in range(130)])
    op = types.SimpleNamespace(options={"beta": 1.0})
    found = np.asarray(jax.jit(lambda x: KERNELS["SOFTMAX"](op, [x], [], ROUNDS))(x))
    assert np.array_equal(found[:4], np.float32([0.00433462486, 0.00449652551, 0.00501942169, 0.00602950389]))


def test_linear_attention_is_that_of_transformers():
    """``torch_recurrent_gated_delta_rule`` of transformers 5.23, two value heads to a key head."""
    q, k, v = steps(1, 1, 3, 2), steps(1, 1, 3, 2) * np.float32(0.5) + np.float32(0.1), steps(1, 3, 2, 2)
    beta, decay = 1 / (1 + np.exp(-steps(1, 3, 2))), -np.abs(steps(1, 3, 2))
    v, beta, decay = (np.moveaxis(x, 2, 1) for x in (v, beta, decay))
    op = Operator("CUSTOM:gated_delta_update", (), (), {})
    given = [q, k, v, beta, decay, steps(1, 2, 2, 2)]
    read, state = jax.jit(lambda x: KERNELS[op.name](op, x, [], numerics_for(None)))(given)
    theirs = (
        ((0.1147096753, -0.0030787382), (-0.2009918988, 0.1599579155), (-0.1586144418, 0.3558920324)),
        ((0.0840497315, -0.4106510878), (-0.4753015637, 0.5944873095), (-0.2492964566, -0.6764981747)),
    )
    left = (
        ((0.0743293166, -0.1836090684), (-0.1030408442, 0.2092433572)),
        ((0.0418569520, 0.4632342160), (-0.2597342730, -0.2487574816)),
    )
    assert np.abs(read[0] - np.float32(theirs)).max() < 5e-7 and np.abs(state[0] - np.float32(left)).max() < 5e-7


def test_what_a_sum_leaves_out_is_not_taken_away_again():
    x, axis = np.float32([1, 2, 3e9, np.inf]), np.array([0])
    for reverse, expected in ((False, [0, 1, 3, 3e9]), (True, [np.inf, np.inf, np.inf, 0])):
        op = types.SimpleNamespace(options={"exclusive": True, "reverse": reverse})
        assert np.array_equal(KERNELS["CUMSUM"](op, [x, axis], [], ROUNDS), np.float32(expected))


def test_an_end_may_count_from_the_beginning():
    op = types.SimpleNamespace(options=dict.fromkeys("ellipsis_mask new_axis_mask shrink_axis_mask".split(), 0))
    op.options |= {"begin_mask": 0, "end_mask": 0, "offset": True}
    found = KERNELS["STRIDED_SLICE"](op, [np.arange(5), *map(np.array, ([-3], [2], [1]))], [], ROUNDS)
    assert found.tolist() == [2, 3]


def test_a_fused_tanh_which_the_runtime_leaves_out_is_refused():
    op = types.SimpleNamespace(options={"activation": 4})
    with pytest.raises(ValueError, match="fused activation 4"):
        KERNELS["ADD"](op, [np.float32(1), np.float32(2)], [], ROUNDS)


def test_what_a_weight_cannot_be_is_refused(ops):
    """As by the delegate; what it leaves to other kernels; what was once read without its scales."""
    with pytest.raises(CheckpointError, match="tensor w: weights with zero points are supported where a DEQUANTIZE"):
        op(ops, "fc_i8_zeros")
    for name, changes, message in (
        ("deq_fc_u8", {"type": "INT16"}, "quantized INT16 is not supported"),
        ("deq_fc_u8", {"quantization": tflite.Quantization(np.ones(8), np.full(3, 7), 0)}, "zero points"),
        ("fc_i2", {"quantization": tflite.Quantization(np.ones(1), np.zeros(1), 0)}, "INT2 weights with one scale"),
    ):
        file = tflite.read(memoryview(ops[f"{name}/model"].tobytes()), "x")
        (graph,) = file.subgraphs
        changed = [t if t.quantization is None else dataclasses.replace(t, **changes) for t in graph.tensors]
        other = dataclasses.replace(file, subgraphs=(dataclasses.replace(graph, tensors=tuple(changed)),))
        with pytest.raises(CheckpointError, match=message):
            Graph(other, numerics_for(None))


def altered(ops, name: str, **changes) -> tflite.TfliteFile:
    """A file of one operator, its float tensors or, of those, its weights changed."""
    file = tflite.read(memoryview(ops[f"{name}/model"].tobytes()), name)
    (graph,) = file.subgraphs
    quantized = any(t.quantization for t in graph.tensors)
    tensors = [
        dataclasses.replace(t, **changes) if bool(t.quantization) == quantized and t.type != "INT32" else t
        for t in graph.tensors
    ]
    return dataclasses.replace(file, subgraphs=(dataclasses.replace(graph, tensors=tuple(tensors)),))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("fc_i4", {"shape": (8, 47)}, "INT4 weights of 47 inputs, which are no whole bytes"),
        ("fc_i2", {"shape": (8, 46)}, "INT2 weights of 46 inputs, which are no whole bytes"),
        ("emb_i2", {"shape": (8, 6)}, "INT2 rows of 6 are not supported"),
        ("deq_fc_i4", {"quantization": tflite.Quantization(None, np.zeros(0), 0, 32, 0)}, "a scale for each block"),
    ],
)
def test_weights_that_the_runtime_reads_otherwise_are_refused(ops, name, changes, message):
    """ai-edge-litert 2.3.0: rows that are no whole bytes reach another kernel, or begin at another nibble; DEQUANTIZE
    makes zeros of blocks.  Each was computed as others are."""
    file = altered(ops, name, **changes)
    assert any(message in problem for problem in problems_of(file, file.signatures))


def test_a_computed_bias_beside_quantized_weights_is_refused(ops):
    """The delegate leaves the product to a kernel that rounds activations in another way."""
    file = altered(ops, "fc_i8")
    (graph,) = file.subgraphs
    product = dataclasses.replace(graph.operators[0], inputs=(*graph.operators[0].inputs[:2], graph.inputs[0]))
    other = dataclasses.replace(file, subgraphs=(dataclasses.replace(graph, operators=(product,)),))
    assert problems_of(file, file.signatures) == []
    assert "a bias that the graph computes" in problems_of(other, file.signatures)[0]


def test_what_is_empty_may_be_computed(ops):
    """It was taken for a constant, since it needs no bytes, and so given twice."""
    file = altered(ops, "gelu_erf", shape=(0, 3), dims=(0, 3))
    graph = Graph(file, numerics_for(None))
    (signature,) = graph.signatures
    (name,) = graph.signatures[signature].inputs
    assert graph.run(signature, {name: np.zeros((0, 3), np.float32)})[0]["y"].shape == (0, 3)
    weight = QTensor(np.ones((4, 64), np.int8), np.ones((4, 1), np.float32))
    assert products.fully_connected(np.zeros((0, 64), np.float32), weight, None, ROUNDS).shape == (0, 4)


def test_a_single_index_may_be_left_to_the_mask():
    """ai-edge-litert 2.3.0: x[:, 0] of a mask over -1; the index was taken as it stood."""
    op = types.SimpleNamespace(options=dict.fromkeys("ellipsis_mask new_axis_mask end_mask offset".split(), 0))
    op.options |= {"begin_mask": 2, "shrink_axis_mask": 3}
    given = [np.arange(4).reshape(2, 2), *map(np.array, ([-1, -1], [0, 0], [1, 1]))]
    assert KERNELS["STRIDED_SLICE"](op, given, [], ROUNDS) == 2


def test_an_activation_behind_a_concatenation_which_the_runtime_leaves_out_is_refused():
    op = types.SimpleNamespace(options={"activation": 1, "axis": 0})
    with pytest.raises(ValueError, match="a fused activation, which LiteRT leaves out"):
        KERNELS["CONCATENATION"](op, [np.float32([-1]), np.float32([2])], [], ROUNDS)


@pytest.mark.parametrize("size", [0, 1, 3, 64, -2])
def test_a_rotation_by_no_matrix_is_refused(size):
    with pytest.raises(ValueError, match=f"hadamard_size {size} is no power of two that divides 48"):
        products.rotated(np.ones((2, 48), np.float32), size)


def test_numbers_that_do_not_fit_are_refused(ops):
    graph = op(ops, "emb_i2")
    name = next(iter(graph.signatures))
    inputs = {p: np.full(graph.tensor(name, p).shape, 2**32) for p in graph.signatures[name].inputs}
    with pytest.raises(RequestError, match="do not fit int32"):
        graph.run(name, inputs)


def test_reference_does_not_round_activations(ops):
    rounded, theirs = run(op(ops, "fc_i8"), ops, "fc_i8")
    plain, _ = run(op(ops, "fc_i8", "reference"), ops, "fc_i8")
    assert 1e-3 < np.abs(plain - theirs).max() / np.abs(theirs).max() < 0.02
    assert np.abs(rounded - theirs).max() < np.abs(plain - theirs).max() / 1000


@pytest.mark.parametrize(
    ("run", "ids", "length", "prefill"),
    [slow("s0", "ids/s0", 24, 16), ("s1", "ids/s1", 19, 11), slow("s2", "ids/s1", 12, 8)],
)
def test_logits_behind_prefill_are_those_of_the_runtime(model, stored, run, ids, length, prefill):
    with jax.disable_jit(True), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):  # of others
        (logits,) = model.logits([stored[ids][:length].tolist()], prefill=prefill)
    far = np.abs(logits - stored[f"xnn1/{run}/logits"]).max(1)
    assert far.shape == (length - prefill,)
    assert np.sort(far)[-3] <= 1e-5 and far.max() <= 0.1  # two roundings may go the other way


def test_a_graph_of_the_older_converter(tmp_path):
    """litert_torch/generative/examples 0.10.0: caches ``[1, C, K, H]``, no mask that is given, attention with a single
    key head whose body transposes it wrongly and the runtime does not look at."""
    model, stored = llmjax.load(unpacked("older.tflite", tmp_path)), np.load(DATA / "older.npz")
    assert (model.context_length, model.config.num_key_value_heads, model.config.head_dim) == (12, 1, 8)
    assert np.abs(model.logits([stored["ids"].tolist()], prefill=7)[0] - stored["logits"]).max() < 5e-5


def test_what_a_graph_says_of_itself(model, stored):
    assert (model.config.vocab_size, model.context_length, model.config.prefill_lengths) == (304, 64, (4, 16))
    assert model.tokenizer is None and model.numerics.label == "litert"
    with pytest.raises(RequestError, match="row 0: prefill: expected 0 to 3, its length, found 4"):
        model.logits([[1, 2, 3]], prefill=4)
    with pytest.raises(RequestError, match="row 0: 65 tokens, longer than the model's context of 64; shorten it$"):
        model.logits([[1] * 65])
    with pytest.raises(ConfigError, match="dtype, quantize: an op graph is run as it is"):
        llmjax.load(model.path, dtype="float32", quantize="int8")
    with pytest.raises(ConfigError, match="mediapipe_cpu is not about op graphs"):
        llmjax.load(model.path, numerics="mediapipe_cpu")
    with pytest.raises(TypeError, match="the model of a graph .* is not pickled; load it"):
        pickle.dumps(model)


def test_prompts_are_cut_as_litert_lm_cuts_them():
    assert cuts([4, 16], 16, 64) == [(16, 16)]
    assert cuts([4, 16], 8, 64) == [(4, 4), (4, 4)]
    assert cuts([4, 16], 11, 64) == [(16, 11)]
    assert cuts([4, 16], 35, 64) == [(16, 16), (16, 16), (4, 3)]
    assert cuts([16], 30, 31) == [(16, 16)]  # a second one would end beyond the caches
    assert cuts([], 5, 64) == []


@pytest.mark.slow
def test_rows_side_by_side_generate_what_each_does_alone(model, stored):
    llm = llmjax.LLM(model, max_batch=2)
    prompts = [stored["ids/s0"][:17].tolist(), stored["ids/s1"][:6].tolist()]
    greedy = llmjax.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    outputs = llm.generate(prompts, greedy)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids, taken = list(prompt), list(output.outputs[0].token_ids)
        (logits,) = model.logits([[*prompt, *taken[:-1]]], prefill=len(prompt) - 1)
        best = np.sort(logits, -1)
        sure = best[:, -1] - best[:, -2] > 0.1  # elsewhere a rounding may decide
        assert np.array_equal(logits.argmax(-1)[sure], np.array(taken)[sure]) and len(ids) == len(prompt)
    assert list(llm.generate(prompts[1], greedy)[0].outputs[0].token_ids) == list(outputs[1].outputs[0].token_ids)


def test_trace_gives_tensors_by_the_files_names(model, stored):
    ids = stored["ids/s0"][:3].tolist()
    trace = llmjax.trace(model, ids, ["*Qwen2DecoderLayer_1;", "decode_logits_output", "logits"])
    names = list(trace.activations)
    assert names[1:] == ["decode_logits_output", "logits"] and trace.activations[names[0]].shape == (3, 32)
    assert np.abs(trace.activations["logits"] - model.logits([ids])[0]).max() < 1e-4
    assert np.array_equal(trace.activations["decode_logits_output"], trace.activations["logits"])
    # Or by what they are: the same program.
    by_role = llmjax.trace(model, ids[:1], ["layers.1.resid", *names[1:]])
    assert list(by_role.activations) == names
    assert trace.manifest["numerics"] == "litert" and trace.manifest["token_ids"] == ids


def test_inspect_counts_operators_and_quantization(file):
    report = llmjax.inspect(file)
    (graph,) = report.graphs
    assert report.supported and report.format == "tflite"
    assert graph["kinds"]["FULLY_CONNECTED"] > 20 and graph["context"] == 64
    assert list(graph["quantization"]) == ["INT4 blocks of 32"]
    assert "supported: yes" in report.to_text()


def test_what_does_not_run_is_named_before_anything_runs(file):
    graph = tflite.read_file(file)
    decode = graph.subgraphs[graph.signatures["decode"].subgraph]
    place = next(i for i, o in enumerate(decode.operators) if o.name == "SOFTMAX")
    object.__setattr__(decode.operators[place], "name", "CUSTOM:mine")
    assert problems_of(graph, ["decode"]) == [f"decode: operator {place} (CUSTOM:mine) is not supported"]
    tensor = decode.tensors[decode.operators[place].outputs[0]]
    object.__setattr__(tensor, "quantization", tflite.Quantization(np.ones(1, np.float32), np.zeros(1, np.int64), 0))
    assert f"decode: operator {place} (CUSTOM:mine): static activations of FLOAT32" in problems_of(graph, ["decode"])[1]
    product = next(o for o in decode.operators if o.name == "FULLY_CONNECTED")  # as mixed precision exports them
    object.__setattr__(decode.tensors[product.outputs[0]], "type", "FLOAT16")
    assert any("(FULLY_CONNECTED): activations of FLOAT16" in problem for problem in problems_of(graph, ["decode"]))
    graph.signatures |= {"prefill_16_lora_r4": graph.signatures["decode"], "prefill_16": graph.signatures["prefill_4"]}
    assert [(p.name, p.length) for p in ports.read(graph)[0]] == [("prefill_16", 4)]  # the last of a length
    graph.signatures["decode"].inputs["local_mask"] = graph.signatures["decode"].inputs.pop("mask")
    with pytest.raises(CheckpointError, match=r"decode: input \d+ \(local_mask\): ring-buffer caches"):
        ports.read(graph)
    graph.signatures["decode_cache_32"] = graph.signatures.pop("decode")
    with pytest.raises(
        CheckpointError, match=r"of several lengths \(decode_cache_32\) and no decode .* one cache_length"
    ):
        loading.model_of({"model": graph}, file)


def test_a_graph_that_is_no_model_says_how_to_run_it(ops, tmp_path):
    path = tmp_path / "op.tflite"
    path.write_bytes(ops["fc_i8/model"].tobytes())
    with pytest.raises(CheckpointError, match="no signature decode.*open_graph"):
        llmjax.load(path)
    ours, theirs = run(loading.open_graph(path), ops, "fc_i8")
    assert np.abs(ours - theirs).max() <= 5e-7 * np.abs(theirs).max()


def survives(data: bytes, check: bool) -> None:
    try:
        file = tflite.read(memoryview(data), "x")
        if ports.is_language_model(file):
            ports.read(file)
        graph = Graph(file, numerics_for(None))
        if check:
            graph.check()
    except LlmjaxError as error:
        assert len(str(error)) < 4000


def fuzz(ops, file: Path, count: int) -> None:
    for name in ("fc_i4b32f", "dus_-2", "softmax_masked"):
        for data in mutations(ops[f"{name}/model"].tobytes(), count // 4, count):
            survives(data, check=True)
    # The tables alone: they stand before and behind the weights.
    for data in mutations(file.read_bytes(), count // 4, count):
        survives(data, check=False)


def test_mutated_files_cost_one_line(ops, file):
    fuzz(ops, file, 200)


@pytest.mark.slow
def test_many_mutated_files_cost_one_line_each(ops, file):
    fuzz(ops, file, 10_000)


@pytest.mark.parametrize("name", ["qwen2_int4.tflite", "gemma4.litertlm"])
def test_a_damaged_model_costs_one_line(name, tmp_path):
    for number, data in enumerate(mutations(lzma.decompress((DATA / f"{name}.xz").read_bytes()), 6, 1)):
        path = tmp_path / f"{number}.{name.split('.')[1]}"
        path.write_bytes(data)
        assert outcome(path) in ("error", "runs")


def test_a_tensor_that_two_operators_give_is_refused(file):
    graph = tflite.read_file(file)
    decode = graph.subgraphs[graph.signatures["decode"].subgraph]
    place = next(i for i, o in enumerate(decode.operators) if o.name == "RESHAPE")
    first = decode.operators[place]
    # Back to where it comes from: whoever walks up the graph would walk in a circle.
    object.__setattr__(decode, "operators", (*decode.operators, dataclasses.replace(first, outputs=first.inputs[:1])))
    assert "is given twice" in problems_of(graph, ["decode"])[0]


def test_a_signature_that_does_not_fit_its_graph_is_refused(file):
    graph = tflite.read_file(file)
    del graph.signatures["decode"].inputs["mask"]
    assert "decode: the signature lacks its graph's input" in problems_of(graph, ["decode"])[0]
    assert problems_of(graph, ["prefill_4"]) == []
    prefill = graph.signatures["prefill_4"]
    prefill.outputs["logits"] = prefill.inputs["mask"]
    assert "prefill_4: the signature has what is no output of its graph" in problems_of(graph, ["prefill_4"])[0]


def test_a_graph_says_that_it_has_no_derivative(model):
    ids = jax.numpy.array([[5, 9]])
    for transform in (jax.grad, lambda f, **kinds: jax.jit(jax.grad(f, **kinds))):
        with pytest.raises(LlmjaxError, match="differentiate that"):
            transform(lambda params: model.apply(params, ids).sum(), allow_int=True)(model.params)


def test_keys_are_told_from_values(model):
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.head_dim) == (2, 2, 8)
    # What linear attention carries along has as many dimensions, and cannot be gone back in.
    assert [ports.holds_tokens(f"kv_cache_{kind}_0", (1, 4, 16, 16)) for kind in "kvr"] == [True, True, False]


def test_a_graph_is_shown_in_a_line(model):
    assert repr(model).startswith(f"Model({str(model.path)!r}: litert, ")
    assert repr(model).endswith(f"a context of {model.context_length:,} tokens)") and len(repr(model)) < 300


@pytest.mark.slow
def test_suppressed_tokens_are_never_drawn(model, stored):
    prompt, greedy = stored["ids/s0"][:6].tolist(), llmjax.SamplingParams(temperature=0, max_tokens=1)
    best = np.argsort(model.logits([prompt])[0][-1])[::-1].tolist()
    barring = dataclasses.replace(model, generation_config={"suppress_tokens": best[:2]})
    (output,) = llmjax.LLM(barring, max_batch=1).generate(prompt, greedy)
    assert output.outputs[0].token_ids == [best[2]]


def test_suppressed_tokens_are_barred_in_every_request(model):
    barring = dataclasses.replace(model, generation_config={"suppress_tokens": [5, 7]})
    for config, barred in (("auto", ((5,), (7,))), ("none", ())):
        asking = Asking(barring, 0, (), False, config, {})
        assert asking.request([1, 2], llmjax.SamplingParams(temperature=0)).bad_words == barred
    odd = dataclasses.replace(model, generation_config={"suppress_tokens": [5, 304]})  # of 304 rows: never drawn
    asking = Asking(odd, 0, (), False, "auto", {})
    assert asking.request([1, 2], llmjax.SamplingParams(temperature=0)).bad_words == ((5,),)
    with pytest.raises(ConfigError, match=r"suppress_tokens: expected a list of token ids, found \[-1\]"):
        Asking(dataclasses.replace(model, generation_config={"suppress_tokens": [-1]}), 0, (), False, "auto", {})


def test_a_bundle_says_which_tokens_are_suppressed(tmp_path, monkeypatch):
    read = Package.metadata

    def metadata(package, part):
        found = read(package, part)
        found.suppress_tokens.ids[:] = [7, 9]
        return found

    monkeypatch.setattr(Package, "metadata", metadata)
    assert loading.load_graph(unpacked("gemma4.litertlm", tmp_path)).generation_config == {"suppress_tokens": [7, 9]}


def test_embedders_are_computed_as_the_graph_that_takes_what_they_give(tmp_path):
    """They round nothing themselves; but their products in another order are rounded the other way there."""
    model = llmjax.load(unpacked("gemma4.litertlm", tmp_path))
    for profile, digits in (("litert", 1), ("reference", None), ("litert", 1)):
        model = model.under(profile)
        assert {graph.numerics.digits for graph in model.module.graphs.values()} == {digits}


@pytest.mark.slow
def test_a_bundle_with_embedders_generates_and_scores_as_litert_lm_does(tmp_path):
    llm = llmjax.LLM(unpacked("gemma4.litertlm", tmp_path), max_batch=2)
    for wanted in json.loads((DATA / "gemma4.json").read_text()):
        greedy = llmjax.SamplingParams(temperature=0, ignore_eos=True, max_tokens=64)
        assert list(llm.generate(wanted["prompt"], greedy)[0].outputs[0].token_ids) == wanted["greedy"]
        score = llm.score(wanted["prompt"] + wanted["target"])[0].logprobs[len(wanted["prompt"]) :]
        assert np.abs(np.array(score) - wanted["token_scores_interpreter"]).max() < 0.1
    text = "".join(f"<{i}>" for i in (299, 180, 294))
    assert llm.tokenizer.encode(text) == [299, 180, 294] and llm.model.eos_ids == (3,)


@pytest.mark.slow
def test_scores_are_those_of_the_logits(model, stored):
    ids = stored["ids/s0"][:12].tolist()
    llm, (logits,) = llmjax.LLM(model, max_batch=1), model.logits([ids])
    expected = [row[i] - np.logaddexp.reduce(row) for row, i in zip(logits.astype(np.float64), ids[1:], strict=False)]
    for count in (12, 5):  # alone, and as one of several short texts
        found = llm.score(ids[:count])[0].logprobs[1:]
        assert np.abs(np.array(found) - expected[: count - 1]).max() < 1e-4
