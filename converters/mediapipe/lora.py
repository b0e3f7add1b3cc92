"""MediaPipe's LoRA files: the factors of q, k, v and o in every layer, for the gpu.

A weight's factors ``A [r, in]`` and ``B [out, r]`` lie in the gpu's blocks, in float16 for Gemma and in float32 for
Phi-2, whatever the header says; they are called ``w_prime_left`` and ``w_prime_right``, but the other way round for o.
There is no scale: MediaPipe's runtime adds ``B . A`` as it is.

MediaPipe's converter writes o's factors scrambled: it reads the transposed array as if it were not.  ``scrambled`` does
the same and ``restored`` undoes it.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from converters.mediapipe import layout
from converters.mediapipe.container import BinFile, Entry
from llmjax.errors import CheckpointError

RANK = "lora_rank"
# Of files: whether o's factors are as MediaPipe's converter leaves them.
O_PROJ: tuple[str, ...] = ("mediapipe", "right")
_PLACES = {"q": "q", "k": "k", "v": "v", "o": "post"}
_NAME = re.compile(r"params\.lm\.transformer\.x_layers_(\d+)\.self_attention\.(q|k|v|post)\.w_prime_(left|right)")


@dataclasses.dataclass(frozen=True)
class Factors:
    """Of one weight: A ``[r, in]`` and B ``[out, r]``, float32."""

    a: np.ndarray
    b: np.ndarray


def scrambled(factors: Factors) -> Factors:
    """What the runtime reads where the converter was given ``factors``."""
    a, b = factors.a, factors.b
    return Factors(a.T.reshape(a.shape), b.T.reshape(b.shape))


def restored(factors: Factors) -> Factors:
    """The inverse of ``scrambled``."""
    a, b = factors.a, factors.b
    return Factors(np.ascontiguousarray(a.reshape(a.shape[::-1]).T), np.ascontiguousarray(b.reshape(b.shape[::-1]).T))


def dtype_of(model_type: str) -> np.dtype:
    """What the file of a model type (MediaPipe's name) holds."""
    return np.dtype(np.float32 if model_type == "PHI_2" else np.float16)


def tensors(factors: Mapping[tuple[int, str], Factors], model_type: str) -> Iterator[tuple[Entry, np.ndarray]]:
    """The file's tensors in its order.

    Args:
      factors: by layer and ``q``, ``k``, ``v`` or ``o``.
      model_type: MediaPipe's name.
    """
    for layer in range(1 + max(i for i, _ in factors)):
        for module, place in _PLACES.items():
            found = factors[layer, module]
            sides = ("left", "right") if module != "o" else ("right", "left")
            for side, values in zip(sides, (found.a, found.b), strict=True):
                data = _to_blocks(values.astype(dtype_of(model_type)))
                name = f"params.lm.transformer.x_layers_{layer}.self_attention.{place}.w_prime_{side}"
                yield Entry(name, "FLOAT32", (data.nbytes,), data.nbytes), data


def _to_blocks(values: np.ndarray) -> np.ndarray:
    # Blocks move values about without looking at them; those of 32 bits are the only floats the layout knows.
    blocks = layout.to_blocks(values.astype(np.float32), (values.shape[0], values.shape[1]), 32)
    return blocks.view("<f4").astype(values.dtype)


def is_lora(path: Path) -> bool:
    """Whether a MediaPipe file holds LoRA weights."""
    return RANK in BinFile(path).numbers


def read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[int, str], Factors]:
    """The factors as the file has them.

    Args:
      path: of the file.
      shapes: of the model's weights, by canonical name.

    Raises:
      CheckpointError: it is damaged, or made for another model.
    """
    file = BinFile(path)
    rank = file.numbers.get(RANK)
    if not rank:
        raise CheckpointError(f"{path}: no metadata {RANK}: this is a model, or no LoRA file of MediaPipe's")
    found: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    names = {place: module for module, place in _PLACES.items()}
    for name, entry in file.entries.items():
        match = _NAME.fullmatch(name)
        module = match and names[match[2]]
        shape = match and shapes.get(f"layers.{match[1]}.attn.{module}.weight")
        if not match or not module or not shape:
            raise CheckpointError(f"{path}: tensor {name}: no LoRA factor of this model's q, k, v or o")
        side = "a" if (match[3] == "left") == (module != "o") else "b"
        whole = (rank, shape[1]) if side == "a" else (shape[0], rank)
        count = layout.stored_bytes(whole, 32, "gpu") // 4
        if entry.nbytes not in (2 * count, 4 * count):
            raise CheckpointError(
                f"{path}: tensor {name}: expected {2 * count} or {4 * count} bytes for {list(whole)}, found "
                f"{entry.nbytes}; it belongs to a model of other dimensions"
            )
        raw = file.raw(name).view("<f2" if entry.nbytes == 2 * count else "<f4").astype("<f4")
        found.setdefault((int(match[1]), module), {})[side] = layout.from_blocks(raw.view(np.uint8), whole, 32)
    lacking = [f"layers.{i}.attn.{m}" for (i, m), sides in found.items() if len(sides) < 2]
    if lacking or not found:
        raise CheckpointError(f"{path}: a factor is missing: {', '.join(lacking) or 'all of them'}")
    return {key: Factors(**sides) for key, sides in found.items()}
