"""Classes of arithmetic, and what each does to every tap: measured by running our own model in their ways.

A class holds an error that is within ``MARGIN`` of what one of its ways does to the same step, where that way's traces
are there: most of the steps that it moves must have moved, at every token.  One step, or all but the first token,
that is off does not make a float32 run bfloat16.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.models.context import Context
from llmjax.models.delta import CHUNK, GatedDelta
from llmjax.models.layers import Projection, over
from llmjax.models.rope import Rope
from llmjax.numerics import Numerics
from llmjax.oracle.stages import Edit, Hook, Params
from llmjax.oracle.steps import LAYER
from llmjax.quant.qtensor import dequantize
from llmjax.quant.rounding import quantize
from llmjax.quant.schemes import Scheme

# One run is one sample of what an arithmetic does; another runtime's may be this many times worse.
MARGIN = 4.0
# A runtime is worse everywhere alike.  A step may be this many times as far off as the same step of the other layers,
# and always this many times as far as a way of its class (of few bits the finest).  One bit less makes it twice as far,
# a wrong zero point or another group's scale three times; the farthest of right runtimes' was 1.7 times its like where
# weights were of one kind, and up to twice in the middle of a mix.
LIKE, OWN = 2.5, 1.5
# What no measure falls below: a few float32 roundings.
LEAST = 1.5e-6
# The share of the steps moved by a way that must have moved for it to be the candidate's.
TRACES = 0.5
# What moves a step this many times less than a class is of more bits: weights of 6 in groups move it 5 times less than
# those of 4 do, those of 8 some 11 times; float16 moves it 8 times less than bfloat16.
FINER = {"int8": 8.0, "dynamic_int8": 8.0, "int4": 8.0, "bfloat16": 4.0}

Change = Callable[[jax.Array], jax.Array]


def weights(change: Change) -> Callable[[Params], Params]:
    """Changes the matrices of a stage, those of experts among them."""
    return partial(_edited, {"weight": lambda w: change(w) if w.ndim > 1 else w})


def _edited(changes: Mapping[str, Callable[[Any], Any]], params: Params) -> Params:
    """Changes leaves by their names; no product has a convolution's kernel."""
    found: dict[str, Any] = {}
    for name, leaf in params.items():
        if isinstance(leaf, Mapping):
            found[name] = leaf if name == "kernel" else _edited(changes, dict(leaf))
        else:
            found[name] = changes[name](leaf) if name in changes else leaf
    return found


def rounded(dtype: Any) -> Change:
    """To a dtype and back."""
    return lambda x: x.astype(dtype).astype(x.dtype)


def requantized(scheme: str) -> Change:
    """What a weight is after it was quantized; as it is where the scheme does not fit it."""

    def change(weight: jax.Array) -> jax.Array:
        parsed, array = Scheme.parse(scheme), np.asarray(weight)
        if array.shape[-1] % (parsed.group or 2):
            return weight
        rows = array.reshape(-1, array.shape[-1])  # of all experts
        made = dequantize(quantize(lambda a, b: rows[a:b], rows.shape, parsed))
        return jnp.asarray(made, jnp.float32).reshape(array.shape)

    return change


@dataclasses.dataclass(frozen=True)
class _Nudged:
    """Angles one rounding off."""

    rope: Rope

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        nudged = ctx.positions.astype(jnp.float32) * jnp.float32(1 + 2**-23)
        return self.rope(x, ctx.replace(positions=nudged, length=ctx.tokens))


class _OfSums(GatedDelta):
    """Decays from one token to another as differences of their running sums in a chunk, which transformers rounds."""

    def _read(
        self, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, decay: jax.Array, ctx: Context
    ) -> jax.Array:
        tokens = decay.shape[1]
        chunks = jnp.pad(decay, ((0, 0), (0, -tokens % CHUNK), (0, 0))).reshape(len(decay), -1, CHUNK, decay.shape[2])
        steps = jnp.diff(jnp.cumsum(chunks, 2), axis=2, prepend=0)
        return super()._read(q, k, v, beta, steps.reshape(len(decay), -1, decay.shape[2])[:, :tokens], ctx)


def _of_sums(module: Any, run: Any, x: jax.Array) -> Any:
    given = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
    return run(_OfSums(**given | {"parent": None}), x)


def _products(hook: Hook) -> dict[str, Hook]:
    """A hook for each product with a weight."""

    def projection(module: Any, run: Any, x: jax.Array) -> Any:
        return hook(module, run, x) if isinstance(module, Projection) else run(module, x)

    return {"head": hook, "*": projection}


def _other_order() -> Edit:
    """Sums from the other end, angles one rounding off, and decays as they are where sums of them are rounded."""

    def backwards(module: Any, run: Any, x: jax.Array) -> Any:
        return run(module, x[..., ::-1])

    def looked_up(module: Any, run: Any, ids: jax.Array) -> Any:
        return run(module, ids)[..., ::-1]

    def nudged(module: Any, run: Any, x: jax.Array) -> Any:
        rope = getattr(module, "rope", None)
        return run(module if rope is None else module.clone(rope=_Nudged(rope)), x)

    mirrored = {
        "weight": lambda w: w[:, ::-1] if w.ndim == 2 else w,
        "lora": lambda lora: lora.replace(a=lora.a[..., ::-1]),
    }
    lookups: dict[str, Hook] = {"embed": looked_up, "*.embed": looked_up}
    return Edit(lookups | {"attn": nudged, "delta": _of_sums} | _products(backwards), partial(_edited, mirrored))


def _ties_upwards(x: jax.Array) -> jax.Array:
    """Of experts with one score the last is chosen, not the first: 16 bits often tie, and who wins is no law."""
    return x + 1e-6 * jnp.max(jnp.abs(x), -1, keepdims=True) * over(jnp.arange(x.shape[-1], dtype=x.dtype), x)


def _narrow(dtype: Any) -> tuple[Edit, ...]:
    """Everything in 16 bits; products alone; weights alone."""

    def cast(params: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)

    everything = Numerics("hf", jnp.dtype(dtype), jnp.dtype(dtype), round_alibi=True)
    products = Numerics("hf", jnp.dtype(jnp.float32), jnp.dtype(dtype))
    return (
        Edit(params=cast, numerics=lambda _: everything),
        Edit(
            params=cast, numerics=lambda _: products, after=dict.fromkeys(("router", "router.project"), _ties_upwards)
        ),
        Edit(params=weights(rounded(dtype))),
    )


_KEPT = ("attn.k_rot", "attn.v", "attn.v_norm")


def _cache(dtype: Any, *beside: str) -> Edit:
    """What is kept, and steps ``beside`` it, rounded."""
    return Edit(after=dict.fromkeys((*_KEPT, *beside), rounded(dtype)))


def _small_cache(change: Change, queries: Change = lambda x: x) -> Edit:
    """What is kept in few bits, which a dump may show as it was or as it is kept; queries as they meet it."""
    kept = dict.fromkeys(_KEPT, change)
    return Edit(after=kept | {"attn.q_rot": queries}, dumped=kept)


def _whole_numbers(most: int) -> tuple[Edit, ...]:
    """A cache of whole numbers up to ``most``: in llama.cpp's blocks, whose products take queries in 8 bits; with a
    scale for each head of a key, each value."""
    blocks, queries = (partial(in_blocks, m, 32, kept=rounded(jnp.float16)) for m in (most, 127))
    return _small_cache(blocks, queries), _small_cache(lambda x: in_blocks(most, x.shape[-1], x))


def _activation16(module: Any, run: Any, x: jax.Array) -> Any:
    half, act = rounded(jnp.float16), module.activation
    return run(module.clone(activation=lambda y: half(act(half(y)))), x)


def _float8(x: jax.Array, scale: jax.Array) -> jax.Array:
    """To e4m3, the largest of which is 448, and back; what is larger than ``scale`` becomes that."""
    scale = jnp.maximum(scale, 1e-30) / 448
    return rounded(jnp.float8_e4m3fn)(jnp.clip(x / scale, -448, 448)) * scale


def _one_float8(x: jax.Array) -> jax.Array:
    return _float8(x, jnp.max(jnp.abs(x)))


def _rows_float8(module: Any, run: Any, x: jax.Array) -> Any:
    return run(module, _float8(x, jnp.max(jnp.abs(x), -1, keepdims=True)))


def _rows8(module: Any, run: Any, x: jax.Array) -> Any:
    scale = jnp.max(jnp.abs(x), -1, keepdims=True) / 127
    scale = jnp.where(scale == 0, 1, scale)
    return run(module, jnp.round(x / scale) * scale)


def in_blocks(most: int, size: int, x: jax.Array, kept: Change = lambda scale: scale) -> jax.Array:
    """Whole numbers up to ``most``, times a scale for each ``size`` of them as it is ``kept``."""
    if x.shape[-1] % size:
        return x
    blocks = x.reshape(*x.shape[:-1], -1, size)
    scale = jnp.max(jnp.abs(blocks), -1, keepdims=True) / most
    steps = jnp.round(blocks / jnp.where(scale == 0, 1, scale))
    return (steps * kept(scale)).reshape(x.shape)


def _of_range(bits: int) -> tuple[Edit, ...]:
    """Weights in so few bits that every format spans what is there: from the least to the largest of a row, or of 32.

    Four levels are 5 times as coarse as sixteen, which is beyond what int4 explains.
    """

    def change(size: int | None, weight: jax.Array) -> jax.Array:
        if weight.shape[-1] % (size or 1):
            return weight
        groups = weight.reshape(*weight.shape[:-1], -1, size or weight.shape[-1])
        low = jnp.min(groups, -1, keepdims=True)
        step = jnp.maximum(jnp.max(groups, -1, keepdims=True) - low, 1e-30) / (2**bits - 1)
        return (jnp.round((groups - low) / step) * step + low).reshape(weight.shape)

    return tuple(Edit(params=weights(partial(change, size))) for size in (None, 32))


def _cut(x: jax.Array) -> jax.Array:
    """The 13 bits left away that tf32 has not, as a tensor core does with what nobody rounded before."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFE000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _tf32(change: Change) -> Edit:
    """Every product's inputs, those of attention among them, with 10 bits behind the point, summed in float32."""

    def product(module: Any, run: Any, x: Any) -> Any:
        return run(module, change(x))

    met = dict.fromkeys((*_KEPT, "attn.q_rot", "attn.probs"), change)
    return Edit({"experts": product} | _products(product), weights(change), after=met)


def _static(bits: int) -> Edit:
    """Every step's result, and every product's input, in whole numbers with one scale for all tokens, as calibration
    finds it."""

    def change(x: jax.Array) -> jax.Array:
        flat = in_blocks(2 ** (bits - 1) - 1, x.size, x.reshape(1, -1))
        return flat.reshape(x.shape)

    def product(module: Any, run: Any, x: Any) -> Any:
        return run(module, change(x))

    every = dict.fromkeys((*LAYER, "embed", "final_norm", "head", "logits"), change)
    return Edit({"experts": product} | _products(product), after=every, dumped=every)


def _blocks8(size: int, module: Any, run: Any, x: jax.Array) -> Any:
    """A product's input in blocks of 8 bits, with scales in float16: llama.cpp's Q8_0, Q8_1 (of 32), Q8_K (of 256)."""
    return run(module, in_blocks(127, size, x, rounded(jnp.float16)))


# By class, from narrow to wide, the ways that are the class.
CLASSES: dict[str, Callable[[], tuple[Edit, ...]]] = {
    "float32": lambda: (_other_order(),),
    "gelu16": lambda: (Edit({"mlp": _activation16}),),
    # What meets a cache in llama.cpp is as narrow: queries, probabilities, and their sums where attention is fused.
    "cache_float16": lambda: (_cache(jnp.float16), _cache(jnp.float16, "attn.q_rot", "attn.probs", "attn.out")),
    "cache16": lambda: (_cache(jnp.float16), _cache(jnp.bfloat16)),
    "tf32": lambda: (_tf32(partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=10)), _tf32(_cut)),
    "float16": partial(_narrow, jnp.float16),
    "bfloat16": partial(_narrow, jnp.bfloat16),
    "static_int16": lambda: (_static(16),),
    "static_int8": lambda: (_static(8),),
    "cache_int8": partial(_whole_numbers, 127),
    # With a scale that calibration finds, and with none, as vLLM has it by default.
    "cache_float8": lambda: (_small_cache(_one_float8), _small_cache(lambda x: _float8(x, jnp.float32(448)))),
    "cache_int4": partial(_whole_numbers, 7),
    "block_int8": lambda: tuple(Edit(_products(partial(_blocks8, size))) for size in (32, 256)),
    "int8": lambda: tuple(Edit(params=weights(requantized(s))) for s in ("int8", "int8-g32")),
    "dynamic_int8": lambda: (Edit({"experts": _rows8} | _products(_rows8), weights(requantized("int8"))),),
    "float8": lambda: (
        Edit(params=weights(_one_float8)),
        Edit({"experts": _rows_float8} | _products(_rows_float8), weights(_one_float8)),
    ),
    "int4": lambda: tuple(Edit(params=weights(requantized(s))) for s in ("int4", "int4-g32")),
    "int3": partial(_of_range, 3),
    "int2": partial(_of_range, 2),
}
# Weights of few bits.
FEW = ("block_int8", "int8", "dynamic_int8", "float8", "int4", "int3", "int2")
# Activations in whole numbers, by scales that calibration found.
STATIC = ("static_int16", "static_int8")
# What makes no step one factor off, however coarse it is.
NO_FACTOR = (*FEW, "static_int8")
# Caches of few bits, which go with anything.
SMALL_CACHES = ("cache_int8", "cache_float8", "cache_int4")


def floor(measured: np.ndarray, float32: np.ndarray, margin: Any = MARGIN) -> np.ndarray:
    """The most that errors ``[whole, worst token]`` may be, from what a way does and what another order of sums does.

    Of the whole the noise may be ``margin`` times as strong: the error of two arrays one of which is the other and
    noise of ``r`` times its size is ``r / sqrt(2 + r^2)``, so that values which have nothing in common (1) never pass.
    """
    error, margin = np.hypot(np.maximum(measured, float32), LEAST), np.broadcast_to(margin, 2)
    return margin * error / np.sqrt([1 + (margin[0] ** 2 - 1) * error[0] ** 2, 1])
