"""A PEFT adapter on disk: low-rank factors by module, and ``adapter_config.json`` beside them.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.readers.digest import Stamp, stamp
from converters.readers.jsonfile import read_json
from converters.readers.source import TensorSpec
from converters.readers.weights_file import WeightsFile, open_weights
from llmjax.errors import CheckpointError, lies_at, named

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# Of a module's tensors, by what they are: how PEFT's names end.
MAGNITUDE = "magnitude"
NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}
# ``default`` is the adapter's own name, which stays in files saved from a state dict; so does a magnitude's ``weight``.
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\."
    r"(?:lora_(?P<side>[AB])(?:\.default)?\.weight|lora_magnitude_vector(?:\.default)?(?:\.weight)?)"
)
# What PEFT saves of the base beside the factors of a head, unless told not to (save_embedding_layers).
_BASE = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.base_layer\.(?P<leaf>weight|bias)")
_FOREIGN = (
    (r"lora_embedding_[AB]", "a trained embedding is not supported, expected projections alone"),
    (r"\.bias$|lora_bias", "a trained bias is not supported, expected bias 'none'"),
    (r"\.lora_([AB]|magnitude_vector)\.", "factors of several adapters, expected one adapter a file"),
    (r"\.weight$", "a whole weight (modules_to_save), not a low-rank update; it is not supported"),
)


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter's files say.

    Attributes:
      path: of the weights.
      config: ``adapter_config.json``; None for weights without one.
      factors: by module as the base model names it (``model.layers.0.self_attn.q_proj``), the names of its tensors
        ``A [r, in]``, ``B [out, r]`` and, in DoRA, ``magnitude [out]``, of which any may be missing.
      bases: by module with factors, names of the base's own tensors (``weight``, ``bias``) that are saved with them.
      problems: tensors that are neither, and why they are refused.
      files: the weights and the configuration, as they were when they were opened.
    """

    path: Path
    config: dict[str, Any] | None
    factors: dict[str, dict[str, str]]
    bases: dict[str, dict[str, str]]
    problems: list[str]
    files: tuple[Stamp, ...]
    _tensors: WeightsFile

    def spec(self, name: str) -> TensorSpec:
        """A tensor's header."""
        return self._tensors.spec(name)

    def read(self, name: str) -> np.ndarray:
        """A tensor's values."""
        return self._tensors.read(name)


def open_adapter(path: Path) -> AdapterFile:
    """Opens a directory with PEFT's files, or a weights file alone, whose configuration may lie beside it.

    Raises:
      CheckpointError: nothing is there, or it is damaged.
    """
    weights = path
    if path.is_dir():
        found = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path}: no adapter here; expected {' or '.join(WEIGHTS)} with {CONFIG} beside it")
        weights = found[0]
    elif not path.is_file():
        raise CheckpointError(f"{path}: {lies_at(path)}; expected a PEFT adapter's directory or its weights")
    configs = [stamp(weights.parent / CONFIG)] if (weights.parent / CONFIG).is_file() else []
    config = read_json(weights.parent / CONFIG)
    if config is None and path.is_dir():
        raise CheckpointError(f"{path / CONFIG}: no such file; copy it, or name the weights file and give alpha")
    tensors = open_weights(weights, "unknown kind of adapter; expected a directory, *.safetensors or *.bin")
    factors: dict[str, dict[str, str]] = {}
    bases: dict[str, dict[str, str]] = {}
    problems = []
    for name in tensors.names():
        if base := _BASE.fullmatch(name):
            bases.setdefault(base["module"], {})[base["leaf"]] = name
        elif not (found_factor := _FACTOR.fullmatch(name)):
            why = next((why for pattern, why in _FOREIGN if re.search(pattern, name)), "no factor of a LoRA adapter")
            problems.append(f"tensor {named(name)}: {why}")
        elif factors.setdefault(found_factor["module"], {}).setdefault(found_factor["side"] or MAGNITUDE, name) != name:
            problems.append(f"tensor {named(name)}: the same factor as {factors[found_factor['module']]}")
    problems += [f"tensor {named(name)}: of the base, beside which there are no factors"
                 for module in bases.keys() - factors.keys() for name in bases[module].values()]  # fmt: skip
    return AdapterFile(weights, config, factors, bases, problems, (tensors.stamp, *configs), tensors)
