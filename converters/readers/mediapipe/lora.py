"""MediaPipe's LoRA files: the factors of q, k, v and o in every layer, for the gpu.

A weight's factors ``A [r, in]`` and ``B [out, r]`` lie in the gpu's blocks, in float16 for Gemma and in float32 for
Phi-2, whatever the header says; they are called ``w_prime_left`` and ``w_prime_right``, but the other way round for o.
There is no scale: MediaPipe's runtime adds ``B . A`` as it is.

MediaPipe's converter writes o's factors scrambled: it reads the transposed array as if it were not.  ``restored``
undoes that.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from converters.readers.mediapipe import layout
from converters.readers.mediapipe.container import LORA_RANK, BinFile
from llmjax.errors import CheckpointError, named

# Our names of the modules, and the file's.
PLACES = {"q": "q", "k": "k", "v": "v", "o": "post"}
_NAME = re.compile(r"params\.lm\.transformer\.x_layers_(\d+)\.self_attention\.(q|k|v|post)\.w_prime_(left|right)")


@dataclasses.dataclass(frozen=True)
class Factors:
    """Of one weight: A ``[r, in]`` and B ``[out, r]``, float32."""

    a: np.ndarray
    b: np.ndarray


def restored(factors: Factors) -> Factors:
    """The inverse of the scrambling of MediaPipe's converter."""
    a, b = factors.a, factors.b
    return Factors(np.ascontiguousarray(a.reshape(a.shape[::-1]).T), np.ascontiguousarray(b.reshape(b.shape[::-1]).T))


def read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[int, str], Factors]:
    """The factors as the file has them.

    Args:
      path: of the file.
      shapes: of the model's weights, by canonical name.

    Raises:
      CheckpointError: it is damaged, or made for another model.
    """
    file = BinFile(path)
    rank = file.numbers.get(LORA_RANK)
    if not rank:
        raise CheckpointError(f"{path}: no metadata {LORA_RANK}: this is a model, or no LoRA file of MediaPipe's")
    found: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    names = {place: module for module, place in PLACES.items()}
    for name, entry in file.entries.items():
        match = _NAME.fullmatch(name)
        module = match and names[match[2]]
        shape = match and shapes.get(f"layers.{match[1]}.attn.{module}.weight")
        if not match or not module or not shape:
            raise CheckpointError(f"{path}: tensor {named(name)}: no LoRA factor of this model's q, k, v or o")
        side = "a" if (match[3] == "left") == (module != "o") else "b"
        whole = (rank, shape[1]) if side == "a" else (shape[0], rank)
        count = layout.stored_bytes(whole, 32, "gpu") // 4
        if entry.nbytes not in (2 * count, 4 * count):
            raise CheckpointError(
                f"{path}: tensor {named(name)}: expected {2 * count} or {4 * count} bytes for {list(whole)}, found "
                f"{entry.nbytes}; it belongs to a model of other dimensions"
            )
        raw = file.raw(name).view("<f2" if entry.nbytes == 2 * count else "<f4").astype("<f4")
        found.setdefault((int(match[1]), module), {})[side] = layout.from_blocks(raw.view(np.uint8), whole, 32)
    lacking = [f"layers.{i}.attn.{m}" for (i, m), sides in found.items() if len(sides) < 2]
    if lacking or not found:
        raise CheckpointError(f"{path}: a factor is missing: {', '.join(lacking) or 'all of them'}")
    return {key: Factors(**sides) for key, sides in found.items()}
