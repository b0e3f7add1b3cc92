"""Mistakes in the rotation of queries and keys."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.models.context import Context
from llmjax.models.rope import Rope
from llmjax.oracle.causes.base import Cause, Scene, begins, factors, field
from llmjax.oracle.floors import rounded
from llmjax.oracle.measure import token_axis
from llmjax.oracle.stages import Edit

# What a fit looks at: so many tokens of the first, and positions that begin so far away.
_TOKENS, _MOST, _SHIFTS = 64, 512, 4096


class _Pairs(Rope):
    """Neighbours make a pair."""

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        to = np.concatenate([np.arange(0, self.dims, 2), np.arange(1, self.dims, 2), np.arange(self.dims, x.shape[-1])])
        return super().__call__(x[..., to], ctx)[..., np.argsort(to)]


class _Backwards(Rope):
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        return super().__call__(x, ctx.replace(positions=-ctx.positions))


@dataclasses.dataclass(frozen=True)
class _Apart:
    """Queries and keys rotated at positions of their own; the query is the first of the two."""

    rope: Rope
    moves: tuple[Callable[[jax.Array], jax.Array], ...]
    calls: list[int] = dataclasses.field(default_factory=list)

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        self.calls.append(0)
        move = self.moves[(len(self.calls) - 1) % 2]
        return self.rope(x, ctx.replace(positions=move(ctx.positions)))


@dataclasses.dataclass(frozen=True)
class _Times:
    """Cosines and sines so many times as large, at the scaling's frequencies or at ``plain`` ones."""

    rope: Rope
    plain: bool
    factor: float

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        if self.rope.scaling is None:
            return self.rope(x, ctx)
        rope = dataclasses.replace(self.rope, scaling=None) if self.plain else self.rope
        rotated, rest = x[..., : rope.dims], x[..., rope.dims :]
        return rope(jnp.concatenate([self.factor * rotated, rest], -1), ctx)


def _rope(change: Callable[[Rope], Any]) -> Edit:
    return Edit({"attn": field(rope=change)})


def rotation(scene: Scene) -> Iterator[Cause]:
    """Of the rotation."""
    steps = ("attn.q_rot", "attn.k_rot")
    config = scene.stages.model.config
    ropes = {r for r in vars(config).values() if isinstance(r, Rope)}
    if not ropes:
        return

    def cause(word: str, detail: str, change: Callable[..., Any]) -> Cause:
        return Cause(word, detail, steps, _rope(change))

    replace = dataclasses.replace
    yield cause("rope_pairing", "neighbours are rotated together, not halves", lambda r: _Pairs(**vars(r)))
    yield cause("rope_pairing", "the rotation turns the other way", lambda r: _Backwards(**vars(r)))
    for name, value in {"linear": 1.0, "llama3": None, "divisors": None, "scaling": None}.items():
        if any(getattr(r, name) != value for r in ropes):
            yield cause("rope_scaling", f"{name} scaling is ignored", lambda r, n=name, v=value: replace(r, **{n: v}))
    for factor in {getattr(r.scaling, "attention_factor", 1.0) for r in ropes} - {1.0}:
        yield cause("rope_scaling", f"only the factor of cosines and sines, {factor:.4g}, is scaling's",
                    lambda r, f=factor: _Times(r, True, f))  # fmt: skip
        yield cause("rope_scaling", f"the factor of cosines and sines, {factor:.4g}, is left out",
                    lambda r, f=factor: _Times(r, False, 1 / f))  # fmt: skip
    for factor in (2.0, 4.0, 8.0):
        yield cause("rope_scaling", f"positions are divided by {factor:g}", lambda r, f=factor: replace(r, linear=f))
    for other in ropes:
        if len(ropes) > 1:
            yield cause(
                "rope_theta",
                f"the base is {other.theta:g}, another layer's",
                lambda r, o=other: replace(r, theta=o.theta),
            )
            yield cause("rope_scaling", "the rotation is another layer's", lambda r, o=other: o)
    for theta in (1e4, 5e5, 1e6, 1e5, 5e3, 5e4, 2.5e5, 1e3):
        yield cause("rope_theta", f"the base is {theta:g}", lambda r, t=theta: replace(r, theta=t))
    width = config.head_dim
    for dims in sorted({width, width // 2, width // 4, int(width * 0.4), int(width * 0.75)} - {0}):
        if dims % 2 == 0:
            yield cause("rope_dims", f"{dims} of {width} dimensions rotate", lambda r, d=dims: replace(r, dims=d))
    yield cause("rope_dims", "nothing rotates", lambda r: lambda x, ctx: x)
    for dtype in ("bfloat16", "float16"):
        for what in ("cosines and sines", "frequencies", "angles"):
            yield cause("precision", f"{what} of the rotation are rounded to {dtype}",
                        lambda r, w=what, d=dtype: r if r.follows_length else _Coarse(r, w, d))  # fmt: skip
    moves: dict[str, Callable[[jax.Array], jax.Array]] = {
        "as they are": lambda p: p, "one too high": lambda p: p + 1, "one too low": lambda p: p - 1,
        "all 0": lambda p: 0 * p,
    }  # fmt: skip
    for q, at in moves.items():
        for k, other_at in moves.items():
            if (q, k) != ("as they are", "as they are"):
                detail = f"positions are {q}" if q == k else f"positions of queries are {q}, of keys {k}"
                yield cause("rope_positions", detail, lambda r, m=(at, other_at): _Apart(r, m))
    start = begins(scene.ours, scene.theirs, token_axis(scene.step))
    if start is not None:  # as of a prompt's end: what is drawn behind it has been counted otherwise
        behind: dict[str, Callable[[jax.Array], jax.Array]] = {
            "are one too high": lambda p: p + (p >= start), "are one too low": lambda p: p - (p >= start),
            "begin again at 0": lambda p: p - start * (p >= start),
        }  # fmt: skip
        for what, move in behind.items():
            detail = f"from token {start} on positions {what}"
            yield cause("rope_positions", detail, lambda r, m=move: _Apart(r, (m, m)))
    if scene.step not in steps:
        bases = sorted({r.theta for r in ropes})
        for factor in factors(scene, "rope_theta", lambda f: _rope(lambda r: replace(r, theta=r.theta * f))):
            detail = f"the base is {', '.join(f'{factor * base:.5g}' for base in bases)}"
            yield cause("rope_theta", detail, lambda r, f=factor: replace(r, theta=r.theta * f))
    yield from _fitted(scene, ropes, cause)


@dataclasses.dataclass(frozen=True)
class _Coarse:
    """A rotation in float32 by a table that was made in 16 bits: frequencies, angles from such ones, or the table."""

    rope: Rope
    what: str
    dtype: str

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        coarse, half = rounded(self.dtype), self.rope.dims // 2
        frequencies = jnp.asarray(self.rope.frequencies())
        if self.what != "cosines and sines":
            frequencies = coarse(frequencies)
        angles = ctx.positions[..., None].astype(jnp.float32) * frequencies
        if self.what == "angles":
            angles = coarse(angles)
        factor = 1.0 if self.rope.scaling is None else self.rope.scaling.attention_factor
        cos, sin = (f(angles)[:, :, None] * jnp.float32(factor) for f in (jnp.cos, jnp.sin))
        if self.what == "cosines and sines":
            cos, sin = coarse(cos), coarse(sin)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _fitted(scene: Scene, ropes: set[Rope], cause: Callable[..., Cause]) -> Iterator[Cause]:
    """Another base, and positions that begin elsewhere, as the candidate's own rotation has them."""
    if scene.step not in ("attn.q_rot", "attn.k_rot") or len(scene.ours) < 2:
        return
    for rope in ropes:
        half = rope.dims // 2
        if rope.follows_length or 2 * half > scene.ours.shape[-1]:
            continue
        # [T, dims / 2]: by how much more the candidate has turned each pair, as a complex number.
        ours, theirs = (x[..., :half] + 1j * x[..., half : 2 * half] for x in (scene.ours, scene.theirs))
        turned = (theirs * ours.conj()).sum(1)
        own = rope.frequencies().astype(np.float64)
        # The same for all tokens, as far as positions begin elsewhere.
        shifts = np.arange(-_SHIFTS, _SHIFTS + 1)
        shift = int(shifts[(turned.sum(0) * np.exp(-1j * np.outer(shifts, own))).sum(1).real.argmax()])
        if shift:
            yield cause(
                "rope_positions", f"positions begin at {shift}", lambda r, s=shift: _Apart(r, (lambda p: p + s,) * 2)
            )
        few = np.unique(np.linspace(0, min(len(turned), _MOST) - 1, _TOKENS).astype(int))
        low, high = np.log(10.0), np.log(1e9)
        for count in (1000, 40, 40, 40, 40):
            logs = np.linspace(low, high, count)
            best = logs[
                np.argmax([_fit(dataclasses.replace(rope, theta=float(np.exp(x))), own, few, turned) for x in logs])
            ]
            low, high = (best + side * 2 * (logs[1] - logs[0]) for side in (-1, 1))
        base = float(f"{np.exp(best):.5g}")
        if base != float(f"{rope.theta:.5g}"):
            yield cause("rope_theta", f"the base is {base:g}", lambda r, b=base: dataclasses.replace(r, theta=b))


def _fit(rope: Rope, own: np.ndarray, tokens: np.ndarray, turned: np.ndarray) -> float:
    """How well other frequencies explain by how much more the candidate has ``turned [T, dims / 2]`` than with our
    ``own``."""
    return float((turned[tokens] * np.exp(1j * np.outer(tokens, own - rope.frequencies()))).real.sum())
