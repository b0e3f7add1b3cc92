"""The catalogue of known mistakes, to be tried one after the other in our own code (``patching``).

Each is an ``Edit`` of one stage and the steps it acts on.  What does not apply to a model changes nothing there, and so
explains nothing.  To add one, write it beside its kin.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llmjax.models.attention import Scores
from llmjax.models.context import tap
from llmjax.models.layers import ACTIVATIONS, LayerNorm, RMSNorm, UnitOffsetRMSNorm, parameter, rms_normalised
from llmjax.models.rope import Rope
from llmjax.oracle.floors import requantized, rounded
from llmjax.oracle.stages import Edit, Hook, Params, Stages
from llmjax.quant.qtensor import QTensor

NORMS = ("attn_norm", "post_attn_norm", "mlp_norm", "post_mlp_norm", "attn.q_norm", "attn.k_norm", "final_norm")
PROJECTIONS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down", "head")
_SCHEMES = ("int8", "int4", "int8-g32", "int4-g32", "int4-g64", "int4-g128", "int8-asym", "int4-asym", "int4-g32-asym",
            "int4-g32-mse")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cause:
    """One mistake.

    Attributes:
      cause: the contract's word.
      detail: what exactly.
      steps: what it acts on, as taps are named within the stage.
      edit: how our code makes the same mistake.
      post: instead, what becomes of the step's right value.
    """

    cause: str
    detail: str
    steps: tuple[str, ...]
    edit: Edit = Edit()
    post: Callable[[np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a cause may look at.

    Attributes:
      stages: our model.
      stage: where the error is.
      step: the tap that shows it, as named within the stage.
      ours: what our step makes of the candidate's input.
      theirs: what the candidate has.
    """

    stages: Stages
    stage: int
    step: str
    ours: np.ndarray
    theirs: np.ndarray


# Mistakes that a runtime makes in all layers alike, where they are made in the code and not in a tensor.
EVERYWHERE = (
    "norm_eps", "norm_offset", "norm_kind", "activation", "rope_theta", "rope_dims", "rope_pairing", "rope_positions",
    "rope_scaling", "attention_scale", "attention_softcap", "final_softcap", "window", "mask", "head_mapping", "qk_norm",
    "alibi", "residual", "embedding_scale", "cache_precision",
)  # fmt: skip


def catalogue(scene: Scene) -> Iterator[Cause]:
    """All causes for a scene, the most specific first."""
    for norm in NORMS:
        yield from _norm(scene, norm)
    for projection in PROJECTIONS:
        yield from _projection(scene, projection)
    yield from _activation()
    yield from _rotation(scene)
    yield from _scores(scene)
    yield from _heads(scene)
    yield from _residual(scene)
    yield from _embedding(scene)
    yield from _head(scene)
    yield from _layers(scene)
    for dtype in ("bfloat16", "float16"):
        post = partial(_rounded, dtype=dtype)
        yield Cause("precision", f"the result is rounded to {dtype}", (scene.step,), post=post)


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32))


# Helpers: fields of a module, leaves of the parameters.


def field(**changes: Any) -> Hook:
    """Other fields of a module, where it has them; a function gets the old value."""

    def hook(module: nn.Module, run: Any, x: Any) -> Any:
        if any(getattr(module, name, None) is None for name in changes):
            return run(module, x)
        found = {n: v(getattr(module, n)) if callable(v) else v for n, v in changes.items()}
        return run(module.clone(**found), x)

    return hook


def leaf(step: str, name: str, change: Callable[[jax.Array], Any]) -> Callable[[Params], Params]:
    """One leaf of a module's parameters changed, if it is there; a tied head's weight is the embedding's."""

    def edit(params: Params, path: tuple[str, ...] = tuple(step.split("."))) -> Params:
        if path == ("head",) and "weight" not in params.get("head", {}) and name == "weight":
            path = ("embed",)
        if not path:
            return params | {name: change(params[name])} if name in params else params
        return params | {path[0]: edit(params[path[0]], path[1:])} if path[0] in params else params

    return edit


def _weight(scene: Scene, step: str, name: str = "weight", stage: int | None = None) -> Any:
    node: Any = scene.stages.params(scene.stage if stage is None else stage)
    for key in step.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    if step == "head" and (node is None or "weight" not in node):
        node = scene.stages.params(scene.stages.layers)["embed"] if name == "weight" else node
    return node.get(name) if isinstance(node, Mapping) else None


def _others(scene: Scene) -> Iterable[int]:
    """The other layers, the nearest first."""
    if not 0 <= scene.stage < scene.stages.layers:
        return ()
    return sorted(set(range(scene.stages.layers)) - {scene.stage}, key=lambda j: abs(j - scene.stage))


# Norms.


class _Identity(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return tap(self, "", x)


class _NoMean(nn.Module):
    """LayerNorm without taking the mean away."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = rms_normalised(x, self.eps) * parameter(self, "weight", nn.initializers.ones, x.shape[-1:])
        if self.has_variable("params", "bias"):
            y = y + self.get_variable("params", "bias")
        return tap(self, "", y.astype(x.dtype))


def _offset(module: Any, run: Any, x: Any) -> Any:
    kind = {RMSNorm: UnitOffsetRMSNorm, UnitOffsetRMSNorm: RMSNorm}.get(type(module))
    return run(kind(module.eps) if kind else module, x)


def _other_kind(module: Any, run: Any, x: Any) -> Any:
    if type(module) is LayerNorm:
        return run(_NoMean(module.eps), x)
    return run(module, x - jnp.mean(x, -1, keepdims=True))


def _norm(scene: Scene, step: str) -> Iterator[Cause]:
    here = (step,)

    def cause(word: str, detail: str, hook: Hook | None = None, params: Any = None) -> Cause:
        return Cause(word, detail, here, Edit({step: hook} if hook else {}, params or (lambda p: p)))

    missing = "qk_norm" if step.endswith(("q_norm", "k_norm")) else "norm_kind"
    yield cause(missing, "the norm is not applied", lambda module, run, x: run(_Identity(), x))
    yield cause("norm_offset", "1 + w and w are confused", _offset)
    yield cause("norm_kind", "root mean square and mean-and-variance norm are confused", _other_kind)
    for eps in (1e-5, 1e-6, 1e-12, 1e-8, 1e-4, 1e-3, 1e-2, 0.0):
        yield cause("norm_eps", f"epsilon is {eps:g}", field(eps=eps))
    yield cause("bias", "the norm's bias is not added", params=leaf(step, "bias", jnp.zeros_like))
    own = _weight(scene, step)
    if own is None:
        return
    for other in (n for n in NORMS if n != step):
        weight = _weight(scene, other)
        if weight is not None and weight.shape == own.shape and scene.stage < scene.stages.layers:
            yield cause("weight_swapped", f"the weight is that of {other}", params=leaf(step, "weight", _is(weight)))
    for j in _others(scene):
        weight = _weight(scene, step, stage=j)
        if weight is not None and weight.shape == own.shape:
            yield cause("weight_swapped", f"the weight is layer {j}'s", params=leaf(step, "weight", _is(weight)))
    yield cause("weight", "the norm's weight is left out (1)", params=leaf(step, "weight", jnp.ones_like))
    yield cause("weight", "the norm's weight is left out (0)", params=leaf(step, "weight", jnp.zeros_like))
    if scene.step == step and own.ndim == 1:
        scale = _fit(scene, own, step)
        if scale is not None:
            yield cause("weight", f"the weight is scaled by {scale:.4g}", params=leaf(step, "weight", lambda w: w * scale))
    yield cause("precision", "the norm is computed in bfloat16", _narrow_norm)


def _narrow_norm(module: Any, run: Any, x: Any) -> Any:
    """Squares, their mean and the root in bfloat16, the weight after it."""
    narrow = x.astype(jnp.bfloat16)
    mean = jnp.mean(narrow * narrow, -1, keepdims=True).astype(jnp.bfloat16)
    wanted = (narrow * jax.lax.rsqrt(mean + jnp.bfloat16(module.eps))).astype(jnp.float32)
    # The module normalises once more, which but for rounding changes nothing.
    return rounded(jnp.bfloat16)(run(module, wanted))


def _is(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def _fit(scene: Scene, weight: Any, step: str) -> float | None:
    """The factor of the weight that comes nearest; None where it is 1."""
    bias = _weight(scene, step, "bias")
    shift = 0.0 if bias is None else np.asarray(bias, np.float64)
    ours, theirs = (x.reshape(len(x), -1).astype(np.float64) - shift for x in (scene.ours, scene.theirs))
    scale = float((ours * theirs).sum() / max((ours**2).sum(), 1e-300))
    return None if abs(scale - 1) < 1e-6 else scale


# Products.


def _projection(scene: Scene, step: str) -> Iterator[Cause]:
    weight = _weight(scene, step)
    if weight is None or isinstance(weight, QTensor) or (step == "head") != (scene.stage == scene.stages.layers):
        return

    def cause(word: str, detail: str, change: Any, name: str = "weight") -> Cause:
        return Cause(word, detail, (step,), Edit(params=leaf(step, name, change)))

    yield cause("bias", "the bias is not added", jnp.zeros_like, "bias")
    yield cause("bias", "the bias is added twice", lambda b: 2 * b, "bias")
    if weight.shape[0] == weight.shape[1]:
        yield cause("weight_transposed", "the weight is transposed", lambda w: w.T)
    for other in (p for p in PROJECTIONS if p != step and step != "head"):
        theirs = _weight(scene, other)
        if theirs is not None and theirs.shape == weight.shape and other != "head":
            found = {name: _weight(scene, other, name) for name in ("weight", "bias")}
            yield Cause("weight_swapped", f"the weight is that of {other}", (step,), Edit(params=_put(step, found)))
    for j in _others(scene):
        same = _weight(scene, step, stage=j)
        if same is not None and same.shape == weight.shape:
            found = {name: _weight(scene, step, name, j) for name in ("weight", "bias")}
            yield Cause("weight_swapped", f"the weight is layer {j}'s", (step,), Edit(params=_put(step, found)))
    for scheme in _SCHEMES:
        yield cause("quantization", f"the weight is rounded to {scheme}", requantized(scheme))
    for dtype in ("bfloat16", "float16"):
        yield cause("quantization", f"the weight is rounded to {dtype}", rounded(dtype))
    if scene.step == step:
        scale = _fit(scene, weight, step)
        if scale is not None:
            yield cause("weight", f"the weight is scaled by {scale:.4g}", lambda w: w * scale)
        yield from _channels(scene, step)
    lora = _weight(scene, step, "lora")
    if lora is not None:
        yield cause("lora_scale", "the adapter is not applied", lambda a: a.replace(scale=a.scale * 0), "lora")
        for factor in (lora.a.shape[0], 1 / lora.a.shape[0], 2.0, 0.5, lora.a.shape[0] ** 0.5, 1 / float(lora.scale)):
            scaled = partial(lambda f, a: a.replace(scale=a.scale * f), factor)
            yield cause("lora_scale", f"the adapter's scale is {float(lora.scale) * factor:.4g}", scaled, "lora")


def _put(step: str, found: Mapping[str, Any]) -> Callable[[Params], Params]:
    def edit(params: Params) -> Params:
        for name, value in found.items():
            params = params if value is None else leaf(step, name, _is(value))(params)
        return params

    return edit


def _channels(scene: Scene, step: str) -> Iterator[Cause]:
    """A few rows of the weight scaled, each by its own factor."""
    bias = _weight(scene, step, "bias")
    shift = 0.0 if bias is None else np.asarray(bias, np.float64)
    ours, theirs = (x.reshape(len(x), -1).astype(np.float64) - shift for x in (scene.ours, scene.theirs))
    if len(ours) < 4:
        return
    scales = (ours * theirs).sum(0) / np.maximum((ours**2).sum(0), 1e-300)
    off = np.abs(scales - 1) > 1e-3
    if off.any():
        factor = jnp.asarray(np.where(off, scales, 1), jnp.float32)
        detail = f"{off.sum()} of {len(off)} output channels are scaled"
        edit = Edit(params=leaf(step, "weight", lambda w: w * factor[:, None]))
        yield Cause("weight", detail, (step,), edit)


def _activation() -> Iterator[Cause]:
    others: dict[str, Callable[[jax.Array], jax.Array]] = {
        "gelu (tanh)": ACTIVATIONS["gelu_pytorch_tanh"],
        "gelu (erf)": ACTIVATIONS["gelu"],
        "silu": ACTIVATIONS["silu"],
        "relu": ACTIVATIONS["relu"],
        "quick gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "relu squared": lambda x: jnp.square(jax.nn.relu(x)),
        "sigmoid": jax.nn.sigmoid,
        "nothing": lambda x: x,
    }
    for name, function in others.items():
        yield Cause("activation", f"the activation is {name}", ("mlp.act",), Edit({"mlp": field(activation=_is(function))}))


# The rotation.


class _Pairs(Rope):
    """Neighbours make a pair."""

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        to = np.concatenate([np.arange(0, self.dims, 2), np.arange(1, self.dims, 2), np.arange(self.dims, x.shape[-1])])
        return super().__call__(x[..., to], positions)[..., np.argsort(to)]


class _Backwards(Rope):
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return super().__call__(x, -positions)


@dataclasses.dataclass(frozen=True)
class _Apart:
    """Queries and keys rotated at positions of their own; the query is the first of the two."""

    rope: Rope
    moves: tuple[Callable[[jax.Array], jax.Array], ...]
    calls: list[int] = dataclasses.field(default_factory=list)

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        self.calls.append(0)
        return self.rope(x, self.moves[(len(self.calls) - 1) % 2](positions))


def _rope(change: Callable[[Rope], Any]) -> Edit:
    return Edit({"attn": field(rope=change)})


def _rotation(scene: Scene) -> Iterator[Cause]:
    steps = ("attn.q_rot", "attn.k_rot")
    config = scene.stages.model.config
    ropes = {r for r in vars(config).values() if isinstance(r, Rope)}
    if not ropes:
        return

    def cause(word: str, detail: str, change: Callable[[Rope], Any]) -> Cause:
        return Cause(word, detail, steps, _rope(change))

    replace = dataclasses.replace
    yield cause("rope_pairing", "neighbours are rotated together, not halves", lambda r: _Pairs(**vars(r)))
    yield cause("rope_pairing", "the rotation turns the other way", lambda r: _Backwards(**vars(r)))
    for name, value in {"linear": 1.0, "llama3": None, "divisors": None}.items():
        if any(getattr(r, name) != value for r in ropes):
            yield cause("rope_scaling", f"{name} scaling is ignored", lambda r, n=name, v=value: replace(r, **{n: v}))
    for factor in (2.0, 4.0, 8.0):
        yield cause("rope_scaling", f"positions are divided by {factor:g}", lambda r, f=factor: replace(r, linear=f))
    for other in ropes:
        if len(ropes) > 1:
            yield cause("rope_theta", f"the base is {other.theta:g}, another layer's", lambda r, o=other: replace(r, theta=o.theta))
            yield cause("rope_scaling", "the rotation is another layer's", lambda r, o=other: o)
    for theta in (1e4, 5e5, 1e6, 1e5, 5e3, 5e4, 2.5e5, 1e3):
        yield cause("rope_theta", f"the base is {theta:g}", lambda r, t=theta: replace(r, theta=t))
    width = config.head_dim
    for dims in sorted({width, width // 2, width // 4, int(width * 0.4), int(width * 0.75)} - {0}):
        if dims % 2 == 0:
            yield cause("rope_dims", f"{dims} of {width} dimensions rotate", lambda r, d=dims: replace(r, dims=d))
    yield cause("rope_dims", "nothing rotates", lambda r: lambda x, positions: x)
    moves: dict[str, Callable[[jax.Array], jax.Array]] = {
        "as they are": lambda p: p, "one too high": lambda p: p + 1, "one too low": lambda p: p - 1, "all 0": lambda p: 0 * p,
    }  # fmt: skip
    for q, at in moves.items():
        for k, other_at in moves.items():
            if (q, k) != ("as they are", "as they are"):
                detail = f"positions are {q}" if q == k else f"positions of queries are {q}, of keys {k}"
                yield cause("rope_positions", detail, lambda r, m=(at, other_at): _Apart(r, m))


# Scores.


@dataclasses.dataclass(frozen=True)
class _Altered(Scores):
    """A rule with something else in its place."""

    alter: Callable[..., Any] | None = None

    def __call__(self, products: Any, queries: Any, keys: Any, ctx: Any) -> Any:
        assert self.alter is not None
        return self.alter(super().__call__, self, products, queries, keys, ctx)


def _scored(change: Callable[[Scores], Scores]) -> Edit:
    return Edit({"attn": field(scores=change)})


def _altered(alter: Callable[..., Any]) -> Edit:
    return _scored(lambda s: _Altered(**vars(s), alter=alter))


def _future(by: int) -> Callable[..., Any]:
    """Sees ``by`` tokens after its own; the window's other end stays."""

    def alter(right: Any, rule: Scores, products: Any, queries: Any, keys: Any, ctx: Any) -> Any:
        scores, _ = right(products, queries, keys, ctx)
        mask = keys[:, None, :] <= queries[:, :, None] + by
        if rule.window is not None:
            mask &= keys[:, None, :] > queries[:, :, None] - rule.window
        return scores, mask[:, None, None]

    return alter


def _alibi(times: Callable[[Scores], float]) -> Callable[..., Any]:
    """The bias as often again."""

    def alter(right: Any, rule: Scores, products: Any, queries: Any, keys: Any, ctx: Any) -> Any:
        scores, mask = right(products, queries, keys, ctx)
        plain, _ = Scores(**{f.name: getattr(rule, f.name) for f in dataclasses.fields(Scores)} | {"alibi": False})(
            products, queries, keys, ctx
        )
        return plain + times(rule) * (scores - plain), mask

    return alter


def _narrow_scores(right: Any, rule: Scores, products: Any, queries: Any, keys: Any, ctx: Any) -> Any:
    scores, mask = right(products, queries, keys, ctx)
    return rounded(jnp.bfloat16)(scores), mask


def _scores(scene: Scene) -> Iterator[Cause]:
    config, steps = scene.stages.model.config, ("attn.probs",)

    def cause(word: str, detail: str, edit: Edit) -> Cause:
        return Cause(word, detail, steps, edit)

    def fields(**changes: Any) -> Edit:
        return _scored(lambda s: dataclasses.replace(s, **changes))

    windows = {w for w in getattr(config, "windows", ()) if w}
    if windows:
        yield cause("window", "there is no window", fields(window=None))
    near = sorted({w + by for w in windows for by in (-1, 0, 1)} | {2 * w for w in windows} | {max(w // 2, 1) for w in windows})
    for window in near:
        if window > 0:
            yield cause("window", f"the window is {window} tokens", fields(window=window))
    yield cause("mask", "the next token is seen", _altered(_future(1)))
    yield cause("mask", "all tokens are seen", _altered(_future(1 << 20)))
    yield cause("mask", "a token does not see itself", _altered(_future(-1)))
    caps = {None, 50.0, 30.0, 20.0}
    for cap in sorted(caps, key=lambda c: (c is not None, c or 0)):
        yield cause("attention_softcap", f"the soft-cap is {cap or 'missing'}", fields(softcap=cap))
    yield cause("alibi", "ALiBi is missing", fields(alibi=False))
    yield cause("alibi", "ALiBi is added twice", _altered(_alibi(lambda s: 2.0)))
    yield cause("alibi", "ALiBi is not scaled", _altered(_alibi(lambda s: 1 / s.scale)))
    yield cause("alibi", "ALiBi is rounded to bfloat16", Edit(numerics=lambda n: dataclasses.replace(n, round_alibi=True)))
    width, hidden, heads = config.head_dim, config.hidden_size, config.num_attention_heads
    scales = {1.0, width**-0.5, hidden**-0.5, (hidden / heads) ** -0.5, 1 / width, 1 / hidden, width**0.5, config.num_key_value_heads**-0.5}
    for scale in sorted(scales):
        yield cause("attention_scale", f"scores are scaled by {scale:.4g}", fields(scale=scale))
    for factor in (0.5, 2.0, 0.1, 10.0, 0.9, 1.1, 2**0.5, 0.5**0.5):
        edit = _scored(lambda s, f=factor: dataclasses.replace(s, scale=s.scale * f))  # type: ignore[misc]
        yield cause("attention_scale", f"scores are {factor:.4g} times too large", edit)
    if scene.step == "attn.probs":
        factor = _temperature(scene)
        if factor is not None:
            edit = _scored(lambda s: dataclasses.replace(s, scale=s.scale * factor))
            yield cause("attention_scale", f"scores are {factor:.4g} times too large", edit)
        rows = scene.theirs.sum(-1, keepdims=True)
        if (np.abs(rows - 1) > 1e-3).any():
            yield Cause("padding", "part of the attention goes to tokens that are not in the dump", steps, post=lambda x: x * rows)
    yield cause("precision", "scores are rounded to bfloat16 before the softmax", _altered(_narrow_scores))


def _temperature(scene: Scene) -> float | None:
    """How many times larger the candidate's scores are, from the logarithms of its probabilities."""
    ours, theirs = scene.ours.astype(np.float64), scene.theirs.astype(np.float64)
    seen = (ours > 1e-6) & (theirs > 1e-6)
    x, y = (np.where(seen, np.log(np.where(seen, p, 1)), 0) for p in (ours, theirs))
    count = np.maximum(seen.sum(-1, keepdims=True), 1)
    x, y = (np.where(seen, z - z.sum(-1, keepdims=True) / count, 0) for z in (x, y))
    scale = float((x * y).sum() / max((x * x).sum(), 1e-300))
    return None if not np.isfinite(scale) or abs(scale - 1) < 1e-4 else scale


# Heads and caches.


def _heads(scene: Scene) -> Iterator[Cause]:
    config = scene.stages.model.config
    n, k, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if 1 < k < n:
        tile = np.arange(n) % k

        def wide(x: jax.Array) -> jax.Array:  # [..., K * H] -> [..., N * H]
            return x.reshape(*x.shape[:-1], k, h)[..., tile, :].reshape(*x.shape[:-1], n * h)

        def projected(module: Any, run: Any, x: Any) -> Any:
            return wide(run(module.clone(features=k * h), x))

        for what in (("attn.k", "attn.v"), ("attn.k",), ("attn.v",)):
            tiled = {name: projected if name in what else _repeated(k, n, h) for name in ("attn.k", "attn.v")}
            edit = Edit({"attn": field(num_kv_heads=n), **tiled}, unpatched=("attn.k_rot", "attn.k_norm"))
            steps = ("attn.probs", "attn.out")[0 if "attn.k" in what else 1 : 2 if "attn.v" in what else 1]
            detail = f"key/value heads are tiled (query head i has head i mod {k}), not repeated"
            yield Cause("head_mapping", detail, steps, edit)
    for dtype in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        for names, steps in ((("attn.k_rot", "attn.v"), ("attn.probs", "attn.out")),):
            after = dict.fromkeys(names, rounded(dtype))
            yield Cause("cache_precision", f"keys and values are kept in {dtype}", steps, Edit(after=after))


def _repeated(k: int, n: int, h: int) -> Hook:
    def hook(module: Any, run: Any, x: Any) -> Any:
        y = run(module.clone(features=k * h), x)
        heads = y.reshape(*y.shape[:-1], k, h)
        return jnp.repeat(heads, n // k, -2).reshape(*y.shape[:-1], n * h)

    return hook


# Residuals: hooks that remember what the layer has seen.


def _residual(scene: Scene) -> Iterator[Cause]:
    taps = {tap.split(".", 2)[2] for tap in scene.stages.shapes if tap.startswith("layers.0.")}
    attn_end = "post_attn_norm" if "post_attn_norm" in taps else "attn"
    mlp_end = "post_mlp_norm" if "post_mlp_norm" in taps else "mlp"
    parallel = "resid_attn" not in taps

    def remembering(**extra: Callable[[dict[str, Any], Any], Any]) -> Edit:
        """Hooks on the ends of both branches and on what ``extra`` names (with ``_`` before it: on what goes in)."""
        seen: dict[str, Any] = {}

        def layer(module: Any, run: Any, x: Any) -> Any:
            seen["in"] = x
            return run(module, x)

        def hook(name: str) -> Hook:
            def inner(module: Any, run: Any, x: Any) -> Any:
                if name == "attn_norm":
                    seen["norm"] = (module, run)
                before = extra.get(f"_{name.replace('.', '_')}")
                y = run(module, x if before is None else before(seen, x))
                seen[name] = y
                after = extra.get(name)
                return y if after is None else after(seen, y)

            return inner

        return Edit({"": layer} | {name: hook(name) for name in ("attn_norm", attn_end, "mlp_norm", mlp_end)}
                    | ({"mlp": hook("mlp")} if mlp_end != "mlp" else {}))  # fmt: skip

    def middle(seen: dict[str, Any]) -> Any:
        return seen["in"] + seen[attn_end]

    first, last = (("resid",), ("resid",)) if parallel else (("resid_attn",), ("resid",))
    yield Cause("residual", "the attention's output is not added", first, remembering(**{attn_end: lambda s, y: 0 * y}))
    yield Cause("residual", "the layer's input is not added to the attention's output", first,
                remembering(**{attn_end: lambda s, y: y - s["in"]}))  # fmt: skip
    yield Cause("residual", "the layer's input is added twice", first, remembering(**{attn_end: lambda s, y: y + s["in"]}))
    yield Cause("residual", "the MLP's output is not added", last, remembering(**{mlp_end: lambda s, y: 0 * y}))
    for name, end, steps in (("attention", attn_end, first), ("MLP", mlp_end, last)):
        for factor in (0.5, 2.0):
            edit = remembering(**{end: lambda s, y, f=factor: f * y})  # type: ignore[misc]
            yield Cause("residual", f"the {name}'s output is added {factor:g} times", steps, edit)
    if parallel:
        own = "mlp_norm" in taps
        if own:
            yield Cause("residual", "attention and MLP are sequential, not parallel", ("mlp_norm",),
                        remembering(_mlp_norm=lambda s, x: middle(s)))  # fmt: skip
        else:
            yield Cause("residual", "attention and MLP are sequential, not parallel", ("mlp.gate", "mlp.up"),
                        remembering(_mlp=lambda s, x: _normed_again(s, middle(s))))  # fmt: skip
        return
    yield Cause("residual", "the residual is not added to the MLP's output", last,
                remembering(**{mlp_end: lambda s, y: y - middle(s)}))  # fmt: skip
    yield Cause("residual", "the MLP's output is added to the layer's input alone", last,
                remembering(**{mlp_end: lambda s, y: y - s[attn_end]}))  # fmt: skip
    yield Cause("residual", "attention and MLP are parallel, not sequential", ("mlp_norm", "mlp.gate", "mlp.up"),
                remembering(**({"_mlp_norm": lambda s, x: s["in"]} if "mlp_norm" in taps else {"_mlp": lambda s, x: s["in"]})))  # fmt: skip
    if "attn_norm" in taps:
        yield Cause("residual", "attention and MLP share the first norm's output", ("mlp_norm", "mlp.gate", "mlp.up"),
                    remembering(_mlp=lambda s, x: s["attn_norm"]))  # fmt: skip
        yield Cause("residual", "the normed input is added instead of the input", first,
                    remembering(**{attn_end: lambda s, y: y - s["in"] + s["attn_norm"]}))  # fmt: skip


def _normed_again(seen: dict[str, Any], x: Any) -> Any:
    module, run = seen["norm"]
    y = run(module.clone(), x)
    run(module.clone(), seen["in"])  # its tap shows the last run
    return y


# The ends, and whole layers.


def _embedding(scene: Scene) -> Iterator[Cause]:
    if scene.stage >= 0:
        return
    steps, config = ("embed",), scene.stages.model.config
    root = float(config.hidden_size) ** 0.5
    scales = {1.0: "missing", root: f"sqrt({config.hidden_size})", float(jnp.bfloat16(root)): "rounded to bfloat16",
              float(jnp.float16(root)): "rounded to float16", float(config.hidden_size): "applied twice", 1 / root: "a division"}  # fmt: skip
    for scale, text in scales.items():
        yield Cause("embedding_scale", f"the scale is {text} ({scale:g})", steps, Edit({"embed": field(scale=scale)}))
    for scheme in _SCHEMES:
        edit = Edit(params=leaf("embed", "weight", requantized(scheme)))
        yield Cause("quantization", f"the table is rounded to {scheme}", steps, edit)
    for dtype in ("bfloat16", "float16"):
        edit = Edit(params=leaf("embed", "weight", rounded(dtype)))
        yield Cause("quantization", f"the table is rounded to {dtype}", steps, edit)
    if scene.step != "embed":
        return
    wrong = np.flatnonzero(np.linalg.norm(scene.theirs - scene.ours, axis=-1) > 1e-2 * np.linalg.norm(scene.ours, axis=-1))
    if 0 < len(wrong):
        table = np.asarray(scene.stages.params(-1)["embed"]["weight"])
        rows = scene.theirs[wrong] / np.linalg.norm(scene.theirs[wrong], axis=-1, keepdims=True)
        norms = np.maximum(np.linalg.norm(table, axis=-1), 1e-30)
        likely = (rows @ table.T / norms).argmax(-1)
        fed = scene.stages.ids.copy()
        fed[wrong] = likely
        if not np.array_equal(fed, scene.stages.ids):
            pairs = ", ".join(f"{int(t)}: {int(fed[t])} for {int(scene.stages.ids[t])}" for t in wrong[:4])
            edit = Edit({"embed": lambda module, run, ids: run(module, jnp.asarray(fed)[None])})
            yield Cause("token_ids", f"other ids were fed (position {pairs})", steps, edit)
    scale = _fit(scene, None, "nothing")
    if scale is not None:
        yield Cause("weight", f"the table is scaled by {scale:.4g}", steps, Edit(params=leaf("embed", "weight", lambda w: w * scale)))


def _head(scene: Scene) -> Iterator[Cause]:
    if scene.stage < scene.stages.layers:
        return
    params = scene.stages.params(scene.stage)
    if "weight" in params.get("head", {}):
        table = params["embed"]["weight"]
        yield Cause("head", "the head is the embedding's table", ("head",), Edit(params=leaf("head", "weight", _is(table))))
    for cap in (None, 30.0, 50.0, 20.0):
        if hasattr(scene.stages.model.config, "final_logit_softcapping"):
            edit = Edit(config=lambda c, cap=cap: dataclasses.replace(c, final_logit_softcapping=cap))  # type: ignore[misc]
            yield Cause("final_softcap", f"the soft-cap on logits is {cap or 'missing'}", ("logits",), edit)
        elif cap:
            yield Cause("final_softcap", f"logits have a soft-cap of {cap:g}", ("logits", "head"),
                        post=lambda x, cap=cap: cap * np.tanh(x / cap))  # fmt: skip


def _layers(scene: Scene) -> Iterator[Cause]:
    if not 0 <= scene.stage < scene.stages.layers:
        return
    every = tuple({tap.split(".", 2)[2] for tap in scene.stages.shapes if tap.startswith(f"layers.{scene.stage}.")})
    for j in _others(scene):
        yield Cause("layer_order", f"the layer is layer {j}", every, Edit(params=_is(scene.stages.params(j))))
    skipped = Edit({"": lambda module, run, x: run(_Skip(), x)})
    yield Cause("layer_order", "the layer is left out", every, skipped)


class _Skip(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, ctx: Any) -> jax.Array:
        return tap(self, "resid", x)
