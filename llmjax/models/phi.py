"""Phi-1, Phi-1.5 (Li et al. 2023, arXiv:2309.05463) and Phi-2: attention and MLP side by side on one norm, biases
everywhere, the head included."""

import dataclasses

import jax
from flax import linen as nn

from llmjax.models.architecture import ROTARY_BUFFERS, Architecture
from llmjax.models.attention import Scores
from llmjax.models.config import DecoderConfig, dimensions
from llmjax.models.context import Context, tap
from llmjax.models.hf_config import Reader
from llmjax.models.layers import ACTIVATIONS, MLP, Attention, Embedding, LayerNorm, Projection, parameter
from llmjax.models.names import hf_names
from llmjax.models.rope import Rope
from llmjax.models.stack import in_turn


@dataclasses.dataclass(frozen=True)
class PhiConfig(DecoderConfig):
    """``PhiForCausalLM``."""

    layer_norm_eps: float
    hidden_act: str
    qk_layernorm: bool
    rope: Rope

    @classmethod
    def from_hf(cls, r: Reader) -> "PhiConfig":
        """See ``DecoderConfig.from_hf``."""
        shared = dimensions(r, tied=False, context=2048)
        return cls(
            **shared,
            layer_norm_eps=r.number("layer_norm_eps", 1e-5),
            hidden_act=r.activation("hidden_act", "gelu_new"),
            qk_layernorm=r.flag("qk_layernorm", False),
            rope=r.rope(shared["head_dim"], fraction=0.5),
        )

    def module(self) -> "Phi":
        """See ``DecoderConfig.module``."""
        return Phi(self)


class Block(nn.Module):
    """Parallel residual: attention and MLP read the same norm."""

    config: PhiConfig

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        h = LayerNorm(c.layer_norm_eps, name="attn_norm")(x)
        attention = Attention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            Scores(scale=c.head_dim**-0.5),
            rope=c.rope,
            qkv_bias=True,
            out_bias=True,
            # one norm for all heads
            qk_norm=(lambda name: LayerNorm(c.layer_norm_eps, name=name)) if c.qk_layernorm else None,
            name="attn",
        )
        mlp = MLP(c.intermediate_size, ACTIVATIONS[c.hidden_act], bias=True, name="mlp")
        return tap(self, "resid", attention(h, ctx) + mlp(h, ctx) + x)


class Phi(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, V]``."""

    config: PhiConfig

    @nn.compact
    def __call__(self, ids: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, name="embed")
        x = tap(self, "embed", embed(ids, ctx))
        x = in_turn(self, [Block(c, name=f"layers_{i}") for i in range(c.num_hidden_layers)], x, ctx)
        x = LayerNorm(c.layer_norm_eps, name="final_norm")(ctx.select_last(x))
        if c.tie_word_embeddings:
            head = embed.attend(x, ctx, Bias(c.vocab_size, name="head")())
            return tap(self, "logits", tap(self, "head", head))
        return tap(self, "logits", Projection(c.vocab_size, bias=True, name="head")(x, ctx))


class Bias(nn.Module):
    """What a tied head has of its own."""

    features: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return parameter(self, "bias", nn.initializers.zeros, (self.features,))


HF_NAMES = hf_names(
    attn_norm="input_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.dense",
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    up="mlp.fc1",
    down="mlp.fc2",
    final_norm="model.final_layernorm",
)

ARCHITECTURE = Architecture(
    model_type="phi",
    config=PhiConfig,
    hf_names=lambda config: HF_NAMES,
    gguf="phi2",
    dropped=ROTARY_BUFFERS,
)
