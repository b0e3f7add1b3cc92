"""Mistakes in what lies between the products: activation, scores, heads and caches, residuals."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.models.attention import Scores
from llmjax.models.gemma3n import above_cutoff
from llmjax.models.layers import ACTIVATIONS
from llmjax.oracle.causes.base import (
    Cause,
    Scene,
    begins,
    factors,
    field,
    nothing,
    weight_of,
)
from llmjax.oracle.floors import Change, in_blocks, rounded
from llmjax.oracle.stages import Edit, Hook, Params
from llmjax.oracle.steps import OUTER


def activation(scene: Scene) -> Iterator[Cause]:
    """Of the MLP's activation, of experts' and of a layer's own input's; where several are, of each alone, too."""
    weights = {"mlp": "mlp.gate", "experts": "experts.gate", "per_layer": "per_layer.gate"}
    steps = {"mlp": "mlp.act", "experts": "experts", "per_layer": "per_layer.act"}
    there = {module: step for module, step in steps.items() if weight_of(scene, weights[module]) is not None}
    alone = there if len(there) > 1 else {}
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
        hook, detail = field(activation=partial(_behind_cutoff, function)), f"the activation is {name}"
        yield Cause("activation", detail, tuple(steps.values()), Edit(dict.fromkeys(steps, hook)))
        for module, step in alone.items():
            yield Cause("activation", f"{detail} in {module} alone", (step,), Edit({module: hook}))
    hook = field(activation=lambda own: own.args[-1] if _cuts_off(own) else own)
    yield Cause("activation", "no neuron is cut off (activation_sparsity_pattern)", ("mlp.act",), Edit({"mlp": hook}))


def _cuts_off(own: Any) -> bool:
    return isinstance(own, partial) and own.func is above_cutoff


def _behind_cutoff(function: Callable[[jax.Array], jax.Array], own: Any) -> Callable[[jax.Array], jax.Array]:
    """Another function for a module's own, which may be of what lies above a cutoff alone (Gemma 3n)."""
    return partial(above_cutoff, own.args[0], function) if _cuts_off(own) else function


# Scores.


@dataclasses.dataclass(frozen=True)
class _Altered(Scores):
    """A rule with something else in its place."""

    alter: Callable[..., Any] | None = None

    def __call__(self, products: Any, queries: Any, keys: Any, ctx: Any, slopes: Any = None) -> Any:
        assert self.alter is not None
        return self.alter(partial(super().__call__, slopes=slopes), self, products, queries, keys, ctx)


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


def scores(scene: Scene) -> Iterator[Cause]:
    """Of scores and mask."""
    config, steps = scene.stages.model.config, ("attn.probs",)

    def cause(word: str, detail: str, edit: Edit) -> Cause:
        return Cause(word, detail, steps, edit)

    def fields(**changes: Any) -> Edit:
        return _scored(lambda s: dataclasses.replace(s, **changes))

    windows = {w for w in getattr(config, "windows", ()) if w}
    if windows:
        yield cause("window", "there is no window", fields(window=None))
    near = sorted(
        {w + by for w in windows for by in (-1, 0, 1)} | {2 * w for w in windows} | {max(w // 2, 1) for w in windows}
        | (_seen(scene.theirs) if scene.step == "attn.probs" else _since(scene.ours, scene.theirs))
    )  # fmt: skip
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
    yield cause(
        "alibi", "ALiBi is rounded to bfloat16", Edit(numerics=lambda n: dataclasses.replace(n, round_alibi=True))
    )
    width, hidden, heads = config.head_dim, config.hidden_size, config.num_attention_heads
    scales = {
        1.0,
        width**-0.5,
        hidden**-0.5,
        (hidden / heads) ** -0.5,
        1 / width,
        1 / hidden,
        width**0.5,
        config.num_key_value_heads**-0.5,
    }
    for scale in sorted(scales):
        yield cause("attention_scale", f"scores are scaled by {scale:.4g}", fields(scale=scale))

    def times(factor: float) -> Edit:
        return _scored(lambda s: dataclasses.replace(s, scale=s.scale * factor))

    for factor in (0.5, 2.0, 0.1, 10.0, 0.9, 1.1, 2**0.5, 0.5**0.5):
        yield cause("attention_scale", f"scores are {factor:.4g} times too large", times(factor))
    if scene.step != "attn.probs":
        for factor in factors(scene, "attention_scale", times):
            yield cause("attention_scale", f"scores are {factor:.5g} times too large", times(factor))
    else:
        if (temperature := _temperature(scene)) is not None:
            detail = f"scores are {temperature:.4g} times too large"
            yield cause("attention_scale", detail, times(temperature))
        rows = scene.theirs.sum(-1, keepdims=True)
        if (np.abs(rows - 1) > 1e-3).any():
            yield Cause(
                "padding",
                "part of the attention goes to tokens that are not in the dump",
                steps,
                post=lambda x: x * rows,
            )
    yield cause("precision", "scores are rounded to bfloat16 before the softmax", _altered(_narrow_scores))


def _seen(probs: np.ndarray) -> set[int]:
    """The window that probabilities ``[N, T, S]`` show, if all tokens that do not see the first show the same."""
    first = (probs > 0).any(0).argmax(-1)
    widths = {int(w) for w in (np.arange(len(first)) - first + 1)[first > 0]}
    return widths if len(widths) == 1 else set()


def _since(ours: np.ndarray, theirs: np.ndarray) -> set[int]:
    """The window of which the first token differs ``[T, ...]`` that does not see all before it; none where differences
    do not begin at a token."""
    at = begins(ours, theirs)
    return set() if at is None else {at - 1, at}


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

# Key/value heads that are each tried for every query head.
_HEADS = 16


def heads(scene: Scene) -> Iterator[Cause]:
    """Of which heads meet, and of what a cache keeps."""
    config = scene.stages.model.config
    n, k, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for what in (("attn.k", "attn.v"), ("attn.k",), ("attn.v",)) if 1 < k <= n else ():
        steps = ("attn.probs", "attn.out")[0 if "attn.k" in what else 1 : 2 if "attn.v" in what else 1]

        def met(order: np.ndarray, what: tuple[str, ...] = what) -> Edit:
            """Query head i meets key/value head ``order[i]``."""
            hooks = {x: _meeting(order if x in what else np.arange(n) // (n // k), k, h) for x in ("attn.k", "attn.v")}
            return Edit({"attn": field(num_kv_heads=n), **hooks}, unpatched=("attn.k_rot", "attn.k_norm"))

        if k < n:
            detail = f"key/value heads are tiled (query head i has head i mod {k}), not repeated"
            yield Cause("head_mapping", detail, steps, met(np.arange(n) % k))
        if scene.step in steps and k <= _HEADS:
            each = [x - scene.theirs for j in range(k) if (x := scene.under(met(np.full(n, j)))) is not None]
            if len(each) < k:
                continue
            axes = (1, 2) if scene.step == "attn.probs" else (0, 2)
            order = np.argmin([np.square(x if x.ndim == 3 else x.reshape(len(x), n, -1)).sum(axes) for x in each], 0)
            off = np.flatnonzero(order != np.arange(n) // (n // k))
            if len(off):
                some = ", ".join(f"{i} meets {order[i]}" for i in off[:4]) + (", ..." if len(off) > 4 else "")
                detail = f"{len(off)} of {n} query heads meet other key/value heads ({some})"
                yield Cause("head_mapping", detail, steps, met(order))
    for kept, change in _kept(h).items():
        after = dict.fromkeys(("attn.k_rot", "attn.v"), change)
        detail = f"keys and values are kept in {kept}"
        yield Cause("cache_precision", detail, ("attn.probs", "attn.out"), Edit(after=after))
    for late, by_step in (
        ("values", {"attn.out": "attn.v"}),
        ("keys", {"attn.probs": "attn.k_rot"}),
        ("keys and values", {"attn.probs": "attn.k_rot", "attn.out": "attn.v"}),
    ):
        detail = f"{late} are those of the token before, a slot late in the cache"
        yield Cause("mask", detail, tuple(by_step), Edit(after=dict.fromkeys(by_step.values(), _late)))


def _late(x: jax.Array) -> jax.Array:
    """Of tokens ``[B, T, ...]`` those before them, of the first its own."""
    return jnp.concatenate([x[:, :1], x[:, :-1]], 1)


def _kept(width: int) -> dict[str, Change]:
    """What a cache may hold, of heads of a width."""
    return {
        **{dtype: rounded(dtype) for dtype in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")},
        "int8, a scale for each head": partial(in_blocks, 127, width),
        "int8, a scale for each 32": partial(in_blocks, 127, 32),
        "int4, a scale for each 32": partial(in_blocks, 7, 32),
    }


def _meeting(order: np.ndarray, k: int, h: int) -> Hook:
    """A projection's ``k`` heads of width ``h`` in the order in which query heads meet them."""

    def hook(module: Any, run: Any, x: Any) -> Any:
        y = run(module.clone(features=k * h), x)
        heads = y.reshape(*y.shape[:-1], k, h)[..., order, :]
        return heads.reshape(*y.shape[:-1], len(order) * h)

    return hook


# Residuals: hooks that remember what the layer has seen.


def residual(scene: Scene) -> Iterator[Cause]:
    """Of what is added to what: by hooks that remember what the layer has seen."""
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

        # What stands in the place of either in some layers.
        others = {module: hook("attn") for module in OUTER if module != "mlp" and attn_end == "attn"}
        others |= {"experts": hook("mlp")} if mlp_end == "mlp" else {"mlp": hook("mlp")}
        names = ("attn_norm", attn_end, "mlp_norm", mlp_end)
        return Edit({"": layer} | others | {name: hook(name) for name in names})

    def middle(seen: dict[str, Any]) -> Any:
        return seen["in"] + seen[attn_end]

    first, last = (("resid",), ("resid",)) if parallel else (("resid_attn",), ("resid",))
    yield Cause("residual", "the attention's output is not added", first, remembering(**{attn_end: lambda s, y: 0 * y}))
    yield Cause("residual", "the layer's input is not added to the attention's output", first,
                remembering(**{attn_end: lambda s, y: y - s["in"]}))  # fmt: skip
    yield Cause(
        "residual", "the layer's input is added twice", first, remembering(**{attn_end: lambda s, y: y + s["in"]})
    )
    yield Cause("residual", "the MLP's output is not added", last, remembering(**{mlp_end: lambda s, y: 0 * y}))
    for name, end, steps in (("attention", attn_end, first), ("MLP", mlp_end, last)):
        for factor in (0.5, 2.0):
            edit = remembering(**{end: lambda s, y, f=factor: f * y})
            yield Cause("residual", f"the {name}'s output is added {factor:g} times", steps, edit)
    if parallel:
        own = "mlp_norm" in taps
        if own:
            yield Cause("residual", "attention and MLP are sequential, not parallel", ("mlp_norm",),
                        remembering(_mlp_norm=lambda s, x: middle(s)))  # fmt: skip
        else:
            edit = remembering(_mlp=lambda s, x: _normed_again(s, middle(s)))
            yield Cause("residual", "attention and MLP are sequential, not parallel", ("mlp.gate", "mlp.up"),
                        dataclasses.replace(edit, unpatched=("attn_norm",)))  # fmt: skip
        return
    yield Cause("residual", "the residual is not added to the MLP's output", last,
                remembering(**{mlp_end: lambda s, y: y - middle(s)}))  # fmt: skip
    yield Cause("residual", "the MLP's output is added to the layer's input alone", last,
                remembering(**{mlp_end: lambda s, y: y - s[attn_end]}))  # fmt: skip
    yield Cause("residual", "attention and MLP are parallel, not sequential", ("mlp_norm", "mlp.gate", "mlp.up"),
                remembering(**{"_mlp_norm" if "mlp_norm" in taps else "_mlp": lambda s, x: s["in"]}))  # fmt: skip
    if "attn_norm" in taps:
        yield Cause("residual", "attention and MLP share the first norm's output", ("mlp_norm", "mlp.gate", "mlp.up"),
                    remembering(_mlp=lambda s, x: s["attn_norm"]))  # fmt: skip
        yield Cause("residual", "the normed input is added instead of the input", first,
                    remembering(**{attn_end: lambda s, y: y - s["in"] + s["attn_norm"]}))  # fmt: skip


def beside(scene: Scene) -> Iterator[Cause]:
    """Of what layers add beside attention and MLP, and of their scale (Gemma 3n and 4)."""
    for module, weight, what, steps in (
        ("per_layer", "gate", "what the layer's own input gives", ("streams", "resid")),
        ("laurel", "left", "the low-rank branch's output", ("resid_attn",)),
    ):
        if weight_of(scene, f"{module}.{weight}") is not None:
            yield Cause("residual", f"{what} is not added", steps, Edit({module: nothing}))
    if "scale" in scene.stages.params(scene.stage):

        def unscaled(params: Params) -> Params:
            return params | {"scale": jnp.ones_like(params["scale"])} if "scale" in params else params

        yield Cause("residual", "the layer's output is not scaled (layer_scalar)", ("resid",), Edit(params=unscaled))


def _normed_again(seen: dict[str, Any], x: Any) -> Any:
    module, run = seen["norm"]
    y = run(module.clone(), x)
    run(module.clone(), seen["in"])  # its tap shows the last run
    return y
