"""Qwen3, the dense models (Yang et al. 2025, arXiv:2505.09388): Llama with norms of each head's query and key."""

from typing import Self

from llmjax.models.architecture import Architecture
from llmjax.models.hf_config import Reader
from llmjax.models.llama import HF_NAMES, LlamaConfig
from llmjax.models.qwen2 import qwen_options


class Qwen3Config(LlamaConfig):
    """``Qwen3ForCausalLM``."""

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        bias = r.flag("attention_bias", False)
        return cls(**qwen_options(r, head_dim=128), qkv_bias=bias, out_bias=bias, qk_norm=True)


ARCHITECTURE = Architecture(
    model_type="qwen3",
    config=Qwen3Config,
    hf_names=lambda config: HF_NAMES,
    gguf="qwen3",
)
