"""The operator that LiteRT-LM brings for Qwen3.5's linear attention; the interpreter alone does not have it.

Source: litert-torch's ``generative/export_hf/model_ext/qwen3_5/gated_delta_rule.py``, which writes it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from converters.readers.litert.tflite import Operator, Tensor
from llmjax.litert.products import Value, as_array
from llmjax.models.delta import delta_rule
from llmjax.numerics import Numerics

NAME = "CUSTOM:gated_delta_update"


def gated_delta_update(op: Operator, x: list[Value], out: list[Tensor], numerics: Numerics) -> Any:
    """Of ``q, k [B, K, T, E]``, ``v [B, K * G, T, H]``, ``beta, decay [B, K * G, T]`` and a state ``[B, K * G, E, H]``,
    as ``llmjax.models.delta`` has them: what is read, as v, and the state behind the last token; one after the other,
    as LiteRT-LM does.  (Its option ``mode`` says how, not what.)"""
    q, k, v, beta, decay, state = map(as_array, x)
    heads = q.shape[1], v.shape[1] // max(1, q.shape[1])

    def tokens(y: jax.Array, *heads: int) -> jax.Array:  # [T, B, 1, heads, ...]
        return jnp.moveaxis(y, 2, 0).reshape(y.shape[2], len(y), 1, *heads, *y.shape[3:])

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        return delta_rule(state, *token)

    each = (tokens(q, heads[0]), tokens(k, heads[0]), *(tokens(y, *heads) for y in (v, decay, beta)))
    turned = jnp.swapaxes(state, -1, -2)
    last, y = lax.scan(step, turned.reshape(len(state), *heads, *turned.shape[2:]), each)
    y = jnp.moveaxis(y.reshape(v.shape[2], v.shape[0], v.shape[1], v.shape[3]), 0, 2)
    return y, jnp.swapaxes(last.reshape(turned.shape), -1, -2)
