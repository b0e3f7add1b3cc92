"""Qwen3, the mixtures of experts (Yang et al. 2025, arXiv:2505.09388): Qwen3 with experts in the place of MLPs."""

import dataclasses
from collections.abc import Hashable
from typing import Self

import jax
import numpy as np
from flax import linen as nn

from llmjax.errors import shown
from llmjax.models.architecture import Architecture
from llmjax.models.config import dimensions
from llmjax.models.context import Context, tap
from llmjax.models.experts import Choice, Experts
from llmjax.models.hf_config import Reader
from llmjax.models.layers import ACTIVATIONS, Attention, GatedMLP, Projection, RMSNorm
from llmjax.models.llama import HF_NAMES, LlamaConfig
from llmjax.models.names import From, Names, stacked_experts


@dataclasses.dataclass(frozen=True)
class Qwen3MoeConfig(LlamaConfig):
    """``Qwen3MoeForCausalLM``."""

    experts: int = 1
    experts_used: int = 1
    expert_size: int = 1
    normalised: bool = False  # the weights of a token's experts add up to 1
    sparse: tuple[bool, ...] = ()  # whether each layer has experts

    @property
    def kinds(self) -> tuple[Hashable, ...]:
        """See ``DecoderConfig``."""
        return tuple(zip(self.windows, self.sparse, strict=True))

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        shared = dimensions(r, tied=False, context=32768, kv_heads=4)
        layers = shared["num_hidden_layers"]
        window = r.nullable(r.size, "sliding_window", 4096)
        r.ignore("max_window_layers", "output_router_logits", "router_aux_loss_coef")
        # Of the family's older code, which Qwen3-Coder's config keeps: what this model is and is not.
        for key, value in (("qkv_bias", False), ("shared_expert_intermediate_size", 0), ("use_qk_norm", True)):
            r.expect(key, (value,), value)
        if not r.flag("use_sliding_window", False):
            window = None
        step, dense = r.size("decoder_sparse_step", 1), r.get("mlp_only_layers", [])
        if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < layers for i in dense):
            r.problem(f"mlp_only_layers: expected numbers of layers from 0 to {layers - 1}, found {shown(dense)}")
            dense = []
        experts = r.size("num_experts", r.get("num_local_experts", 128))  # transformers 5 renames it
        used = r.size("num_experts_per_tok", 8)
        if used > experts:
            r.problem(f"num_experts_per_tok: {used} of {experts} experts")
        bias = r.flag("attention_bias", False)
        return cls(
            **shared,
            rms_norm_eps=r.number("rms_norm_eps", 1e-6),
            hidden_act=r.activation("hidden_act", "silu"),
            rope=r.rope(shared["head_dim"]),
            windows=(window,) * layers,
            qkv_bias=bias,
            out_bias=bias,
            experts=experts,
            experts_used=used,
            expert_size=r.size("moe_intermediate_size", 768),
            normalised=r.flag("norm_topk_prob", False),
            sparse=tuple(i not in dense and (i + 1) % step == 0 for i in range(layers)),
        )

    def block(self, layer: int) -> nn.Module:
        """See ``LlamaConfig``."""
        return Block(self, self.windows[layer], self.sparse[layer], name=f"layers_{layer}")


class Block(nn.Module):
    """Pre-norm, sequential residual; an MLP or experts."""

    config: Qwen3MoeConfig
    window: int | None
    sparse: bool

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        h = RMSNorm(c.rms_norm_eps, name="attn_norm")(x)
        attention = Attention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.scores(self.window),
            rope=c.rope,
            qkv_bias=c.qkv_bias,
            out_bias=c.out_bias,
            qk_norm=lambda name: RMSNorm(c.rms_norm_eps, name=name),
            name="attn",
        )
        x = tap(self, "resid_attn", x + attention(h, ctx))
        h = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        activation = ACTIVATIONS[c.hidden_act]
        if self.sparse:
            scores = Projection(c.experts, name="router")(h, ctx)
            weights, chosen = Choice(c.experts_used, c.normalised, name="choice")(scores)
            experts = Experts(c.experts, c.expert_size, activation, name="experts")
            h = experts(h, weights.astype(h.dtype), chosen, ctx)
        else:
            h = GatedMLP(c.intermediate_size, activation, name="mlp")(h, ctx)
        return tap(self, "resid", x + h)


def names(config: Qwen3MoeConfig) -> Names:
    """Each expert has tensors of its own; or all are in two, as transformers 5 computes with them and, if asked to
    (``save_original_format=False``), saves them."""
    experts = "model.layers.{}.mlp.experts"
    together = stacked_experts(experts, config.expert_size)

    def stacked(role: str) -> tuple[str, From]:
        place, modules = f"layers.{{}}.experts.{role}", (f"{experts}.{i}.{role}_proj" for i in range(config.experts))
        other = together[place]
        assert isinstance(other, From)
        return place, From(tuple(modules), np.stack, source_shape=lambda shape: shape[1:], otherwise=other)

    return {
        **HF_NAMES,
        "layers.{}.router": "model.layers.{}.mlp.gate",
        **dict(map(stacked, ("gate", "up", "down"))),
    }


ARCHITECTURE = Architecture(model_type="qwen3_moe", config=Qwen3MoeConfig, hf_names=names, gguf="qwen3moe")
