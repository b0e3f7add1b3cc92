"""The committed golden files, and the models they belong to."""

import functools
import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

import llmjax
from tests import tiny
from tests.parity import checkpoints

FOLDER = Path(__file__).parents[1] / "golden"
NAMES = sorted(p.stem for p in FOLDER.glob("*.npz"))

# One variant of each layout, the one with the most options.
ONE_EACH = set(
    """
    falcon_40b falcon_7b falcon_rw gemma2 gemma3_linear_layer_types gemma3_multimodal gemma_gqa_bias llama_llama3
    mistral phi3 phi_gqa_qk_norm qwen2_windows_untied qwen3_bias_layer_types stablelm_qkv_bias_qk_norm
    """.split()
)

# Of the logits' largest value; float32 sums in another order reach a third of it.
TOLERANCE = 3e-5


def some(quick: Collection[str], of: Collection[str] = NAMES) -> list:
    """See ``tiny.some``; of all golden files, or of these."""
    return tiny.some(quick, sorted(of))


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """What transformers computed (scripts/make_golden.py)."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {k: file[k] for k in file.files}


def meta(name: str) -> dict[str, Any]:
    """``config``, ``shapes``, ``seed``, and ``rows`` of the long prompt that were kept."""
    return json.loads(str(arrays(name)["meta"]))


def load(name: str, numerics: str = "reference", dtype: str = "float32") -> llmjax.Model:
    """The variant's model, through files on disk as a user's would be."""
    with tempfile.TemporaryDirectory() as folder:
        return llmjax.load(write(name, Path(folder), dtype), numerics=numerics)


def write(name: str, folder: Path, dtype: str = "float32") -> Path:
    """The variant's checkpoint, with the weights its file was made of."""
    m = meta(name)
    return checkpoints.write(folder, m["config"], m["shapes"], m["seed"], dtype)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected value; infinite where something is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / np.abs(expected).max())
