"""Flax's own tools find in our models what they find in any: in any order, under jit, and nothing stays behind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import llmjax
from llmjax import LLM, SamplingParams
from llmjax.models import layers
from llmjax.models.context import Context
from llmjax.models.llama import Block, LlamaConfig
from llmjax.models.stack import STACKED, in_turn, stacked
from llmjax.runtime.cache import make_cache
from tests.tiny import random_model, slow
from tests.unit.test_stack import packed_model

MODEL = random_model()
CTX = Context(jnp.arange(5)[None], MODEL.numerics)
X = jax.random.normal(jax.random.key(7), (1, 5, 48))
KEYS = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


class Researched(nn.Module):
    """A block with all that a person may put into one."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, ctx):
        if self.is_mutable_collection("stats"):
            self.variable("stats", "seen", jnp.zeros, ()).value += jnp.mean(x)
        self.sow("intermediates", "entry", x)
        x = Block(self.config, None, self.config.rope, name="inner")(x, ctx)
        x = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)
        return self.perturb("exit", x)


class Model(nn.Module):
    """Two of them, in our loop or in the plain one of Flax's documentation."""

    config: LlamaConfig
    ours: bool

    @nn.compact
    def __call__(self, x, ctx):
        blocks = [Researched(self.config, name=f"layers_{i}") for i in range(2)]
        if self.ours:
            return in_turn(self, blocks, x, ctx)
        for block in blocks:
            x = block(x, ctx)
        return x


def without(path):
    """An interceptor that makes nothing of what a module returns."""

    def interceptor(next_function, args, kwargs, context):
        y = next_function(*args, **kwargs)
        return jnp.zeros_like(y) if context.module.path == path and context.method_name == "__call__" else y

    return interceptor


def intercepted(module, variables):
    with nn.intercept_methods(without(("layers_1", "inner", "attn"))):
        return module.apply(variables, X, CTX)


def slopes(module, variables):
    """By perturbations, the derivatives by what leaves each block."""

    def loss(perturbations):
        return jnp.sum(
            jnp.square(module.apply({"params": variables["params"], "perturbations": perturbations}, X, CTX))
        )

    return jax.grad(loss)(variables["perturbations"])


# By name: what is done with a module, and the collections it is given.
TOOLS = {
    "plain": (lambda m, v: m.apply(v, X, CTX), ["params"]),
    "intercepted": (intercepted, ["params"]),
    "sown": (lambda m, v: m.apply(v, X, CTX, mutable=["intermediates"]), ["params"]),
    "captured": (lambda m, v: m.apply(v, X, CTX, capture_intermediates=True), ["params"]),
    "dropped": (lambda m, v: m.apply(v, X, CTX, rngs={"dropout": KEYS["dropout"]}), ["params"]),
    "counted": (lambda m, v: m.apply(v, X, CTX, mutable=["stats"]), ["params", "stats"]),
    "perturbed": (slopes, ["params", "perturbations"]),
    "initialised": (lambda m, v: m.init(KEYS, X, CTX), []),
}


def use(tool, module, variables):
    function, given = TOOLS[tool]
    return jax.jit(lambda v: function(module, v))({name: variables[name] for name in given})


@pytest.fixture(scope="module")
def variables():
    return Model(MODEL.config, ours=False).init(KEYS, X, CTX)


@pytest.fixture(scope="module")
def expected(variables):
    """What Flax gives where nothing of ours is between."""
    results = {tool: use(tool, Model(MODEL.config, ours=False), variables) for tool in TOOLS}
    for tool in ("intercepted", "dropped"):
        assert not np.allclose(results["plain"], results[tool], rtol=1e-2)
    return results


def same(found, expected, tolerance=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


@pytest.mark.parametrize("order", [slow([*TOOLS, "plain"]), slow([*TOOLS][::-1])], ids=["forwards", "backwards"])
def test_a_tool_gives_what_flax_gives_whatever_came_before(expected, variables, order):
    ours = Model(MODEL.config, ours=True)
    for tool in order:
        same(use(tool, ours, variables), expected[tool])


@pytest.mark.parametrize("tool", [*map(slow, ("plain", "intercepted", "sown", "dropped", "perturbed"))])
def test_without_jit(expected, variables, tool):
    function, given = TOOLS[tool]
    same(function(Model(MODEL.config, ours=True), {name: variables[name] for name in given}), expected[tool])


def test_a_table_of_the_model_has_each_layer_under_its_name():
    ids = jnp.ones((1, 5), jnp.int32)
    paths = MODEL.module.module_paths(jax.random.key(0), ids, CTX)
    assert {"layers_0", "layers_1/attn/q", "layers_1/mlp", "final_norm"} <= set(paths)
    table = MODEL.module.tabulate(jax.random.key(0), ids, CTX, console_kwargs={"width": 400, "force_terminal": False})
    count = sum(x.size for x in jax.tree.leaves(MODEL.params))
    assert f"Total Parameters: {count:,}" in table
    assert "layers_1/attn/o" in table and "float32[48,48]" in table


def test_what_stands_in_a_functions_place_is_what_runs(monkeypatch):
    """A trace is kept no longer than the call that made it."""
    ids = jnp.array([[3, 1, 4]])
    before = jax.jit(lambda p: MODEL.apply(p, ids))(MODEL.params)
    nothing = {**MODEL.params}
    for name in ("layers_0", "layers_1"):
        layer = MODEL.params[name]
        attn = {**layer["attn"], "o": {"weight": jnp.zeros_like(layer["attn"]["o"]["weight"])}}
        nothing[name] = {**layer, "attn": attn}
    expected = jax.jit(lambda p: MODEL.apply(p, ids))(nothing)
    dense = layers.dense_attention
    with monkeypatch.context() as patch:
        patch.setattr(layers, "dense_attention", lambda q, *a: (jnp.zeros_like(q), dense(q, *a)[1]))
        same(jax.jit(lambda p: MODEL.apply(p, ids))(MODEL.params), expected)
    same(jax.jit(lambda p: MODEL.apply(p, ids))(MODEL.params), before)


def test_alike_layers_are_traced_once_in_plain_use(monkeypatch):
    """Eight layers of two kinds."""
    model = random_model(num_hidden_layers=8)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, windows=(2, None) * 4))
    traced = []
    dense = layers.dense_attention
    monkeypatch.setattr(layers, "dense_attention", lambda *a: traced.append(1) or dense(*a))
    jax.make_jaxpr(model.apply)(model.params, jnp.ones((1, 5), jnp.int32))
    assert len(traced) == 2


def without_attention(model, layer):
    """The model as ``without((layer, "attn"))`` computes it."""
    attn = model.params[layer]["attn"]
    o = jax.tree.map(lambda x: jnp.zeros_like(x) if x.dtype.kind == "f" else x, attn["o"])
    return dataclasses.replace(model, params={**model.params, layer: {**model.params[layer], "attn": {**attn, "o": o}}})


def answers(llm):
    """Tokens and log-probabilities of all that an engine does, prompts with a common beginning among it."""
    common = list(range(1, 20))
    rows = [r.outputs[0] for r in llm.generate([[5, 9, 2], common, [*common, 7]], GREEDY)]
    return [row.token_ids for row in rows], [
        [row.cumulative_logprob for row in rows],
        llm.score([5, 9, 2, 77])[0].logprobs[1:],
    ]


@pytest.fixture(scope="module", params=["float", slow("stacked")])
def engines(request):
    """Makes an engine; what it answers in plain use and without an attention, by other engines."""
    model = random_model("fast") if request.param == "float" else packed_model()

    def make(model=model):
        return LLM(model, max_batch=2, chunk=16, block=16)

    assert (STACKED in make().engine._params) == (request.param == "stacked")
    plain, changed = answers(make()), answers(make(without_attention(model, "layers_1")))
    assert plain[0] != changed[0]
    return make, plain, changed


@pytest.mark.parametrize("order", [slow((False, True, False)), slow((True, False))], ids=str)
def test_an_engine_is_intercepted_only_while_it_is(engines, order):
    make, plain, (tokens, logprobs) = engines
    llm = make()
    for watched in order:
        if not watched:
            assert answers(llm) == plain
            continue
        with nn.intercept_methods(without(("layers_1", "attn"))):
            found = answers(llm)
        assert found[0] == tokens
        same(found[1], logprobs, 2e-4)


@pytest.mark.parametrize("watched_first", [False, slow(True)])
def test_logits_and_traces_are_intercepted_only_while_they_are(watched_first):
    model = dataclasses.replace(MODEL)
    ids, name = [5, 9, 2, 77], "layers.1.resid"
    changed = without_attention(model, "layers_1")
    expected = {True: changed.logits([ids])[0], False: dataclasses.replace(model).logits([ids])[0]}
    residual = {True: llmjax.trace(changed, ids).activations[name], False: llmjax.trace(model, ids).activations[name]}
    assert not np.allclose(expected[True], expected[False], rtol=1e-2)
    for watched in (watched_first, not watched_first, watched_first):
        with nn.intercept_methods(without(("layers_1", "attn") if watched else ("none",))):
            same(model.logits([ids])[0], expected[watched])
            same(llmjax.trace(model, ids).activations[name], residual[watched])
        same(model.logits([ids])[0], expected[False])


def test_an_interceptor_that_changes_its_mind_is_heard():
    model = dataclasses.replace(MODEL)
    factor = 1.0

    def times(next_function, args, kwargs, context):
        y = next_function(*args, **kwargs)
        return y * factor if context.module.path == () else y

    once = model.logits([[5, 9]])[0]
    with nn.intercept_methods(times):
        for factor in (2.0, 3.0):
            same(model.logits([[5, 9]])[0], factor * once)


@pytest.mark.slow
def test_stacked_layers_are_seen_one_by_one():
    """What Flax captures, and the cache that comes about, is that of the layers apart."""
    model = packed_model(windows=(8, None) * 2)
    whole = stacked(model.params, model.config.period, 1, model.numerics)
    ids, table = jnp.arange(1, 11)[None], jnp.array([[1, 0]])
    ctx = Context(jnp.arange(10)[None], model.numerics, block=16, table=table)
    pages = dict(pages=2, page=16)

    @jax.jit
    def run(params, cache):
        variables = {"params": params, "cache": cache}
        return model.module.apply(variables, ids, ctx, mutable=["cache", "intermediates"], capture_intermediates=True)

    expected, made = run(model.params, make_cache(model.config, model.numerics, **pages))
    found, changed = run(whole, make_cache(model.config, model.numerics, **pages, stacked=True))
    same(found, expected, 1e-4)
    same(changed["intermediates"], made["intermediates"], 1e-4)
    for i in range(4):
        cut = slice(i // 2 * 2, i // 2 * 2 + 2)
        one = jax.tree.map(lambda x, cut=cut: x[cut], changed["cache"][STACKED][i % 2])
        same(one, made["cache"][f"layers_{i}"], 1e-4)
        assert np.abs(one["attn"]["k"]).max() > 0.1
