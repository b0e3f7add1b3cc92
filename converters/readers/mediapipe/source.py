"""A ``.bin`` file of MediaPipe's converter as a ``Source``."""

from pathlib import Path
from typing import Any

import numpy as np

from converters.readers.digest import Stamp
from converters.readers.mediapipe import layout
from converters.readers.mediapipe import parameters as parameters_lib
from converters.readers.mediapipe.container import (
    BACKEND,
    LORA_RANK,
    MODEL_TYPE,
    PARAMETERS,
    VOCABULARY,
    BinFile,
    Entry,
)
from converters.readers.source import TensorSpec, problems_error
from llmjax.errors import CheckpointError, named

_BITS = {"INT8": 8, "INT4": 4, "FLOAT32": 32}
# What belongs to the weight whose name stands before: its type, and in which layout it is.
SCALE, SUM, ZERO = "_quantized_scale", ".sum_i", "_quantized_zp"
_PARTS = {SCALE: ("FLOAT32", ("cpu", "gpu")), SUM: ("INT32", ("gpu",)), ZERO: ("FLOAT32", ("gpu",))}


class MediapipeSource:
    """A file as a ``Source``; ``read`` gives the values of quantized tensors in float32.

    Attributes:
      parameters: its ``LlmParameters``.
      model_type: its ``LlmModelType``, None where it has none.
      backend: ``cpu`` or ``gpu``.
      vocabulary: a SentencePiece model; None where there is none.

    Args:
      path: of the file.

    Raises:
      CheckpointError: truncated, damaged, LoRA weights alone, or tensors of sizes that do not fit its dimensions.
    """

    format = "mediapipe"

    def __init__(self, path: Path):
        self.path = path
        self.directory = path.parent
        self.config: dict[str, Any] = {}
        self.generation_config: dict[str, Any] | None = None
        self.metadata: dict[str, Any] = {}
        self._file = BinFile(path)
        self.files: tuple[Stamp, ...] = (self._file.stamp,)
        if LORA_RANK in self._file.numbers:
            raise CheckpointError(
                f"{path}: LoRA weights of rank {self._file.numbers[LORA_RANK]}, expected a model; "
                "load the model they belong to"
            )
        data, backend = self._file.blob(PARAMETERS), self._file.blob(BACKEND)
        if data is None:
            raise CheckpointError(f"{path}: no metadata {PARAMETERS}: not a model of MediaPipe's converter")
        if backend not in (b"cpu", b"gpu"):
            raise CheckpointError(f"{path}: metadata {BACKEND}: expected cpu or gpu, found {backend!r:.40}")
        self.parameters = parameters_lib.read(data, str(path))
        self.model_type = self._file.numbers.get(MODEL_TYPE)
        self.backend = backend.decode()
        self.vocabulary = self._file.blob(VOCABULARY)
        self._specs: dict[str, TensorSpec] = {}
        problems = [problem for entry in self._file.entries.values() if (problem := self._add(entry))]
        if problems:
            raise problems_error(path, "tensors that do not fit the model's dimensions", problems)

    def _add(self, entry: Entry) -> str:
        """Remembers a weight or vector; returns what is wrong with it, if anything is."""
        label = f"tensor {named(entry.name)}"
        for part, (kind, backends) in _PARTS.items():
            if entry.name.endswith(part):
                owner = self._file.entries.get(entry.name.removesuffix(part))
                if owner is None or owner.type not in ("INT8", "INT4"):
                    return f"{label}: there is no quantized tensor it belongs to"
                if entry.type != kind or self.backend not in backends:
                    return f"{label}: {entry.type} in a {self.backend} file, expected {kind} in {', '.join(backends)}"
                return ""
        bits = _BITS.get(entry.type)
        shape = self._shape(entry)
        if bits is None or not shape:
            return f"{label}: {entry.type} {list(entry.shape)}: expected a weight or a vector of floats"
        nbytes = entry.nbytes
        if len(shape) == 2:
            if bits == 4 and shape[1] % 2:
                return f"{label}: {shape[1]} inputs of 4 bits, expected an even number"
            expected = layout.stored_bytes((shape[0], shape[1]), bits, self.backend)
            if nbytes != expected or (self.backend == "cpu" and entry.shape != shape):
                found = f"{entry.type} {list(entry.shape)}, {nbytes} bytes"
                return f"{label}: expected {list(shape)}, {expected} bytes as {entry.type}, found {found}"
            if bits != 32:
                parts = {part: self._file.entries.get(entry.name + part) for part in _PARTS}
                for part in (SCALE, SUM, ZERO):
                    found_part, needed = parts[part], part != ZERO and self.backend in _PARTS[part][1]
                    if found_part is None and needed:
                        return f"{label}: {named(entry.name + part)} is missing"
                    if found_part is not None and found_part.nbytes != 4 * shape[0]:
                        return f"{label}: {part}: expected {shape[0]} values, found {found_part.nbytes / 4:g}"
                    nbytes += found_part.nbytes if found_part else 0
        label_type = "F32" if bits == 32 else entry.type
        self._specs[entry.name] = TensorSpec(entry.name, shape, label_type, nbytes, self.path)
        return ""

    def _shape(self, entry: Entry) -> tuple[int, ...]:
        """What a tensor's dimensions must be, for the file may give no more than its bytes; () where its name tells
        nothing."""
        t = self.parameters.transformer_parameters
        q = t.num_heads * t.head_dimension
        kv = (t.num_kv_heads or t.num_heads) * t.head_dimension
        d, f, v = t.embedding_dim, t.hidden_dimension, self.parameters.vocab_size
        module = entry.name.removesuffix(".w").removesuffix(".linear").rsplit(".", 1)[-1]
        known = {
            "q": (q, d),
            "k": (kv, d),
            "v": (kv, d),
            "post": (d, q),
            "ffn_layer1": (f, d),
            "ffn_layer1_gate": (f, d),
            "ffn_layer2": (d, f),
            "logits_ffn": (v, d),
            "token_embedding": (v, d),
        }
        if entry.name.endswith(".w"):
            return known.get(module, ())
        return (entry.nbytes // 4,) if entry.type == "FLOAT32" and entry.nbytes % 4 == 0 else ()

    def names(self) -> list[str]:
        """See ``Source``; scales and the like are part of the tensor they belong to."""
        return list(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """See ``Source``."""
        return self._specs[name]

    def has_zero(self, name: str) -> bool:
        """Whether a quantized tensor has zero points."""
        return name + ZERO in self._file.entries

    def _values(self, name: str) -> np.ndarray:
        spec, raw = self._specs[name], self._file.raw(name)
        bits = _BITS[self._file.entries[name].type]
        shape = spec.shape
        if len(shape) != 2:
            return raw.view("<f4")
        read = layout.from_blocks if self.backend == "gpu" else layout.from_rows
        return read(raw, (shape[0], shape[1]), bits)

    def parts(self, name: str) -> dict[str, Any] | None:
        """The fields of a ``QTensor``; None for a tensor of floats.

        Raises:
          CheckpointError: the sums of a gpu file are not those of its integers.
        """
        bits = _BITS[self._file.entries[name].type]
        if bits == 32:
            return None
        values = self._values(name)
        if self.backend == "gpu":
            wrong = layout.row_sums(values, bits) != self._file.raw(name + SUM).view("<i4")
            if wrong.any():
                raise CheckpointError(
                    f"{self.path}: tensor {named(name)}: {wrong.sum()} of {len(wrong)} rows do not have the sum the "
                    "file gives for them; the file is damaged, download or convert it again"
                )
        scales = self._file.raw(name + SCALE).view("<f4")
        fields: dict[str, Any] = {"values": values, "scales": scales[:, None], "bits": bits}
        fields["zero"] = 8 if bits == 4 else 0
        if self.has_zero(name):
            fields["offsets"] = -products(scales, self._file.raw(name + ZERO).view("<f4"))[:, None]
        return fields

    def read(self, name: str) -> np.ndarray:
        """See ``Source``."""
        fields = self.parts(name)
        if fields is None:
            return self._values(name)
        from llmjax.quant.qtensor import QTensor, dequantize

        return dequantize(QTensor(**fields))

    def release(self, name: str) -> None:
        """See ``Source``."""
        for part in ("", *_PARTS):
            if name + part in self._file.entries:
                self._file.release(name + part)

    def close(self) -> None:
        """See ``Source``.  The map goes when the last array that views it does."""


def quotients(products: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Zero points as a gpu file has them: of the integers' scale, where the quantizer's are of the weights'."""
    return products / scales


def products(scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """``scales * zeros``, within the last bits such that ``quotients`` gives ``zeros`` back: a file that is written
    again stays what it was."""
    with np.errstate(all="ignore"):
        best = scales * zeros
        for steps in (1, -1, 2, -2):
            other = best
            for _ in range(abs(steps)):
                other = np.nextafter(other, np.float32(np.copysign(np.inf, steps)), dtype=np.float32)
            best = np.where(quotients(best, scales) == zeros, best, other)
    return best
