"""Throughput of a batch job on the demo model, against one row at a time, transformers and llama.cpp.

    python scripts/bench_batch.py --rows 256                  # everything that is installed
    python scripts/bench_batch.py --rows 64 --only llmjax llama.cpp

The rows are pieces of Python's documentation of 8 to 512 tokens, each with its own limit of 8 to 128 new tokens, which
every runtime is made to use up.  A rate is all new tokens of the rows over the wall time of the whole job, prefill
included, compiling and loading not.  transformers gets rows sorted by length, left padding, and every batch size of
``--transformers-batches`` in every dtype of ``--transformers-dtypes``; its rows wait for the longest of their batch, as
they do for its users.
llama.cpp (``pip install --no-deps xllamacpp==2026.10.11549``) gets the same GGUF file and parallel slots.
"""

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

import llmjax
from llmjax.checkpoint.loading import find_model
from llmjax.model import Model


class Job(NamedTuple):
    """A prompt's token ids and how many tokens are to follow."""

    ids: list[int]
    limit: int


def rows_of(model: Model, count: int) -> list[Job]:
    """``count`` rows of mixed length, the same on every run."""
    from pydoc_data.topics import topics

    assert model.tokenizer is not None
    text = model.tokenizer.encode("\n".join(topics[name] for name in sorted(topics))[:600_000])
    rng = np.random.default_rng(0)
    lengths, limits = rng.integers(8, 513, count), rng.integers(8, 129, count)
    starts = rng.integers(0, len(text) - 512, count)
    return [Job(text[s : s + n], int(m)) for s, n, m in zip(starts, lengths, limits, strict=True)]


Run = Callable[[list[Job]], str]


def engine(model: Model, slots: int) -> Run:
    """This library's engine; the note it returns says how busy its slots were."""
    llm = llmjax.LLM(model, max_batch=slots)

    def run(rows: list[Job]) -> str:
        before = llm.engine.progress.decode_steps, llm.engine.progress.decode_tokens

        def requests() -> Iterator[llmjax.runtime.row.Request]:
            for i, row in enumerate(rows):
                params = llmjax.SamplingParams(temperature=0, max_tokens=row.limit, ignore_eos=True)
                yield llm.request(row.ids, params, request_id=str(i))

        done = sum(len(o.outputs[0].token_ids) for o in llm.outputs(requests(), reserve=[640] * slots))
        assert done == sum(row.limit for row in rows)
        steps = llm.engine.progress.decode_steps - before[0]
        busy = (llm.engine.progress.decode_tokens - before[1]) / (steps * slots)
        return f"{slots} slots {100 * busy:.0f} % busy"

    return run


def transformers_(checkpoint: str, batch: int, dtype: str) -> Run:
    """Batched ``generate``."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))

    def run(rows: list[Job]) -> str:
        order = sorted(rows, key=lambda row: (len(row.ids), row.limit))
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            longest = max(len(row.ids) for row in part)
            ids = torch.zeros(len(part), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(part):
                ids[i, longest - len(row.ids) :] = torch.tensor(row.ids)
                mask[i, longest - len(row.ids) :] = 1
            new = max(row.limit for row in part)
            model.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return f"batches of {batch}"

    return run


def llama_cpp(path: str, slots: int) -> Run:
    """llama.cpp's server with parallel slots."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel, params.n_ctx = slots, slots * 640
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(params)

    def one(row: Job) -> None:
        request = {"prompt": row.ids, "n_predict": row.limit, "ignore_eos": True, "temperature": 0}
        answer = server.handle_completions({**request, "cache_prompt": False})
        assert answer["usage"]["completion_tokens"] == row.limit, answer

    def run(rows: list[Job]) -> str:
        with ThreadPoolExecutor(slots) as pool:
            list(pool.map(one, rows))
        return f"{slots} slots"

    return run


def _installed(package: str) -> bool:
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"skipped: {package} is not installed", flush=True)
    return found


def main() -> None:
    """Alternates the runtimes over the same rows and prints rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--slots", type=int, default=32, help="of the job, and of llama.cpp")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--dtype", help="of llmjax's weights; as stored in the file where absent")
    parser.add_argument("--transformers-batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--transformers-dtypes", nargs="+", default=["float32", "bfloat16"])
    kinds = ("llmjax", "alone", "transformers", "llama.cpp")
    parser.add_argument("--only", nargs="+", default=list(kinds), choices=kinds)
    args = parser.parse_args()
    if min(args.rows, args.slots, args.repeats, *args.transformers_batches) < 1:
        parser.error("--rows, --slots, --repeats, --transformers-batches: expected at least 1")
    path = str(find_model("smollm2"))
    model = llmjax.load(path, dtype=args.dtype, numerics="fast")
    rows = rows_of(model, args.rows)
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "llmjax" in args.only:
            runs["llmjax"] = engine(model, args.slots)
        if "alone" in args.only:
            runs["llmjax, one row at a time"] = engine(model, 1)
        if "transformers" in args.only and _installed("transformers"):
            llmjax.convert(path, f"{folder}/hf", to="hf", dtype="float32")
            for dtype in args.transformers_dtypes:
                for batch in args.transformers_batches:
                    runs[f"transformers, {dtype}, batch {batch}"] = transformers_(f"{folder}/hf", batch, dtype)
        if "llama.cpp" in args.only and _installed("xllamacpp"):
            runs["llama.cpp"] = llama_cpp(path, args.slots)
        new, prompt = sum(row.limit for row in rows), sum(len(row.ids) for row in rows)
        print(f"{len(rows)} rows: {prompt} prompt and {new} new tokens", flush=True)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run(rows[:2])
        for _ in range(args.repeats):
            for name, run in runs.items():
                began = time.monotonic()
                note = run(rows)
                seconds[name].append(time.monotonic() - began)
                print(f"  {name}: {seconds[name][-1]:.1f} s, {note}", flush=True)
    ours = new / statistics.median(seconds["llmjax"]) if "llmjax" in seconds else None
    for name, taken in seconds.items():
        rate = new / statistics.median(taken)
        ratio = f", llmjax / this = {ours / rate:.2f}" if ours and name != "llmjax" else ""
        print(f"{name}: {rate:.1f} new tokens/s, {prompt / statistics.median(taken):.0f} prompt tokens/s{ratio}")


if __name__ == "__main__":
    main()
