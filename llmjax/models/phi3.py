"""Phi-3 (Abdin et al. 2024, arXiv:2404.14219): Llama with a sliding window on every layer, a partial rotation, and
fused tensors on disk."""

from typing import Self

from llmjax.models.architecture import ROTARY_BUFFERS, Architecture
from llmjax.models.config import dimensions
from llmjax.models.hf_config import Reader
from llmjax.models.llama import LlamaConfig
from llmjax.models.names import Names, fused, hf_names
from llmjax.models.rope import Rope
from llmjax.models.scalings import LongRope


class Phi3Config(LlamaConfig):
    """``Phi3ForCausalLM``."""

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        shared = dimensions(r, tied=False, context=4096)
        r.expect("attention_bias", (False,), False)
        r.default("original_max_position_embeddings", 4096)  # transformers', whatever the rope itself says
        r.ignore("original_max_position_embeddings")  # with other ropes than those that want it
        # What Phi-4's files have beside, and no version of transformers reads.
        r.ignore("interpolate_factor", "full_attn_mod", "lm_head_bias", "mlp_bias", "embd_layer")
        window = None if r.get("sliding_window") is None else r.size("sliding_window")
        rope = r.rope(shared["head_dim"], fraction=1.0)
        if rope != Rope(rope.theta, rope.dims) and not isinstance(rope.scaling, LongRope):
            r.problem("rope_scaling: no version of transformers scales a Phi-3 but by longrope; expected that, or none")
        return cls(
            **shared,
            rms_norm_eps=r.number("rms_norm_eps", 1e-5),
            hidden_act=r.activation("hidden_act", "silu"),
            rope=rope,
            windows=(window,) * shared["num_hidden_layers"],
        )


def _names(config: Phi3Config) -> Names:
    """``qkv_proj`` has all rows of q, then k, then v; ``gate_up_proj`` those of gate, then up."""
    q, kv = (config.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
    mlp = config.intermediate_size
    attn = fused("self_attn.qkv_proj", {"q": q, "k": kv, "v": kv})
    gated = fused("mlp.gate_up_proj", {"gate": mlp, "up": mlp})
    return hf_names(
        attn_norm="input_layernorm",
        q=attn["q"],
        k=attn["k"],
        v=attn["v"],
        o="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        gate=gated["gate"],
        up=gated["up"],
        down="mlp.down_proj",
    )


ARCHITECTURE = Architecture(
    model_type="phi3",
    config=Phi3Config,
    hf_names=_names,
    gguf="phi3",
    dropped=ROTARY_BUFFERS,
)
