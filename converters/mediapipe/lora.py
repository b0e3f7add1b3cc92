"""The tensors of MediaPipe's LoRA files, which ``readers.mediapipe.lora`` describes."""

from collections.abc import Iterator, Mapping

import numpy as np

from converters.readers.mediapipe import layout
from converters.readers.mediapipe.container import Entry
from converters.readers.mediapipe.lora import PLACES, Factors
from llmjax.errors import LoraError

# Of files: whether o's factors are as MediaPipe's converter leaves them.
O_PROJ: tuple[str, ...] = ("mediapipe", "right")


def scrambled(factors: Factors) -> Factors:
    """What the runtime reads where the converter was given ``factors``."""
    a, b = factors.a, factors.b
    return Factors(a.T.reshape(a.shape), b.T.reshape(b.shape))


def dtype_of(model_type: str) -> np.dtype:
    """What the file of a model type (MediaPipe's name) holds."""
    return np.dtype(np.float32 if model_type == "PHI_2" else np.float16)


def tensors(factors: Mapping[tuple[int, str], Factors], model_type: str) -> Iterator[tuple[Entry, np.ndarray]]:
    """The file's tensors in its order.

    Args:
      factors: by layer and ``q``, ``k``, ``v`` or ``o``.
      model_type: MediaPipe's name.

    Raises:
      LoraError: factors that the file's dtype would make infinite, all of them named.
    """
    dtype = dtype_of(model_type)
    largest = {f"layers.{i}.attn.{m}": max(np.abs(f.a).max(), np.abs(f.b).max()) for (i, m), f in factors.items()}
    with np.errstate(over="ignore"):
        too_large = [f"{name}: {size:g}" for name, size in largest.items() if np.isinf(size.astype(dtype))]
    if too_large:
        raise LoraError(
            "\n  ".join(
                [
                    f"factors of {model_type} are {dtype} in MediaPipe's files, expected at most "
                    f"{np.finfo(dtype).max:g}; make A smaller and B larger by the same factor, or the other way round:",
                    *too_large,
                ]
            )
        )
    for layer in range(1 + max(i for i, _ in factors)):
        for module, place in PLACES.items():
            found = factors[layer, module]
            for name, values in _named(layer, module, place, found):
                data = _to_blocks(values.astype(dtype))
                yield Entry(name, "FLOAT32", (data.nbytes,), data.nbytes), data


def raw_files(factors: Mapping[tuple[int, str], Factors]) -> Iterator[tuple[str, np.ndarray, tuple[int, int]]]:
    """The weight files of factors: name, values, and the shape that ``layer_info.txt`` gives them.

    They are listed as transposed.  Those of o are read as if they were not, so they are what the file shall hold.

    Args:
      factors: as ``tensors`` takes them.
    """
    for (layer, module), found in factors.items():
        for name, values in _named(layer, module, PLACES[module], found):
            out, width = values.shape
            yield name, values if module == "o" else values.T, (width, out)


def _named(layer: int, module: str, place: str, factors: Factors) -> list[tuple[str, np.ndarray]]:
    sides = ("left", "right") if module != "o" else ("right", "left")
    name = f"params.lm.transformer.x_layers_{layer}.self_attention.{place}.w_prime_"
    return [(name + side, values) for side, values in zip(sides, (factors.a, factors.b), strict=True)]


def _to_blocks(values: np.ndarray) -> np.ndarray:
    # Blocks move values about without looking at them; those of 32 bits are the only floats the layout knows.
    blocks = layout.to_blocks(values.astype(np.float32), (values.shape[0], values.shape[1]), 32)
    return blocks.view("<f4").astype(values.dtype)
