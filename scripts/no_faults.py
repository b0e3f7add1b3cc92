"""Runs that have no fault, and whether `llmjax compare` says so: each other verdict is a false alarm.

    python scripts/no_faults.py ours [--seeds 20]      # our float32 in other batch shapes, with a cache, and `fast`
    python scripts/no_faults.py theirs                 # transformers in float32, bfloat16 and float16, with few bits

The first takes every architecture of the registry with shuffled weights.  The second declares each dump's class, then
nothing (both must be equivalent; what must be declared is not tried without), then float32 (which must differ, but of
float32).  Needs the parity extra.
"""

import argparse
import dataclasses
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE.parent), str(_HERE), str(_HERE / "dumps")]

import transformers_dump  # noqa: E402
from transformers_faults import both, patched  # noqa: E402

import llmjax  # noqa: E402
from llmjax.models.context import Context  # noqa: E402
from llmjax.models.registry import architectures  # noqa: E402
from llmjax.models.tree import named  # noqa: E402
from llmjax.oracle.trace import to_numpy  # noqa: E402
from llmjax.runtime.cache import make_cache  # noqa: E402
from tests.parity import golden, reference  # noqa: E402

TOKENS = 21
CASES = _HERE.parent / "tests" / "data" / "cases"


def folders(work: Path) -> dict[str, Path]:
    """A checkpoint of each kind of model: the cases, and the golden files' variants."""
    found = {path.name: path for path in sorted(CASES.iterdir())}
    for name in golden.NAMES:
        if name in golden.ONE_EACH:
            found[name] = golden.write(name, work / name)
    return found


def shuffled(model: llmjax.Model, seed: int) -> llmjax.Model:
    """Other weights of the same distributions."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(rng.permuted(np.asarray(x).reshape(-1)).reshape(x.shape)), model.params)
    return dataclasses.replace(model, params=params, origin=None)


def run(model: llmjax.Model, ids: np.ndarray, start: int = 0, cache: Any = None) -> tuple[dict[str, np.ndarray], Any]:
    """Taps of the last of several rows."""
    rows, tokens = ids.shape
    positions = jnp.tile(jnp.arange(start, start + tokens), (rows, 1))
    table = None if cache is None else jnp.arange(rows * PAGES).reshape(rows, PAGES)
    made = _jitted(model)(model.params, ids, positions, cache, table)
    return {name: to_numpy(leaf[-1:]) for name, leaf in named(made["taps"])}, made.get("cache")


PAGE, PAGES = 8, 4


def _jitted(model: llmjax.Model) -> Callable[..., Any]:
    key = (model.module, model.numerics)
    if key not in _programs:

        def taps(params: Any, ids: Any, positions: Any, cache: Any, table: Any) -> Any:
            variables = {"params": params} | ({} if cache is None else {"cache": cache})
            length = jnp.full(len(ids), TOKENS)  # of the row's text, without what it is padded with
            slot = jnp.int32(0)
            ctx = Context(positions, model.numerics, block=PAGE, table=table, slot=slot, length=length)
            return key[0].apply(variables, ids, ctx, mutable=["taps", "cache"])[1]

        _programs[key] = jax.jit(taps)
    return _programs[key]


_programs: dict[Any, Callable[..., Any]] = {}


def batch(model: llmjax.Model, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The last of three rows that are padded on the right."""
    rows = np.random.default_rng(1).integers(3, 90, (3, TOKENS + 7)).astype(np.int32)
    rows[-1, :TOKENS] = ids
    found, _ = run(model, rows)
    return {n: x[:, :TOKENS, :TOKENS] if n.endswith(".probs") else x[:TOKENS] for n, x in found.items()}


def cached(model: llmjax.Model, ids: np.ndarray) -> dict[str, np.ndarray]:
    """In chunks of seven tokens, with a cache."""
    cache = make_cache(model.config, model.numerics, 2 * PAGES, PAGE, slots=2)
    parts = []
    for start in range(0, TOKENS, 7):
        found, cache = run(model, np.tile(ids[start : start + 7], (2, 1)), start, cache)
        parts.append(found)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def fast(model: llmjax.Model, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Another profile."""
    other = dataclasses.replace(model, numerics=llmjax.numerics.resolve("fast", jnp.dtype("float32")))
    return llmjax.trace(other, ids.tolist()).activations


def ours(name: str, folder: Path, seeds: int) -> Iterator[tuple[str, bool, Any]]:
    loaded = llmjax.load(folder, context_length=512)
    for seed in range(seeds):
        model = shuffled(loaded, seed)
        ids = np.random.default_rng(seed).integers(3, 90, TOKENS).astype(np.int32)
        make = (batch, cached, fast)[seed % 3]
        if make is cached and model.config.row_arrays is not None:
            make = batch
        trace = llmjax.Trace(make(model, ids), {"token_ids": ids.tolist(), "dtype": "float32"})
        report = llmjax.compare(model, trace)
        yield f"{name} {make.__name__} {seed}", report.verdict in ("identical", "equivalent"), report


def rounded(bits: int, group: int) -> Callable[[torch.nn.Module], None]:
    """All matrices of few bits, symmetric; not what quantizers leave as it is, filters say."""

    def change(model: torch.nn.Module) -> None:
        for key, tensor in model.named_parameters():
            if tensor.ndim > 1 and not re.search(r"conv\.conv|conv1d|router|mlp\.gate\.|altup", key):
                rows = tensor.data.reshape(-1, group) if group and tensor.shape[-1] % group == 0 else tensor.data
                tensor.data = grid(rows, bits).reshape(tensor.shape)

    return change


def ids_of(seed: int, count: int) -> list[int]:
    """A text."""
    return np.random.default_rng(seed).integers(3, 90, count).tolist()


def grid(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers, a scale for each row."""
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / most
    return torch.round(x / scale) * scale


def float8(x: torch.Tensor) -> torch.Tensor:
    """e4m3, a scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def dynamic(
    of_inputs: Callable[[torch.Tensor], torch.Tensor], of_weights: Callable[[Any], None]
) -> Callable[..., None]:
    """Products whose inputs are rounded as they come."""

    def change(model: torch.nn.Module) -> None:
        of_weights(model)
        for module in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
            module.forward = lambda x, right=module.forward: right(of_inputs(x))

    return change


def linears(model: torch.nn.Module) -> dict[int, torch.nn.Linear]:
    """By number, the products whose weights quantizers round; routers stay."""
    return {
        i: module
        for i, (key, module) in enumerate(model.named_modules())
        if isinstance(module, torch.nn.Linear) and not re.search(r"router|mlp\.gate$|altup", key)
    }


def to_float8(model: torch.nn.Module) -> None:
    """Weights of products."""
    for module in linears(model).values():
        module.weight.data = float8(module.weight.data)


def static(bits: int) -> Callable[[Any], None]:
    """Each module's result in unsigned whole numbers, with one scale and zero point that texts gave, the one to be
    compared among them, and a little room for what rounding before it adds, lest it saturate; weights of 8 bits."""

    def change(model: torch.nn.Module) -> None:
        rounded(8, 0)(model)
        ends: dict[torch.nn.Module, tuple[float, float]] = {}
        some = [m for m in model.modules() if not list(m.children()) and list(m.parameters())]

        def seen(module: torch.nn.Module, args: Any, out: Any) -> None:
            low, high = ends.get(module, (0.0, 0.0))
            ends[module] = min(low, float(out.min())), max(high, float(out.max()))

        hooks = [m.register_forward_hook(seen) for m in some]
        for text in (ids_of(5, 40), ids_of(1, 24), ids_of(9, 200)):  # the second is the tests'
            with torch.no_grad():
                model(torch.tensor([text]))
        for hook in hooks:
            hook.remove()

        def quantized(module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
            low, high = (1.02 * end for end in ends[module])
            scale = max(high - low, 1e-30) / (2**bits - 1)
            zero = round(-low / scale)
            return (torch.clamp(torch.round(out / scale) + zero, 0, 2**bits - 1) - zero) * scale

        for module in some:
            module.register_forward_hook(quantized)

    return change


def kept(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    """Keys and values as a cache gives them."""

    def make(right: Callable[..., Any]) -> Callable[..., Any]:
        return lambda module, q, k, v, *args, **kwargs: right(module, q, change(k), change(v), *args, **kwargs)

    return patched("eager_attention_forward", make)


def awq(model: torch.nn.Module) -> None:
    """4 bits of weights whose columns were scaled, and scaled back behind it."""
    for i, module in linears(model).items():
        scale = torch.exp(0.4 * torch.randn(module.in_features, generator=torch.Generator().manual_seed(i)))
        w = module.weight.data * scale
        groups = w.reshape(-1, 32) if w.shape[-1] % 32 == 0 else w
        low, high = (f(groups, -1, keepdim=True) for f in (torch.amin, torch.amax))
        step = (high - low).clamp(min=1e-30) / 15
        module.weight.data = ((torch.round((groups - low) / step) * step + low).reshape(w.shape)) / scale


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a right runtime computes, what it declares of that, and whether it must."""

    change: Callable[[Any], None] | None = None
    dtype: str = "float32"
    quantization: str | None = None
    kv_cache: str | None = None
    must: bool = False


THEIRS = {
    "float32": Variant(),
    "bfloat16": Variant(dtype="bfloat16"),
    "float16": Variant(dtype="float16"),
    "int8": Variant(rounded(8, 0), quantization="int8"),
    "int8 in groups": Variant(rounded(8, 32), quantization="int8"),
    "int4": Variant(rounded(4, 0), quantization="int4"),
    "int4 in groups": Variant(rounded(4, 32), quantization="int4"),
    "int4 and bfloat16": Variant(rounded(4, 32), "bfloat16", "int4"),
    "AWQ": Variant(awq, quantization="awq"),
    "float8": Variant(to_float8, quantization="fp8", must=True),
    "float8 dynamic": Variant(dynamic(float8, to_float8), quantization="fp8 dynamic", must=True),
    "8da4w": Variant(dynamic(lambda x: grid(x, 8), rounded(4, 32)), quantization="8da4w"),
    "static int8": Variant(static(8), quantization="static int8", must=True),
    "16a8w": Variant(static(16), quantization="16a8w", must=True),
    "cache of 8 bits": Variant(kept(lambda x: grid(x, 8)), kv_cache="q8_0", must=True),
    "cache of float8": Variant(kept(lambda x: x.to(torch.float8_e4m3fn).to(x.dtype)), kv_cache="fp8", must=True),
    "cache of 4 bits": Variant(kept(lambda x: grid(x, 4)), kv_cache="int4", must=True),
    "cache of 8 bits, int4 and bfloat16": Variant(
        both(rounded(4, 32), kept(lambda x: grid(x, 8))), "bfloat16", "int4", "int8", must=True
    ),
}


def theirs(name: str, folder: Path, work: Path, only: str) -> Iterator[tuple[str, bool, Any]]:
    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    model = llmjax.load(folder, context_length=512)
    ids = ids_of(5, 40)
    for variant, how in THEIRS.items():
        if not re.search(only, variant):
            continue
        try:
            candidate = reference.load(folder, kind, how.dtype)
        except (ImportError, ValueError) as error:
            print(f"{name}: transformers alone does not load it: {str(error).strip().splitlines()[0]}")
            return
        dump = work / f"{name} {variant}"
        try:
            with reference.float32_alibi() if how.dtype == "float32" else reference.as_it_is():
                if how.change:
                    how.change(candidate)
                transformers_dump.write(dump, candidate, ids)
        except AttributeError as error:
            print(f"{name} {variant}: transformers' file has another attention: {error}")
            continue
        finally:
            if hasattr(candidate, "_restore"):
                setattr(*candidate._restore)
        manifest = json.loads((dump / "manifest.json").read_text())
        facts = {key: getattr(how, key) for key in ("dtype", "quantization", "kv_cache")}
        nothing = dict.fromkeys(facts)
        declarations = {"declared": facts, "nothing": nothing, "as float32": nothing | {"dtype": "float32"}}
        for said, declared in declarations.items():
            if said == "nothing" and how.must:
                continue
            (dump / "manifest.json").write_text(json.dumps(manifest | declared | {"numerics": None}))
            report = llmjax.compare(model, dump)
            wanted = "different" if said == "as float32" and variant != "float32" else "equivalent"
            yield f"{name} {variant}, {said}", report.verdict == wanted, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=("ours", "theirs"))
    parser.add_argument(
        "--folder", type=Path, action="append", default=[], help="a checkpoint beside the project's own"
    )
    parser.add_argument("--only", default="", help="models whose names match this regular expression")
    parser.add_argument("--variant", default="", help="theirs: variants that match")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--cache", help="keep compiled programs in this folder")
    args = parser.parse_args()
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    right = total = 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        found = {
            name: folder
            for name, folder in (folders(work) | {f.name: f for f in args.folder}).items()
            if re.search(args.only, name)
        }
        for name, folder in found.items():
            began = time.monotonic()
            rows = ours(name, folder, args.seeds) if args.which == "ours" else theirs(name, folder, work, args.variant)
            for row, good, report in rows:
                right, total = right + good, total + 1
                if not good:
                    faults = [(f["module"], f["causes"][0]["cause"]) for f in report.faults[:3]]
                    print(f"NO  {row}: {report.verdict}, {report.explained_by}, {report.reason[:200]} {faults}")
            _programs.clear()
            jax.clear_caches()
            print(f"{name:32} {time.monotonic() - began:.0f} s, so far {right} of {total} right", flush=True)
        seen = {llmjax.load(folder, context_length=512).architecture.model_type for folder in found.values()}
    print(f"{right} of {total} right; architectures without one: {sorted(set(architectures()) - seen)}")


if __name__ == "__main__":
    main()
