"""From a runtime's names to ours: our own, Hugging Face's module names, or a map.

A map (``names`` of a manifest, or a TOML file) has regular expressions of whole names for keys.  A value is our name,
with groups as ``\\1``, or a table: ``to`` (our name, or a list of those that lie one after the other in the array), and
data that says how to get there: ``reshape`` (after the token axis), ``transpose`` (axes, after that, without a batch),
``sizes`` and ``axis`` (what each name of a list has of which axis; the last one).
"""

import dataclasses
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.errors import RequestError, shown
from llmjax.model import Model
from llmjax.models.names import From, stem
from llmjax.oracle.dump import Dump
from llmjax.oracle.steps import OUTER, order

Shape = tuple[int, ...]


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
    """

    dump: Dump
    taps: Mapping[str, Source]
    unknown: tuple[str, ...]

    def read(self, tap: str) -> np.ndarray:
        """A tap's values as they are stored."""
        source = self.taps[tap]
        return source.make(self.dump.read(source.name))


def named(dump: Dump, shapes: Mapping[str, Shape], model: Model | None, extra: str | Path | None = None) -> Named:
    """Finds the tap of each array.

    Args:
      dump: the arrays.
      shapes: of the model's taps; empty where no model is known.
      model: ours, whose architecture knows Hugging Face's names.
      extra: a TOML file of names.

    Raises:
      RequestError: two arrays for one tap, a map that leads nowhere, or no name that is known.
    """
    rules = _rules(dump, extra)
    known = set(shapes) | {f"{tap[: -len(inner)]}{outer}" for outer, inner in OUTER.items() for tap in shapes
                           if tap.endswith(f".{inner}")}  # fmt: skip
    table = _hugging_face(model) if model else {}
    meant = _meant(dump)
    found: dict[str, Source] = {}
    unknown = []
    for name in dump.arrays:
        places = list(_mapped(name, rules))
        for tap, _ in places:
            if known and tap not in known:
                raise RequestError(f"{dump.path}: {name}: is mapped to {tap}, which is no activation of the model")
        if not places and (name in known or not known):
            places = [(name, Source(name))]
        for meaning in [] if places else meant.get(name, [name]):
            ours = [(meaning, _whole)] if meaning in known else _from_module(meaning, table)
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
    return Named(dump, {tap: found[tap] for tap in sorted(found, key=order)}, tuple(sorted(unknown)))


def _meant(dump: Dump) -> dict[str, list[str]]:
    """What a dump says of its arrays' names: our names, or Hugging Face's, by its own (``modules`` of its manifest)."""
    found = dump.manifest.get("modules") or {}
    if not isinstance(found, dict) or not all(
        isinstance(names, list) and all(isinstance(n, str) for n in names) for names in found.values()
    ):
        raise RequestError(f"{dump.path}/manifest.json: modules: expected lists of names by name, found {shown(found)}")
    return found


def layouts(array: np.ndarray, shape: Shape) -> list[np.ndarray]:
    """The array in a tap's shape, in each way it may be meant: as it is, with a batch of one, heads joined, or heads
    before tokens.  None where it does not fit."""
    size = int(np.prod(shape))
    if array.ndim > 1 and array.shape[0] == 1 and array.size == size and (shape[0] != 1 or array.ndim > len(shape)):
        array = array[0]
    if array.size != size:
        return []
    if array.shape == shape and (len(shape) != 3 or shape[0] != shape[1]):
        return [array]
    found = [array.reshape(shape)] if array.shape[0] == shape[0] else []
    if array.ndim == 3 and len(shape) > 1 and array.shape[1] == shape[0]:  # [N, T, H] for [T, N, H] or [T, N * H]
        found.append(np.swapaxes(array, 0, 1).reshape(shape))
    return found


def _rules(dump: Dump, extra: str | Path | None) -> list[tuple[re.Pattern[str], Any]]:
    tables = [(f"{dump.path}/manifest.json: names", dump.manifest.get("names") or {})]
    if extra is not None:
        try:
            tables.append((str(extra), tomllib.loads(Path(extra).read_text(encoding="utf-8"))))
        except OSError as error:
            raise RequestError(f"{extra}: cannot read the names: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"{extra}: not a TOML file: {error}") from None
    rules = []
    for where, table in tables:
        for key, value in table.items():
            try:
                rules.append((re.compile(key), _entry(value)))
            except (re.error, ValueError) as error:
                raise RequestError(f"{where}: {shown(key)}: {error}") from None
    return rules


def _entry(value: Any) -> dict[str, Any]:
    entry = {"to": value} if isinstance(value, str) else value
    if not isinstance(entry, dict) or "to" not in entry:
        raise ValueError(f"expected a name or a table with 'to', found {shown(value)}")
    if unknown := set(entry) - {"to", "reshape", "transpose", "sizes", "axis"}:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}; expected to, reshape, transpose, sizes, axis")
    names = entry["to"] if isinstance(entry["to"], list) else [entry["to"]]
    if not all(isinstance(name, str) for name in names) or len(names) != len(entry.get("sizes", names)):
        raise ValueError("to: expected a name, or a list of names and as many sizes")
    for key in ("reshape", "transpose", "sizes"):
        if key in entry and not (isinstance(entry[key], list) and all(type(n) is int for n in entry[key])):
            raise ValueError(f"{key}: expected a list of integers, found {shown(entry[key])}")
    return entry | {"to": names}


def _mapped(name: str, rules: list[tuple[re.Pattern[str], Any]]) -> Iterator[tuple[str, Source]]:
    for pattern, entry in rules:
        match = pattern.fullmatch(name)
        if match or pattern.pattern == name:
            start = 0
            for i, to in enumerate(entry["to"]):
                tap = match.expand(to) if match else to
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
            return array if size is None else np.take(array, range(start, start + size), axis)
        except (ValueError, IndexError) as error:
            raise RequestError(f"names: {', '.join(entry['to'])}: shape {list(array.shape)}: {error}") from None

    return make


def _hugging_face(model: Model) -> dict[str, list[tuple[str, Callable[[np.ndarray], np.ndarray]]]]:
    """By a module's stem with ``{}`` for the layer: the taps that its output holds."""
    table: dict[str, list[tuple[str, Callable[[np.ndarray], np.ndarray]]]] = {"logits": [("logits", _whole)]}
    layer = ""
    for ours, entry in model.architecture.hf_names(model.config).items():
        if isinstance(entry, From):
            # What builds a weight's rows from source rows builds activations' columns from source columns.
            modules, make = entry.modules, _columns(entry.make)
            if len(modules) > 1:  # a norm for each head: their parent's output
                modules, make = (re.sub(r"\.norms\.\d+$", "", modules[0]),), _whole
        else:
            modules, make = (entry,), _whole
        table.setdefault(stem(modules[0]), []).append((ours, make))
        if ours in ("layers.{}.attn.o", "layers.{}.mlp.down"):
            parent = stem(modules[0]).rsplit(".", 1)[0]
            table[parent] = [(ours.rsplit(".", 1)[0], _whole)]
            table[f"{stem(modules[0])}.input"] = [("layers.{}.attn.out", _whole)] if ours.endswith(".o") else []
            layer = parent.rsplit(".", 1)[0]
            inner = {"attn.o": ("q_rot", "k_rot"), "mlp.down": ()}[ours.removeprefix("layers.{}.")]
            for name in inner:
                table[f"{parent}.{name}"] = [(f"layers.{{}}.attn.{name}", _whole)]
            if ours.endswith(".o"):
                table[f"{parent}.attn_weights"] = [("layers.{}.attn.probs", _whole)]
            else:
                for name in ("act_fn", "activation_fn", "act"):
                    table[f"{parent}.{name}"] = [("layers.{}.mlp.act", _whole)]
    table[layer] = [("layers.{}.resid", _whole)]
    return table


def _from_module(
    name: str, table: Mapping[str, list[tuple[str, Callable[[np.ndarray], np.ndarray]]]]
) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    found = stem(name)
    layer = re.search(r"(?<=\.)\d+(?=\.|$)", found)
    key = found if layer is None else found[: layer.start()] + "{}" + found[layer.end() :]
    for tap, make in table.get(key, ()):
        yield tap.format(layer[0] if layer else ""), make


def _whole(array: np.ndarray) -> np.ndarray:
    return array


def _columns(make: Callable[[list[np.ndarray]], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def columns(array: np.ndarray) -> np.ndarray:
        flat = array.reshape(-1, array.shape[-1])
        return np.ascontiguousarray(make([np.ascontiguousarray(flat.T)]).T)

    return columns
