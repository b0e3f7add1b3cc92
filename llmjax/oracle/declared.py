"""Which classes of arithmetic a candidate's own words leave: its dtype, numerics, quantization and kv_cache."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np

from llmjax.errors import RequestError, shown
from llmjax.oracle.dump import Dump, Window
from llmjax.oracle.floors import CLASSES, FEW, SMALL_CACHES, STATIC

_CACHES = ("cache_float16", "cache16")
_NARROW = ("gelu16", *_CACHES, "tf32", "float16", "bfloat16", *STATIC)
# What no runtime is taken to do that does not say so, or is known to.
_KNOWN_ALONE = ("block_int8", "cache_float16", "tf32", "float8", "int3", "int2", *STATIC, *SMALL_CACHES)


def _word(words: str) -> str:
    """``words`` that are no part of another, but for what underscores join: ``mixed_bfloat16``."""
    return rf"(?<![a-z0-9])(?<!cache_)({words})(?![a-z0-9])"


def _bits(n: str) -> str:
    """Whole numbers of so many bits, as GGUF, GPTQ, MLX, exl2 and others spell them; no ternary ones (1.58bit, tq2_0),
    which a float model is trained for, not rounded to."""
    return (
        rf"(?<!block_)(?<!cache_)int{n}(?!\d)|\b[siu]{n}\b|(?<!t)q{n}|wi?{n}|a{n}w|bits?\W+{n}\b"
        rf"|(?<![\d.]){n}(\.\d+)?.?(bit|bpw)|\bmixed\b.*\b{n}(?!\d)"
    )


_FLOAT8 = r"\b(mx)?(fp|float|f)8|e4m3|e5m2"
# ExecuTorch's 16a4w has 16 bits of activations by calibration, its 8da4w 8 that are found at run time.
_A16 = r"(\b16a[48]w|static.*a16|a16.*static|int16|\b16x8)"
_SPELLINGS = {
    "tf32": _word("tf32|tensorfloat.?32"),
    "float16": _word("fp16|float16|f16|half"),
    "bfloat16": _word("bf16|bfloat16"),
    "float8": _FLOAT8,
    "static_int16": _A16,
    "static_int8": rf"^(?=.*static)(?!.*{_A16})|\b8a[48]w",
    "dynamic_int8": rf"^(?!.*({_FLOAT8})).*dynamic|^(?!.*static).*w[48]a8|\b8da[48]w|mediapipe_cpu|\bint8 activations",
    "block_int8": r"block_int8",
    "int8": rf"{_bits('8')}|16x8",
    "int4": rf"{_bits('[4-6]')}|nf4|fp4|^(?!.*(?<!\d)8).*(gptq|awq|hqq)",
    "int3": _bits("3"),
    "int2": _bits("2"),
    **{name: rf"{name}\b" for name in (*_CACHES, *SMALL_CACHES, "gelu16")},
}
# Of a manifest's kv_cache.
_CACHE_SPELLINGS = {
    "cache16": rf"{_word('bf16|fp16|f16|b?float16|half')}|16.?bit",
    "cache_float8": _FLOAT8,
    "cache_int8": _bits("8"),
    "cache_int4": rf"{_bits('[3-6]')}|nf4",
}
# Quantizations and dtypes that are none, or no narrower than float32.
_PLAIN = r"none|no|false|null|q0(b?f16|f32)|(torch\.|jnp\.|np\.)?((bf|fp?|float|bfloat)(16|32|64)|float|single|double)"
# What says nothing of precision.
_UNSAID = {
    "dtype": "auto",
    "quantization": "auto",
    "kv_cache": r"auto|default|true|hybrid|sliding_window|(offloaded_)?(dynamic|static)",
}
# Keys of a bitsandbytes configuration that bear bits in their names and hold none.
_KNOBS = r"llm_int8_|bnb_4bit_"


# Of what arrays may be stored in: half of its step, as a share of a value, and at least.
_HALF_STEP = {"float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 0.0)}


@dataclasses.dataclass(frozen=True)
class Allowed:
    """Which classes may explain a candidate.

    Attributes:
      singles: each alone, from narrow to wide.
      declared: the candidate says so itself, or ``--class`` does.
      unread: what it declares and is no class of ours.
      stored: of 16 bits, what all arrays are stored as, which rounds as that class does, whatever was computed in.
    """

    singles: tuple[str, ...]
    declared: bool
    unread: str | None = None
    stored: str | None = None

    @property
    def words(self) -> str:
        """The classes, for a reader."""
        return ", ".join(f"{name}, as its arrays are" if name == self.stored else name for name in self.singles)

    @property
    def together(self) -> list[tuple[str, ...]]:
        """Classes alone and what goes together: a 16-bit cache and activation, as llama.cpp has them, weights of few
        bits with anything narrow, and a cache of few bits with all of that."""
        few = [name for name in self.singles if name in FEW]
        narrow: list[tuple[str, ...]] = []
        for name in (name for name in self.singles if name in _NARROW):
            narrow += [(name,), ("gelu16", name)] if name in _CACHES and "gelu16" in self.singles else [(name,)]
        wide = [name for name in self.singles if name not in (*_NARROW, *SMALL_CACHES, "float32")]
        first = [("float32",)] if "float32" in self.singles else []
        found = [*narrow, *((name,) for name in wide), *((*some, name) for name in few for some in narrow)]
        small = [name for name in self.singles if name in SMALL_CACHES]
        caches: list[tuple[str, ...]] = [(name,) for name in small]
        if len(small) > 1:
            caches.append(tuple(small))  # keys in one, values in another
        return [*first, *found, *caches, *((*some, *cache) for cache in caches for some in found)]


def allowed(manifest: Mapping[str, Any], forced: str | None, stored: Collection[str] = ()) -> Allowed:
    """The classes that a dump's manifest, or ``--class``, leaves; several, with commas between them, may go together.

    The 16 bits that all arrays are ``stored`` in join declared ones: float32 that was written so is no mistake.

    Of llama.cpp's files, whose other arithmetic is known, a forced cache stands in the place of the usual one.

    Raises:
      RequestError: there is no such class.
    """
    if forced is not None:
        names = {name.strip() for name in forced.split(",")}
        if unknown := sorted(names - {*CLASSES}):
            raise RequestError(f"class: unknown {unknown[0]!r}; expected one of {', '.join(CLASSES)}, or several: a,b")
        if names <= {*_CACHES, *SMALL_CACHES} and str(manifest.get("numerics")).startswith("llama.cpp: "):
            names |= {*allowed(manifest, None).singles} - {*_CACHES}
        return Allowed(tuple(name for name in CLASSES if name in names), True)
    declared = {key: _text(manifest.get(key)) for key in ("dtype", "numerics", "quantization", "kv_cache")}
    said = {key: text for key, text in declared.items() if text and not re.fullmatch(_UNSAID.get(key, ""), text)}
    if not said:
        return Allowed(tuple(name for name in CLASSES if name not in _KNOWN_ALONE), False)
    others = " ".join(text for key, text in said.items() if key != "kv_cache")
    found = {name for name, pattern in _SPELLINGS.items() if re.search(pattern, others)}
    kept = {name for name, pattern in _CACHE_SPELLINGS.items() if re.search(pattern, said.get("kv_cache", ""))}
    if "dtype" not in said and not found & {"tf32", "float16", "bfloat16"}:
        found |= {*_NARROW} - {*_KNOWN_ALONE}  # nothing is said of activations
    read = {
        "quantization": any(name in (*FEW, *STATIC) for name in found),
        "dtype": any(re.search(pattern, said.get("dtype", "")) for pattern in _SPELLINGS.values()),
        "kv_cache": bool(kept),
    }
    unread = [f"the {key} {shown(manifest[key])}" for key, known in read.items()
              if not known and not re.fullmatch(_PLAIN, said.get(key, "none"))]  # fmt: skip
    kinds = {*stored}
    narrow = next(iter(kinds)) if len(kinds) == 1 and kinds <= {"float16", "bfloat16"} - found else None
    singles = tuple(name for name in CLASSES if name in found | kept | {"float32", narrow})
    return Allowed(singles, True, " and ".join(unread) or None, narrow)


def narrowly_stored(dump: Dump, permitted: Allowed) -> Dump:
    """A dump some of whose arrays are stored in 16 bits that are not the arithmetic it declares: these are rounded, and
    nothing is computed from them.  Where nothing is declared, they may be what it was computed in."""
    kinds = {name: stored.dtype for name, stored in dump.arrays.items()} if permitted.declared else {}
    narrow = {name: kind for name, kind in kinds.items() if kind in _HALF_STEP and kind not in permitted.singles}
    rows = np.arange(len(dump.token_ids))
    windows = {name: Window(rows, lambda x: x, partial(_rounding, kind)) for name, kind in narrow.items()}
    return dataclasses.replace(dump, windows={**windows, **dump.windows})


def _rounding(kind: str, values: np.ndarray) -> np.ndarray:
    """Half a step at each value."""
    share, least = _HALF_STEP[kind]
    return np.maximum(np.abs(values.astype(np.float32)) * share, least)


def _text(value: Any) -> str:
    """What is declared, in lower case; of a mapping what is not switched off.  A number alone is one of bits."""
    if isinstance(value, Mapping):
        items = ((str(key).lower(), v) for key, v in value.items() if v is not None and v is not False)
        return ", ".join(f"{key}: {v}".lower() for key, v in items if not re.match(_KNOBS, key))
    text = str(value or "").strip().lower()
    return f"{text} bit" if text.isdecimal() else text
