"""Times prefill and decode of one model in the engine's own compiled programs, and the machine's peaks between them."""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.bench.cost import Cost, Costs
from llmjax.bench.probes import matmul_probe, read_probe
from llmjax.checkpoint.identity import model_facts, runtime_facts
from llmjax.device import device_of, platform_of
from llmjax.errors import RequestError
from llmjax.litert.model import GraphModel
from llmjax.model import Model
from llmjax.outside.values import POSITIVE, check
from llmjax.outside.whole import make_folder
from llmjax.products.matmul import integer_digits
from llmjax.quant.qtensor import is_qtensor
from llmjax.runtime.decode import BURST
from llmjax.runtime.engine import Engine
from llmjax.runtime.params import SamplingParams
from llmjax.runtime.row import Request, Row
from llmjax.runtime.schedule import Schedule
from llmjax.runtime.state import State
from llmjax.runtime.store import Store


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      slots: of the engine.
      in_use: how many of them decode; each is measured.
      chunk: prompt tokens a prefill call takes.
      prompt_lengths: tokens, for prefill and the time to the first token.
      output_length: tokens each row decodes.
      contexts: tokens in the cache when decoding begins; None for the prompt lengths.
      caches: positions of the cache, rounded up as the engine does; None for the least that holds a row.
      repeat: measurements of each setting, taken in turns.
      profile: a folder for the profiler's trace of one run more of each setting; None for none.
    """

    slots: int = 8
    in_use: Sequence[int] = (1,)
    chunk: int = 128
    prompt_lengths: Sequence[int] = (128, 512)
    output_length: int = 32
    contexts: Sequence[int] | None = None
    caches: Sequence[int] | None = None
    repeat: int = 5
    profile: Path | None = None

    def __post_init__(self) -> None:
        numbers = {"prompt length": self.prompt_lengths, "context": self.contexts or (), "cache": self.caches or ()}
        numbers |= {"output length": (self.output_length,), "repeat": (self.repeat,), "slots in use": self.in_use}
        for name, values in numbers.items():
            for value in values:
                check(name, value, POSITIVE)
        if max(self.in_use) > self.slots:
            raise RequestError(f"slots in use: expected at most the {self.slots} there are, found {max(self.in_use)}")


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclasses.dataclass(frozen=True)
class Measured:
    """One setting.

    Attributes:
      phase: ``prefill`` or ``decode``.
      tokens: in the cache when the phase begins, for decode; of the prompt, for prefill.
      new: tokens each row decodes; 0 for prefill.
      cache: positions of the cache.
      in_use: slots that run.
      tokens_per_second: of all slots together.
      bytes_per_second: what must be read (``llmjax.bench.cost``), by the time it took.
      flops_per_second: what must be computed, by the time it took.
      of_limit: the least time the machine's measured peaks (of products, the fastest dtype's) allow, by the time it
        took; above 1 on a machine that is not quiet, or where all weights fit its caches.
      bound: which of the two takes longer: ``memory`` or ``compute``.
      first_token_seconds: from the request to the first token, for prefill; else None.
      compile_seconds: for programs this setting was the first to need.
    """

    phase: str
    tokens: int
    new: int
    cache: int
    in_use: int
    tokens_per_second: Spread
    bytes_per_second: float
    flops_per_second: float
    of_limit: float
    bound: str
    first_token_seconds: Spread | None
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """All of one run.

    Attributes:
      model: ``llmjax.checkpoint.identity.model_facts``, ``parameters`` and ``weight_bytes``.
      runtime: ``llmjax.checkpoint.identity.runtime_facts``.
      slots: of the engine.
      chunk: prompt tokens a prefill call takes.
      load_seconds: from the call to weights on the device.
      compile_seconds: of all programs.
      peak_bytes: most memory until every setting had run once: of the process, or of the GPU.
      read_bytes_per_second: the machine's, by the probe.
      matmul_flops_per_second: the machine's, by dtype.
      settings: what was measured.
    """

    model: dict[str, Any]
    runtime: dict[str, Any]
    slots: int
    chunk: int
    load_seconds: float
    compile_seconds: float
    peak_bytes: int | None
    read_bytes_per_second: Spread
    matmul_flops_per_second: dict[str, Spread]
    settings: list[Measured]

    def to_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return dataclasses.asdict(self)


@dataclasses.dataclass
class _Setting:
    """A setting under way: ``time`` runs it once and returns seconds, ``first_token`` those to the first token."""

    phase: str
    tokens: int
    new: int
    cache: int
    in_use: int
    cost: Cost
    time: Callable[[], float]
    first_token: Callable[[], float] | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    first_token_seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0

    def run(self) -> None:
        self.seconds.append(self.time())
        if self.first_token is not None:
            self.first_token_seconds.append(self.first_token())


def run(load: Callable[[], Model], options: Options, report: Callable[[str], None] = lambda _: None) -> BenchReport:
    """Loads a model and measures it.

    Args:
      load: makes the model; timed.
      options: what to measure.
      report: told what is going on.

    Raises:
      LlmjaxError: the model does not load, or no setting fits its context.
      RequestError: it is an op graph, or there cannot be the profile's folder.
    """
    if options.profile:
        make_folder(options.profile, RequestError)
    began = time.perf_counter()
    model = load()
    jax.block_until_ready(model.params)
    loaded = time.perf_counter() - began
    if isinstance(model, GraphModel):
        raise RequestError(f"{model.path}: bench measures checkpoints, not op graphs")
    engine = Engine(model, slots=options.slots, chunk=options.chunk, enable_prefix_caching=False)
    costs = Costs(model)
    settings = list(_settings(Runner(engine), costs, options))
    for i, setting in enumerate(settings):
        report(f"warming up {i + 1} of {len(settings)}")
        before = engine.compile_seconds
        setting.run()
        setting.compile_seconds = engine.compile_seconds - before
        setting.seconds.clear()
        setting.first_token_seconds.clear()
    device = device_of(model.params)
    peak = _peak_bytes(device)  # before the probes take theirs

    report("measuring the machine")
    with jax.default_device(device):
        probes = {"read": read_probe()} | {dtype: matmul_probe(dtype) for dtype in _product_dtypes(model)}
    rates: dict[str, list[float]] = {name: [] for name in probes}
    for probe in probes.values():
        probe()
    for i in range(options.repeat):
        report(f"measuring {i + 1} of {options.repeat}")
        for name, probe in probes.items():
            rates[name].append(probe())
        for setting in settings:
            setting.run()
    if options.profile:
        report("profiling")
        for setting in settings:
            name = f"{setting.phase}-{setting.tokens}-{setting.in_use}-{setting.cache}"
            with jax.profiler.trace(options.profile / name):
                setting.time()
    report("")
    spreads = {name: Spread.of(values) for name, values in rates.items()}
    read = spreads.pop("read")
    fastest = max(s.median for s in spreads.values())
    return BenchReport(
        model={
            **model_facts(model),
            "parameters": costs.parameters,
            "weight_bytes": costs.weight_bytes,
        },
        runtime=runtime_facts(model.params),
        slots=engine.slots,
        chunk=engine.chunk,
        load_seconds=loaded,
        compile_seconds=engine.compile_seconds,
        peak_bytes=peak,
        read_bytes_per_second=read,
        matmul_flops_per_second=spreads,
        settings=[_measured(s, read.median, fastest) for s in settings],
    )


class Runner:
    """Drives one engine's programs with states made to measure: one a cache length, shared by all settings."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._stores: dict[int, Store] = {}
        self._random = np.random.default_rng(0)

    def length(self, tokens: int) -> int:
        """The cache the engine makes for so many tokens."""
        return self.engine.store.bucket(tokens)

    def _enter(self, length: int) -> State:
        """Gives the engine the state of this length, with pages for as much in every slot."""
        engine = self.engine
        if length not in self._stores:
            self._stores[length] = engine.new_store()
        store = engine.store = self._stores[length]
        return store.ensure(length, engine.slots * store.pages.needed(length))

    def request(self, tokens: int, new: int = 1) -> Request:
        """A greedy request for a random prompt."""
        ids = self._random.integers(0, self.engine.model.config.vocab_size, tokens).tolist()
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        return Request("0", None, ids, params, 0)

    def prefill(self, tokens: int, length: int) -> float:
        """Seconds for one prompt in one slot."""
        self._enter(length)
        engine = self.engine
        schedule = Schedule(engine.store, engine.slots, engine.chunk)
        schedule.waiting.append(Row(self.request(tokens), None, ()))
        began = time.perf_counter()
        admitted = schedule.admit()
        assert admitted is not None, "this setting does not fit the memory"
        for _ in engine._fill(*admitted):
            pass
        jax.block_until_ready(engine.store.state)
        return time.perf_counter() - began

    def first_token(self, tokens: int, length: int) -> float:
        """Seconds from a request to its first token on the host."""
        self._enter(length)
        request = self.request(tokens)
        began = time.perf_counter()
        next(iter(self.engine.run([request], burst=1)))
        return time.perf_counter() - began

    def decode(self, context: int, new: int, in_use: int, length: int) -> float:
        """Seconds for ``new`` tokens in each of ``in_use`` slots, ``context`` in the cache of each."""
        engine, state = self.engine, self._enter(length)
        used = jnp.arange(engine.slots) < in_use
        for slot in range(in_use):
            engine.store.hold(slot, context + new, range(in_use))
        engine.store.state = state.replace(
            position=jnp.where(used, jnp.int32(context), 0),
            step=jnp.zeros_like(state.step),
            active=used,
            max_tokens=jnp.full_like(state.max_tokens, new + 1),
        )
        rows = {slot: Row(self.request(1, new), None, ()) for slot in range(in_use)}
        jax.block_until_ready(engine.store.state)
        began = time.perf_counter()
        for done in range(0, new, BURST):
            engine._produced(rows, *engine._burst(rows, min(BURST, new - done), False))
        return time.perf_counter() - began


def _settings(bench: Runner, costs: Costs, options: Options) -> Iterator[_Setting]:
    context_length, new = bench.engine.model.context_length, options.output_length
    contexts = options.contexts or options.prompt_lengths
    for tokens in {*options.prompt_lengths, *contexts}:
        if tokens + new > context_length:
            raise RequestError(
                f"{tokens} tokens and {new} new ones are more than the model's context of {context_length}; "
                f"measure fewer (--prompt-lengths, --context, --output-length){bench.engine.model.longer_context}"
            )
    for tokens in options.prompt_lengths:
        length = bench.length(tokens + new)
        cost = costs.prefill(tokens, bench.engine.chunk)
        prefill, first_token = (functools.partial(f, tokens, length) for f in (bench.prefill, bench.first_token))
        yield _Setting("prefill", tokens, 0, length, 1, cost, prefill, first_token)
    for cache in options.caches or ():
        if cache < min(contexts) + new:
            raise RequestError(
                f"cache: {cache} positions do not hold {min(contexts)} tokens and {new} new ones; give more (--cache)"
            )
    for context, positions, rows in itertools.product(contexts, options.caches or (0,), options.in_use):
        if options.caches and positions < context + new:
            continue  # of a table of both, the corner that cannot be
        length = bench.length(positions or context + new)
        cost = sum((costs.decode_step(rows, context + i) for i in range(new)), Cost(0, 0))
        decode = functools.partial(bench.decode, context, new, rows, length)
        yield _Setting("decode", context, new, length, rows, cost, decode)


def _measured(setting: _Setting, read: float, flops: float) -> Measured:
    seconds, cost = statistics.median(setting.seconds), setting.cost
    reading, computing = cost.nbytes / read, cost.flops / flops
    tokens = setting.in_use * setting.new if setting.phase == "decode" else setting.tokens
    first = setting.first_token_seconds
    return Measured(
        phase=setting.phase,
        tokens=setting.tokens,
        new=setting.new,
        cache=setting.cache,
        in_use=setting.in_use,
        tokens_per_second=Spread.of([tokens / s for s in setting.seconds]),
        bytes_per_second=cost.nbytes / seconds,
        flops_per_second=cost.flops / seconds,
        of_limit=max(reading, computing) / seconds,
        bound="memory" if reading > computing else "compute",
        first_token_seconds=Spread.of(first) if first else None,
        compile_seconds=setting.compile_seconds,
    )


def _product_dtypes(model: Model) -> list[str]:
    """What the model's products may run in; quantized weights are multiplied in integers on some CPUs, elsewhere in
    bfloat16 (``products.defined``)."""
    found = ["float32", str(model.numerics.products)]
    if any(map(is_qtensor, jax.tree.leaves(model.params, is_leaf=is_qtensor))):
        on_cpu = platform_of(model.params) == "cpu"
        if model.numerics.digits and not on_cpu:
            found.append("bfloat16")
        elif integer_digits(model.numerics) and on_cpu:
            found.append("int8")
    return list(dict.fromkeys(found))


def _peak_bytes(device: jax.Device) -> int | None:
    """Of the GPU's memory, or of the process's (not ``ru_maxrss``, which begins with what the parent had); None where
    neither is known."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
