"""OLMo 3 (Ai2 2025, arXiv:2512.13961): OLMo 2 with a sliding window on three of four layers; the others alone have
their rotation stretched."""

import dataclasses

from llmjax.models.architecture import Architecture
from llmjax.models.config import FULL, SLIDING, check_rope_types, dimensions, layer_windows
from llmjax.models.hf_config import Reader
from llmjax.models.olmo2 import HF_NAMES, Olmo2Config, WideRope, wide
from llmjax.models.rope import Rope

THETA = 500000.0  # the base where a config does not say it


@dataclasses.dataclass(frozen=True)
class Olmo3Config(Olmo2Config):
    """``Olmo3ForCausalLM``; ``rope`` is that of global layers."""

    local_rope: WideRope = WideRope(THETA, 2)

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """See ``LlamaConfig``."""
        return tuple(self.rope if window is None else self.local_rope for window in self.windows)

    @classmethod
    def from_hf(cls, r: Reader) -> "Olmo3Config":
        """See ``DecoderConfig.from_hf``."""
        shared = dimensions(r, tied=False, context=2048)
        kinds = [SLIDING if (i + 1) % 4 else FULL for i in range(shared["num_hidden_layers"])]
        bias, width = r.flag("attention_bias", False), shared["head_dim"]
        check_rope_types(r)
        return cls(
            **shared,
            rms_norm_eps=r.number("rms_norm_eps", 1e-5),
            hidden_act=r.activation("hidden_act", "silu"),
            rope=wide(r.rope(width, theta=THETA, layer_type=FULL)),
            # transformers 4's one base, too, is for global layers alone.
            local_rope=wide(r.rope(width, theta=THETA, theta_key=None, scaling_key=None, layer_type=SLIDING)),
            windows=layer_windows(r, kinds, r.nullable(r.size, "sliding_window", 4096)),
            qkv_bias=bias,
            out_bias=bias,
        )


ARCHITECTURE = Architecture(model_type="olmo3", config=Olmo3Config, hf_names=lambda config: HF_NAMES, gguf="olmo2")
