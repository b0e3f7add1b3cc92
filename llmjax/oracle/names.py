"""From a runtime's names to ours: our own, Hugging Face's module names, or a map.

A map (``names`` of a manifest, or a TOML file) has regular expressions of whole names for keys.  A value is our name,
with groups as ``\\1``, or a table: ``to`` (our name, or a list of those that lie one after the other in the array), and
data that says how to get there: ``reshape`` (after the token axis), ``transpose`` (axes, after that, without a batch),
``sizes`` and ``axis`` (what each name of a list has of which axis; the last one).
"""

import dataclasses
import re
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import regex  # type: ignore[import-untyped]

from llmjax.errors import RequestError, shown
from llmjax.model import Model
from llmjax.models.names import From, stem
from llmjax.oracle.dump import Dump, Window
from llmjax.oracle.steps import OUTER, order
from llmjax.outside.paths import checked_path
from llmjax.outside.patterns import Matcher, is_regex
from llmjax.outside.values import check, each, integer

Shape = tuple[int, ...]
# Of an array, in any direction.
_MOST = 2**40


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the values of a tap come from.

    Attributes:
      name: the array's.
      make: makes the tap of the array; shapes are fitted afterwards.
    """

    name: str
    make: Callable[[np.ndarray], np.ndarray] = lambda array: array


@dataclasses.dataclass(frozen=True)
class Named:
    """A dump under our names.

    Attributes:
      dump: the arrays.
      taps: by tap, in the order of computation; a module's output beside its last step's stands under the module's
        name (``steps.OUTER``).
      unknown: arrays that no name of ours belongs to.
      unmatched: keys of maps that no array was mapped by.
    """

    dump: Dump
    taps: Mapping[str, Source]
    unknown: tuple[str, ...]
    unmatched: tuple[str, ...] = ()

    def read(self, tap: str) -> np.ndarray:
        """A tap's values as they are stored."""
        source = self.taps[tap]
        return source.make(self.dump.read(source.name))

    def window(self, tap: str) -> Window | None:
        """What is there of a tap, if that is not all of it."""
        return self.dump.windows.get(self.taps[tap].name) if tap in self.taps else None

    def shown(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the dump would show of these values, by tap."""
        return {tap: x if (window := self.window(tap)) is None else window.show(x) for tap, x in values.items()}


def named(
    dump: Dump,
    shapes: Mapping[str, Shape],
    model: Model | None,
    extra: str | Path | None = None,
    twice: Collection[str] = (),
) -> Named:
    """Finds the tap of each array.

    Args:
      dump: the arrays.
      shapes: of the model's taps; empty where no model is known.
      model: ours, whose architecture knows Hugging Face's names.
      extra: a TOML file of names.
      twice: taps of modules that are called twice: of the second call, whose array's name ends in ``#2``.

    Raises:
      RequestError: two arrays for one tap, a map that leads nowhere, or no name that is known.
    """
    rules, matcher = _rules(dump, extra), Matcher(RequestError)
    known = set(shapes) | {f"{tap[: -len(inner)]}{outer}" for outer, inner in OUTER.items() for tap in shapes
                           if tap.endswith(f".{inner}")}  # fmt: skip
    table = _hugging_face(model, shapes) if model else {}
    meant = _meant(dump)
    found: dict[str, Source] = {}
    unknown, used = [], set[str]()
    for name in dump.arrays:
        places = list(_mapped(name, rules, matcher, used))
        for tap, _ in places:
            if known and tap not in known:
                raise RequestError(f"{dump.path}: {name}: is mapped to {tap}, which is no activation of the model")
        if not places and (name in known or not known):
            places = [(name, Source(name))]
        for meaning in [] if places else meant.get(name, [name]):
            ours = [(meaning, _whole)] if meaning in known else _from_module(meaning, table, twice)
            places += [(tap, Source(name, make)) for tap, make in ours if tap in known]
        if not places:
            unknown.append(name)
        for tap, source in places:
            if tap in found:
                raise RequestError(f"{dump.path}: {found[tap].name} and {source.name} are both {tap}; keep one of them")
            found[tap] = dataclasses.replace(source, name=name)
    if not found:
        raise RequestError(
            f"{dump.path}: unknown names: {', '.join(map(shown, sorted(unknown)[:5]))}; expected llmjax's "
            "(layers.0.attn.q), Hugging Face's module names, or a map (--names)"
        )
    for tap in [tap for tap in found if tap.split(".")[-1] in OUTER and tap not in shapes]:
        inner = tap.rsplit(".", 1)[0] + "." + OUTER[tap.split(".")[-1]]
        if shapes and inner not in found:
            found[inner] = found.pop(tap)
    unmatched = tuple(dict.fromkeys(key for key, _ in rules if key not in used))
    return Named(dump, {tap: found[tap] for tap in sorted(found, key=order)}, tuple(sorted(unknown)), unmatched)


def _meant(dump: Dump) -> dict[str, list[str]]:
    """What a dump says of its arrays' names: our names, or Hugging Face's, by its own (``modules`` of its manifest)."""
    found = dump.manifest.get("modules") or {}
    if not isinstance(found, dict) or not all(
        isinstance(names, list) and all(isinstance(n, str) for n in names) for names in found.values()
    ):
        raise RequestError(f"{dump.path}/manifest.json: modules: expected lists of names by name, found {shown(found)}")
    return found


def layouts(array: np.ndarray, shape: Shape) -> list[np.ndarray]:
    """The array in a tap's shape, in each way it may be meant: as it is, with a batch of one, heads joined, heads
    before tokens, or each key/value head as often as query heads meet it.  None where it does not fit."""
    size = int(np.prod(shape))
    if array.size != size:
        return [own for x in _once_each(array, shape) for own in layouts(x, shape)]
    if array.ndim > 1 and array.shape[0] == 1 and (shape[0] != 1 or array.ndim > len(shape)):
        array = array[0]
    if array.shape == shape and (len(shape) != 3 or shape[0] != shape[1]):
        return [array]
    found = [array.reshape(shape)] if array.shape[0] == shape[0] else []
    if array.ndim == 3 and len(shape) > 1 and array.shape[1] == shape[0]:  # [N, T, H] for [T, N, H] or [T, N * H]
        found.append(np.swapaxes(array, 0, 1).reshape(shape))
    return found


def _once_each(array: np.ndarray, shape: Shape) -> list[np.ndarray]:
    """Heads that stand there several times over, repeated or tiled, all copies equal in every bit, once each."""
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    times, over = divmod(array.size, int(np.prod(shape)))
    if array.ndim != 3 or over or times < 2:
        return []
    found = []
    for axis in (0, 1):
        count = array.shape[axis] // times
        if array.shape[1 - axis] == shape[0] and count * times == array.shape[axis] and count:
            first = np.take(array, range(0, count * times, times), axis)
            tiled = np.take(array, range(count), axis)
            if np.array_equal(np.repeat(first, times, axis), array):
                found.append(first)
            elif np.array_equal(np.concatenate([tiled] * times, axis), array):
                found.append(tiled)
    return found


def _rules(dump: Dump, extra: str | Path | None) -> list[tuple[str, Any]]:
    own = dump.manifest.get("names")
    if own is not None and not isinstance(own, Mapping):
        raise RequestError(f"{dump.path}/manifest.json: names: expected a map, found {shown(own)}")
    tables = [(f"{dump.path}/manifest.json: names", own or {})]
    if extra is not None:
        try:
            tables.append(
                (str(extra), tomllib.loads(checked_path("names", extra, RequestError).read_text(encoding="utf-8-sig")))
            )
        except OSError as error:
            raise RequestError(f"{extra}: cannot read the names: {error.strerror}") from None
        except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, too many digits
            raise RequestError(f"{extra}: not a TOML file: {error}") from None
    rules = []
    for where, table in tables:
        for key, value in table.items():
            try:
                if not is_regex(key):
                    raise ValueError("expected a regular expression")
                rules.append((key, _entry(value)))
            except (ValueError, RequestError) as error:
                raise RequestError(f"{where}: {shown(key)}: {error}") from None
    return rules


def _entry(value: Any) -> dict[str, Any]:
    entry = {"to": value} if isinstance(value, str) else value
    if not isinstance(entry, dict) or "to" not in entry:
        raise ValueError(f"expected a name or a table with 'to', found {shown(value)}")
    if unknown := set(entry) - {"to", "reshape", "transpose", "sizes", "axis"}:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}; expected to, reshape, transpose, sizes, axis")
    whole = integer(-_MOST, _MOST)
    for key, rule in (("reshape", whole), ("transpose", whole), ("sizes", integer(1, _MOST))):
        check(key, entry.get(key, []), each(rule, f"a list, each {rule.what}", kinds=(list,)), RequestError)
    check("axis", entry.get("axis", -1), whole, RequestError)
    names = entry["to"] if isinstance(entry["to"], list) else [entry["to"]]
    if not all(isinstance(name, str) for name in names) or len(names) != len(entry.get("sizes", names)):
        raise ValueError("to: expected a name, or a list of names and as many sizes")
    return entry | {"to": names}


def _mapped(name: str, rules: list[tuple[str, Any]], matcher: Matcher, used: set[str]) -> Iterator[tuple[str, Source]]:
    for pattern, entry in rules:
        match = matcher.match(pattern, name, whole=True)
        if match or pattern == name:
            start = 0
            used.add(pattern)
            for i, to in enumerate(entry["to"]):
                try:
                    tap = match.expand(to) if match else to
                except (regex.error, IndexError) as error:
                    raise RequestError(f"names: {shown(pattern)}: {shown(to)}: {error}") from None
                size = entry["sizes"][i] if "sizes" in entry else None
                yield tap, Source(name, _maker(entry, start, size))
                start += size or 0
            return


def _maker(entry: Mapping[str, Any], start: int, size: int | None) -> Callable[[np.ndarray], np.ndarray]:
    def make(array: np.ndarray) -> np.ndarray:
        try:
            if "reshape" in entry:
                array = array[0] if array.shape[0] == 1 and array.ndim > 2 else array
                array = array.reshape(array.shape[0], *entry["reshape"])
            if "transpose" in entry:
                array = array.transpose(entry["transpose"])
            axis = entry.get("axis", -1)
            if size is not None and start + size > array.shape[axis]:
                raise ValueError(f"sizes: expected at most {array.shape[axis]} together, found {start + size} or more")
            return array if size is None else np.take(array, range(start, start + size), axis)
        except (ValueError, IndexError) as error:
            raise RequestError(f"names: {', '.join(entry['to'])}: shape {list(array.shape)}: {error}") from None

    return make


Table = dict[str, list[tuple[str, Callable[[np.ndarray], np.ndarray]]]]
# What stands in a layer beside the modules that have weights, by the end of its name.
_BESIDE = {
    "self_attn.v_norm": "attn.v_norm",
    "act_fn": "per_layer.act",
    "mlp.experts": "experts",
    "experts": "experts",
}


def _hugging_face(model: Model, shapes: Collection[str]) -> Table:
    """By a module's stem with ``{}`` for the layer: the taps that its output holds."""
    table: Table = {"logits": [("logits", _whole)]}
    layer = ""
    for ours, entry in model.architecture.hf_names(model.config).items():
        if isinstance(entry, From):
            # What builds a weight's rows from source rows builds activations' columns from source columns.
            modules, make = entry.modules, _columns(entry.make)
            if len(modules) > 1:  # a norm for each head: their parent's output
                modules, make = (re.sub(r"\.norms\.\d+$", "", modules[0]),), _whole
        else:
            modules, make = (entry,), _whole
        source = stem(modules[0])
        table.setdefault(source, []).append((ours, make))
        parent, role = source.rpartition(".")[0], ours.removeprefix("layers.{}.")
        if role in OUTER.values():
            layer = parent.rsplit(".", 1)[0]
            table[parent] = [(ours.rsplit(".", 1)[0], _whole)]
            out = "attn.gated" if any(name.endswith(".attn.gated") for name in shapes) else "attn.out"
            into = {"attn.o": out, "conv.leave": "conv.out", "delta.o": "delta.out"}.get(role)
            table[f"{source}.input"] = [(f"layers.{{}}.{into}", _whole)] if into else []
        if role == "attn.o":
            for name, tap in {"q_rot": "q_rot", "k_rot": "k_rot", "attn_weights": "probs"}.items():
                table[f"{parent}.{name}"] = [(f"layers.{{}}.attn.{tap}", _whole)]
        if role == "delta.norm":  # theirs lets the gate weigh it, too: what the last step's input has
            table[source] = []
        if role == "mlp.down":
            for name in ("act_fn", "activation_fn", "act"):
                table[f"{parent}.{name}"] = [("layers.{}.mlp.act", _whole)]
    factor = getattr(model.config, "embedding_multiplier", 1.0)  # of what the table's module gives
    if factor != 1.0:
        table[stem(str(model.architecture.hf_names(model.config)["embed"]))] = [("embed", lambda array: array * factor)]
    several = "layers.0.streams" in shapes
    table[layer] = [("layers.{}.streams", _streams) if several else ("layers.{}.resid", _whole)]
    for name, tap in _BESIDE.items():
        table[f"{layer}.{name}"] = [(f"layers.{{}}.{tap}", _whole)]
    return table


def _streams(array: np.ndarray) -> np.ndarray:
    """``[A, 1, T, D]``, as transformers has it, to ``[T, A, D]``."""
    return np.moveaxis(array[:, 0], 0, 1) if array.ndim == 4 and array.shape[1] == 1 else array


def _from_module(
    name: str, table: Table, twice: Collection[str]
) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    found, call = re.fullmatch(r"(.*?)(#2)?", stem(name), re.DOTALL).groups()  # type: ignore[union-attr]
    layer = re.search(r"(?<=\.)\d+(?=\.|$)", found)
    key = found if layer is None else found[: layer.start()] + "{}" + found[layer.end() :]
    # A name without a layer has a number of its own: one of several entries.
    places = table.get(key) or [(tap, make) for tap, make in table.get(found, ()) if "{}" not in tap]
    for tap, make in places:
        tap = tap.format(layer[0] if layer else "")
        if (tap in twice) == (call is not None):
            yield tap, make


def _whole(array: np.ndarray) -> np.ndarray:
    return array


def _columns(make: Callable[[list[np.ndarray]], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def columns(array: np.ndarray) -> np.ndarray:
        flat = array.reshape(-1, array.shape[-1])
        return np.ascontiguousarray(make([np.ascontiguousarray(flat.T)]).T)

    return columns
