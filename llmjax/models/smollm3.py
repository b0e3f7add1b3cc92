"""SmolLM3 (Hugging Face 2025, https://huggingface.co/blog/smollm3): Llama whose every fourth layer does not rotate
(NoPE, Yang et al. 2025, arXiv:2501.18795)."""

import dataclasses
from typing import Self

from llmjax.errors import shown
from llmjax.models.architecture import Architecture
from llmjax.models.config import FULL, SLIDING, dimensions, layer_windows
from llmjax.models.hf_config import Reader
from llmjax.models.llama import HF_NAMES, LlamaConfig
from llmjax.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class SmolLM3Config(LlamaConfig):
    """``SmolLM3ForCausalLM``."""

    rotates: tuple[bool, ...] = ()  # whether each layer does

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """See ``LlamaConfig``."""
        return tuple(self.rope if rotates else None for rotates in self.rotates)

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        shared = dimensions(r, tied=True, context=32768, kv_heads=4)
        layers = shared["num_hidden_layers"]
        interval = r.size("no_rope_layer_interval", 4)
        rotates = r.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)])  # 1 rotates
        if (
            not isinstance(rotates, list)
            or len(rotates) != layers
            or any(type(x) is not int or x not in (0, 1) for x in rotates)
        ):
            r.problem(f"no_rope_layers: expected {layers} of 0 or 1, found {shown(rotates)}")
            rotates = [1] * layers
        r.ignore("max_window_layers")  # a remainder of Qwen's config
        window = r.size("sliding_window") if r.get("sliding_window") is not None else None
        if not r.flag("use_sliding_window", False):
            window = None
        kinds = [SLIDING if window and not x else FULL for x in rotates]
        bias = r.flag("attention_bias", False)
        return cls(
            **shared,
            rms_norm_eps=r.number("rms_norm_eps", 1e-6),
            hidden_act=r.activation("hidden_act", "silu"),
            rope=r.rope(shared["head_dim"], theta=2e6),
            windows=layer_windows(r, kinds, window),
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=r.flag("mlp_bias", False),
            rotates=tuple(map(bool, rotates)),
        )


ARCHITECTURE = Architecture(
    model_type="smollm3", config=SmolLM3Config, hf_names=lambda config: HF_NAMES, gguf="smollm3"
)
