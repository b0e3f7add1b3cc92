"""Checkpoints of random numbers, the same on every machine: each tensor's values follow from its name and a seed."""

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Norm weights and biases far from 1 and 0, so that a norm or bias that is dropped or swapped shows; one embedding
    row is tiny, so that a wrong epsilon does."""
    random = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))  # its stream is frozen, Generator's is not
    x = random.standard_normal(shape)
    if name.endswith("bias"):
        x = 0.3 * x
    elif re.search(r"norm|ln_f|ln_attn|ln_mlp", name):
        x = 1 + 0.3 * x
    elif re.search(r"embed", name):
        x = 0.6 * x
        x[7] *= 1e-3
    elif "lm_head" in name:
        x = 3 * x / np.sqrt(shape[-1])
    else:
        x = 1.3 * x / np.sqrt(shape[-1])
    return x.astype(np.float32)


def write(
    folder: Path, config: Mapping, shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: str = "float32"
) -> Path:
    """A Hugging Face directory without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: values(name, tuple(shape), seed).astype(DTYPES[dtype]) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    return folder
