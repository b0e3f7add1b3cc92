"""The stored cases can fail, too: faults in what is new in each kind move the logits clearly beyond its tolerance."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models import delta, gemma3n, ministral3, per_layer, shared_keys
from llmjax.models.layers import Embedding, RMSNorm, WideRMSNorm
from tests.parity.test_cases import loaded
from tests.parity.test_mutations import CLEARLY, config, no_norm_of, patch, rope, swap
from tests.tiny import some

QUICK = {"lfm2: the convolution runs backwards", "qwen3 moe: weights as they come"}


def part(**changes):
    """Another value in the scaling of a rope."""
    return config(rope=lambda r: dataclasses.replace(r, scaling=dataclasses.replace(r.scaling, **changes)))


def windows(by):
    return config(windows=lambda w: tuple(x and x + by for x in w))


def replaced(**changes):
    """A change of a field that holds a rope."""
    return lambda r: dataclasses.replace(r, **changes)


def layer_scale_dropped(m, _):
    params = {
        n: x | {"scale": jnp.ones_like(x["scale"])} if n.startswith("layers_") else x for n, x in m.params.items()
    }
    return dataclasses.replace(m, params=params)


def altered(module, name, change):
    """Parameter ``name`` of ``module`` in every layer that has them, changed."""

    def fault(m, _):
        def edit(layer):
            if module not in layer:
                return layer
            part = dict(layer[module])
            if name in part:
                part[name] = (
                    change(part[name])
                    if not isinstance(part[name], dict)
                    else part[name] | {"weight": change(part[name]["weight"])}
                )
            return layer | {module: part}

        params = {n: edit(x) if n.startswith("layers_") else x for n, x in m.params.items()}
        return dataclasses.replace(m, params=params)

    return fault


def transposed_mixing(weight):
    """The coefficients [to, from] read as [from, to]."""
    return weight.reshape(4, 4, -1).transpose(1, 0, 2).reshape(weight.shape)


def unrescaled(right):
    return lambda x, other: x


def laurel_of(right):
    """LAuReL without its residual."""
    return lambda self, x, ctx: right(self, x, ctx) - x


def lookup_unscaled(right):
    """The table of per-layer inputs, not the token embedding, without its factor."""
    return lambda self, ids, ctx: right(self, ids, ctx) / (self.scale if self.features == 42 else 1)


def keys_of_an_earlier_layer(keys):
    """Local layers that take keys and values get those of the second layer, not the last local one's."""
    return tuple({1: shared_keys.GIVEN, 3: shared_keys.OWN}.get(i, k) for i, k in enumerate(keys))


def no_floor(right):
    def grown(self, q, positions):
        return q * (1 + jnp.float32(self.beta) * jnp.log1p(positions / self.original))[..., None, None]

    return grown


def values_as_they_are(right):
    """Nothing norms the values; q and k have norms of their own."""
    return lambda x, eps: x


def key_heads_in_turn(right):
    """Value head ``g * K + k`` with key head ``k``."""

    def fault(state, q, k, *rest, kept):
        v, decay, beta = rest
        turned = [x.reshape(*x.shape[:2], x.shape[3], x.shape[2], *x.shape[4:]).swapaxes(2, 3) for x in rest]
        state, y = right(state, q, k, *turned, kept=kept)
        return state, y.swapaxes(2, 3).reshape(v.shape)

    return fault


def not_corrected(right):
    """The rule of linear attention without delta: ``S + beta v k^T``."""

    def fault(state, q, k, v, decay, beta, kept):
        def step(state, token):
            q, k, v, decay, beta = token
            state = state * jnp.exp(decay)[..., None, None] + (v * beta[..., None])[..., None] * k[:, :, None, None]
            return state, jnp.sum(state * q[:, :, None, None], -1)

        state, y = jax.lax.scan(step, state, [jnp.moveaxis(x, 1, 0) for x in (q, k, v, decay, beta)])
        return state, jnp.moveaxis(y, 0, 1)

    return fault


def halves_swapped(weight):
    return weight.reshape(3, 2, 12, 36)[:, ::-1].reshape(72, 36)


FAULTS = {
    "gemma3n: window + 1": ("gemma3n_cond", windows(1)),
    "gemma3n: one base for all layers": ("gemma3n_cond", config(local_rope=replaced(theta=1e6))),
    "gemma3n: nothing cut off": ("gemma3n_cond", config(sparsity=lambda s: (0.0,) * len(s))),
    "gemma3n: every layer cuts as the first": ("gemma3n_cond", config(sparsity=lambda s: s[:1] * len(s))),
    "gemma3n: another stream active": ("gemma3n_cond", config(active=1)),
    "gemma3n: correction not scaled": ("gemma3n_cond", config(correct_scale=False)),
    "gemma3n: mixing transposed": ("gemma3n_cond", altered("altup", "prediction", transposed_mixing)),
    "gemma3n: streams not rescaled": ("gemma3n_cond", patch(gemma3n, "as_large_as", unrescaled)),
    "gemma3n: laurel without its residual": ("gemma3n_cond", patch(gemma3n.Laurel, "__call__", laurel_of)),
    "gemma3n: values not normed": ("gemma3n_cond", patch(shared_keys, "rms_normalised", values_as_they_are)),
    "gemma3n: looked-up half not scaled": ("gemma3n_cond", patch(Embedding, "__call__", lookup_unscaled)),
    "gemma3n: keys of an earlier layer": ("gemma3n_cond", config(keys=keys_of_an_earlier_layer)),
    "gemma3n: no soft-cap on logits": ("gemma3n_cond", config(final_logit_softcapping=None)),
    "gemma4: keys of an earlier layer": ("gemma4_cond", config(keys=keys_of_an_earlier_layer)),
    "gemma4: window - 1": ("gemma4_cond", windows(-1)),
    "gemma4: all pairs turn": ("gemma4_cond", config(global_rope=replaced(turning=None))),
    "gemma4: the first part of a head turns": ("gemma4_cond", config(global_rope=replaced(turning=None, dims=4))),
    "gemma4: local base for global layers": ("gemma4_cond", config(global_rope=replaced(theta=1e4))),
    "gemma4: layers not scaled": ("gemma4_cond", layer_scale_dropped),
    "gemma4: per-layer branch not normed": ("gemma4_cond", patch(per_layer, "WideRMSNorm", lambda right: lambda eps, name: lambda x: x)),
    "gemma4: values not normed": ("gemma4_moe", patch(shared_keys, "rms_normalised", values_as_they_are)),
    "gemma4: keys not normed": ("gemma4_moe", patch(WideRMSNorm, "__call__", no_norm_of("k_norm"))),
    "gemma4: expert scales dropped": ("gemma4_moe", altered("router", "per_expert_scale", jnp.ones_like)),
    "gemma4: router's scale dropped": ("gemma4_moe", altered("router", "scale", jnp.ones_like)),
    "gemma4: one expert more": ("gemma4_moe", config(experts_used=3)),
    "gemma4: gate and up of experts swapped": ("gemma4_moe", swap("experts.gate", "experts.up")),
    "gemma4: experts' sum not normed": ("gemma4_moe", patch(WideRMSNorm, "__call__", no_norm_of("post_experts_norm"))),
    "smollm3: every layer rotates": ("smollm3", config(rotates=lambda r: (True,) * len(r))),
    "smollm3: other layers do not rotate": ("smollm3", config(rotates=lambda r: r[::-1])),
    "olmo3: scaling on local layers, too": ("olmo3_yarn", lambda m, p: config(local_rope=lambda _: m.config.rope)(m, p)),
    "olmo3: no scaling": ("olmo3_yarn", rope(scaling=None)),
    "olmo3: window + 1": ("olmo3_yarn", windows(1)),
    "olmo3: cosines not scaled": ("olmo3_yarn", part(attention=1.0)),
    "granite: embeddings as they are": ("granite", config(embedding_multiplier=1.0)),
    "granite: scale from the head width": ("granite", config(attention_multiplier=12**-0.5)),
    "granite: branches as they are": ("granite", config(residual_multiplier=1.0)),
    "granite: logits as they are": ("granite", config(logits_scaling=1.0)),
    "ministral3: scores do not grow": ("ministral3_cond", config(beta=0.0)),
    "ministral3: scores grow from the first position": ("ministral3_cond", config(original=1)),
    "ministral3: growth without steps": ("ministral3_cond", patch(ministral3.GrowingScores, "grown", no_floor)),
    "ministral3: mscale alone": ("ministral3_cond", part(scales=None)),
    "qwen3 moe: weights as they come": ("qwen3_moe", config(normalised=lambda n: not n)),
    "qwen3 moe: one expert less": ("qwen3_moe", config(experts_used=1)),
    "qwen3 moe: experts in another order": ("qwen3_moe", altered("experts", "down", lambda w: w[::-1])),
    "lfm2: the convolution runs backwards": ("lfm2", altered("conv", "kernel", lambda w: w[:, ::-1])),
    "lfm2: gates swapped": ("lfm2", altered("conv", "enter", lambda w: jnp.concatenate([w[40:80], w[:40], w[80:]]))),
    "lfm2: a token less": ("lfm2", altered("conv", "kernel", lambda w: w.at[:, 0].set(0))),
    "lfm2: keys not normed": ("lfm2", patch(RMSNorm, "__call__", no_norm_of("k_norm"))),
    "qwen3.5: the convolution runs backwards": ("qwen3_5_cond", altered("delta", "kernel", lambda w: w[:, ::-1])),
    "qwen3.5: keys as long as they come": ("qwen3_5_cond", patch(delta, "_unit", lambda right: lambda x: x)),
    "qwen3.5: nothing decays": ("qwen3_5_cond", altered("delta", "a_log", lambda a: a - 100)),
    "qwen3.5: key heads in turn": ("qwen3_5_cond", patch(delta, "delta_rule", key_heads_in_turn)),
    "qwen3.5: what is there is not corrected": ("qwen3_5_cond", patch(delta, "delta_rule", not_corrected)),
    "qwen3.5: gates before queries": ("qwen3_5_cond", altered("attn", "q", halves_swapped)),
    "qwen3.5: norm with 1 + w where it has w": ("qwen3_5_cond", altered("delta", "norm", lambda w: 1 + w)),
    "yarn: ramp without whole pairs": ("llama_yarn_mscale", part(truncate=False)),
    "yarn: cosines not scaled": ("llama_yarn_mscale", part(attention=1.0)),
    "dynamic: base as it is": ("llama_dynamic_old", rope(scaling=None)),
    "dynamic: another factor": ("llama_dynamic_old", part(factor=2.5)),
    "longrope: short factors for long texts": ("phi35_mini_longrope", part(original=10**6)),
    "longrope: cosines not scaled": ("phi35_mini_longrope", part(attention_factor=1.0)),
}  # fmt: skip


@pytest.mark.parametrize("fault", some(QUICK, FAULTS))
def test_fault_is_seen(fault, monkeypatch, record_property):
    name, make = FAULTS[fault]
    model, expected = loaded(name)
    jax.clear_caches()
    broken = make(dataclasses.replace(model), monkeypatch)
    found = float(np.abs(broken.logits([expected["ids"].tolist()])[0] - expected["logits"]).max())
    record_property("error", found)
    assert found > CLEARLY * expected["atol"], f"{found:.1e} would go unnoticed"
