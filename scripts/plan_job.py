"""Arithmetic before a job: from rows, lengths, model and machines to memory, hours and cost.

    python scripts/plan_job.py --model config:gemma-2b --bits 8 --rows 1000000 --prompt-tokens 300 \\
        --answer-tokens 200 --machines 4 --memory 80GB --bandwidth 2000 --tflops 400 --price 2.5
    python scripts/plan_job.py --model config:gemma-2b --rows 1000000 --pilot answers.jsonl.manifest.json --machines 4

The first line goes by what a machine can do at most: prompts cost two operations for each weight and token, a step of
all slots reads every weight and the keys and values of every row once, and programs come to ``--reach`` of both peaks
(``llmjax bench`` measures it).  The second goes by what a pilot of some hundred rows took, which is nearer: its
manifest says.  A machine is one worker, with one model: a GPU, or a computer without any.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax.numpy as jnp  # noqa: E402

from llmjax import configs, numerics  # noqa: E402
from llmjax.errors import LlmjaxError, RequestError  # noqa: E402
from llmjax.models.registry import read_config  # noqa: E402
from llmjax.models.tree import parameter_shapes  # noqa: E402
from llmjax.runtime.cache import job_slots, make_cache, nbytes  # noqa: E402
from llmjax.runtime.memory import parse, size  # noqa: E402

# Of what is free beside the weights, what an engine takes (``llmjax.runtime.memory``).
_SHARE = 3 / 4
_POSITIONS = 256


@dataclasses.dataclass(frozen=True)
class Rows:
    """Of a job: how many, and tokens of each on the average."""

    rows: int
    prompt: float
    answer: float


@dataclasses.dataclass(frozen=True)
class Weights:
    """Of a model: all of them, those that every token goes through, bits of each, bytes that a token leaves in the
    cache, slots that a job takes where memory allows, and bytes that a slot carries from token to token."""

    parameters: int
    used: int
    bits: float
    token_bytes: int
    slots: int
    slot_bytes: int = 0

    @property
    def nbytes(self) -> float:
        """Of all weights."""
        return self.parameters * self.bits / 8


@dataclasses.dataclass(frozen=True)
class Machine:
    """What one has: bytes, bytes a second, operations a second; and how much of these two a program comes to."""

    memory: float
    bandwidth: float
    flops: float
    reach: float = 0.5


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of one machine: slots, tokens a second of prompts and of answers, and seconds that a row takes beside them, and a
    start."""

    slots: float
    prefill: float
    decode: float
    row_seconds: float = 0.0
    start_seconds: float = 0.0


def rates_of(rows: Rows, weights: Weights, machine: Machine) -> Rates:
    """By what a machine can do.

    Raises:
      RequestError: the model does not fit.
    """
    row_bytes = weights.slot_bytes + weights.token_bytes * (rows.prompt + rows.answer)
    free = _SHARE * (machine.memory - weights.nbytes)
    if free < row_bytes:
        raise RequestError(
            f"memory: {size(int(machine.memory))} holds no row beside weights of {size(int(weights.nbytes))}: a row "
            f"takes {size(int(row_bytes))} of three quarters of the rest; fewer bits, or larger machines"
        )
    slots = min(weights.slots, int(free / row_bytes))
    operations = 2 * weights.used
    # On the average half of its answer stands in a row's cache.
    cache = 2 * weights.slot_bytes + weights.token_bytes * (rows.prompt + rows.answer / 2)
    read = weights.used * weights.bits / 8 + slots * cache  # what is carried is written as well
    step = max(read / machine.bandwidth, slots * operations / machine.flops) / machine.reach
    return Rates(slots, machine.flops * machine.reach / operations, slots / step)


def measured(manifest: dict) -> tuple[Rates, float, float]:
    """By what a pilot did: rates, and the mean lengths of its prompts and answers.

    Raises:
      RequestError: it answered nothing.
    """
    runs, counts = manifest["runs"], manifest["counts"]
    done = sum(run["rows"] for run in runs)
    total = {name: sum(run[name] for run in runs) for name in runs[-1] if name.endswith(("seconds", "tokens"))}
    if not (done and total["decode_tokens"]):
        raise RequestError("--pilot: it answered no row")
    prefilled = total["prefill_tokens"] + total["reused_tokens"]
    beside = total["seconds"] - total["compile_seconds"] - total["prefill_seconds"] - total["decode_seconds"]
    start = (total["compile_seconds"] + total["load_seconds"]) / len(runs)
    rates = Rates(
        manifest["job"]["slots"],
        prefilled / max(total["prefill_seconds"], 1e-9),
        total["decode_tokens"] / max(total["decode_seconds"], 1e-9),
        max(beside, 0.0) / done,
        start,
    )
    return rates, counts["prompt_tokens"] / counts["rows"], counts["completion_tokens"] / counts["rows"]


def hours(rows: Rows, rates: Rates, machines: int) -> float:
    """That the job takes, all machines at it until its end."""
    row = rows.prompt / rates.prefill + rows.answer / rates.decode + rates.row_seconds
    return (rows.rows * row / machines + rates.start_seconds) / 3600


def weights_of(name: str, bits: float) -> Weights:
    """A model's, by its configuration alone.

    Raises:
      LlmjaxError: there is none.
    """
    if name.startswith("config:"):
        facts = configs.read(name)["config"]
    else:
        path = Path(name)
        try:
            facts = json.loads((path / "config.json" if path.is_dir() else path).read_text())
        except (OSError, ValueError) as error:
            wanted = "config:NAME, or a directory with a config.json"
            raise RequestError(f"--model {name}: expected {wanted}: {error}") from None
    _, config = read_config(facts, name)
    profile = numerics.resolve("fast", jnp.dtype("bfloat16"))
    parameters = sum(map(math.prod, parameter_shapes(config).values()))
    # A table that is not the head, too, is only looked up.
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    slot, page = (nbytes(lambda n=n: make_cache(config, profile, n, _POSITIONS)) for n in (0, 1))
    token = (page - slot) // _POSITIONS
    return Weights(parameters, parameters - table, bits, token, job_slots(config, profile), slot)


def pilot_of(path: str) -> tuple[Rates, float, float]:
    """``measured`` of a manifest's file.

    Raises:
      RequestError: it is none.
      OSError: it cannot be read.
    """
    try:
        return measured(json.loads(Path(path).read_text()))
    except (ValueError, KeyError, TypeError, IndexError):
        raise RequestError(f"--pilot {path}: expected what a batch job writes, OUTPUT.manifest.json") from None


def above_0(text: str) -> float:
    """A flag's number."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return number


def count(text: str) -> int:
    """A flag's number of things."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {text}")
    return number


def main() -> None:
    """Prints the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="config:NAME, or a directory with a config.json")
    parser.add_argument("--bits", type=above_0, default=16, help="of a weight as it is stored: 16, 8, 4.5, ...")
    parser.add_argument("--rows", type=count, required=True)
    parser.add_argument("--prompt-tokens", type=above_0, metavar="N", help="of a row, on the average (or the pilot's)")
    parser.add_argument("--answer-tokens", type=above_0, metavar="N")
    parser.add_argument("--machines", type=count, default=1)
    parser.add_argument("--memory", default="80GB", metavar="SIZE", help="of one, for the model")
    parser.add_argument("--bandwidth", type=above_0, default=2000, metavar="GB/S")
    parser.add_argument("--tflops", type=above_0, default=400, metavar="T", help="of dense products in the dtype")
    parser.add_argument("--reach", type=above_0, default=0.5, metavar="R", help="of both peaks, what programs come to")
    parser.add_argument("--price", type=float, default=0, help="of a machine for an hour")
    parser.add_argument("--pilot", metavar="MANIFEST", help="of a job with some of the rows, on such a machine")
    args = parser.parse_args()
    try:
        prompt, answer = args.prompt_tokens, args.answer_tokens
        if args.pilot:
            rates, *means = pilot_of(args.pilot)
            prompt, answer = (mean if n is None else n for n, mean in zip((prompt, answer), means, strict=True))
        if prompt is None or answer is None:
            raise RequestError("--prompt-tokens, --answer-tokens: needed where no --pilot tells them")
        rows, weights = Rows(args.rows, prompt, answer), weights_of(args.model, args.bits)
        if not args.pilot:
            machine = Machine(parse(args.memory), args.bandwidth * 1e9, args.tflops * 1e12, args.reach)
            rates = rates_of(rows, weights, machine)
    except (LlmjaxError, OSError) as error:
        raise SystemExit(f"plan_job: {error}") from None
    print(report(rows, weights, rates, args.machines, args.price))


def report(rows: Rows, weights: Weights, rates: Rates, machines: int, price: float) -> str:
    """The plan, for people."""
    time = hours(rows, rates, machines)
    cache = rates.slots * weights.token_bytes * (rows.prompt + rows.answer)
    return "\n".join(
        [
            f"model    {weights.parameters / 1e9:.2f} billion weights of {weights.bits:g} bits: "
            f"{size(int(weights.nbytes))}",
            f"memory   {rates.slots:g} rows at a time, {size(int(cache))} of cache "
            f"({weights.token_bytes / 1000:.1f} kB a token): {size(int(weights.nbytes + cache))} a machine",
            f"rates    prompts {rates.prefill:,.0f} tokens a second, answers {rates.decode:,.0f}, on each machine",
            f"time     {time:,.2f} hours on {machines} machines for {rows.rows:,} rows of {rows.prompt:.0f} + "
            f"{rows.answer:.0f} tokens",
            f"cost     {time * machines * price:,.2f} ({time * machines:,.1f} machine hours at {price:g})",
        ]
    )


if __name__ == "__main__":
    main()
