"""Weights of 8-bit floats, each with its scales, as Hugging Face publishes them (``quant_method: fp8``).

What a weight means is its float times its scale: one for all, or one for each block of ``weight_block_size``.  Runtimes
on some devices round activations to 8 bits as well; here, as in transformers on a CPU, they are not.
Sources: https://github.com/huggingface/transformers (``integrations/finegrained_fp8.py``), and for the names that
AutoFP8 has for the same https://github.com/vllm-project/vllm (``layers/quantization/fp8.py``).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.readers.source import TensorSpec
from llmjax.errors import named, shown

_KEY, _DTYPE = "quantization_config", "F8_E4M3"
# Of a module, beside its weight: the weight's scales, and those of static activations.
_SCALES, _ACTIVATIONS = ("weight_scale_inv", "weight_scale"), ("activation_scale", "input_scale")
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", "float8_e4m3fn"),
    "scale_fmt": ("float",),
    "expert_dtype": ("fp8",),
    "activation_scheme": ("dynamic", "static"),
}
_IRRELEVANT = {"modules_to_not_convert", "ignored_layers", "dequantize", "weight_block_size"}


def settings(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A ``config.json`` without what it says of 8-bit floats, and that; of other kinds it keeps what it says."""
    found = config.get(_KEY)
    if not isinstance(found, dict) or found.get("quant_method") != "fp8":
        return config, None
    return {key: value for key, value in config.items() if key != _KEY}, found


class Float8:
    """The 8-bit weights of a checkpoint.

    Args:
      said: of them in its configuration.
      specs: its tensors.
      where: for messages.
      problems: what is wrong is added.

    Attributes:
      scales: the name of each such weight's scales.
      others: names of scales, which are no tensors of the model.
    """

    def __init__(self, said: Mapping[str, Any], specs: Mapping[str, TensorSpec], where: Path, problems: list[str]):
        self.scales: dict[str, str] = {}
        self.others: set[str] = set()
        for key, value in said.items():
            if key in _IRRELEVANT or value is None or value in _EXPECTED.get(key, ()):
                continue
            problems.append(f"{where}: {_KEY}.{named(key)}: {shown(value)} is not supported for quant_method 'fp8'")
        block = said.get("weight_block_size", [128, 128])
        for name, spec in specs.items():
            module, _, ending = name.rpartition(".")
            if ending == "weight" and spec.dtype == _DTYPE:
                names = [f"{module}.{scales}" for scales in _SCALES]
                scales = next((scales for scales in names if scales in specs), names[0])
                self.scales[name] = scales
                self.others |= {scales, *(f"{module}.{scale}" for scale in _ACTIVATIONS)} & specs.keys()
                if problem := _misfit(spec.shape, specs.get(scales), block):
                    problems.append(f"{where}: tensor {named(scales)}: {problem}")
            elif ending == "weight" and spec.dtype.startswith("F8_"):
                problems.append(f"{where}: tensor {named(name)}: type {spec.dtype} is not supported, expected {_DTYPE}")

    def read(self, name: str, raw: np.ndarray, shape: tuple[int, ...], read: Callable[[str], np.ndarray]) -> np.ndarray:
        """float32: a weight from its bytes, and ``read``'s scales."""
        import ml_dtypes

        out = raw.view(ml_dtypes.float8_e4m3fn).reshape(shape).astype(np.float32)
        scales = read(self.scales[name]).astype(np.float32)
        if scales.size == 1:
            out *= scales.reshape(())
        else:
            rows, columns = (n // m for n, m in zip(shape, scales.shape, strict=True))
            for i, of_row in enumerate(scales):  # a block's rows at a time: all scales would take as much as the weight
                out[i * rows : (i + 1) * rows] *= np.repeat(of_row, columns)
        return out


def _misfit(shape: tuple[int, ...], scales: TensorSpec | None, block: Any) -> str | None:
    if scales is None:
        return f"missing, beside a weight of {_DTYPE}"
    if scales.dtype not in ("F32", "BF16", "F16"):
        return f"scales of type {scales.dtype} are not supported, expected F32, F16 or BF16"
    if scales.shape in ((), (1,), (1, 1)):
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        return f"scales {list(scales.shape)} of blocks, but weight_block_size is {shown(block)}"
    if len(shape) != 2 or scales.shape != tuple(n / b for n, b in zip(shape, block, strict=True)):
        return f"scales {list(scales.shape)} do not fit a weight {list(shape)} in blocks of {block}"
    return None
