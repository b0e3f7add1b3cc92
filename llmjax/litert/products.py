"""Products with a graph's weights, as LiteRT's interpreter computes them.

A quantized weight that an operator takes as it is has its activations rounded to 8 bits at run time, by XNNPACK's rule
(``rounded``); one that passes a DEQUANTIZE first means its dequantized values.  ``scripts/litert_int8.py`` checks the
rule on the runtime, where it is right to the last bit or so.  Under the profile ``reference`` activations are never
rounded.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.custom_batching import custom_vmap

from llmjax.litert import approximations
from llmjax.numerics import REFERENCE, Numerics, resolve
from llmjax.products.digits import integer_product
from llmjax.products.matmul import matmul
from llmjax.quant.qtensor import QTensor, dequantize

_FLOAT32 = resolve(REFERENCE, jnp.dtype(jnp.float32))
_TINY = np.finfo(np.float32).tiny
_ROWS_APART = 8
_MOST_APART = 1 << 24  # multiplications
_MOST_TAPS = 25


class Filter(struct.PyTreeNode):
    """A quantized constant that is no matrix: integers, and scales that broadcast to them."""

    values: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the integers."""
        return self.values.shape


class Dequantized(struct.PyTreeNode):
    """A weight behind a DEQUANTIZE: what it stands for, not yet computed."""

    weight: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.weight.shape


class Computed(struct.PyTreeNode):
    """A weight that the graph computes: products with it XNNPACK leaves to the runtime's own kernel."""

    weight: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.weight.shape


class Square(struct.PyTreeNode):
    """What was multiplied with itself, and the product: XNNPACK sums squares without rounding them first."""

    root: jax.Array
    product: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of both."""
        return self.root.shape


Value = Any  # jax.Array | np.ndarray | QTensor | Filter | Dequantized | Computed | Square


def has_blocks(weight: QTensor) -> bool:
    """Whether a weight's scales are those of blocks, though one may be as long as a row.

    The step of activations goes to XNNPACK's products after such a scale, before a channel's.  Files hold scales of
    blocks in float16, of channels in float32; XNNPACK keeps the former in bfloat16.
    """
    return weight.scales.dtype == jnp.float16 or weight.scales.shape[1] > 1


def as_array(value: Value) -> jax.Array:
    """What a value stands for, as one array."""
    if isinstance(value, Dequantized | Computed):
        return as_array(value.weight)
    if isinstance(value, QTensor):
        return jnp.asarray(dequantize(value))
    if isinstance(value, Square):
        return value.product
    if isinstance(value, Filter):
        return value.values.astype(jnp.float32) * value.scales
    return value


def computed(weight: Value) -> Value:
    """A weight that is no constant of the file; one behind a DEQUANTIZE is as good as one."""
    return Computed(weight) if isinstance(weight, jax.Array) else weight


def rounded(x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """XNNPACK's 8 bits: ``q`` and ``zero``, whole numbers in float32, and ``step``: x is about ``(q - zero) * step``.

    Asymmetric: 255 steps from the least value to the greatest, zero always among them; both roundings to integers go to
    the even neighbour.

    Args:
      x: float32.
      axes: along which values share a step.
    """
    low = jnp.minimum(jnp.min(x, axes, keepdims=True), 0)
    high = jnp.maximum(jnp.max(x, axes, keepdims=True), 0)
    per_unit = jnp.where(low == high, jnp.float32(1), jnp.float32(255) / (high - low))
    low, high = low * per_unit, high * per_unit
    # The end that is left with the smaller error when the zero point is rounded.
    zero = jnp.where((-128 + low) + (127 + high) > 0, -128 - low, 127 - high)
    zero = jnp.round(jnp.clip(zero, -128, 127))
    q = jnp.clip(jnp.round(x * per_unit) + zero, -128, 127)
    step = 1 / per_unit
    return q, zero, jnp.where(step < _TINY, 0, step)  # XNNPACK runs with subnormal numbers off


@functools.partial(jax.jit, static_argnums=3)  # traced once for all layers alike
def fully_connected(x: jax.Array, weight: Value, bias: jax.Array | None, numerics: Numerics) -> jax.Array:
    """``x [rows, in] . weight [out, in] + bias -> float32 [rows, out]``.

    Of blocks XNNPACK adds up exact integers times their scale, block after block; with AVX2 four parts of them side by
    side.  Scales have 8 bits, so in float32 nothing of that is rounded, in whatever order, unless the scales of a row
    are many powers of two apart: of SmolLM2's 1.2 million products five differed.
    """
    if not len(x) * weight.shape[0]:
        return jnp.zeros((len(x), weight.shape[0]), jnp.float32)
    if isinstance(weight, QTensor) and numerics.name == "litert":
        q, zero, step = rounded(x, (-1,))
        if has_blocks(weight):
            scales = lax.reduce_precision(weight.scales.astype(jnp.float32), 8, 7)
            y = _by_rows(_float_product, q - zero, weight.replace(scales=scales)) * step
        else:
            y = _by_rows(_integer_product, q.astype(jnp.int8), weight, zero)
            y = y * step * weight.scales[:, 0].astype(jnp.float32)
    elif numerics.digits == 1 and isinstance(weight, Computed):
        y = _by_rows(_of_rounded, x, weight, jnp.zeros((len(x), weight.shape[0]), jnp.float32))
    elif numerics.digits == 1:  # beside weights whose activations are rounded
        start = jnp.float32(0) if bias is None else bias
        return _by_rows(_in_order, x, weight, jnp.broadcast_to(start, (len(x), weight.shape[0])))
    else:
        y = _by_rows(_float_product, x, weight.weight if isinstance(weight, Dequantized | Computed) else weight)
    return y if bias is None else y + bias


def _float_product(x: jax.Array, weight: Any) -> jax.Array:
    return matmul(x, weight, _FLOAT32)


def _in_order(x: jax.Array, weight: Any, start: jax.Array) -> jax.Array:
    """``start [rows, out] + x . weight^T`` as XNNPACK adds it up: one input after the other, each product rounded with
    the sum that it is added to."""
    return _one_by_one(lambda total, product: product + total, x, weight, start)


def _of_rounded(x: jax.Array, weight: Any, start: jax.Array) -> jax.Array:
    """As ``_in_order``, but that products are rounded first: the runtime's own kernel for floats."""
    return _one_by_one(lambda total, product: jnp.maximum(product, approximations.LEAST) + total, x, weight, start)


def _one_by_one(add: Callable[..., jax.Array], x: jax.Array, weight: Any, start: jax.Array) -> jax.Array:
    columns = as_array(weight).astype(jnp.float32).T

    def step(total: jax.Array, item: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return add(total, item[0][:, None] * item[1]), None

    return lax.scan(step, start, (x.T, columns))[0]


def _integer_product(q: jax.Array, weight: QTensor, zero: jax.Array) -> jax.Array:
    """``(q - zero) . n^T`` of int8 ``q [rows, in]`` and the weight's integers n: exact, then rounded to float32."""
    rows = jnp.concatenate([q, jnp.ones_like(q[:1])])  # the last gives the sums of n, which zero multiplies
    sums = integer_product(rows, weight)
    return (sums[:-1] - zero.astype(jnp.int32) * sums[-1:]).astype(jnp.float32)


def _by_rows(product: Callable[..., jax.Array], x: jax.Array, weight: Any, *more: jax.Array) -> jax.Array:
    """``product``, which meets a weight once, however many rows are computed side by side."""

    @custom_vmap
    def at_once(x: jax.Array, weight: Any, *more: jax.Array) -> jax.Array:
        return product(x, weight, *more)

    @at_once.def_vmap
    def _(size: int, batched: Any, x: jax.Array, weight: Any, *more: jax.Array) -> tuple[jax.Array, bool]:
        if any(jax.tree.leaves(batched[1])):
            axes = jax.tree.map(lambda b: 0 if b else None, tuple(batched))
            return jax.vmap(product, axes)(x, weight, *more), True
        rows = [
            (a if has else jnp.broadcast_to(a, (size, *a.shape))).reshape(-1, a.shape[-1])
            for a, has in zip((x, *more), (batched[0], *batched[2:]), strict=True)
        ]
        y = at_once(rows[0], weight, *rows[1:])
        return y.reshape(size, -1, y.shape[-1]), True

    return at_once(x, weight, *more)


def depthwise(x: jax.Array, weight: Value, bias: jax.Array | None, options: dict[str, Any], numerics: Numerics) -> Any:
    """``x [B, H, W, C]`` with a filter of its own for each channel, ``weight [1, h, w, C * m]``."""
    step = scales = None
    if isinstance(weight, Filter) and numerics.name == "litert":
        x, step = _rounded_whole(x)
        weight, scales = weight.values.astype(jnp.float32), weight.scales
    elif numerics.digits == 1 and _is_in_order(x, weight, options):
        return _taps_in_order(x, as_array(weight)[0], bias, options)
    kernel = as_array(weight)[0][:, :, None]
    y = lax.conv_general_dilated(
        x,
        kernel,
        (options["stride_h"], options["stride_w"]),
        ("SAME", "VALID")[options["padding"]],
        rhs_dilation=(options["dilation_h"], options["dilation_w"]),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3],
        precision=lax.Precision.HIGHEST,
    )
    if step is not None:
        y = jnp.maximum(y * jnp.asarray(scales).reshape(-1) * step, approximations.LEAST)  # rounded before the bias
    return y if bias is None else y + bias


def _rounded_whole(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whole numbers in float32, and their step: x is about their product.  A batch element has one step, by the rule of
    TFLite's own kernel, which the delegate leaves such filters to: as ``rounded``, but that halves go away from zero,
    and that the step is no reciprocal."""
    axes = (1, 2, 3)
    low = jnp.minimum(jnp.min(x, axes, keepdims=True), 0)
    high = jnp.maximum(jnp.max(x, axes, keepdims=True), 0)
    # Behind the barrier XLA does not know what to multiply by instead.
    step = jnp.where(low == high, 1, (high - low) / lax.optimization_barrier(jnp.float32(255)))
    low, high = low / step, high / step
    zero = _away(jnp.clip(jnp.where((-128 + low) + (127 + high) > 0, -128 - low, 127 - high), -128, 127))
    return jnp.clip(_away(x * (1 / step)) + zero, -128, 127) - zero, step


def _away(x: jax.Array) -> jax.Array:
    """The nearest whole numbers, halves away from zero."""
    whole = jnp.trunc(x)
    return whole + jnp.where(jnp.abs(x - whole) >= 0.5, jnp.sign(x), 0)


def _is_in_order(x: jax.Array, weight: Value, options: dict[str, Any]) -> bool:
    """Whether XNNPACK has a kernel for a filter; the runtime's own adds up in another order."""
    steps = (options[f"{what}_{along}"] for what in ("stride", "dilation") for along in "hw")
    return weight.shape[3] == x.shape[3] and weight.shape[1] * weight.shape[2] <= _MOST_TAPS and min(steps) > 0


def _taps_in_order(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, options: dict[str, Any]) -> jax.Array:
    """As ``depthwise``, ``kernel [h, w, C]``, added up as XNNPACK does: the bias first, then taps column by column."""
    strides = options["stride_h"], options["stride_w"]
    apart = options["dilation_h"], options["dilation_w"]
    spans = [(taps - 1) * d + 1 for taps, d in zip(kernel.shape, apart, strict=False)]
    pads = lax.padtype_to_pads(x.shape[1:3], spans, strides, ("SAME", "VALID")[options["padding"]])
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    sizes = [(n - span) // s + 1 for n, span, s in zip(x.shape[1:3], spans, strides, strict=True)]
    total = jnp.broadcast_to(jnp.float32(0) if bias is None else bias, (len(x), *sizes, x.shape[3]))
    for j, i in np.ndindex(kernel.shape[1::-1]):
        rows, columns = (slice(t * d, None, s) for t, d, s in zip((i, j), apart, strides, strict=True))
        total = x[:, rows, columns][:, : sizes[0], : sizes[1]] * kernel[i, j] + total
    return total


def batch_matmul(x: jax.Array, y: jax.Array, adj_x: bool, adj_y: bool, numerics: Numerics) -> jax.Array:
    """``x [..., m, k] . y [..., k, n]``, either of them the other way round.

    XNNPACK adds up in order.  XLA does so for a row by itself, not for several; so where activations are rounded behind
    it, the few rows of a decode step are a product each, which costs no more, and so are a small prefill's, one after
    the other.  A large one's would take many times as long.
    """
    x = jnp.swapaxes(x, -1, -2) if adj_x else x
    y = jnp.swapaxes(y, -1, -2) if adj_y else y
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    if x.shape[-2] == 1 or numerics.digits != 1:
        return product(x, y)
    if x.shape[-2] <= _ROWS_APART:
        return jnp.concatenate([product(row, y) for row in jnp.split(x, x.shape[-2], -2)], -2)
    if x.size * y.shape[-1] > _MOST_APART:
        return product(x, y)
    rows = lax.map(lambda row: product(row[..., None, :], y), jnp.moveaxis(x, -2, 0))
    return jnp.moveaxis(rows[..., 0, :], 0, -2)


def rotated(x: jax.Array, size: int) -> jax.Array:
    """``x [..., n * size]`` whose parts of ``size`` are multiplied by Hadamard's matrix over its root, as
    ai-edge-quantizer's ``aeq.hadamard_rotation`` has it: sums and differences of neighbours first.

    Raises:
      ValueError: no such matrix, or parts of another size.
    """
    if size < 2 or size & (size - 1) or x.shape[-1] % size:
        raise ValueError(f"hadamard_size {size} is no power of two that divides {x.shape[-1]}")
    y, apart = x, 1
    while apart < size:
        first, second = jnp.split(y.reshape(-1, 2, apart), 2, axis=1)
        y, apart = jnp.concatenate([first + second, first - second], 1), 2 * apart
    return y.reshape(x.shape) * (np.float32(1) / np.sqrt(np.float32(size)))
