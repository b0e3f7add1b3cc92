"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671): Llama with biases on q, k and v, which its config does not
mention."""

from typing import Any, Self

from llmjax.models.architecture import ROTARY_BUFFERS, Architecture
from llmjax.models.config import FULL, SLIDING, dimensions, layer_windows
from llmjax.models.hf_config import Reader
from llmjax.models.llama import HF_NAMES, LlamaConfig


class Qwen2Config(LlamaConfig):
    """``Qwen2ForCausalLM``."""

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        r.expect("use_mrope", (False,), False)
        return cls(**qwen_options(r), qkv_bias=True)


def qwen_options(r: Reader, head_dim: int | None = None) -> dict[str, Any]:
    """What Qwen2 and Qwen3 read alike; ``head_dim`` is the default for an absent one."""
    shared = dimensions(r, tied=False, context=32768, kv_heads=32, head_dim=head_dim)
    window = r.nullable(r.size, "sliding_window", 4096)
    if not r.flag("use_sliding_window", False):
        window = None  # published files give a width all the same
    full = r.count("max_window_layers", 28)  # the layers before this one do not slide
    kinds = [SLIDING if window and i >= full else FULL for i in range(shared["num_hidden_layers"])]
    return {
        **shared,
        "rms_norm_eps": r.number("rms_norm_eps", 1e-6),
        "hidden_act": r.activation("hidden_act", "silu"),
        "rope": r.rope(shared["head_dim"]),
        "windows": layer_windows(r, kinds, window),
    }


ARCHITECTURE = Architecture(
    model_type="qwen2",
    config=Qwen2Config,
    hf_names=lambda config: HF_NAMES,
    gguf="qwen2",
    dropped=ROTARY_BUFFERS,
)
