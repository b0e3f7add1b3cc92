"""llmjax's own directories: quantized weights as they are computed with, in files other software can open.

``config.json``
    as Hugging Face writes it, and ``"quantization": {"format": "llmjax", "version": 1, "recipe": ...}``.
``model.safetensors``
    parameters by llmjax's names (``layers.0.attn.q.weight``).  A quantized one is several tensors, ``NAME.values``,
    ``NAME.scales`` and, where it has them, ``NAME.offsets`` and ``NAME.fifth``, laid out as
    ``llmjax.quant.qtensor.QTensor`` says; the file's metadata hold ``{NAME: {"bits", "zero", "group"}}`` under
    ``quantization``, as JSON.
tokenizer files and ``generation_config.json``
    as Hugging Face writes them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from converters.readers.digest import Stamp
from converters.readers.jsonfile import parse_json, read_json
from converters.readers.safetensors import SafetensorsFile
from converters.readers.source import TensorSpec, problems_error
from llmjax.errors import CheckpointError, named

VERSION = 1
WEIGHTS = "model.safetensors"
PARTS = ("values", "scales", "offsets", "fifth")


def is_llmjax(path: Path) -> bool:
    """Whether a directory is of this kind; one whose ``config.json`` cannot be read is left to others to complain
    about."""
    try:
        block = (read_json(path / "config.json") or {}).get("quantization")
    except CheckpointError:
        return False
    return isinstance(block, dict) and block.get("format") == "llmjax"


class LlmjaxSource:
    """A directory as a ``Source``; ``read`` gives the values of quantized tensors in float32.

    Args:
      path: the directory.

    Raises:
      CheckpointError: a file is missing or damaged, of a later version, or its schemes and tensors disagree.
    """

    format = "llmjax"

    def __init__(self, path: Path):
        self.path = self.directory = path
        self.metadata: dict[str, Any] = {}
        config = read_json(path / "config.json") or {}
        block = config["quantization"]
        if block.get("version") != VERSION:
            raise CheckpointError(
                f"{path / 'config.json'}: quantization.version: expected {VERSION}, found {block.get('version')!r}; "
                "use the version of llmjax that wrote it, or convert the source again"
            )
        self.recipe: dict[str, Any] | None = block.get("recipe")
        self.config = {key: value for key, value in config.items() if key != "quantization"}
        self.generation_config = read_json(path / "generation_config.json")
        self._file = SafetensorsFile(path / WEIGHTS)
        self.files: tuple[Stamp, ...] = (self._file.stamp,)
        self._packed = self._read_schemes()
        self._specs = self._read_specs()

    def _read_schemes(self) -> dict[str, dict[str, int]]:
        text = self._file.metadata.get("quantization", "")
        try:
            schemes = parse_json(text)
        except (ValueError, RecursionError):
            schemes = None
        fields = {"bits", "zero", "group"}
        if not isinstance(schemes, dict) or not all(
            isinstance(s, dict) and set(s) == fields and all(type(v) is int for v in s.values())
            for s in schemes.values()
        ):
            raise CheckpointError(
                f"{self._file.path}: metadata 'quantization': expected bits, zero and group of each quantized tensor, "
                f"found {named(text)}; convert the source again"
            )
        return schemes

    def _read_specs(self) -> dict[str, TensorSpec]:
        found = {name: self._file.spec(name) for name in self._file.names()}
        specs, problems = {}, []
        self._stored: dict[str, list[str]] = {}
        for name, scheme in self._packed.items():
            self._stored[name] = [part for part in PARTS if f"{name}.{part}" in found]
            parts = {part: found.pop(f"{name}.{part}") for part in self._stored[name]}
            shape, wrong = _check(parts, **scheme)
            problems += [f"tensor {named(name)}: {problem}" for problem in wrong]
            label = f"INT{scheme['bits']}-G{scheme['group']}" if shape[-1] > scheme["group"] else f"INT{scheme['bits']}"
            size = sum(part.nbytes for part in parts.values())
            specs[name] = TensorSpec(name, shape, label, size, self._file.path)
        if problems:
            raise problems_error(
                self._file.path, "the schemes do not fit the tensors, convert the source again", problems
            )
        return specs | found

    def names(self) -> list[str]:
        """See ``Source``."""
        return list(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """See ``Source``; the shape of a quantized tensor is that of its values."""
        return self._specs[name]

    def parts(self, name: str) -> dict[str, Any] | None:
        """The fields of a ``QTensor``, views of the mapped file; None for a tensor of floats."""
        if name not in self._packed:
            return None
        fields: dict[str, Any] = {part: self._file.read(f"{name}.{part}") for part in self._stored[name]}
        return fields | {"bits": self._packed[name]["bits"], "zero": self._packed[name]["zero"]}

    def read(self, name: str) -> np.ndarray:
        """See ``Source``."""
        fields = self.parts(name)
        if fields is None:
            return self._file.read(name)
        from llmjax.quant.qtensor import QTensor, dequantize

        return dequantize(QTensor(**fields))

    def release(self, name: str) -> None:
        """See ``Source``."""
        parts = self._stored.get(name)
        for stored in [name] if parts is None else [f"{name}.{part}" for part in parts]:
            self._file.release(stored)

    def close(self) -> None:
        """See ``Source``.  The map goes when the last array that views it does."""


def _check(parts: dict[str, TensorSpec], bits: int, zero: int, group: int) -> tuple[tuple[int, ...], list[str]]:
    """The shape a quantized tensor stands for, and where its parts contradict its scheme."""
    if "values" not in parts or "scales" not in parts or len(parts["values"].shape) not in (2, 3):
        return (0, 0), ["expected values of two or three dimensions, and scales"]
    *out, stored = parts["values"].shape
    width = stored if bits == 8 else 2 * stored
    # Two values share a byte in fewer than 8 bits, eight their fifth bits; what zero is taken from must stay an int8.
    step, zeros = {4: (2, range(-112, 128)), 5: (8, range(-96, 128)), 8: (1, range(1))}.get(bits, (1, range(0)))
    if zero not in zeros or group < 1 or width % group or width % step or (bits < 8 and group % 2):
        return (*out, width), [f"bits {bits}, zero {zero}, group {group}: no such scheme for {width} inputs"]
    expected = {"values": ("I8" if bits == 8 else "U8", (*out, stored)), "scales": ("F32", (*out, width // group))}
    if bits == 5:
        expected["fifth"] = ("U8", (*out, width // 8))
    if "offsets" in parts:
        expected["offsets"] = expected["scales"]
    problems = [f"{part}: not part of this scheme" for part in parts if part not in expected]
    for part, (dtype, shape) in expected.items():
        found = parts.get(part)
        dtypes = ("F32", "F16") if dtype == "F32" else (dtype,)
        if found is None or found.shape != shape or found.dtype not in dtypes:
            what = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            problems.append(f"{part}: expected {' or '.join(dtypes)} {list(shape)}, found {what}")
    return (*out, width), problems
