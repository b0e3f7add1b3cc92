"""Programs lowered for a GPU on a machine without one: what its compiler is given to compile.

As they are defined, for any: the kernels for NVIDIA's cards alone are in ``test_gpu_programs``.
"""

import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import TrainConfig, device
from llmjax.checkpoint.loading import with_numerics
from llmjax.lora.config import LoraConfig
from llmjax.models import pages
from llmjax.models.context import Context
from llmjax.numerics import resolve
from llmjax.products.defined import FEW, as_defined
from llmjax.quant.qtensor import dequantize
from llmjax.runtime.cache import _longer, make_cache
from llmjax.runtime.decode import BURST, decode
from llmjax.runtime.prefill import prefill, score_chunk
from llmjax.runtime.sampling import Knobs, draw
from llmjax.runtime.scoring import score_texts
from llmjax.runtime.state import empty_state
from llmjax.runtime.terms import NARROW, WIDE
from llmjax.training.adapter import new_adapter
from llmjax.training.batches import from_labels
from llmjax.training.step import Programs
from tests.tiny import random_model, slow
from tests.traced import equations
from tests.unit.test_quant import on_device, quantized
from tests.unit.test_stack import packed_model

SLOTS, CHUNK, BLOCK, PAGES = 5, 16, 16, 11
# Of what the CPU's library or compiler alone knows there is nothing; a GPU's own are these.
CALLS = {"cu_threefry2x32_ffi"}
# What products and gradients wait for on the CPU: the bits of a NaN that no arithmetic makes.
NEVER = 0x7FC1_2345
PROFILES = ("reference", "hf", "fast", "dynamic_int8")
KINDS = ("float32", "bfloat16", "int8", "int8-asym", "int4", "int4-g32")
QUICK = {
    ("decode", "int8", "fast"),
    ("decode", "int4-g32", "reference"),
    ("prefill", "bfloat16", "reference"),
    ("prefill", "int4-g32", "fast"),
    ("score_texts", "int8", "hf"),
}
CASES = [
    (program, kind, profile) if (program, kind, profile) in QUICK else slow(program, kind, profile)
    for program in ("decode", "prefill", "score_chunk", "score_texts")
    for kind in KINDS
    for profile in PROFILES
    if profile != "dynamic_int8" or kind.startswith("int")
]


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    monkeypatch.setattr(device, "knows_cuda", lambda: False)


@functools.cache
def model_of(kind, profile):
    if kind.startswith("int"):
        return with_numerics(packed_model(kind, (None,)), profile)
    return random_model(profile, kind, num_hidden_layers=1)


@functools.cache
def program_of(name, kind, profile):
    """A program of the engine, its arguments as shapes, and which of them are the weights and the state."""
    model = model_of(kind, profile)
    c, numerics = model.config, model.numerics
    params = jax.eval_shape(lambda: model.params)
    pages = partial(make_cache, c, numerics, PAGES, 2 * BLOCK)
    state = jax.eval_shape(lambda: empty_state(pages(), SLOTS, 128, c.vocab_size))
    table, zero = np.zeros((SLOTS, 4), np.int32), np.int32(0)
    ids = np.zeros((1, CHUNK), np.int32)
    static = (model.module, numerics)
    if name == "decode":
        step = (table, np.full((SLOTS, BURST), -1, np.int32), np.ones(SLOTS, np.bool_), np.int32(1), np.False_)
        return partial(decode, *static, BLOCK, None), (params, state, *step), state
    if name == "prefill":
        first = jax.eval_shape(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), state.replace(cache=None))
        )
        terms = ({n: getattr(first, n) for n in names} for names in (WIDE, NARROW))
        rest = (*terms, ids, zero, table[0], zero, zero, zero, np.False_)
        return partial(prefill, *static, BLOCK), (params, state, *rest), state
    if name == "score_chunk":
        rest = (ids, ids[0], table[0], zero, zero, np.False_, zero)
        return partial(score_chunk, *static, BLOCK), (params, state, *rest), state
    texts = np.zeros((2, 8), np.int32)
    return partial(score_texts, *static), (params, texts, texts, np.ones(2, np.int32), np.zeros(2, np.int32)), None


def lowered(traced):
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def check_text(text):
    """No call that is the CPU's, none of its tricks, and no TF32."""
    assert str(NEVER) not in text
    calls = set(re.findall(r"custom_call @([\w.]+)", text)) - CALLS
    assert not calls, calls
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    tf32 = [line.strip() for line in dots if "xbf16>" not in line and "precision = [HIGHEST, HIGHEST]" not in line]
    assert not tf32, tf32
    return dots


def check_scatters(eqns):
    """None whose result depends on which thread comes first, for those become loops."""
    for eqn, _ in eqns:
        if eqn.primitive.name == "scatter":
            places = eqn.invars[1].aval.shape[:-1]
            assert eqn.params["unique_indices"] or np.prod(places) == 1, eqn


def check_weights(eqns, dtype):
    """A weight is looked up in, multiplied with as it is, or waits with what it is multiplied with; nothing that is
    made of it is larger than it, or of a wider dtype than the product's."""
    used = [(eqn, hit) for eqn, hit in eqns if hit]
    assert used
    for eqn, hit in used:
        name = eqn.primitive.name
        if name == "dot_general":
            assert all(v.aval.dtype == dtype for v in hit), eqn
        else:
            assert name == "gather" or (name == "optimization_barrier" and len(eqn.invars) > len(hit)), eqn
    most = max(np.prod(v.aval.shape) for _, hit in used for v in hit if v.aval.dtype != jnp.uint8)
    made = [v for eqn, _ in eqns if eqn.primitive.name == "convert_element_type" for v in eqn.outvars]
    assert max((np.prod(v.aval.shape) for v in made), default=0) <= 2 * most  # packed ones are half as wide


@pytest.mark.parametrize(("name", "kind", "profile"), CASES)
def test_a_program_for_a_gpu(name, kind, profile):
    function, args, state = program_of(name, kind, profile)
    numerics = model_of(kind, profile).numerics
    traced = jax.jit(function, donate_argnums=() if state is None else 1).trace(*args)
    eqns = equations(traced.jaxpr, len(jax.tree.leaves(args[0])))
    check_scatters(eqns)
    check_weights(eqns, numerics.products)
    text = lowered(traced)
    dots = check_text(text)
    # Every buffer of the state is written where it stands.
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(state))
    in_bfloat16 = [line for line in dots if "xbf16>" in line]
    if profile == "reference":
        assert not in_bfloat16
    elif profile in ("fast", "dynamic_int8") and kind.startswith("int"):
        assert len(in_bfloat16) >= 7  # the layers' products, all of them


def test_a_draw_for_a_gpu_has_no_branch_or_loop_for_a_row():
    """A GPU's host must wait for what decides: once for all rows, and nothing is called back or sent."""
    rows, vocab = 5, 700
    f, i = (jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.float32, jnp.int32))
    knobs = Knobs(f, i, f, f, jax.ShapeDtypeStruct((rows, 2), jnp.uint32))
    traced = jax.jit(draw).trace(jax.ShapeDtypeStruct((rows, vocab), jnp.float32), knobs, i)
    check_text(lowered(traced))
    names = {p: [eqn.primitive.name for eqn, _ in equations(traced.jaxpr, 0, p)] for p in ("cuda", "cpu")}
    assert not {"while", "scan", "pure_callback", "io_callback", "device_put"} & set(names["cuda"])
    assert "scan" in names["cpu"]


def test_a_cache_that_grows_holds_no_other():
    buffer = jax.ShapeDtypeStruct((PAGES, 2, 32, 8), jnp.float32)
    text = lowered(_longer.trace(buffer, 1, 4))
    check_text(text)
    assert "tensor<15x2x32x8xf32>" in text and "stablehlo.concatenate" not in text


@pytest.mark.parametrize("name", ["k", "v"])
def test_a_prompts_pages_are_written_at_once(name, monkeypatch):
    page, table = 8, np.array([[5, 1, 6, 3, 0, 2]], np.int32)
    ctx = Context(np.arange(16, 40, dtype=np.int32)[None], resolve("fast", jnp.dtype(jnp.float32)), 4, table)
    cache = np.zeros(pages.shape(name, 7, 2, 4, page), np.float32)
    new = np.arange(1, 193, dtype=np.float32).reshape(1, 24, 2, 4)
    write = partial(pages.written, name=name)
    text = lowered(jax.jit(write).trace(cache, new=new, ctx=ctx))
    assert text.count('"stablehlo.scatter"(') == 1 and "dynamic_update_slice" not in text
    for t, position in enumerate(range(16, 40)):
        at = table[0, position // page], slice(None), *([] if name == "k" else [slice(None)]), position % page
        cache[at] = new[0, t]
    empty = jnp.zeros_like(cache)
    np.testing.assert_array_equal(jax.jit(write)(empty, new=new, ctx=ctx), cache)
    monkeypatch.setattr(pages, "by_device", lambda plain, cpu: plain)
    np.testing.assert_array_equal(write(empty, new=jnp.asarray(new), ctx=ctx), cache)


@pytest.mark.parametrize("kind", ["int8", slow("float32"), slow("bfloat16"), slow("int4-g32")])
@pytest.mark.parametrize("recompute", [slow("all"), "cheap", slow("nothing")])
def test_gradients_for_a_gpu(kind, recompute):
    """The way back converts a weight again, one at a time, and no frozen one has a gradient."""
    model = model_of(kind, "reference")
    adapter = new_adapter(model, LoraConfig(rank=2, alpha=4, dora=True, target_modules=("q_proj", "down_proj")))
    programs = Programs(model, adapter.targets, TrainConfig(rank=2, recompute=recompute))
    batch = from_labels(*(np.ones((2, 5), np.int32),) * 2).arrays()
    args = (jax.eval_shape(lambda: model.params), adapter.factors, batch, jnp.float32(1), jax.random.key(0))
    traced = programs._gradients.trace(*args)
    check_text(lowered(traced))
    check_scatters(equations(traced.jaxpr))
    found, _ = traced.out_info
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, adapter.factors)


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
@pytest.mark.parametrize("scheme", [slow("int4-g32"), "int4", slow("int8"), slow("int8-asym"), slow("int8-g32")])
def test_what_a_gpu_computes_is_the_product(scheme, rows):
    """Its formulas, run here: weight-only as near as float32, and what 8 bits of activations mean."""
    rng = np.random.default_rng(0)
    q = quantized(rng.standard_normal((30, 512)).astype(np.float32), scheme)
    x = rng.standard_normal((rows, 512)).astype(np.float32) * np.exp(rng.standard_normal((rows, 1))).astype(np.float32)
    w = np.asarray(dequantize(q), np.float64)
    numerics = [resolve(profile, jnp.dtype(jnp.float32)) for profile in ("reference", "fast", "dynamic_int8")]
    q = on_device(q)
    found = jax.jit(lambda x, q: [as_defined(n, x, q) for n in numerics])(x, q)
    in_bfloat16 = jnp.asarray(x, jnp.bfloat16)
    hf = partial(as_defined, resolve("hf", in_bfloat16.dtype))
    found.append(jax.jit(hf)(in_bfloat16, q))
    dots = [e for e, _ in equations(jax.jit(hf).trace(in_bfloat16, q).jaxpr) if e.primitive.name == "dot_general"]
    assert all(v.aval.dtype == jnp.bfloat16 for e in dots for v in e.invars) and bool(dots) == (rows > FEW)
    top = np.abs(x).max(1, keepdims=True)
    rounded = np.round(x * (127 / top)).astype(np.float64) * (top * np.float32(1 / 127))
    given = (x, x, rounded, np.asarray(in_bfloat16, np.float64))
    errors = [np.abs(y - of @ w.T).max(1) / np.abs(of @ w.T).max(1) for y, of in zip(found, given, strict=True)]
    reference, fast, dynamic, one_piece = np.max(errors, 1)
    assert reference < 2e-6
    assert max(fast, one_piece) < (2e-6 if scheme in ("int8", "int4") or rows <= FEW else 1e-5)
    assert dynamic < 1e-5


def test_few_rows_read_a_packed_weight_in_a_sum():
    """There is no product that it would be unpacked for, in memory."""
    q = quantized(np.ones((30, 512), np.float32), "int4-g32")
    for profile in ("reference", "fast", "dynamic_int8"):
        function = partial(as_defined, resolve(profile, jnp.dtype(jnp.float32)))
        traced = jax.jit(function).trace(jax.ShapeDtypeStruct((FEW, 512), jnp.float32), on_device(q))
        names = [eqn.primitive.name for eqn, _ in equations(traced.jaxpr)]
        assert "dot_general" not in names and names.count("reduce_sum") == FEW


@pytest.mark.parametrize("name", ["k", "v"])
def test_one_row_is_written_in_place(name):
    """As several rows are; at rest it leaves all there is as it is, and nobody's page zero."""
    page, table = 8, np.array([[5, 1, 6, 3]], np.int32)
    cache = np.random.default_rng(0).normal(size=pages.shape(name, 7, 2, 4, page)).astype(np.float32)
    cache[0] = 0
    new = np.arange(1, 9, dtype=np.float32).reshape(1, 1, 2, 4)
    numerics = resolve("fast", jnp.dtype(jnp.float32))
    write = jax.jit(partial(pages.written, name=name))
    for active in (True, False):
        ctx = Context(np.array([[17]], np.int32), numerics, 4, table, active=np.array([active]))
        wanted = cache.copy()
        if active:
            wanted[(6, slice(None), 1) if name == "k" else (6, slice(None), slice(None), 1)] = new[0, 0]
        np.testing.assert_array_equal(write(jnp.asarray(cache), new=new, ctx=ctx), wanted)
    text = lowered(write.trace(cache, new=new, ctx=ctx))
    assert "dynamic_update_slice" in text and "scatter" not in text
