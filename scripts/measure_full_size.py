#!/usr/bin/env python3
"""Loads a full-size checkpoint of random weights from disk, generates, and reports memory and time.

    python scripts/measure_full_size.py config:gemma-2b bfloat16
    python scripts/measure_full_size.py config:gemma-7b bfloat16 --quantize int8 int4 --convert-only
    python scripts/measure_full_size.py config:gemma-2b bfloat16 --mediapipe cpu-int8 gpu-int4

Writes the checkpoint (sharded safetensors), reads it once to know what reading costs, then loads or converts it in a
fresh process.  Peak memory is that process's, of which file pages that were mapped count too.
"""

import argparse
import json
import os
import shutil
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
    from llmjax.models.tree import parameter_shapes

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
    from llmjax.models.names import sources_of

    shapes = {}
    for parameter, shape in parameters.items():
        entry, tensors = sources_of(parameter, names)
        shapes.update(dict.fromkeys(tensors, entry.source_shape(shape)))
    return shapes


def generate(folder: str) -> None:
    """In a process of its own: load and generate."""
    import llmjax
    from llmjax.model import Model

    began = time.monotonic()
    model: Model = llmjax.load(folder, numerics="fast")
    jax_ready(model.params)
    loaded = time.monotonic()
    peak_load = peak_memory()
    llm = llmjax.LLM(model, max_batch=4)
    params = llmjax.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm.generate([2, 10, 20, 30], params)
    compiled = time.monotonic()
    llm.generate([2, 10, 20, 30], params)
    done = time.monotonic()
    times = {"load_s": loaded - began, "first_s": compiled - loaded, "second_s": done - compiled}
    print(json.dumps(times | {"peak_load": peak_load, "peak": peak_memory()}))


def convert(folder: str, destination: str, scheme: str) -> None:
    """In a process of its own: quantize."""
    import llmjax

    began = time.monotonic()
    llmjax.convert(folder, destination, quantize=scheme)
    print(json.dumps({"convert_s": time.monotonic() - began, "peak": peak_memory()}))


def convert_to_mediapipe(folder: str, destination: str, target: str) -> None:
    """In a process of its own: a ``.bin`` file, by MediaPipe's options and so with raw weight files beside it."""
    from converters import ConversionConfig, convert_checkpoint
    from converters.readers.mediapipe.container import VOCABULARY, BinFile
    from llmjax.checkpoint.mediapipe_config import MODEL_TYPES

    published = json.loads((Path(folder) / "config.json").read_text())
    kind = next(m for m in MODEL_TYPES.values() if m.config["hidden_size"] == published["hidden_size"])
    tiny = ROOT / "tests" / "data" / "mediapipe" / "GEMMA_2B_gpu_int8_mp0.10.21.bin"
    vocabulary = Path(destination) / "spm.model"
    vocabulary.parent.mkdir()
    vocabulary.write_bytes(BinFile(tiny).blob(VOCABULARY) or b"")
    backend, bits = target.split("-int")
    options = {f"{role}_quant_bits": int(bits) for role in ("attention", "feedforward", "embedding")}
    config = ConversionConfig(
        folder, "safetensors", kind.name, backend, destination, vocab_model_file=str(vocabulary), **options
    )
    began = time.monotonic()
    convert_checkpoint(config)
    print(json.dumps({"convert_s": time.monotonic() - began, "peak": peak_memory()}))


def jax_ready(tree: object) -> None:
    import jax

    jax.block_until_ready(tree)


def peak_memory() -> int:
    """Bytes; not ``ru_maxrss``, which begins with what the parent process had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def in_child(*arguments: str) -> dict[str, float]:
    out = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(out.stderr)
    return json.loads(out.stdout)


def copied(folder: Path, destination: Path | None = None, limit: float = float("inf")) -> float:
    """Seconds that reading the weights takes, and writing ``limit`` bytes of them to a file if there is one."""
    began = time.monotonic()
    buffer, written = bytearray(1 << 24), 0
    with open(destination or os.devnull, "wb", buffering=0) as out:
        for file in sorted(folder.glob("*.safetensors")):
            with open(file, "rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    if destination and written < limit:
                        written += out.write(memoryview(buffer)[:count])
        if destination:
            os.fsync(out.fileno())
    return time.monotonic() - began


def report_generation(folder: Path, weights: int, allowed: float) -> None:
    read_s = copied(folder)
    found = in_child("--generate", str(folder))
    print(f"  load {found['load_s']:.1f} s = {found['load_s'] / read_s:.2f} x reading the file ({read_s:.1f} s)")
    print(f"  first 8 tokens {found['first_s']:.1f} s with compiling, next 8 {found['second_s']:.1f} s")
    for what in ("peak_load", "peak"):
        size = found[what]
        print(f"  {what} {size / 1e9:.2f} GB = {size / weights:.2f} x weights (allowed {allowed / 1e9:.2f} GB)")


def report_conversion(folder: Path, name: str, found: dict[str, float], packed: int) -> None:
    copy = folder.parent / "copy"
    copy_s = copied(folder, copy, packed)
    copy.unlink()
    print(f"{name}: {packed / 1e9:.2f} GB")
    print(f"  convert {found['convert_s']:.1f} s = {found['convert_s'] / copy_s:.2f} x reading and writing")
    print(f"  those bytes ({copy_s:.1f} s); peak {found['peak'] / 1e9:.2f} GB", flush=True)


def wrong(args: argparse.Namespace) -> str | None:
    """What would else be found out after gigabytes were written."""
    from llmjax import configs
    from llmjax.checkpoint.mediapipe_config import MODEL_TYPES
    from llmjax.errors import LlmjaxError
    from llmjax.quant.schemes import parse

    try:
        width = configs.read(args.config)["config"].get("hidden_size")
        for scheme in args.quantize or ():
            parse(scheme)
    except LlmjaxError as error:
        return str(error)
    if args.mediapipe and width not in (kind.config["hidden_size"] for kind in MODEL_TYPES.values()):
        return f"--mediapipe: {args.config} is none of its models, {', '.join(MODEL_TYPES)}"
    if args.folder and not args.folder.is_dir():
        return f"{args.folder}: no such directory"
    return None


def main() -> None:
    """Measures and prints."""
    if sys.argv[1:2] == ["--generate"]:
        return generate(sys.argv[2])
    if sys.argv[1:2] == ["--convert"]:
        return convert(*sys.argv[2:5])
    if sys.argv[1:2] == ["--to-mediapipe"]:
        return convert_to_mediapipe(*sys.argv[2:5])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config:NAME")
    parser.add_argument("dtype", choices=("bfloat16", "float32"))
    parser.add_argument("folder", nargs="?", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--quantize", nargs="+", metavar="SCHEME", help="convert to these, and run those instead")
    parser.add_argument("--convert-only", action="store_true")
    targets = [f"{backend}-int{bits}" for backend in ("cpu", "gpu") for bits in (8, 4)]
    parser.add_argument("--mediapipe", nargs="+", choices=targets, help="convert to .bin files")
    args = parser.parse_args()
    if problem := wrong(args):
        parser.error(problem)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary) / "float"
        folder.mkdir()
        weights = write(args.config, args.dtype, folder)
        print(f"{args.config} {args.dtype}: {weights / 1e9:.2f} GB of weights", flush=True)
        for target in args.mediapipe or ():
            converted = Path(temporary) / target
            found = in_child("--to-mediapipe", str(folder), str(converted), target)
            report_conversion(folder, target, found, sum(file.stat().st_size for file in converted.iterdir()))
            shutil.rmtree(converted)
        if not args.quantize and not args.mediapipe:
            report_generation(folder, weights, 1.15 * weights + 1e9)
        for scheme in args.quantize or ():
            converted = Path(temporary) / scheme
            found = in_child("--convert", str(folder), str(converted), scheme)
            packed = sum(file.stat().st_size for file in converted.glob("*.safetensors"))
            report_conversion(folder, scheme, found, packed)
            if not args.convert_only:
                report_generation(converted, packed, packed + 1e9)
            shutil.rmtree(converted)


if __name__ == "__main__":
    main()
