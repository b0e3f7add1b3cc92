"""A tiny Llama-type model with random weights, norms included: big enough for every path of the engine, and fast."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llmjax import numerics
from llmjax.model import Model
from llmjax.models.context import Context
from llmjax.models.registry import architectures, read_config

CONFIG = {
    "model_type": "llama",
    "vocab_size": 600,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 200,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def random_model(profile: str = "reference", dtype: str = "float32", eos_ids=(), seed: int = 0, **changes) -> Model:
    """The model; ``changes`` go into its config."""
    _, config = read_config(CONFIG | changes, "tiny")
    resolved = numerics.resolve(profile, jnp.dtype(dtype))
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(config.module().init, jax.random.key(0), ids, Context(ids, resolved))["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.35, dtype), shapes)
    return Model(architectures()["llama"], config, params, resolved, None, tuple(eos_ids), Path("tiny"))


def random_ids(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(0, CONFIG["vocab_size"], length).tolist()
