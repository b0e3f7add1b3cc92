"""Layers run in a loop over stacked weights: the same numbers as one after the other."""

import dataclasses
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import LLM, SamplingParams
from llmjax.models.stack import STACKED, stacked
from llmjax.numerics import GPU_STEP, resolve
from llmjax.quant.rounding import quantize
from llmjax.quant.schemes import Scheme
from llmjax.runtime import engine
from tests.programs import engine_programs
from tests.tiny import random_ids, random_model, slow

RNG = np.random.default_rng(5)
FULL = (None,) * 4
TWO = (None,) * 2
ALTERNATING = (8, None) * 2


def packed_model(scheme="int4-g32", windows=FULL, **others):
    """A model whose layers' weights are quantized; ``others`` names the scheme of single layers."""
    wide = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, max_position_embeddings=1024)
    model = random_model("fast", num_hidden_layers=len(windows), **wide)
    for name, layer in model.params.items():
        for role in layer.values() if name.startswith("layers_") else ():
            for projection in role.values() if isinstance(role, dict) else ():
                if isinstance(projection, dict):
                    w = np.asarray(projection["weight"])
                    kind = Scheme.parse(others.get(name, scheme))
                    q = quantize(lambda a, b, w=w: w[a:b], w.shape, kind, name)
                    projection["weight"] = jax.tree.map(jnp.asarray, q)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, windows=windows))


def outputs(model, prompts, **options):
    llm = LLM(model, max_batch=4, **options)
    return llm, *answers(llm, prompts)


def answers(llm, prompts):
    rows = [r.outputs[0] for r in llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0, logprobs=1))]
    return [row.token_ids for row in rows], np.array([row.cumulative_logprob for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("windows", [FULL, ALTERNATING])
def test_a_loop_computes_what_the_layers_do(monkeypatch, windows):
    """Prompts of one chunk and of several, one whose beginning is copied from another slot's cache."""
    model = packed_model(windows=windows)
    long = random_ids(RNG, 300)
    prompts = [random_ids(RNG, 5), long, long[:256] + [7], random_ids(RNG, 140)]
    llm, tokens, logprobs = outputs(model, prompts)
    assert len(llm.engine._params[STACKED]) == (2 if windows == ALTERNATING else 1)
    assert llm.engine.progress.reused_tokens == 256
    score = llm.score(long)[0].logprobs[1:]
    monkeypatch.setattr(engine, "stacked", lambda *_, **__: None)
    plain, expected, expected_logprobs = outputs(model, prompts)
    assert STACKED not in plain.engine._params
    assert tokens == expected
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=2e-4)
    np.testing.assert_allclose(score, plain.score(long)[0].logprobs[1:], atol=2e-4)


@pytest.mark.parametrize("scheme", ["int4-g32", slow("int4"), slow("int8")])
def test_rows_keep_their_bits_among_others(scheme):
    model = packed_model(scheme, windows=ALTERNATING)
    prompts = [random_ids(RNG, n) for n in (3, 130, 9, 40, 77)]
    llm, together, sums = outputs(model, prompts, enable_prefix_caching=False)
    for prompt, tokens, total in zip(prompts, together, sums, strict=True):
        [alone], [alone_total] = answers(llm, [prompt])
        assert alone == tokens and alone_total == total


@pytest.mark.parametrize(
    ("profile", "slots"), [slow("dynamic_int8", 1), slow("fast", 1), slow("fast", 2), slow("dynamic_int8", 2)]
)
def test_few_slots_of_8_bits_run_in_a_loop(monkeypatch, profile, slots):
    model = packed_model("int8", windows=ALTERNATING)
    model = dataclasses.replace(model, numerics=resolve(profile, jnp.float32))
    prompts = [random_ids(RNG, n) for n in (3, 140)]

    def run():
        llm = LLM(model, max_batch=slots)
        rows = llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0))
        return STACKED in llm.engine._params, [row.outputs[0].token_ids for row in rows]

    looped, tokens = run()
    monkeypatch.setattr(engine, "stacked", lambda *_, **__: None)
    plain, expected = run()
    assert looped and not plain
    assert tokens == expected


@pytest.mark.parametrize(
    ("slots", "scheme", "tokens"),
    [
        *(slow(*case, 20) for case in ((4, "int4-g32"), (1, "int8"), (1, "int4-g32"), (1, None), (4, None))),
        *(slow(*case, 1000) for case in ((1, "int8"), (1, "int4-g32"), (4, "int4-g32"), (1, None), (4, None))),
    ],
)
def test_no_program_copies_a_cache(slots, scheme, tokens):
    """Not the layers' common one, either; the shortest cache there is and a longer one."""
    model = packed_model(scheme, TWO) if scheme else random_model("fast", max_position_embeddings=1024)
    llm = LLM(model, max_batch=slots)
    llm.engine.store.ensure(tokens, slots * 8)
    assert (STACKED in llm.engine._params) == bool(scheme)
    shapes = {str(list(leaf.shape)).replace(" ", "") for leaf in jax.tree.leaves(llm.engine.store.state.cache)}
    for compiled in engine_programs(llm):
        copies = re.findall(r"= \w+(\[[\d,]*\])\S* copy\(", compiled.as_text())
        assert copies and not shapes & set(copies)


@pytest.mark.parametrize(
    ("slots", "scheme"),
    [
        *(slow(*case) for case in ((4, "int4-g32"), (1, "int8"), (4, None), (2, "int4"), (2, None))),
        slow(1, None),
    ],
)
def test_the_length_of_a_cache_moves_no_bit(slots, scheme):
    """The shortest there is and a longer one."""
    model = packed_model(scheme, TWO) if scheme else random_model("fast", max_position_embeddings=1024)
    prompts = [random_ids(RNG, n) for n in (3, 150)]
    found = []
    for tokens in (20, 1000):
        llm = LLM(model, max_batch=slots)
        llm.engine.store.ensure(tokens, tokens // 256 * slots)
        rows = llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0, logprobs=1))
        found.append([(row.outputs[0].token_ids, row.outputs[0].cumulative_logprob) for row in rows])
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_cache_that_grows_keeps_its_rows():
    model = packed_model()
    llm = LLM(model, max_batch=2)
    short, long = random_ids(RNG, 20), random_ids(RNG, 500)
    greedy = SamplingParams(max_tokens=8, temperature=0)
    before = llm.generate(short, greedy)[0].outputs[0].token_ids
    llm.generate(long, greedy)
    assert llm.generate([short, long], greedy)[0].outputs[0].token_ids == before


@pytest.mark.parametrize(
    "made",
    [partial(packed_model, "int8"), partial(packed_model, layers_2="int4"), partial(random_model, "fast")],
    ids=["int8", "mixed", "float"],
)
def test_what_would_be_copied_is_not_stacked(made):
    """Weights multiplied as they are stored, and layers of different kinds."""
    model = made()
    assert stacked(model.params, model.config.period, 17, model.numerics) is None


def test_a_gpu_takes_no_trick_of_the_cpus(monkeypatch):
    """Layers are not stacked, and no option is of the CPU's compiler; ``test_cuda_programs`` looks into the rest."""
    model = packed_model()
    assert (
        stacked(model.params, 1, 1, model.numerics) is not None and "xla_cpu_enable_fast_math" in model.compiler_options
    )
    monkeypatch.setattr("llmjax.device.device_of", lambda *_: SimpleNamespace(platform="gpu"))
    assert stacked(model.params, 1, 1, model.numerics) is None
    assert model.compiler_options == {
        "xla_gpu_deterministic_ops": True,
        "xla_gpu_enable_triton_gemm": False,
        "xla_gpu_dot_merger_threshold_mb": 0,
    }
    options = {}
    monkeypatch.setattr(engine, "Program", lambda made, **of: options.update({made.__name__: of["compiler_options"]}))
    engine.Engine(model, slots=4, memory=1 << 30)
    assert options["prefill"] == model.compiler_options
    assert options["decode"] == model.compiler_options | GPU_STEP


@pytest.mark.parametrize(
    ("windows", "period"), [(FULL, 1), (ALTERNATING, 2), ((8, 8, None) * 2, 3), ((8, None, 8), 2), ((8, 8, None), 3)]
)
def test_period(windows, period):
    assert dataclasses.replace(random_model().config, windows=windows).period == period
