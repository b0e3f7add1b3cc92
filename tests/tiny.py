"""A tiny Llama-type model with random weights, norms included: big enough for every path of the engine, and fast."""

import dataclasses
import json
from collections.abc import Collection, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from llmjax import LLM, numerics
from llmjax.model import Model
from llmjax.models.context import Context
from llmjax.models.registry import read_config

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


def slow(*values):
    """A test's parameters that are left to ``--runslow``: as true as the others, and as costly."""
    import pytest  # scripts, which have these models from here, do without

    return pytest.param(*values, marks=pytest.mark.slow)


def some(quick: Collection, of: Iterable) -> list:
    """The cases of a test that compiles much: ``quick`` run by default, all with ``--runslow``."""
    return [c if c in quick else slow(*c) if isinstance(c, tuple) else slow(c) for c in of]


def random_model(profile: str = "reference", dtype: str = "float32", eos_ids=(), seed: int = 0, **changes) -> Model:
    """The model; ``changes`` go into its config, or are another kind's whole one."""
    whole = "model_type" in changes and bool({"hidden_size", "text_config"} & set(changes))
    architecture, config = read_config(changes if whole else CONFIG | changes, "tiny")
    resolved = numerics.resolve(profile, jnp.dtype(dtype))
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(config.module().init, jax.random.key(0), ids, Context(ids, resolved))["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.35, dtype), shapes)
    return Model(architecture, config, params, resolved, None, tuple(eos_ids), Path("tiny"))


def shortened(model: Model, layers: int) -> Model:
    """Its first layers, under its own embedding and head."""
    config = dataclasses.replace(model.config, num_hidden_layers=layers, windows=model.config.windows[:layers])
    dropped = {f"layers_{i}" for i in range(layers, model.config.num_hidden_layers)}
    params = {name: leaf for name, leaf in model.params.items() if name not in dropped}
    return dataclasses.replace(model, config=config, params=params)


def roomy(llm: LLM, tokens: int = 200) -> LLM:
    """With a cache for ``tokens`` of every row from the start: whatever a test asks, the same programs answer."""
    store = llm.engine.store
    store.ensure(tokens, 20 * llm.engine.slots)  # what a job reserves
    return llm


def random_ids(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(0, CONFIG["vocab_size"], length).tolist()


def checkpoint(folder: Path, **changes) -> Path:
    """A Hugging Face directory of such a model, with a tokenizer whose tokens are the 256 bytes and ``</s>``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"eos_token_id": 256} | changes
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = width // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    shapes["lm_head.weight"] = (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        layer = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width)}
        layer |= {"self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
        layer |= {"mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    save_file(
        {name: (rng.normal(size=shape) * 0.35).astype(np.float32) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder
