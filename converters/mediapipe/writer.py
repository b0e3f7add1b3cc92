"""From parameters to a ``.bin`` file as MediaPipe's converter writes it, one parameter in memory at a time."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from converters.mediapipe import lora
from converters.mediapipe.bin_file import BinWriter
from converters.readers.mediapipe import layout
from converters.readers.mediapipe.container import BACKEND, LORA_RANK, MODEL_TYPE, PARAMETERS, VOCABULARY, Entry
from converters.readers.mediapipe.lora import Factors
from converters.readers.mediapipe.source import SCALE, SUM, ZERO, quotients
from llmjax.checkpoint import mediapipe_config, mediapipe_names
from llmjax.checkpoint.mediapipe_config import ModelType
from llmjax.checkpoint.parameters import OnParameter
from llmjax.models.config import DecoderConfig
from llmjax.models.names import sources_of
from llmjax.outside.whole import whole_file
from llmjax.quant.qtensor import QTensor

BACKENDS: tuple[str, ...] = ("cpu", "gpu")

Parameters = Iterator[tuple[str, "np.ndarray | QTensor"]]


@dataclasses.dataclass(frozen=True)
class Item:
    """One weight, norm or bias of the file.

    Attributes:
      name: MediaPipe's.
      place: ours.
      parameter: whose values it has: of a tied head those of ``embed.weight``.
      shape: ``[out, in]``, or ``[n]``.
      bits: 4 or 8; 32 for floats.
      has_zero: it is quantized asymmetrically.
    """

    name: str
    place: str
    parameter: str
    shape: tuple[int, ...]
    bits: int = 32
    has_zero: bool = False


# Role and bits of a quantized parameter: what ``items`` asks for.
Kept = Callable[[str], tuple[int, bool]]

_ATTENTION = {
    "cpu": ("attn_norm", "attn.k", "attn.q", "attn.v", "attn.o", "post_attn_norm"),
    "gpu": ("attn_norm", "attn.q", "attn.k", "attn.v", "attn.o", "post_attn_norm"),
}
_MLP = {
    "cpu": ("mlp_norm", "mlp.up", "mlp.down", "mlp.gate", "post_mlp_norm"),
    "gpu": ("mlp_norm", "mlp.gate", "mlp.up", "mlp.down", "post_mlp_norm"),
}


def items(
    shapes: dict[str, tuple[int, ...]], config: DecoderConfig, kind: ModelType, backend: str, kept: Kept
) -> list[Item]:
    """What the file holds, in its order.

    Args:
      shapes: of all parameters, by canonical name.
      config: the model's.
      kind: its model type.
      backend: ``cpu`` or ``gpu``.
      kept: bits of a parameter, and whether it has zero points.
    """
    names = mediapipe_names.names(kind.model_type, backend)
    filled = {parameter: parameter for parameter in shapes}
    if config.tie_word_embeddings and not kind.model_type.startswith("gemma"):
        filled["head.weight"] = "embed.weight"  # the format has two tables for these model types
    found = []
    for place in sorted(filled, key=lambda name: _order(name, kind, backend)):
        parameter = filled[place]
        (name,) = sources_of(place, names)[1]
        found.append(Item(name, place, parameter, shapes[parameter], *kept(parameter)))
    return found


def _order(parameter: str, kind: ModelType, backend: str) -> tuple[int, int, int, str]:
    """The cpu's files have all attention first, the gpu's go through the layers."""
    module, ending = parameter.rsplit(".", 1)
    if module == "embed" and kind.model_type.startswith("gemma") and backend == "cpu":
        module = "head"  # their one table stands where the others' head does
    ending = "0" if ending == "weight" else "1"
    found = re.fullmatch(r"layers\.(\d+)\.(.*)", module)
    if not found:
        places = ("head", "final_norm", "embed") if backend == "cpu" else ("", "final_norm", "head")
        return (0, -1, 0, ending) if module not in places else (2, 0, places.index(module), ending)
    layer, role = int(found[1]), found[2]
    attention, mlp = _ATTENTION[backend], _MLP[backend]
    if backend == "cpu":
        return (0, layer, attention.index(role), ending) if role in attention else (1, layer, mlp.index(role), ending)
    return 0, layer, (attention + mlp).index(role), ending


def entries(found: Sequence[Item], kind: ModelType, backend: str) -> list[Entry]:
    """The tensors of the file, in order."""
    result = []
    for item in found:
        type_ = {4: "INT4", 8: "INT8", 32: "FLOAT32"}[item.bits]
        shape = item.shape
        if len(shape) == 1 and kind.norm == "LAYER_NORM" and item.parameter.rsplit(".", 1)[0].endswith("norm"):
            shape = (1, 1, *shape)
        nbytes = 4 * shape[-1]
        if len(item.shape) == 2:
            nbytes = layout.stored_bytes((item.shape[0], item.shape[1]), item.bits, backend)
        weight = Entry(item.name, type_, shape if backend == "cpu" else (nbytes,), nbytes)
        if item.bits == 32:
            result.append(weight)
            continue
        size = 4 * item.shape[0]
        vector = (size,) if backend == "gpu" else (item.shape[0],)
        scale = Entry(item.name + SCALE, "FLOAT32", vector, size)
        total = Entry(item.name + SUM, "INT32", vector, size)
        zero = [Entry(item.name + ZERO, "FLOAT32", vector, size)] if item.has_zero else []
        if backend == "cpu":
            result += [weight, scale]  # and no zero points: MediaPipe drops them
        elif item.parameter == "embed.weight" and item is found[0]:
            result += [weight, total, scale, *zero]
        else:
            result += [scale, weight, total, *zero]
    return result


def write(
    path: Path,
    found: Sequence[Item],
    parameters: Parameters,
    config: DecoderConfig,
    kind: ModelType,
    backend: str,
    vocabulary: bytes,
    also: Callable[[Item, "np.ndarray | QTensor"], None] = lambda item, value: None,
    report: OnParameter = lambda done, total: None,
    *,
    new: bool = False,
) -> None:
    """Writes the file; it appears under its name when it is whole.

    Args:
      path: of the file.
      found: what ``items`` returned.
      parameters: every parameter by its canonical name, in any order.
      config: the model's.
      kind: its model type.
      backend: ``cpu`` or ``gpu``.
      vocabulary: a SentencePiece model.
      also: told every item with its values.
      report: called after each parameter.
      new: see ``whole_file``.

    Raises:
      CheckpointError: it cannot be written.
    """
    blobs = {
        PARAMETERS: mediapipe_config.parameters(config, kind, backend).SerializeToString(),
        VOCABULARY: vocabulary,
        BACKEND: backend.encode(),
    }
    uses: dict[str, list[Item]] = {}
    for item in found:
        uses.setdefault(item.parameter, []).append(item)
    with whole_file(path, new=new) as partial:
        writer = BinWriter(partial, kind.name, backend, entries(found, kind, backend), blobs, {MODEL_TYPE: kind.number})
        try:
            for done, (name, value) in enumerate(parameters, 1):
                for item in uses.pop(name):
                    also(item, value)
                    _write_item(writer, item, value, backend)
                report(done, done + len(uses))
            if uses:
                raise AssertionError(f"no values for {', '.join(uses)}")
        finally:
            writer.close()


def write_lora(
    path: Path,
    factors: Mapping[tuple[int, str], Factors],
    rank: int,
    config: DecoderConfig,
    kind: ModelType,
    vocabulary: bytes,
) -> None:
    """Writes a LoRA file; it appears under its name when it is whole.

    Raises:
      CheckpointError: it cannot be written.
    """
    blobs = {
        PARAMETERS: mediapipe_config.parameters(config, kind, "gpu").SerializeToString(),
        VOCABULARY: vocabulary,
        BACKEND: b"gpu",
    }
    found = list(lora.tensors(factors, kind.name))
    numbers = {MODEL_TYPE: kind.number, LORA_RANK: rank}
    with whole_file(path) as partial:
        writer = BinWriter(partial, kind.name, "gpu", [entry for entry, _ in found], blobs, numbers)
        try:
            for entry, data in found:
                writer.write(entry.name, data)
        finally:
            writer.close()


def _write_item(writer: BinWriter, item: Item, value: "np.ndarray | QTensor", backend: str) -> None:
    if not isinstance(value, QTensor):
        value = value.astype(np.float32, copy=False)
        in_blocks = len(item.shape) == 2 and backend == "gpu"
        shape = (item.shape[0], item.shape[-1])
        writer.write(item.name, layout.to_blocks(value, shape, 32) if in_blocks else value)
        return
    scales = value.scales[:, 0].astype(np.float32, copy=False)
    writer.write(item.name + SCALE, scales)
    if backend == "cpu":
        writer.write(item.name, value.values)
        return
    out, width = value.shape
    writer.write(item.name, layout.to_blocks(value.values, (out, width), value.bits))
    writer.write(item.name + SUM, layout.row_sums(value.values, value.bits))
    if value.offsets is not None:
        writer.write(item.name + ZERO, quotients(-value.offsets[:, 0], scales))
