#!/usr/bin/env python3
"""Runs op graphs through llmjax and compares them with what LiteRT's interpreter computed.

    python scripts/check_litert.py CASE_DIR [GLOB]

CASE_DIR holds ``tflite/NAME/RECIPE.tflite[.xz]`` with ``RECIPE.npz``, ``handwritten/*.tflite[.xz]`` with ``*.npz``,
``ops/ops.npz`` and bundles ``litertlm/*.litertlm[.xz]`` with ``*.json``; GLOB chooses among them (``tflite/phi/*``).
Tolerances: floats 5e-5 in logits, caches and traced tensors; where activations are rounded to 8 bits 1e-5, but for two
rows of a file, in which a rounding may go the other way, up to 0.1.
"""

import argparse
import fnmatch
import json
import lzma
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from converters.readers.litert import tflite  # noqa: E402
from llmjax.errors import LlmjaxError  # noqa: E402
from llmjax.litert import loading  # noqa: E402
from llmjax.litert.graph import Graph, numerics_for  # noqa: E402
from llmjax.litert.model import GraphModel  # noqa: E402
from llmjax.litert.module import EMBEDDER, MAIN, PER_LAYER  # noqa: E402

FLOAT, ROUNDED, FLIPPED, FLIPS = 5e-5, 1e-5, 0.1, 2


def content(path: Path) -> bytes:
    return lzma.open(path).read() if path.suffix == ".xz" else path.read_bytes()


def beside(path: Path, end: str) -> Path | None:
    """The file of the same name with another end, compressed or not."""
    base = path.name.removesuffix(".xz").removesuffix(".tflite").removesuffix(".litertlm")
    found = [path.with_name(base + end), path.with_name(base + end + ".xz")]
    return next((p for p in found if p.exists()), None)


def model(path: Path) -> GraphModel:
    """A graph, with those of its embedders beside it."""
    parts = {
        MAIN: path,
        EMBEDDER: beside(path, ".embedder.tflite"),
        PER_LAYER: beside(path, ".per_layer_embedder.tflite"),
    }
    files = {part: tflite.read(memoryview(content(p)), str(p)) for part, p in parts.items() if p}
    return loading.model_of(files, path)


def check_model(path: Path) -> Iterator[str]:
    """What is wrong with the three stored runs of a file, and with its traced tensors."""
    results = beside(path, ".npz")
    if results is None:
        yield "no .npz of results beside it"
        return
    stored, found = np.load(results), model(path)
    rounds = found.numerics.digits == 1
    s0, s1 = stored["ids/s0"].tolist(), stored["ids/s1"].tolist()
    rows: list[float] = []
    for run, ids, prefill in (("s0", s0[:24], 16), ("s1", s1[:19], 11), ("s2", s1[:12], 8)):
        logits, states = found.follow(ids, prefill)
        rows += np.abs(logits - stored[f"xnn1/{run}/logits"]).max(1).tolist()
        for key in (k for k in stored if k.startswith(f"xnn1/{run}/end/")):
            far = float(np.abs(np.asarray(states[key.split("/")[-1]]) - stored[key]).max())
            if not far <= (FLIPPED if rounds else FLOAT):  # no number, neither
                yield f"{key}: {far:.1e}"
    limit = ROUNDED if rounds else FLOAT
    flips = [far for far in rows if not far <= limit]
    if len(flips) > (FLIPS if rounds else 0) or not all(far <= FLIPPED for far in flips):
        yield f"logits: {len(flips)} rows of {len(rows)} above {limit}, up to {max(rows):.1e}"
    print(f"  logits {max(rows):.1e}, {len(flips)} rows above {limit}", file=sys.stderr)
    if "trace_names" in stored and not rounds:
        yield from check_trace(found, stored, s0)


def check_trace(found: GraphModel, stored: "np.lib.npyio.NpzFile", ids: list[int]) -> Iterator[str]:
    """The tensors of the first decode step."""
    module, ports = found.module, found.module.decode_ports
    graph = module.graphs[MAIN]
    _, states = found.follow(ids[:16], 16)
    position = np.int32(16)
    seen = np.arange(ports.context)[None] <= position
    inputs = module.inputs(found.params, ports, states, np.int32([ids[16]]), np.int32([position]), seen)
    _, tensors = graph.run(ports.name, {k: np.asarray(v) for k, v in inputs.items()}, ["*"])
    names = graph.names(ports.name)
    far = {
        int(key[6:]): float(np.abs(tensors[names[int(key[6:])]].astype(np.float64) - stored[key]).max(initial=0))
        for key in stored
        if key.startswith("trace/") and int(key[6:]) in names
    }
    print(f"  {len(far)} tensors, {max(far.values()):.1e}", file=sys.stderr)
    yield from (f"tensor {i} {names[i][-60:]}: {error:.1e}" for i, error in far.items() if not error <= FLOAT)


def check_ops(path: Path) -> Iterator[str]:
    """Graphs of one operator; their errors count in relation to the largest output."""
    stored = np.load(path)
    for name in sorted({key.split("/")[0] for key in stored}):
        graph = Graph(tflite.read(memoryview(stored[f"{name}/model"].tobytes()), name), numerics_for(None))
        inputs = {key.split("/")[-1]: stored[key] for key in stored if key.startswith(f"{name}/in/")}
        outputs, _ = graph.run(next(iter(graph.signatures)), inputs)
        for port, value in outputs.items():
            expected = stored[f"{name}/xnn1/{port}"]
            far = float(np.abs(value - expected).max() / max(1, np.abs(expected).max()))
            if not far <= 1e-6:
                yield f"{name}: {far:.1e}"


def check_bundle(path: Path) -> Iterator[str]:
    """Greedy ids and scores of LiteRT-LM, through the whole API."""
    import llmjax

    with tempfile.NamedTemporaryFile(suffix=".litertlm") as file:
        file.write(content(path))
        file.flush()
        llm = llmjax.LLM(file.name, max_batch=2)
        about = beside(path, ".json") or path.with_name(path.name.split("-nobos")[0] + ".json")
        runs = [run for run in json.loads(about.read_text()).get("runs", []) if run["start_token"] is None]
        greedy = llmjax.SamplingParams(temperature=0, ignore_eos=True, max_tokens=64)
        for run, output in zip(runs, llm.generate([r["prompt"] for r in runs], greedy), strict=True):
            ours, theirs = list(output.outputs[0].token_ids), run["greedy"]
            same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
            if same < len(theirs) and run["greedy_margins_interpreter"][same] > FLIPPED:
                yield f"greedy ids differ from token {same} on"
            # The prompt but for its last token went through prefill there, whose weights may be others.
            before, target = len(run["prompt"]) - 1, run["target"]
            logits = llm.model.logits([run["prompt"] + target], prefill=before)[0][: len(target)].astype(np.float64)
            scores = logits[range(len(target)), target] - np.logaddexp.reduce(logits, axis=1)
            far = float(np.abs(scores - run["token_scores_interpreter"]).max())
            print(f"  {len(theirs)} greedy ids, {same} the same; scores {far:.1e}", file=sys.stderr)
            if not far <= FLIPPED:
                yield f"scores: {far:.1e}"


def main() -> int:
    """Returns 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("glob", nargs="?", default="*")
    args = parser.parse_args()
    checks = {"tflite": check_model, "handwritten": check_model, "ops": check_ops, "litertlm": check_bundle}
    ends = {"tflite": ".tflite", "handwritten": ".tflite", "ops": ".npz", "litertlm": ".litertlm"}
    if not args.directory.is_dir():
        parser.error(f"{args.directory}: no such directory")
    bad = seen = 0
    for path in sorted(args.directory.rglob("*")):
        name = path.relative_to(args.directory).as_posix()
        kind, plain = name.split("/")[0], path.name.removesuffix(".xz")
        if kind not in checks or not plain.endswith(ends[kind]) or "embedder" in plain:
            continue
        if not fnmatch.fnmatch(name, f"{args.glob}*"):
            continue
        print(name, file=sys.stderr)
        try:
            problems = list(checks[kind](path))
        except LlmjaxError as error:
            problems = [str(error)]
        bad, seen = bad + bool(problems), seen + 1
        print(f"{name}: {'; '.join(problems) or 'right'}", flush=True)
    if not seen:
        parser.error(f"{args.directory}: no file to check in {', '.join(checks)} below it whose name fits {args.glob}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
