#!/usr/bin/env python3
"""Loads a full-size checkpoint of random weights from disk, generates, and reports memory and time.

    python scripts/measure_full_size.py config:gemma-2b bfloat16 [FOLDER]

Writes the checkpoint (sharded safetensors) into FOLDER (a temporary one by default), reads it once to know what reading
costs, then loads it in a fresh process.  Peak memory is that process's, of which file pages that were mapped count too.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHARD_BYTES = 2e9


def write(name: str, dtype: str, folder: Path) -> int:
    """A sharded Hugging Face directory; returns the bytes of its weights."""
    import ml_dtypes
    from safetensors.numpy import save_file

    from llmjax import configs
    from llmjax.models.registry import read_config
    from llmjax.plan import parameter_shapes

    facts = configs.read(name)
    architecture, config = read_config(facts["config"], name)
    shapes = source_shapes(architecture.hf_names(config), parameter_shapes(config))
    kind = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype]
    random, shard, size, number, index = np.random.default_rng(0), {}, 0, 0, {}
    total = 0

    def flush() -> None:
        nonlocal shard, size, number
        number += 1
        file = f"model-{number:05}.safetensors"
        save_file(shard, folder / file)
        index.update(dict.fromkeys(shard, file))
        shard, size = {}, 0

    for tensor, shape in shapes.items():
        value = (random.random(shape, np.float32) - 0.5) * np.float32(0.07)
        shard[tensor] = (value if len(shape) > 1 else value + 1).astype(kind)
        size += shard[tensor].nbytes
        total += shard[tensor].nbytes
        if size > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(facts["config"]))
    return total


def source_shapes(names: dict, parameters: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors a checkpoint of this architecture holds."""
    from llmjax.plan import sources_of

    shapes = {}
    for parameter, shape in parameters.items():
        entry, tensors = sources_of(parameter, names)
        shapes.update(dict.fromkeys(tensors, entry.source_shape(shape)))
    return shapes


def child(folder: str) -> None:
    """In a process of its own: load and generate."""
    import resource

    import llmjax
    from llmjax.model import Model

    began = time.monotonic()
    model: Model = llmjax.load(folder, numerics="fast")
    for leaf in model.params["embed"].values():
        leaf.block_until_ready()
    loaded = time.monotonic()
    peak_load = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    llm = llmjax.LLM(model, max_batch=4)
    params = llmjax.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm.generate([2, 10, 20, 30], params)
    compiled = time.monotonic()
    tokens = llm.generate([2, 10, 20, 30], params)[0].outputs[0].token_ids
    done = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "load_s": loaded - began,
                "first_s": compiled - loaded,
                "second_s": done - compiled,
                "tokens": len(tokens),
                "peak_load": peak_load,
                "peak": peak,
            }
        )
    )


def main() -> None:
    """Measures and prints."""
    if sys.argv[1] == "--child":
        child(sys.argv[2])
        return
    name, dtype = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        weights = write(name, dtype, folder)
        began = time.monotonic()
        for file in sorted(folder.glob("*.safetensors")):
            with open(file, "rb", buffering=0) as stream:
                buffer = bytearray(1 << 24)
                while stream.readinto(buffer):
                    pass
        read_s = time.monotonic() - began
        out = subprocess.run([sys.executable, __file__, "--child", str(folder)], capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(out.stderr)
    found = json.loads(out.stdout)
    print(f"{name} {dtype}: {weights / 1e9:.2f} GB of weights")
    print(f"  load {found['load_s']:.1f} s = {found['load_s'] / read_s:.2f} x reading the file ({read_s:.1f} s)")
    print(f"  first 8 tokens {found['first_s']:.1f} s with compiling, next {found['tokens']} {found['second_s']:.1f} s")
    for what in ("peak_load", "peak"):
        allowed = 1.15 * weights + 1e9
        size = found[what]
        print(f"  {what} {size / 1e9:.2f} GB = {size / weights:.2f} x weights (allowed {allowed / 1e9:.2f} GB)")


if __name__ == "__main__":
    main()
