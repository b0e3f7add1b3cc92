"""Ministral 3 (Mistral AI 2025, https://mistral.ai/news/mistral-3): Mistral with a stretched rotation, and scores that
grow with the logarithm of the query's place (as in Llama 4)."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from llmjax.models.architecture import Architecture
from llmjax.models.attention import Scores
from llmjax.models.config import dimensions
from llmjax.models.hf_config import Reader
from llmjax.models.llama import HF_NAMES, LlamaConfig
from llmjax.models.rope_config import STRETCHED
from llmjax.outside.values import INT32, MOST_FLOAT, integer, number

_BETA = number(0, MOST_FLOAT, "a number, 0 or more")
_TOKENS = integer(1, INT32, "a number of tokens")


@dataclasses.dataclass(frozen=True)
class GrowingScores(Scores):
    """``Scores`` of queries multiplied by ``1 + beta ln(1 + floor(position / original))``."""

    beta: float = 0.0
    original: int = 1

    def grown(self, q: jax.Array, positions: jax.Array) -> jax.Array:
        """See ``Scores``; the factor is rounded to q's dtype."""
        factor = 1 + jnp.float32(self.beta) * jnp.log1p((positions // self.original).astype(jnp.float32))
        return q * factor[..., None, None].astype(q.dtype)


@dataclasses.dataclass(frozen=True)
class Ministral3Config(LlamaConfig):
    """``Ministral3ForCausalLM``."""

    beta: float = 0.0
    original: int = 1

    def scores(self, window: int | None) -> Scores:
        """See ``LlamaConfig``."""
        return GrowingScores(self.head_dim**-0.5, window=window, beta=self.beta, original=self.original)

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        shared = dimensions(r, tied=False, context=262144, kv_heads=8, head_dim=128)
        if not r.get("rope_scaling"):
            r.default("rope_parameters", _ROPE)
        ropes: Any = r.get("rope_scaling") or r.get("rope_parameters")
        ropes = ropes if isinstance(ropes, dict) else _ROPE
        beta, original = ropes.get("llama_4_scaling_beta"), ropes.get("original_max_position_embeddings")
        if ropes.get("rope_type", ropes.get("type")) in STRETCHED:  # then transformers has one for both
            original = r.get("original_max_position_embeddings", r.context if original is None else original)
        if problem := _BETA.problem(beta):
            r.problem(f"rope parameter llama_4_scaling_beta: {problem}")
            beta = 0.0
        if problem := _TOKENS.problem(original):
            r.problem(f"rope parameter original_max_position_embeddings: {problem}")
            original = 1
        window = None if r.get("sliding_window") is None else r.size("sliding_window")
        return cls(
            **shared,
            rms_norm_eps=r.number("rms_norm_eps", 1e-5),
            hidden_act=r.activation("hidden_act", "silu"),
            rope=r.rope(shared["head_dim"], known=("llama_4_scaling_beta",)),
            windows=(window,) * shared["num_hidden_layers"],
            beta=float(beta),
            original=original,
        )


_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

ARCHITECTURE = Architecture(
    model_type="ministral3", config=Ministral3Config, hf_names=lambda config: HF_NAMES, gguf="mistral3"
)
