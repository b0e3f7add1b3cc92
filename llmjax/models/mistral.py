"""Mistral 7B (Jiang et al. 2023, arXiv:2310.06825): Llama with a sliding window, on every layer but where
``layer_types`` says otherwise."""

from typing import Self

from llmjax.models.architecture import ROTARY_BUFFERS, Architecture
from llmjax.models.config import FULL, SLIDING, dimensions, layer_windows
from llmjax.models.hf_config import Reader
from llmjax.models.llama import HF_NAMES, LlamaConfig


class MistralConfig(LlamaConfig):
    """``MistralForCausalLM``."""

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        shared = dimensions(r, tied=False, context=131072, kv_heads=8)
        window = r.nullable(r.size, "sliding_window", 4096)
        return cls(
            **shared,
            rms_norm_eps=r.number("rms_norm_eps", 1e-6),
            hidden_act=r.activation("hidden_act", "silu"),
            rope=r.rope(shared["head_dim"]),
            windows=layer_windows(r, [SLIDING if window else FULL] * shared["num_hidden_layers"], window),
        )


ARCHITECTURE = Architecture(
    model_type="mistral",
    config=MistralConfig,
    hf_names=lambda config: HF_NAMES,
    gguf="llama",
    dropped=ROTARY_BUFFERS,
)
