"""What must be true of a device, each asked of it and of the CPU's own path beside it in one process.

Kernels at a model's own size come first, then whole models, which are tiny.  ``scripts/gpu_check.py`` prints them as a
table, ``test_gpu.py`` runs them where there is a GPU.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import llmjax
from llmjax import LLM, SamplingParams, TrainConfig
from llmjax.batch import job
from llmjax.lora.config import LoraConfig
from llmjax.models.attention import Scores, cached_attention
from llmjax.models.context import Context
from llmjax.models.experts import _through_experts
from llmjax.numerics import resolve
from llmjax.products.matmul import matmul
from llmjax.quant.bits import to_storage
from llmjax.quant.qtensor import dequantize
from llmjax.training.adapter import new_adapter
from llmjax.training.batches import from_labels
from llmjax.training.step import Programs
from tests import tiny
from tests.mediapipe_files import GEMMA
from tests.parity import golden
from tests.unit.test_quant import on_device, quantized

# Of the largest logit: sums in another order, or roundings that go the other way for one.
EXACT, NARROW, ROUNDED = 3e-5, 2e-2, 5e-2
# Of what is summed: products of packed weights, as `tests/unit/test_kernel.py` has it; of the three pieces of bfloat16.
SUMMED = {"fast": 5e-6, "hf": 5e-6, "reference": 1e-6}
MARGIN = 1e-3  # between the two best logits, below which greedy is a matter of rounding


class Found(NamedTuple):
    """What a check found: its verdict, the largest difference, the one allowed, and a word."""

    fine: bool
    error: float = 0.0
    allowed: float = 0.0
    note: str = ""


Devices = tuple[jax.Device, jax.Device]  # the CPU, and the one that is asked about
Check = Callable[[jax.Device, jax.Device], Found]


def both(function: Callable[[], object], devices: Devices) -> Iterator[object]:
    """What a function gives on each device: everything within is made there."""
    for device in devices:
        with jax.default_device(device):
            yield function()


def compared(arrays: Iterator[object], allowed: float) -> Found:
    ours, theirs = (np.asarray(a, np.float64) for a in arrays)
    error = golden.error(theirs, ours)
    return Found(error <= allowed, error, allowed)


def model_of(name: str, profile: str, dtype: str = "float32", quantize: str | None = None) -> llmjax.Model:
    with tempfile.TemporaryDirectory() as folder:
        path = golden.write(name, Path(folder), dtype)
        roles = {"attention": quantize, "feed_forward": quantize, "embedding": "int8", "head": "int8"}
        recipe = None if quantize is None else roles
        return llmjax.load(path, numerics=profile, quantize=recipe)


def logits(name: str, profile: str, dtype: str, quantize: str | None, allowed: float, *devices: jax.Device) -> Found:
    """A model's logits; in ``reference`` those that transformers computed, too."""
    expected = golden.arrays(name)

    def run() -> np.ndarray:
        return model_of(name, profile, dtype, quantize).logits([expected["short"].tolist()])[0]

    ours, theirs = both(run, devices)
    found = compared(iter((ours, theirs)), allowed)
    if profile == "reference" and quantize is None and not found.error > allowed:
        found = compared(iter((expected["logits_short"], theirs)), allowed)
    return found


def product(
    kind: str, rows: int, out: int, width: int, profile: str, dtype: str, shown: list[str], *devices: jax.Device
) -> Found:
    """``x . W`` at a model's size, whose tiles are not those of the tiny ones, beside float64."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((out, width)).astype(np.float32)
    weight = jnp.asarray(w, dtype) if kind == "float" else quantized(w, kind)
    numerics = resolve(profile, jnp.dtype(dtype))
    given = rng.standard_normal((rows, width)) * np.exp(3 * rng.standard_normal((rows, 1)))
    x = np.asarray(jnp.asarray(given, numerics.products), np.float64)  # what meets the weight
    floats = np.asarray(weight if kind == "float" else dequantize(weight), np.float64)
    options = numerics.compiler_options(devices[-1].platform)
    with jax.default_device(devices[-1]):
        args = jnp.asarray(given, numerics.activations), jnp.asarray(weight) if kind == "float" else on_device(weight)
        program = jax.jit(lambda x, w: matmul(x, w, numerics), compiler_options=options).lower(*args).compile()
        found = np.asarray(program(*args), np.float64)
    missing = [] if devices[-1].platform == "cpu" else [s for s in shown if s not in (program.as_text() or "")]
    error = float((np.abs(found - x @ floats.T) / (np.abs(x) @ np.abs(floats).T)).max())
    note = f"not in the program: {missing}" if missing else ""
    return Found(error <= SUMMED[profile] and not missing, error, SUMMED[profile], note)


def mixture(kind: str, profile: str, tokens: int, allowed: float, *devices: jax.Device) -> Found:
    """A layer's experts, 8 of 1,024 by 512, of which each token has 2; beside the CPU's, one after the other."""
    rng, count, shapes = np.random.default_rng(0), 8, {"gate": (512, 1024), "up": (512, 1024), "down": (1024, 512)}
    values = {name: rng.standard_normal((count, *shape)).astype(np.float32) / 32 for name, shape in shapes.items()}
    packed: dict[str, Any] = values
    if kind.startswith("int"):
        each = {name: [quantized(one, kind) for one in w] for name, w in values.items()}
        packed = {name: jax.tree.map(lambda *leaves: np.stack(leaves), *all_) for name, all_ in each.items()}
    numerics = resolve(profile, jnp.dtype(jnp.float32 if kind.startswith("int") else kind))
    x, chosen = rng.standard_normal((tokens, 1024)), np.argsort(rng.random((tokens, count)), -1)[:, :2]

    def run() -> np.ndarray:
        stack = {n: jnp.asarray(w, kind) if packed is values else on_device(w) for n, w in packed.items()}
        options = numerics.compiler_options(jax.config.jax_default_device.platform)  # type: ignore[attr-defined]
        program = jax.jit(
            functools.partial(_through_experts, jax.nn.silu, numerics, tokens == 1), compiler_options=options
        )
        return np.asarray(
            program(jnp.asarray(x, numerics.activations), jnp.asarray(chosen, jnp.int32), stack), np.float64
        )

    return compared(both(run, devices), allowed)


def elsewhere(name: str, *devices: jax.Device) -> Found:
    """Parameters on the device while JAX's default is the CPU."""
    with jax.default_device(devices[0]):
        model = model_of(name, "fast", quantize="int4")
        moved = dataclasses.replace(model, params=jax.device_put(model.params, devices[-1]))
        return compared((m.logits([list(range(1, 20))])[0] for m in (model, moved)), EXACT)


def attention(
    profile: str, width: int, heads: tuple[int, int], positions: list[list[int]], scores: Scores, *devices: jax.Device
) -> Found:
    """Over a cache at a model's size, its pages in any order; beside the CPU's fold of blocks."""
    float32 = profile in ("reference", "dynamic_int8")
    numerics = resolve(profile, jnp.dtype(jnp.float32 if float32 else jnp.bfloat16))
    rng, page, (queries, kept) = np.random.default_rng(0), 256, heads
    rows, pages = len(positions), -(-max(map(max, positions)) // page) + 1
    table = (1 + rng.permutation(rows * pages)).reshape(rows, pages).astype(np.int32)
    cache = [rng.standard_normal((rows * pages + 1, kept, *size)) for size in ((page, width), (width, page))]
    q = rng.standard_normal((rows, len(positions[0]), queries, width))

    def run() -> np.ndarray:
        keys, values = (to_storage(jnp.asarray(x, numerics.products)) for x in cache)
        ctx = Context(jnp.asarray(positions, jnp.int32), numerics, page // 2, jnp.asarray(table))
        options = numerics.compiler_options(jax.config.jax_default_device.platform)  # type: ignore[attr-defined]
        program = jax.jit(lambda q, k, v: cached_attention(q, k, v, scores, ctx), compiler_options=options)
        return np.asarray(program(jnp.asarray(q, numerics.activations), keys, values), np.float64)

    return compared(both(run, devices), EXACT if float32 else NARROW)


def mediapipe(*devices: jax.Device) -> Found:
    ids = [2, 5, 9, 30, 7]
    return compared(both(lambda: llmjax.load(GEMMA, numerics="mediapipe_gpu").logits([ids])[0], devices), EXACT)


def greedy(name: str, profile: str, quantize: str | None, *devices: jax.Device) -> Found:
    """Tokens of the engine, equal but where two are as likely."""
    prompt = golden.arrays(name)["short"].tolist()
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)

    def run() -> tuple[list[int], list[float]]:
        llm = LLM(model_of(name, profile, quantize=quantize), max_batch=4, chunk=16, block=32)
        (row,) = llm.generate([prompt], params)[0].outputs
        return row.token_ids, [max(p.values()) - min(p.values()) for p in row.logprobs or []]

    (ours, margins), (theirs, _) = both(run, devices)  # type: ignore[misc]
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if at is None:
        return Found(True, note=f"{len(ours)} tokens equal")
    return Found(margins[at] <= MARGIN, margins[at], MARGIN, f"differ at {at}, with this margin")


def determinism(*devices: jax.Device) -> Found:
    """A row has the same bits alone, among others, in another slot and in an engine of its own."""
    params = SamplingParams(temperature=1, top_k=40, max_tokens=16, seed=3, ignore_eos=True)
    prompts = [[1, 2, 3], [5] * 40, [7, 8], [9] * 20]

    def rows(llm: LLM, order: list[int]) -> dict[int, tuple[object, ...]]:
        out = llm.generate([prompts[i] for i in order], params)
        return {i: (o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for i, o in zip(order, out, strict=True)}

    with jax.default_device(devices[-1]):
        model = tiny.random_model("fast")
        llm = LLM(model, max_batch=4, chunk=16, block=16)
        first = rows(llm, [0, 1, 2, 3])
        same = [rows(llm, [0]), rows(llm, [3, 2, 1, 0]), rows(LLM(model, max_batch=4, chunk=16, block=16), [2, 0])]
    wrong = [i for found in same for i, row in found.items() if row != first[i]]
    return Found(not wrong, note=f"rows with other bits: {wrong}" if wrong else "all bits equal")


def lora(*devices: jax.Device) -> Found:
    """An adapter beside quantized weights."""
    from tests.unit.test_identity import adapter

    with tempfile.TemporaryDirectory() as folder:
        path, own = tiny.checkpoint(Path(folder) / "m"), adapter(Path(folder) / "a")

        def run() -> np.ndarray:
            return llmjax.load(path, quantize="int8", lora=own, lora_mode="unmerged").logits([[1, 2, 3, 4]])[0]

        return compared(both(run, devices), EXACT)


def gradients(*devices: jax.Device) -> Found:
    """Of an adapter's factors, by quantized weights."""

    def run() -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            model = llmjax.load(tiny.checkpoint(Path(folder) / "m"), quantize="int8")
        adapter = new_adapter(model, LoraConfig(rank=2, alpha=4, dora=True, target_modules=("q_proj", "down_proj")))
        factors = jax.tree.map(lambda leaf: leaf + 0.1, adapter.factors)
        batch = from_labels(*(np.arange(12, dtype=np.int32).reshape(2, 6),) * 2)
        found, _ = Programs(model, adapter.targets, TrainConfig(rank=2)).gradients(
            factors, batch, 10, jax.random.key(0)
        )
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])

    return compared(both(run, devices), 10 * EXACT)


def resume(*devices: jax.Device) -> Found:
    """A batch that lost its end writes the same bytes again."""
    rows = [{"id": f"r{i}", "prompt": "abcdefgh"[: 1 + i % 7], "max_tokens": 3 + i % 5} for i in range(10)]
    with tempfile.TemporaryDirectory() as name, jax.default_device(devices[-1]):
        folder = Path(name)
        path = tiny.checkpoint(folder / "m")
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        out, params = folder / "out.jsonl", SamplingParams(temperature=1, seed=1)

        def run() -> list[str]:
            llm = LLM(path, max_batch=4, chunk=16, block=16)
            job.run(lambda: llm, str(folder / "in.jsonl"), str(out), params, job.Options(progress_seconds=0))
            return sorted(out.read_text().splitlines())

        whole = run()
        text = out.read_text()
        out.write_text(text[: len(text) * 2 // 5])
        again = run()
    return Found(whole == again and len(whole) == len(rows), note=f"{len(rows)} rows")


def comparison(profile: str, quantize: str | None, *devices: jax.Device) -> Found:
    """What ``llmjax compare`` says of the two."""
    with tempfile.TemporaryDirectory() as folder:

        def run() -> llmjax.Trace:
            return llmjax.trace(
                model_of("gemma2", profile, quantize=quantize), golden.arrays("gemma2")["short"].tolist()
            )

        dumps = []
        for i, trace in enumerate(both(run, devices)):
            trace.save(Path(folder) / str(i))  # type: ignore[attr-defined]
            dumps.append(Path(folder) / str(i))
        report = llmjax.compare(*dumps)
    return Found(report.verdict in ("identical", "equivalent"), note=f"{report.verdict}: {report.reason}"[:100])


def demo(path: Path, profile: str, allowed: float, *devices: jax.Device) -> Found:
    """The demo model."""
    ids = list(range(1000, 1100))
    return compared(both(lambda: llmjax.load(path, numerics=profile).logits([ids])[0], devices), allowed)


# Kind, rows, outputs and inputs, profile and stored dtype: Gemma 2B's widths, no whole number of tiles; few rows and
# many, in parts of the columns where the tiles are few.
PRODUCTS = [
    ("int8", 1, 2000, 2048, "fast", "float32"),
    ("int4", 1, 2000, 16384, "fast", "float32"),
    ("int4-g32-asym", 1, 2000, 2048, "fast", "float32"),
    ("int8", 1, 2000, 16384, "fast", "bfloat16"),
    ("float", 1, 2000, 16384, "fast", "bfloat16"),
    ("float", 64, 2000, 2048, "fast", "bfloat16"),
    ("int8", 64, 2000, 2048, "fast", "bfloat16"),
    ("int4", 64, 2000, 2048, "fast", "float32"),
    ("int8", 300, 1000, 2048, "fast", "float32"),
    ("int4-g32-asym", 64, 520, 16384, "fast", "float32"),
    ("int4-g128", 200, 1000, 2048, "hf", "bfloat16"),
    ("int8-asym", 5, 2000, 2048, "hf", "bfloat16"),
    ("int4", 64, 1000, 2048, "reference", "float32"),
    ("float", 64, 1000, 2048, "reference", "float32"),
]
# Kind, profile, tokens, and how far from the CPU's.
MIXTURES = [
    ("bfloat16", "fast", 1, NARROW),
    ("bfloat16", "fast", 64, NARROW),
    ("int4-g32", "fast", 64, EXACT),
    ("int8", "dynamic_int8", 300, ROUNDED),
]
# Profile, a head's width, heads of queries and of keys, positions and rule: steps at several places, and chunks.
_STEP, _CHUNK = [[3], [255], [256], [1500]], [list(range(256, 512))]
ATTENTION = [
    ("fast", 256, (8, 1), _STEP, Scores(0.0625)),
    ("fast", 256, (8, 1), _CHUNK, Scores(0.0625)),
    ("reference", 256, (8, 4), _STEP, Scores(0.0625, softcap=50.0, window=300)),
    ("reference", 256, (8, 4), _CHUNK, Scores(0.0625, softcap=50.0, window=100)),
    ("hf", 80, (32, 32), _CHUNK, Scores(80**-0.5)),
    ("reference", 80, (32, 32), _STEP, Scores(80**-0.5)),
    ("fast", 64, (9, 3), _CHUNK, Scores(0.125)),
    ("reference", 64, (32, 32), _CHUNK, Scores(0.125, alibi=True)),
    ("reference", 128, (32, 8), [list(range(40))], Scores(128**-0.5)),
    ("reference", 512, (8, 1), _CHUNK, Scores(1.0)),
    ("dynamic_int8", 256, (8, 1), _STEP, Scores(0.0625)),
    ("dynamic_int8", 128, (32, 8), _STEP, Scores(128**-0.5)),
    ("dynamic_int8", 256, (8, 1), _CHUNK, Scores(0.0625, softcap=50.0, window=100)),
    ("dynamic_int8", 80, (32, 32), _CHUNK, Scores(80**-0.5)),
]


def checks(path: Path | None = None) -> dict[str, Check]:
    """All, by name, the quickest and most telling first; those of the demo model where ``path`` says where it is."""
    one = "llama_llama3"
    found: dict[str, Check] = {}
    for kind, rows, out, width, profile, dtype in PRODUCTS:
        shown = [] if profile == "reference" else ["packed_product"]
        name = f"product {profile} {dtype} {kind} {rows} x {out} x {width}"
        found[name] = functools.partial(product, kind, rows, out, width, profile, dtype, shown)
    for profile, width, heads, positions, scores in ATTENTION:
        what = f"{len(positions)} x {len(positions[0])} at {max(map(max, positions))}"
        name = f"attention {profile} {width} {what}"
        found[name] = functools.partial(attention, profile, width, heads, positions, scores)
    for kind, profile, tokens, allowed in MIXTURES:
        name = f"mixture {profile} {kind} {tokens}"
        found[name] = functools.partial(mixture, kind, profile, tokens, allowed)
    found |= {
        "parameters elsewhere": functools.partial(elsewhere, one),
        "logits reference llama": functools.partial(logits, one, "reference", "float32", None, EXACT),
        "logits fast int8": functools.partial(logits, one, "fast", "float32", "int8", EXACT),
        "logits fast int4": functools.partial(logits, one, "fast", "float32", "int4", EXACT),
        "logits dynamic_int8": functools.partial(logits, one, "dynamic_int8", "float32", "int8", ROUNDED),
        "logits reference int8": functools.partial(logits, one, "reference", "float32", "int8", EXACT),
        "logits mediapipe_gpu": mediapipe,
        "determinism": determinism,
        "greedy fast int8": functools.partial(greedy, one, "fast", "int8"),
        "batch resume": resume,
        "lora int8": lora,
        "gradients int8": gradients,
        "compare reference": functools.partial(comparison, "reference", None),
        "compare fast int8": functools.partial(comparison, "fast", "int8"),
        "greedy reference gemma2": functools.partial(greedy, "gemma2", "reference", None),
    }
    if path is not None:
        found |= {f"smollm2 {p}": functools.partial(demo, path, p, EXACT) for p in ("reference", "fast")}
    for name in sorted(golden.ONE_EACH):
        for profile in ("reference", "hf", "fast"):
            dtype, allowed = ("float32", EXACT) if profile == "reference" else ("bfloat16", NARROW)
            found[f"logits {profile} {name}"] = functools.partial(logits, name, profile, dtype, None, allowed)
    for name in golden.NAMES:
        if name not in golden.ONE_EACH:
            found[f"logits reference {name}"] = functools.partial(logits, name, "reference", "float32", None, EXACT)
    return found
