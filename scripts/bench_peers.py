#!/usr/bin/env python3
"""llmjax beside transformers, llama.cpp and LiteRT-LM: the same weights, threads and lengths, measured in turns.

    .venv/bin/python scripts/bench_peers.py
    .venv/bin/python scripts/bench_peers.py --peers llama.cpp,litert-int8 --python llama.cpp=/other/venv/bin/python \\
        --litert-int8 model.litertlm

The weights are the demo model's; each runtime is a process of its own that loads them once and then waits for its turn.
Decoding begins after the prompt.  A ratio is llmjax's speed over the peer's in the same round: the median of all rounds
and their range.  What is not installed is left out with a line.  Peers and what they need:

    transformers-f32, transformers-bf16   torch, transformers and accelerate
    llama.cpp-q4_1, llama.cpp-q8_0        pip install xllamacpp; Q8_0 is written here from the Q4_1 file
    litert-int8                           pip install litert-lm-api, and a model file of these weights: llmjax convert
                                          smollm2 hf --to hf, then litert-torch export_hf --model hf --output_dir out
                                          --quantization_recipe dynamic_wi8_afp32 --prefill_lengths '[8,128,512]'
                                          --cache_length 1024

Start-up is measured, too: the command's time to one token with compiled programs kept from before, and what importing
llmjax takes beyond importing jax.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

OURS = ("stored", "int8", "dynamic_int8", "int4", "bfloat16", "float32")
PEERS = ("transformers-f32", "transformers-bf16", "llama.cpp-q4_1", "llama.cpp-q8_0", "litert-int8")
PHASES = ("decode", "prefill")


class MissingError(Exception):
    """What a runtime needs is not there."""


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(**json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmjax", default=",".join(OURS), help=f"of {', '.join(OURS)} (default: all)")
    parser.add_argument("--peers", default=",".join(PEERS), help="of those above (default: all)")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of such peers")
    parser.add_argument("--litert-int8", type=Path, metavar="FILE", help="the *.litertlm file")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens (default 512)")
    parser.add_argument("--decode", type=int, default=128, metavar="N", help="tokens (default 128)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--no-start-up", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.litert_int8 and not args.litert_int8.is_file():
        parser.error(f"{args.litert_int8}: no such file")
    if wrong := [entry for entry in args.python if "=" not in entry]:
        parser.error(f"--python {wrong[0]}: expected NAME=PATH")
    if min(args.threads, args.prompt, args.decode, args.rounds) < 1:
        parser.error("--threads, --prompt, --decode, --rounds: expected at least 1")
    ours, peers = ([n for n in names.split(",") if n] for names in (args.llmjax, args.peers))
    if unknown := {*ours} - {*OURS} | {*peers} - {*PEERS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    pythons = dict(entry.split("=", 1) for entry in args.python)

    with tempfile.TemporaryDirectory() as folder:
        rates = compared(args, [f"llmjax-{name}" for name in ours] + peers, pythons, Path(folder))
    start = {} if args.no_start_up else start_up(args.rounds)
    if args.json:
        print(json.dumps({"tokens_per_second": rates, "start_up_seconds": start}, indent=2))
    else:
        print(to_text(rates, start))


def compared(args: argparse.Namespace, names: list[str], pythons: dict[str, str], folder: Path) -> dict:
    """``{name: {phase: tokens a second in each round}}`` of what could be measured."""
    from llmjax.checkpoint.loading import find_model

    gguf = find_model("smollm2")
    task = {"threads": args.threads, "prompt": args.prompt, "decode": args.decode, "gguf": str(gguf)}
    if "llama.cpp-q8_0" in names:
        write_q8_0(gguf, folder / "q8_0.gguf")
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            files = {"llama.cpp-q8_0": folder / "q8_0.gguf", "litert-int8": args.litert_int8}
            file = files.get(name, gguf)
            python = next((path for key, path in pythons.items() if name.startswith(key)), sys.executable)
            try:
                workers[name] = Worker(
                    python, task | {"name": name, "file": file and str(file)}, folder / f"{name}.log"
                )
            except MissingError as reason:
                print(f"{name}: left out: {reason}", file=sys.stderr)
        rates: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in workers}
        for i in range(args.rounds):
            print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
            for name, worker in workers.items():
                found = worker.measure()
                for phase in PHASES:
                    rates[name][phase].append(found[phase])
    finally:
        for worker in workers.values():
            worker.close()
    return rates


class Worker:
    """A runtime in a process of its own, stopped between its turns: some wait for work by spinning.

    Raises:
      MissingError: it does not run, and why.
    """

    def __init__(self, python: str, task: dict, log: Path):
        self._log = log
        command = [python, __file__, "--worker", json.dumps(task)]
        try:
            with open(log, "w") as errors:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
        except OSError as error:
            raise MissingError(str(error)) from None
        answer = self._answer()
        if "missing" in answer:
            self.close()
            raise MissingError(answer["missing"])

    def measure(self) -> dict[str, float]:
        """Tokens a second of each phase, once."""
        self._process.send_signal(signal.SIGCONT)
        print("go", file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            sys.exit(f"{' '.join(self._process.args[:2])} failed:\n{self._log.read_text()[-2000:]}")
        self._process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def close(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def work(name: str, threads: int, **task: object) -> None:
    """In a process of its own: load, warm up, then measure once for each line of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what runtimes print must not mix with the answers
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    make = next(make for start, make in MAKERS.items() if name.startswith(start))
    try:
        measure = make(variant=name.partition("-")[2], threads=threads, **task)
    except (ImportError, MissingError) as missing:
        print(json.dumps({"missing": str(missing)}), file=answers, flush=True)
        return
    measure()
    print("{}", file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), file=answers, flush=True)


def llmjax(variant: str, prompt: int, decode: int, file: str, **_: object) -> Callable[[], dict[str, float]]:
    """The engine's own programs, one row."""
    from llmjax.bench.measure import Runner
    from llmjax.checkpoint.loading import load
    from llmjax.runtime.engine import Engine

    settings = {
        "stored": {},
        "int8": {"dtype": "float32", "quantize": "int8"},
        "dynamic_int8": {"dtype": "float32", "quantize": "int8", "numerics": "dynamic_int8"},
        "int4": {"dtype": "float32", "quantize": "int4"},
        "bfloat16": {"dtype": "bfloat16"},
        "float32": {"dtype": "float32"},
    }[variant]
    model = load(file, **({"numerics": "fast"} | settings))
    # The fewest slots there can be: one row is measured.
    runner = Runner(Engine(model, slots=1, enable_prefix_caching=False))
    length = runner.length(prompt + decode)
    return lambda: {
        "prefill": prompt / runner.prefill(prompt, length),
        "decode": decode / runner.decode(prompt, decode, 1, length),
    }


def transformers(
    variant: str, threads: int, prompt: int, decode: int, file: str, **_: object
) -> Callable[[], dict[str, float]]:
    """A greedy loop around the model, its own cache, no more than ``generate`` must do."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[variant]
    path = Path(file)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).eval()
    ids = torch.randint(model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def measure() -> dict[str, float]:
        began = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        filled = time.perf_counter()
        for _ in range(decode):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return {"prefill": prompt / (filled - began), "decode": decode / (time.perf_counter() - filled)}

    return measure


def llama_cpp(threads: int, prompt: int, decode: int, file: str, **_: object) -> Callable[[], dict[str, float]]:
    """Its server inside this process, by its own clock."""
    import random

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel = prompt + decode + 8, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    ids = random.Random(0).choices(range(1000, 40000), k=prompt)
    request = {"prompt": ids, "n_predict": decode, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def measure() -> dict[str, float]:
        timings = server.handle_completions(request)["timings"]
        assert (timings["prompt_n"], timings["predicted_n"]) == (prompt, decode), timings
        return {"prefill": timings["prompt_per_second"], "decode": timings["predicted_per_second"]}

    return measure


def litert(threads: int, prompt: int, decode: int, file: str | None, **_: object) -> Callable[[], dict[str, float]]:
    """Its own benchmark."""
    import litert_lm

    if file is None:
        raise MissingError("no model file (--litert-int8 FILE; see --help)")

    def measure() -> dict[str, float]:
        benchmark = litert_lm.Benchmark(
            file,
            litert_lm.Backend.CPU(thread_count=threads),
            prefill_tokens=prompt,
            decode_tokens=decode,
            max_num_tokens=1024,
            cache_dir=":nocache",
        )
        info = benchmark.run()
        return {"prefill": info.last_prefill_tokens_per_second, "decode": info.last_decode_tokens_per_second}

    return measure


MAKERS = {"llmjax": llmjax, "transformers": transformers, "llama.cpp": llama_cpp, "litert": litert}


def write_q8_0(source: Path, destination: Path) -> None:
    """``source`` with its quantized tensors as Q8_0."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(destination, reader.fields["general.architecture"].contents())
    kinds = gguf.GGUFValueType
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[-1] if field.types[0] == kinds.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        if tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            writer.add_tensor(tensor.name, tensor.data)
        else:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def start_up(rounds: int) -> dict[str, list[float]]:
    """Seconds from the command to one token, and those that importing llmjax adds to importing jax."""
    command = [
        sys.executable,
        "-m",
        "llmjax",
        "generate",
        "--model",
        "smollm2",
        "--prompt",
        "The capital of France",
    ]
    command += ["--max-tokens", "1", "--temperature", "0"]
    importing = "import time, jax; began = time.perf_counter(); import llmjax; print(time.perf_counter() - began)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(command: list[str]) -> str:
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    run(command)  # fills the compilation cache
    seconds: dict[str, list[float]] = {"generate": [], "import": []}
    for _ in range(rounds):
        began = time.perf_counter()
        run(command)
        seconds["generate"].append(time.perf_counter() - began)
        seconds["import"].append(float(run([sys.executable, "-c", importing])))
    return seconds


def to_text(rates: dict[str, dict[str, list[float]]], start: dict[str, list[float]]) -> str:
    """Speeds, then ratios: a line for each peer, a column for each llmjax."""
    from llmjax.bench.report import columns_of

    rows = [("tok/s, median (min-max)", *PHASES)]
    rows += [(name, *(spread(found[phase]) for phase in PHASES)) for name, found in rates.items()]
    blocks = [columns_of(rows)]
    ours = [name for name in rates if name.startswith("llmjax")]
    for phase in PHASES:
        rows = [(f"{phase}: ratio to", *ours)]
        for peer in (name for name in rates if name not in ours):
            pairs = (zip(rates[name][phase], rates[peer][phase], strict=True) for name in ours)
            rows.append((peer, *(spread([a / b for a, b in pair]) for pair in pairs)))
        blocks.append(columns_of(rows))
    if start:
        blocks.append([f"generate, one token, warm: {spread(start['generate'])} s"])
        blocks[-1].append(f"import llmjax beyond jax: {spread(start['import'])} s")
    return "\n\n".join("\n".join(lines) for lines in blocks)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


if __name__ == "__main__":
    main()
