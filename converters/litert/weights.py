"""A checkpoint's weights as a graph holds them: which form each has, and its bytes, some rows at a time.

The rule is ai-edge-quantizer's, bit for bit: a scale is the largest value over 127 or 7, of blocks rounded to bfloat16;
a value is rounded half to even and is never -128 or -8.
"""

import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import IO

import ml_dtypes
import numpy as np

from converters.litert.graph import FLOAT32, File, Form, Stack, Weight
from converters.readers.source import Source
from llmjax.checkpoint.parameters import OnParameter, Stored, check_tied, stored
from llmjax.checkpoint.plan import Plan
from llmjax.errors import CheckpointError, ConfigError
from llmjax.lora import merge as merging
from llmjax.quant.arrays import row_chunks
from llmjax.quant.qtensor import QTensor, pack
from llmjax.quant.schemes import Recipe, Scheme, role_of

SCHEMES = ("int8", "int4", "int4-g32", "int4-g64")
# Values of what stands in the flatbuffer and may be computed with before it does.
_SMALL = 1 << 20
BLOCKS = ((4, 32), (4, 64))  # bits, and inputs that share a scale


def split(
    source: Source, plan: Plan, recipe: Recipe | None, merge: merging.Merge
) -> tuple[dict[str, np.ndarray], dict[str, Weight | Stack]]:
    """The small parameters, float32, and what is to become of each weight.

    Raises:
      CheckpointError: NaN or infinite values in the small ones.
      ConfigError: a scheme that LiteRT lacks, or that does not fit a weight.
    """
    small: dict[str, np.ndarray] = {}
    weights: dict[str, Weight | Stack] = {}
    for parameter in stored(source, plan, merge):
        shape = parameter.shape
        if role_of(parameter.name) is None and (len(shape) < 2 or math.prod(shape) < _SMALL):
            small[parameter.name] = _finite(parameter.name, parameter.rows(0, shape[0]).astype(np.float32))
            continue
        scheme = None if recipe is None else recipe.scheme(parameter.name)
        form = held(parameter.packed()) if recipe is None else _form(scheme, parameter.name, shape)
        size = (shape[-2], shape[-1])
        names = [f"{parameter.name}.{i}" for i in range(shape[0])] if len(shape) > 2 else []
        stack = tuple(Weight(name, size, form) for name in names)
        weights[parameter.name] = Stack(stack) if stack else Weight(parameter.name, size, form)
    return small, weights


def check(recipe: Recipe) -> None:
    """Raises ConfigError for a scheme that LiteRT does not have."""
    for scheme in (s for roles in (recipe.roles, *(own for *_, own in recipe.layers)) for s in roles.values() if s):
        if not scheme.symmetric or scheme.mse or (scheme.group and (scheme.bits, scheme.group) not in BLOCKS):
            raise ConfigError(f"quantize: {scheme}: LiteRT has {', '.join(SCHEMES)}")


def _form(scheme: Scheme | None, name: str, shape: tuple[int, ...]) -> Form:
    if scheme is None:
        return FLOAT32
    unit = scheme.group or (2 if scheme.bits == 4 else 1)
    if shape[-1] % unit:
        raise ConfigError(f"quantize: {name}: {scheme}: {shape[-1]} inputs are not a multiple of {unit}")
    return Form(f"INT{scheme.bits}", scheme.group or 0)


def held(packed: QTensor | None) -> Form:
    """The form that holds the values of a packed weight as they are; float32 where none does."""
    if (
        packed is None
        or packed.offsets is not None
        or packed.bits == 5
        or packed.zero != (8 if packed.bits == 4 else 0)
    ):
        return FLOAT32
    if packed.scales.shape[-1] == 1:
        return Form(f"INT{packed.bits}")
    scales = packed.scales.astype(np.float32)
    exact = (scales == _block_scales(scales).astype(np.float32)).all()
    return Form("INT4", packed.group) if (packed.bits, packed.group) in BLOCKS and exact else FLOAT32


def _block_scales(scales: np.ndarray) -> np.ndarray:
    """As XNNPACK takes them and the file has them: bfloat16's digits in float16."""
    return scales.astype(ml_dtypes.bfloat16).astype(np.float16)


def write(
    out: IO[bytes],
    file: File,
    source: Source,
    plan: Plan,
    weights: Mapping[str, Weight | Stack],
    merge: merging.Merge,
    report: OnParameter,
) -> None:
    """Writes the file from where ``out`` stands: the weights first, for their scales stand before them."""
    start = out.tell()
    for done, parameter in enumerate(stored(source, plan, merge), 1):
        if parameter.name in weights:
            _write(out, start, file, parameter, weights[parameter.name])
        report(done, len(plan.assignments))
    out.seek(start)
    out.write(file.header())
    out.truncate(start + file.size)
    check_tied(source, plan)
    if merge.survivals:
        warnings.warn(merging.describe(merge.survivals), stacklevel=3)


def _write(out: IO[bytes], start: int, file: File, parameter: Stored, weight: Weight | Stack) -> None:
    for one, part in zip(_each(parameter), weight.parts, strict=True):
        values, scales = file.places[part.name]
        found = []
        out.seek(start + values)
        for rows, their in _rows(one, part):
            out.write(rows)
            found.append(their)
        if part.blocks:
            out.seek(start + scales)
            out.write(np.concatenate(found).tobytes())
        elif part.form != FLOAT32:
            part.scales = np.concatenate(found)[:, 0]


def _each(parameter: Stored) -> Iterator[Stored]:
    """A weight, or of a stack ``[E, out, in]`` each."""
    if len(parameter.shape) == 2:
        yield parameter
        return
    stack = functools.cache(parameter.packed)
    for i in range(parameter.shape[0]):
        yield _expert(parameter, stack, i)


def _expert(parameter: Stored, stack: Callable[[], QTensor | None], number: int) -> Stored:
    @functools.cache
    def floats() -> np.ndarray:
        return parameter.rows(number, number + 1)[0]

    def rows(start: int, stop: int) -> np.ndarray:
        return floats()[start:stop]

    def packed() -> QTensor | None:
        found = stack()
        return None if found is None else found.map(operator.itemgetter(number))

    return Stored(f"{parameter.name}.{number}", parameter.shape[1:], rows, packed)


def _rows(parameter: Stored, weight: Weight) -> Iterator[tuple[bytes, np.ndarray]]:
    """The bytes of some rows after the other, and their scales ``[rows, G]`` as the file has them."""
    form, packed = weight.form, parameter.packed()
    keep = packed is not None and held(packed) == form != FLOAT32
    for part in row_chunks(weight.shape):
        if keep:
            assert packed is not None
            rows = packed.map(operator.itemgetter(part))
            _finite(weight.name, rows.scales)
            scales = rows.scales.astype(np.float16 if form.block else np.float32)
            yield (rows.values ^ np.uint8(0x88) if form.bits == 4 else rows.values).tobytes(), scales
            continue
        w = _finite(weight.name, parameter.rows(part.start, part.stop).astype(np.float32))
        if form == FLOAT32:
            yield w.tobytes(), np.zeros((len(w), 0))
            continue
        n, scales = quantized(w, form)
        yield (pack(n & 15) if form.bits == 4 else n).tobytes(), scales


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    """``values``, which a file that is not run would hold as they are."""
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name}: NaN or infinite weights; the checkpoint is damaged")
    return values


def quantized(w: np.ndarray, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """int8 ``[rows, in]`` of a few bits, and their scales ``[rows, G]``, float32 or of blocks float16."""
    most = (1 << (form.bits - 1)) - 1
    groups = w.reshape(len(w), -1, form.block or w.shape[1])
    scales = np.maximum(groups.max(-1), -groups.min(-1)) / np.float32(most)
    scales[scales == 0] = 1
    if form.block:
        scales = _block_scales(scales)
    with np.errstate(divide="ignore", invalid="ignore"):
        n = groups / scales.astype(np.float32)[..., None]
    n = np.clip(np.rint(n, out=n), -most, most, out=n)
    if form.block:  # whose scale may have become 0
        np.nan_to_num(n, copy=False)
    return n.astype(np.int8).reshape(w.shape), scales
