"""What layers keep beside keys and values of their own, in the engine: whatever an architecture declares, a row's bits
depend on nothing but the row."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmjax
from llmjax.models.shared_keys import GIVEN, OWN, TAKEN
from llmjax.runtime.cache import grown, make_cache
from llmjax.runtime.state import empty_state, share
from tests import tiny

LOCAL, GLOBAL = "sliding_attention", "full_attention"
_SIZES = {
    "vocab_size": 90,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_COMMON = _SIZES | {
    "head_dim": 4,
    "sliding_window": 5,
    "vocab_size_per_layer_input": 90,
    "hidden_size_per_layer_input": 6,
}
_SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": [LOCAL, GLOBAL, LOCAL, GLOBAL]}
CONFIGS = {
    "gemma3n": _COMMON
    | _SHARED
    | {
        "model_type": "gemma3n_text",
        "laurel_rank": 3,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0, 0, 0],
    },
    "gemma4": _COMMON | _SHARED | {"model_type": "gemma4_text", "global_head_dim": 8, "use_double_wide_mlp": True},
    "gemma4 experts": _COMMON
    | {
        "model_type": "gemma4_text",
        "num_hidden_layers": 2,
        "layer_types": [LOCAL, GLOBAL],
        "global_head_dim": 8,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "moe_intermediate_size": 12,
    },
}
CONFIGS["lfm2"] = _SIZES | {
    "model_type": "lfm2",
    "num_hidden_layers": 3,
    "block_multiple_of": 4,
    "full_attn_idxs": [1],
}
CONFIGS["qwen3_5"] = _SIZES | {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 3,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 6,
    "full_attention_interval": 3,
}
# Whose angles follow the length of a text: rows of one batch have different ones, and some change on the way.
_LLAMA = tiny.CONFIG | {"vocab_size": 90, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24}
FOLLOWING = {
    "dynamic": _LLAMA | {"max_position_embeddings": 20, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "longrope": _LLAMA
    | {
        "model_type": "phi3",
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 48,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]},
    },
}
PARAMS = llmjax.SamplingParams(temperature=0.7, seed=3, max_tokens=14)


# One that takes keys and values, and one that carries a state from token to token; the others compile for longer.
QUICK = {"gemma4", "qwen3_5"}
SOME = tiny.some(QUICK, CONFIGS | FOLLOWING)


def made(kind):
    model = tiny.random_model(**(CONFIGS | FOLLOWING)[kind])
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, max_position_embeddings=512))
    return llmjax.LLM(model, max_batch=4, chunk=8, block=8, numerics="reference")


@pytest.fixture(scope="module", params=SOME)
def llm(request):
    llm = made(request.param)
    llm.engine.store.ensure(64, 30)  # pages for all that comes: what grows is compiled again
    return llm


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(5)
    return [rng.integers(0, 90, n).tolist() for n in (21, 3, 40, 17)]


def follows_length(llm):
    config = llm.model.config
    return config.length_kind(40) != config.length_kind(100)


def bits(output):
    return output.outputs[0].token_ids, output.outputs[0].token_logprobs


def test_chunks_and_windows_are_the_whole_text(llm, prompts):
    """Longer than windows, chunks, blocks and pages."""
    text = prompts[2] + prompts[0]
    (score,) = llm.score([text])
    logits = llm.model.logits([text])[0].astype(np.float64)
    wanted = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    np.testing.assert_allclose(score.logprobs[1:], [wanted[i, t] for i, t in enumerate(text[1:])], atol=2e-4)


def test_steps_are_the_whole_text(llm, prompts):
    if follows_length(llm):
        pytest.skip("what was generated before has the angles of a shorter text")
    (found,) = llm.generate([prompts[1]], llmjax.SamplingParams(temperature=0, max_tokens=50))
    tokens, logprobs = bits(found)
    logits = llm.model.logits([prompts[1] + tokens])[0].astype(np.float64)[len(prompts[1]) - 1 : -1]
    wanted = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    np.testing.assert_allclose(logprobs, wanted.max(-1), atol=2e-4)
    np.testing.assert_allclose(logprobs, [row[t] for row, t in zip(wanted, tokens, strict=True)], atol=2e-4)


def test_a_row_has_the_same_bits_alone_and_among_others_and_streamed(llm, prompts):
    llm.engine.store.clear()
    alone = []
    for prompt in prompts:
        alone.append(bits(llm.generate([prompt], PARAMS)[0]))
        llm.engine.store.clear()
    assert [bits(o) for o in llm.generate(prompts, PARAMS)] == alone
    assert [bits(o) for o in llm.generate(prompts[::-1] + prompts, PARAMS)] == alone[::-1] + alone
    (*_, last) = llm.run([llm.request(prompts[0], PARAMS)], burst=1)
    assert last.row.completion().token_ids == alone[0][0]
    assert last.row.completion().token_logprobs == alone[0][1]


def test_a_shared_beginning_gives_the_same_bits(llm, prompts):
    """In whole chunks, in the middle of a page, and of a whole prompt whose row went on."""
    first, second = prompts[2] + [1, 2], prompts[2][:27] + [3, 4, 5]
    llm.engine.store.clear()
    alone = {}
    for name, prompt in (("first", first), ("second", second)):
        alone[name] = bits(llm.generate([prompt], PARAMS)[0])
        llm.engine.store.clear()
    before = llm.engine.progress.reused_tokens
    found = [bits(llm.generate([p], PARAMS)[0]) for p in (first, first, second, second)]
    assert found == [alone["first"]] * 2 + [alone["second"]] * 2
    if follows_length(llm):  # beginnings of texts of one kind alone are shared
        return
    wanted = len(first) + 24 + len(second) if llm.model.config.rewinds else 0
    assert llm.engine.progress.reused_tokens - before == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_cache_that_grows_keeps_what_it_holds(kind, prompts):
    """Rows lengthen beyond what the state was made for, pages are added between their tokens."""
    llm = made(kind)
    params = llmjax.SamplingParams(temperature=0.7, seed=3, max_tokens=300)
    whole = bits(llm.generate([prompts[0]], params)[0])
    llm.engine.store.clear()  # it has its length by now: the same run again grows nothing
    assert bits(llm.generate([prompts[0]], params)[0]) == whole
    tokens, logprobs = whole
    text = prompts[0] + tokens
    logits = llm.model.logits([text])[0].astype(np.float64)[len(prompts[0]) - 1 : -1]
    wanted = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    np.testing.assert_allclose(logprobs, [row[t] for row, t in zip(wanted, tokens, strict=True)], atol=5e-4)


def test_a_cache_grows_of_which_a_part_is_empty():
    """A convolution of one token carries none before it.  What is carried lies once for each slot."""
    model = tiny.random_model(**CONFIGS["qwen3_5"], linear_conv_kernel_dim=1)
    make = partial(make_cache, model.config, model.numerics, page=16, slots=4)
    cache = grown(make(3), 1, jax.eval_shape(partial(make, 5)))
    assert [layer for layer in cache.values() if "attn" in layer]
    for layer in cache.values():
        shapes = {name: x.shape for own in layer.values() for name, x in own.items()}
        if "delta" in layer:
            assert shapes == {"before": (4, 0, 44), "state": (4, 4, 6, 5)}
        else:
            assert {x[0] for x in shapes.values()} == {5}
    state = empty_state(cache, 3, 32, model.config.vocab_size)  # a prompt that was scored is shared with itself
    shared = jax.eval_shape(partial(share, 1), state, {}, {}, 0, 0, 0, 0, 3, True)
    assert jax.tree.map(jnp.shape, shared) == jax.tree.map(jnp.shape, state)


def test_what_is_carried_takes_memory_by_the_slot(llm):
    """And the budget knows it."""
    store = llm.engine.store
    store.clear()
    arrays = store.ensure(64, 30)
    assert store.memory.slots + store.pages.total * store.memory.page == sum(x.nbytes for x in jax.tree.leaves(arrays))
    carried = any(map(llm.model.config.carried, range(llm.model.config.num_hidden_layers)))
    shapes = {len(x) for x in jax.tree.leaves(arrays.cache)}
    assert shapes == ({5, store.pages.total} if carried else {store.pages.total})


@pytest.mark.slow
def test_a_model_may_keep_nothing_of_each_token(prompts):
    """All its layers carry a state: pages cost nothing."""
    llm = llmjax.LLM(tiny.random_model(**CONFIGS["qwen3_5"] | {"num_hidden_layers": 2}), max_batch=2, chunk=8, block=8)
    (score,) = llm.score([prompts[0]])
    logits = llm.model.logits([prompts[0]])[0].astype(np.float64)
    wanted = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    np.testing.assert_allclose(score.logprobs[1:], [wanted[i, t] for i, t in enumerate(prompts[0][1:])], atol=2e-4)


def test_layers_that_take_keys_and_values_keep_none():
    model = tiny.random_model(**CONFIGS["gemma4"])
    assert model.config.keys == (GIVEN, GIVEN, TAKEN, TAKEN)
    shapes = jax.eval_shape(lambda: make_cache(model.config, model.numerics, 3, 16))
    assert {name: jax.tree.map(lambda x: x.shape, own) for name, own in shapes.items()} == {
        "layers_0": {"attn": {"k": (3, 2, 16, 4), "v": (3, 2, 4, 16)}},
        "layers_1": {"attn": {"k": (3, 2, 16, 8), "v": (3, 2, 8, 16)}},
    }
    assert "k" not in model.params["layers_2"]["attn"]


def test_the_last_of_a_kind_gives():
    config = CONFIGS["gemma4"] | {"num_hidden_layers": 6, "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL, GLOBAL]}
    assert tiny.random_model(**config).config.keys == (OWN, OWN, GIVEN, OWN, TAKEN, TAKEN)
