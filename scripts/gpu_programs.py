"""Compiles llmjax's programs for an NVIDIA H100, or another card, on a machine without one, and says what they would do
there:

    pip install 'llmjax[cuda]' && python scripts/gpu_programs.py --kinds bfloat16 int4 --programs decode-1 prefill-2048

A line a program: kernels of a call (of a loop, one turn; of a branch, where rows ask for nothing special), how many of
them lie in command buffers (the others are launched one by one), bytes they read and write beside those that must be
read (weights as they are stored, the cache in use), temporaries, buffers updated in place, loops and branches whose
predicates the host waits for, each at every turn; then every kernel that makes an array of a weight, products of
float32 that may be rounded to TF32, calls of the host, products whose tiles are XLA's, and what cuBLAS computes beside
its own.  From shapes alone: no weights are made.

Beside it a bound, not a measurement: the milliseconds of a call (of a loop, one turn) if each kernel, one after the
other, took what its bytes take at the card's memory bandwidth or its matrix products at the card's peak, whichever is
longer, the tokens a second that makes, and the share that is left for what must be read and computed (`llmjax bench`
means the same by it).
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    DUMP = tempfile.TemporaryDirectory()  # where XLA says which kernels lie in command buffers
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # or it would say nothing
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={DUMP.name}"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from llmjax import configs, device
from llmjax.bench.cost import Cost, Costs
from llmjax.checkpoint.loading import parameter_shapes
from llmjax.checkpoint.parameters import made
from llmjax.models.registry import read_config
from llmjax.models.tree import path_of, put_at
from llmjax.numerics import resolve
from llmjax.quant import schemes
from llmjax.runtime.cache import _longer, make_cache
from llmjax.runtime.decode import BURST, decode
from llmjax.runtime.packed import Packed, unpacking
from llmjax.runtime.prefill import prefill
from llmjax.runtime.sampling import draw
from llmjax.runtime.scoring import score_texts
from llmjax.runtime.state import empty_state
from llmjax.runtime.terms import NARROW, WIDE
from scripts.hlo import Program

KINDS = ("bfloat16", "int8", "int4", "int4-g32", "int4-asym")
PROGRAMS = ("decode-1", "decode-64", "prefill-128", "prefill-2048", "draw-1", "score-8", "grow")
CARDS = Path(__file__).with_name("cards")  # what XLA's compiler is told of them
BLOCK, PAGES = 128, 8  # of the cache: positions in half a page, pages of a row
# Of an H100 SXM, as NVIDIA has them: bytes a second, and flops of what is multiplied, float32 without TF32.
BANDWIDTH = 3.35e12
PEAKS = {"bf16": 989e12, "f16": 989e12, "s8": 1979e12, "f32": 67e12}


@cache
def on_card(name: str) -> NamedSharding:
    """Where the arrays would lie."""
    target = (CARDS / f"{name}.txtpb").read_text()
    card = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target)
    return NamedSharding(topologies.make_mesh(card, (1,), ("x",)), PartitionSpec())


@cache
def shapes_of(model: str, kind: str, layers: int | None) -> tuple[Any, dict[str, Any]]:
    """A configuration and the parameters that a model of it has, as shapes."""
    facts = configs.read(model)["config"]
    _, config = read_config(facts, model)
    config = config if layers is None else config.shortened(layers)
    recipe = schemes.parse(kind) if kind.startswith("int") else None
    params: dict[str, Any] = {}
    for name, shape in parameter_shapes(config).items():
        scheme = recipe.scheme(name) if recipe else None
        leaf: Any = jax.ShapeDtypeStruct(shape, "bfloat16" if recipe else kind)
        if scheme is not None:  # of one row, which is as the others are
            one = np.ones((*(1 for _ in shape[1:]), shape[-1]), np.float32)
            row = made(lambda start, stop, one=one: one, one.shape, one.dtype, scheme, name)  # type: ignore[misc]
            leaf = jax.tree.map(lambda x, of=shape[:-1]: jax.ShapeDtypeStruct((*of, x.shape[-1]), x.dtype), row)
        put_at(params, path_of(name), leaf)
    return config, params


def nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program, for the card.

    Attributes:
      name: of the program.
      text: its optimized HLO.
      memory: ``jax.stages.Compiled.memory_analysis``.
      state: bytes it is given to update in place.
      weights: by parameter number of the program, shapes of the weights' arrays; of scales those of groups.
      must: bytes that it must read.
      in_use: of them the cache's.
      seen: positions that a query attends to, on average.
      least: bytes and flops of a call, as ``llmjax bench`` has them; None for what it does not time.
      tokens: of a call.
    """

    name: str
    text: str
    memory: Any
    state: int
    weights: dict[int, tuple[int, ...]]
    must: int
    in_use: int
    seen: float
    least: Cost | None
    tokens: int


def compiled(
    name: str,
    kind: str,
    profile: str,
    model: str = "config:gemma-2b",
    layers: int | None = None,
    tokens: int = 2048,
    card: str = "h100",
) -> Compiled:
    """A program of ``PROGRAMS`` (any number after the dash) of a model whose rows have a cache of ``tokens``."""
    config, params = shapes_of(model, kind, layers)
    numerics = resolve(profile, jnp.dtype(jnp.float32 if kind.startswith("int") else kind))
    what, _, number = name.partition("-")
    count = int(number or 1)
    slots = count if what in ("decode", "draw") else 1
    table = tokens // (2 * BLOCK)
    layers = partial(make_cache, config, numerics, slots * table + 1, 2 * BLOCK, slots=slots + 1)
    state = jax.eval_shape(lambda: empty_state(layers(), slots, tokens, config.vocab_size))

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    static, in_use = (config.module(), numerics, BLOCK), nbytes(state.cache)
    donated: int | tuple[()] = 1
    there: int | None = None  # arguments on the card; the rest is the host's
    function: Any
    args: tuple[Any, ...]
    if what == "decode":
        going, refill = array(slots, dtype=jnp.bool_), array(dtype=jnp.bool_)
        function = partial(decode, *static, None)
        args, there = (params, state, array(slots, table), array(slots, BURST), going, array(), refill), 2
    elif what == "prefill":
        function = partial(prefill, *static)
        row = jax.tree.map(lambda x: array(*x.shape[1:], dtype=x.dtype), state)
        terms = ({name: getattr(row, name) for name in names} for names in (WIDE, NARROW))
        ends = array(dtype=jnp.bool_)
        args, there = (params, state, *terms, array(1, count), array(), array(table), *[array()] * 3, ends), 3
    elif what == "score":
        function, donated, in_use = partial(score_texts, *static[:2]), (), 0
        args, there = (params, array(count, 128), array(count, 128), array(count), array(count)), 1
    elif what == "draw":
        function, donated, in_use, params = draw, (), 0, {}
        args = (state.logits, state.knobs, state.step)
    else:
        function, donated, in_use, params = partial(_longer, layers=1, more=8), (), 0, {}
        args = (jax.tree.leaves(state.cache)[0],)
    if there is not None:
        host = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), args[there:])
        function, args = unpacking(function), (*args[:there], Packed.of(host))
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_card(card)), args)
    device.capabilities = lambda: {9.0 if card == "h100" else 8.9}  # not those of a card that is here
    options: dict[str, Any] = numerics.compiler_options("gpu", step=what == "decode") | {"xla_gpu_autotune_level": 0}
    program = jax.jit(function, donate_argnums=donated).lower(*args).compile(compiler_options=options)
    text, leaves = program.as_text(), jax.tree.leaves(params)
    assert text is not None
    weights = {i: leaf.shape for i, leaf in enumerate(leaves) if len(leaf.shape) == 2 and leaf.shape[1] > 1}
    given = nbytes(state) if donated else 0
    must = nbytes(params) + in_use if params else nbytes(args)
    seen, least = float(tokens), None
    if what in ("decode", "prefill"):
        as_arrays = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), params)
        costs = Costs(SimpleNamespace(config=config, numerics=numerics, params=as_arrays))  # type: ignore[arg-type]
        least = costs.prefill(count, count) if what == "prefill" else costs.decode_step(slots, tokens - 1)
        seen = (count + 1) / 2 if what == "prefill" else seen
    return Compiled(name, text, program.memory_analysis(), given, weights, must, in_use, seen, least, count)


def bound(c: Compiled, program: Program) -> dict[str, float] | None:
    """What an H100's limits allow, see above: milliseconds, tokens a second, and the share of what must be."""
    if c.least is None:
        return None
    times = [max((k.read + k.written) / BANDWIDTH, k.flops / PEAKS.get(k.dtype, math.inf)) for k in program.kernels]
    least = max(c.least.nbytes / BANDWIDTH, c.least.flops / PEAKS["bf16"])
    return {"ms": 1e3 * sum(times), "tokens_per_second": c.tokens / sum(times), "of_limit": least / sum(times)}


def report(c: Compiled) -> dict[str, Any]:
    """All that its HLO says, as JSON would hold it."""
    program = Program(c.text, c.weights, c.in_use, c.seen)
    read, written = sum(k.read for k in program.kernels), sum(k.written for k in program.kernels)
    return {
        "kernels": len(program.kernels),
        "read": read,
        "written": written,
        "must": c.must,
        "extra": (read + written) / c.must - 1,
        "bound": bound(c, program),
        "temporaries": c.memory.temp_size_in_bytes,
        "arguments": c.memory.argument_size_in_bytes,
        "in_place": c.memory.alias_size_in_bytes,
        "state": c.state,
        "reads_of_a_weight": sorted(set(program.reads_of_weights().values())),
        "copied_weights": [f"{k.op.name} {k.op.shape}" for k in program.copied_weights()],
        "copied": sum(k.written for k in program.copied_weights()),
        "tf32": program.tf32(),
        "host_calls": program.host_calls(),
        "tiled": program.tiled(),
        "epilogues": program.epilogues(),
        "most": [f"{k.op.name} {k.op.shape[:60]} reads {k.read / 1e6:.1f} MB, writes {k.written / 1e6:.1f} MB"
                 for k in sorted(program.kernels, key=lambda k: -k.read - k.written)[:8]],
    }  # fmt: skip


def launches(folder: Path) -> dict[str, int]:
    """Of the program that XLA has dumped there, by what it will run: ``buffered`` kernels (of all branches) in command
    buffers, ``launched`` ones outside, and ``waits``, loops and branches outside, whose predicates the host reads."""
    files = sorted(folder.glob("*.thunk_sequence*.txt"))  # before what makes command buffers, and after that if it did
    count, within = dict.fromkeys(("buffered", "launched", "waits"), 0), math.inf
    for line in files[-1].read_text().splitlines():
        if found := re.match(r"( *)\d+: k(\w+)", line):
            depth = len(found[1])
            within = within if depth > within else math.inf
            if found[2] == "CommandBuffer":
                within = min(within, depth)
            elif found[2] in ("While", "Conditional"):
                count["waits"] += within == math.inf
            else:
                count["launched" if within == math.inf else "buffered"] += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="config:gemma-2b")
    parser.add_argument("--card", default="h100", choices=sorted(file.stem for file in CARDS.iterdir()))
    parser.add_argument("--layers", type=int, help="so many alone, which compile sooner")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="bfloat16, float32 or a scheme of quantization")
    parser.add_argument("--profile", default="fast")
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, help=f"of {', '.join(PROGRAMS)}, with any number")
    parser.add_argument("--tokens", type=int, default=2048, help="each row's cache has room for")
    parser.add_argument("--hlo", type=Path, help="a folder for the optimized HLO")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for kind in args.kinds:
        for name in args.programs:
            for file in Path(DUMP.name).glob("*.thunk_sequence*.txt"):
                file.unlink()
            result = compiled(name, kind, args.profile, args.model, args.layers, args.tokens, args.card)
            if args.hlo:
                args.hlo.mkdir(parents=True, exist_ok=True)
                (args.hlo / f"{kind}.{args.profile}.{name}.hlo").write_text(result.text)
            found = report(result)
            found |= launches(Path(DUMP.name)) | ({} if args.card == "h100" else {"bound": None})
            if args.json:
                print(json.dumps({"kind": kind, "profile": args.profile, "program": name} | found), flush=True)
                continue
            mega = {key: f"{found[key] / 1e6:.1f}" for key in ("read", "written", "must", "temporaries", "in_place")}
            print(
                f"{kind} {args.profile} {name}: {found['kernels']} kernels ({found['buffered']} of all branches' in "
                f"command buffers, {found['launched']} not); MB: reads {mega['read']}, writes {mega['written']}, must "
                f"read {mega['must']} ({found['extra']:+.0%}), temporaries {mega['temporaries']}, in place "
                f"{mega['in_place']}; waits {found['waits']}",
                flush=True,
            )
            if found["bound"]:
                print(
                    "  bound: {ms:.3f} ms, {tokens_per_second:.0f} tok/s, {of_limit:.0%} of the limit".format_map(
                        found["bound"]
                    )
                )
            for key in ("copied_weights", "tf32", "host_calls", "tiled", "epilogues"):
                for line in found[key]:
                    print(f"  {key.replace('_', ' ')}: {line}")


if __name__ == "__main__":
    main()
