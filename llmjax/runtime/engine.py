"""The engine: fills decode slots from a queue of requests, runs the compiled programs, hands finished rows back."""

import contextlib
import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.errors import CheckpointError, RequestError
from llmjax.model import Model
from llmjax.models.attention import STEP_BLOCKS
from llmjax.models.stack import stacked
from llmjax.models.watched import Program, interceptors
from llmjax.runtime import state as states
from llmjax.runtime.cache import bucket, make_cache
from llmjax.runtime.decode import BURST, Produced, decode
from llmjax.runtime.logits import Controls, LogitsProcessor, no_controls, row_controls
from llmjax.runtime.prefill import Scored, prefill, score_chunk
from llmjax.runtime.prefixes import Prefixes
from llmjax.runtime.row import Request, Row
from llmjax.runtime.sampling import Knobs, key_words
from llmjax.runtime.state import State

# Below this a smaller cache saves too little to be worth a program of its own.
MIN_LENGTH = 256
# Tokens between two looks at the text where a row has stop strings: what it generates after one is lost.
STOP_BURST = 8


@dataclasses.dataclass
class Progress:
    """Counts since the engine was made.

    Attributes:
      slots: of the engine.
      prefill_tokens: prompt tokens computed.
      reused_tokens: prompt tokens copied from another row with the same beginning.
      decode_tokens: tokens generated, those lost behind a stop string left out.
      decode_steps: steps of all slots together.
      prefill_seconds: that prompts took, without compiling.
      decode_seconds: that generating took, likewise.
      rows: finished.
    """

    slots: int
    prefill_tokens: int = 0
    reused_tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    rows: int = 0

    @property
    def busy(self) -> float:
        """The fraction of slots that gave a token, over all decode steps."""
        return self.decode_tokens / max(1, self.decode_steps * self.slots)


@dataclasses.dataclass(frozen=True)
class Update:
    """New text of a row (possibly empty), and the row itself when it has finished."""

    row: Row
    piece: str


class Engine:
    """Runs requests through one model.

    For one setting of (slots, chunk, block), one machine and one jaxlib, a row's tokens and log-probabilities are the
    same in every bit alone, among any neighbours, in any order and in any slot.

    Args:
      model: the model.
      slots: rows decoded together, all computed at every step, in use or not: 1 is fastest for one row, 32 for many.
      chunk: prompt tokens a prefill call takes.
      block: cache positions attention folds at a time.
      logits_processor: changes the logits before all else does; see ``LLM``.
      enable_prefix_caching: copy the beginning that prompts share instead of computing it again; the bits are the same.
      adapters: places of the resident LoRA adapters by name, from 1.

    Attributes:
      progress: running counts.
      traces: how often each program was traced, that is compiled: once per (slots, chunk, cache length).
      compile_seconds: time that took.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 8,
        chunk: int = 128,
        block: int = 128,
        logits_processor: LogitsProcessor | None = None,
        enable_prefix_caching: bool = True,
        adapters: Mapping[str, int] = MappingProxyType({}),
    ):
        for name, value, least in (("slots", slots, 1), ("chunk", chunk, 1), ("block", block, 1)):
            if not isinstance(value, int) or value < least:
                raise RequestError(f"{name}: expected an integer of at least {least}, found {value!r}")
        self.model, self.slots, self.chunk, self.block = model, slots, chunk, block
        self.progress = Progress(slots)
        self.traces: Counter[str] = Counter()
        self.compile_seconds = 0.0
        layers = stacked(model.params, model.config.period, slots, model.numerics)
        self._params = layers or model.params
        self._cache = functools.partial(make_cache, model.config, model.numerics, stacked=layers is not None)
        static = (model.module, model.numerics, block)
        self._programs: list[Program] = []
        self._prefill = self._compiled(prefill, static, donate=1)
        self._decode = self._compiled(decode, (*static, logits_processor), donate=1)
        self._score = self._compiled(score_chunk, static, donate=1)
        self._share = self._compiled(states.share, (chunk,), donate=0)
        self._admit = self._compiled(states.admit, (), donate=0)
        self._sharing = enable_prefix_caching
        self._adapters = adapters
        self._length = 0
        self._state: State | None = None
        self._stopping = False
        self._pending: jax.Array | None = None  # what the chunk under way gives

    def _compiled(self, function: Callable[..., Any], static: tuple[Any, ...], donate: int) -> Callable[..., Any]:
        """``function`` jitted, its static arguments bound, its traces counted and the time they take added up."""

        def traced(*args: Any) -> Any:
            self.traces[function.__name__] += 1
            return function(*static, *args)

        traced.__name__ = function.__name__  # what profiles and the compilation cache know the program by
        program = Program(traced, donate_argnums=donate, compiler_options=self.model.numerics.compiler_options)
        self._programs.append(program)

        def call(*args: Any) -> Any:
            traces, began = self.traces.total(), time.monotonic()
            result = program(*args)
            if self.traces.total() > traces:
                self.compile_seconds += time.monotonic() - began
            return result

        return call

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Adds the time spent, compiling aside, to a count of ``progress``."""
        began, compiled = time.monotonic(), self.compile_seconds
        yield
        spent = time.monotonic() - began - (self.compile_seconds - compiled)
        setattr(self.progress, name, getattr(self.progress, name) + spent)

    def _settle(self, pending: jax.Array | None = None) -> None:
        """Waits for the chunk before ``pending``: a second one may be on its way to the device, but no more, or an
        interrupt would wait for all of a prompt."""
        before, self._pending = self._pending, pending
        jax.block_until_ready(before)

    def _bucket(self, tokens: int) -> int:
        # Two turns of a step's attention at least.  With one, XLA:CPU would move the slice of the values out of its
        # loop, copy the cache for it, and add up in another order than it does in a longer cache.
        turn = STEP_BLOCKS * self.block
        unit = int(np.lcm(self.chunk, turn))
        return bucket(max(tokens, MIN_LENGTH, 2 * turn), unit, self.model.context_length)

    def _ensure(self, tokens: int) -> State:
        """A state whose cache holds ``tokens`` a row; a longer cache keeps what is in it."""
        length = self._bucket(tokens)
        model = self.model
        if self._state is None:
            length = max(length, self._length)  # the programs of an interrupted run are compiled for it

            def empty() -> State:
                return states.empty_state(self._cache(self.slots, length), self.slots, length, model.config.vocab_size)

            self._state = jax.jit(empty)()  # one program instead of one for each kind of buffer
            self._prefixes = Prefixes(self.slots, self.chunk, self._sharing)
            self._length = length
        elif length > self._length:
            self._state = states.lengthened(self._state, length - self._length)
            self._length = length
        return self._state

    def run(self, requests: Iterable[Request], *, burst: int = BURST, reserve: int = 0) -> Iterator[Update]:
        """Runs requests as slots become free, in any mix of lengths.

        A prompt goes through prefill a chunk at a time; between chunks (as many as slots are free) the rows that decode
        make one step, so that none of them waits for a long prompt.

        Args:
          requests: taken one by one, only when a slot is free.
          reserve: cache positions to begin with, where the longest request is not known: a cache that grows on the way
            means compiling again.
          burst: tokens a row may produce before its text is looked at; the same program whatever the number.

        Yields:
          an update whenever a row has new text or has finished, rows in any order.
        """
        self._stopping = False
        self._ensure(reserve)
        self._forget_watched()
        try:
            yield from self._run(iter(requests), burst)
        except GeneratorExit:
            raise
        except BaseException:
            self._state = self._pending = None  # an interrupted program may have consumed its buffers
            raise

    def _forget_watched(self) -> None:
        """Keeps what Flax's interceptors did in an earlier run, or do in this one, out of the other's programs and
        prompts."""
        if any([program.forget() for program in self._programs]) or interceptors():
            self._prefixes = Prefixes(self.slots, self.chunk, self._sharing)

    def stop(self) -> None:
        """Ends the run at the next chunk or burst of steps: rows that have finished are handed back, the others are
        dropped.  May be called from a signal handler or another thread."""
        self._stopping = True

    def _run(self, queue: Iterator[Request], burst: int) -> Iterator[Update]:
        rows: dict[int, Row] = {}
        more, filling = True, None
        while not self._stopping:
            # As many chunks as slots are free: were it one, short rows would end faster than others begin.
            for _ in range(self.slots - len(rows)):
                if filling is None and more:
                    request = next(queue, None)
                    if request is None:
                        more = False
                    else:
                        filling = self._fill(request, set(range(self.slots)) - set(rows))
                if filling is None or self._stopping:
                    break
                with self._timed("prefill_seconds"):
                    try:
                        next(filling)
                    except StopIteration as filled:
                        slot, row = filled.value
                        rows[slot], filling = row, None
            with self._timed("prefill_seconds"):
                self._settle()
            if self._stopping:
                return
            if rows:
                waiting = filling is not None or (more and len(rows) < self.slots)
                with self._timed("decode_seconds"):
                    produced = self._burst(rows, 1 if waiting else burst, more)
                yield from self._collect(rows, produced)
            elif filling is None and not more:
                return

    def _burst(self, rows: dict[int, Row], steps: int, refill: bool) -> Produced:
        """Runs the decode program, up to ``steps`` tokens a row."""
        forced = np.full((self.slots, BURST), -1, np.int32)
        going = np.zeros(self.slots, np.bool_)
        for slot, row in rows.items():
            tokens = row.forced[:BURST]
            forced[slot, : len(tokens)] = tokens
            going[slot] = True
            if row.request.params.stop:
                steps = min(steps, STOP_BURST)
        self._state, produced = self._decode(
            self._params, self._state, forced, going, np.int32(steps), np.bool_(refill)
        )
        produced = jax.device_get(produced)
        self.progress.decode_steps += int(produced.steps)
        return produced

    def _fill(self, request: Request, free: set[int]) -> Generator[None, None, tuple[int, Row]]:
        """Brings a prompt into a free slot, a chunk at every ``next``, and makes it active; returns slot and row."""
        params = request.params
        assert params.max_tokens is not None
        self._ensure(len(request.ids) + params.max_tokens)
        row = Row(request, self.model.tokenizer, self.model.eos_ids)
        ids = np.asarray(request.ids, np.int32)
        adapter = self._adapter(request.lora)
        place = self._prefixes.take(ids, free, int(adapter))
        slot, begun = np.int32(place.slot), place.length
        if begun and (place.source != place.slot or place.logits is not None):
            chunks = 0 if place.source == place.slot else -(-begun // self.chunk)
            logits = self._none.bias if place.logits is None else place.logits
            self._state = self._share(
                self._state, np.int32(place.source), slot, np.int32(chunks), np.int32(begun), logits
            )
        self.progress.reused_tokens += begun
        for start in range(begun, len(ids), self.chunk):
            if start > begun:
                yield
            part = ids[start : start + self.chunk]
            padded = np.pad(part, (0, self.chunk - len(part)))[None]
            self._state, logits = self._prefill(
                self._params, self._state, padded, slot, np.int32(start), np.int32(len(part)), adapter
            )
            self._prefixes.add(place.slot, ids[: start + len(part)], logits)
            self.progress.prefill_tokens += len(part)
            self._settle(logits)
        if params.prompt_logprobs is not None and request.index == 0:
            row.prompt_logprobs = [None]
            for scored in self._scores(ids, adapter, wanted=True):
                row.prompt_logprobs += scored.by_token(request.ids[len(row.prompt_logprobs) :], params.prompt_logprobs)
                yield
        self._state = self._admit(self._state, slot, self._row_arrays(request))
        return place.slot, row

    @functools.cached_property
    def _none(self) -> Controls:
        """The controls of a row that asks for nothing, kept on the device."""
        return jax.tree.map(lambda x: x[0], no_controls(1, self.model.config.vocab_size))

    @functools.cached_property
    def _stops(self) -> Callable[[tuple[int, ...]], jax.Array]:
        @functools.lru_cache(maxsize=64)  # most rows of a job end alike
        def stops(ends: tuple[int, ...]) -> jax.Array:
            array = np.zeros(self.model.config.vocab_size, np.bool_)
            array[[i for i in ends if i < len(array)]] = True
            return jnp.asarray(array)

        return stops

    def _row_arrays(self, request: Request) -> dict[str, Any]:
        params = request.params
        controls = row_controls(params, request.bad_words, self.model.config.vocab_size)
        knobs: list[Any] = [
            np.float32(params.temperature),
            np.int32(params.top_k),
            np.float32(params.top_p),
            np.float32(params.min_p),
            key_words(request.seed),
        ]
        return {
            "ids": np.pad(np.asarray(request.ids, np.int32), (0, self._length - len(request.ids))),
            "knobs": Knobs(*knobs),
            "controls": self._none if controls is None else controls,
            "stops": self._stops((*params.stop_token_ids, *(() if params.ignore_eos else self.model.eos_ids))),
            "min_tokens": np.int32(params.min_tokens),
            "max_tokens": np.int32(params.max_tokens or 0),
            "want_logprobs": np.bool_(bool(params.logprobs)),
            "adapter": self._adapter(request.lora),
        }

    def _adapter(self, lora: str | None) -> np.int32:
        return np.int32(0 if lora is None else self._adapters[lora])

    def _collect(self, rows: dict[int, Row], produced: Produced) -> Iterator[Update]:
        """Hands a burst's tokens to the rows; a row that a stop string ended loses the tokens after it and its slot."""
        for slot, row in list(rows.items()):
            piece = ""
            self._check_finite(produced.logprobs[slot, : produced.lengths[slot]])
            wanted = row.request.params.logprobs or 0
            for i in range(int(produced.lengths[slot])):
                best = zip(produced.top_ids[slot, i, :wanted], produced.top_logprobs[slot, i, :wanted], strict=True)
                piece += row.push(
                    int(produced.tokens[slot, i]),
                    float(produced.logprobs[slot, i]),
                    {int(t): float(p) for t, p in best},
                )
                self.progress.decode_tokens += 1
                if row.finish_reason:
                    break
            if row.finish_reason:
                del rows[slot]
                self.progress.rows += 1
            if piece or row.finish_reason:
                yield Update(row, piece)

    def _check_finite(self, logprobs: np.ndarray | jax.Array) -> None:
        """A wrong number is worse than a crash.

        Raises:
          CheckpointError: NaN came out of the model.
        """
        if np.isnan(logprobs).any():
            raise CheckpointError(
                f"{self.model.path}: the model computes NaN; look for damaged weights with check_finite=True "
                "(--check-finite), store them in a wider dtype, or look at the logits processor"
            )

    def _scores(self, ids: np.ndarray, adapter: np.int32, *, wanted: bool) -> Iterator[Scored]:
        """What follows each token of a text but the last, chunk by chunk; ``wanted`` asks for alternatives, too."""
        cache = self._cache(1, self._bucket(len(ids)))
        for start in range(0, len(ids) - 1, self.chunk):
            part, after = (array[start : start + self.chunk] for array in (ids[:-1], ids[1:]))
            pad = (0, self.chunk - len(part))
            tokens = np.pad(part, pad)[None], np.pad(after, pad)
            cache, scored = self._score(self._params, cache, *tokens, np.int32(start), np.bool_(wanted), adapter)
            scored = Scored(*(x[: len(part)] for x in jax.device_get(scored)))
            self._check_finite(scored.logprobs)
            yield scored

    def score(self, ids: Sequence[int], lora: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities float32 ``[T - 1]`` of each token after the first, and the most likely token int32 ``[T -
        1]`` there."""
        self._forget_watched()
        scored = list(self._scores(np.asarray(ids, np.int32), self._adapter(lora), wanted=False))
        self.progress.prefill_tokens += len(ids)
        return (
            np.concatenate([np.zeros(0, np.float32), *(s.logprobs for s in scored)]),
            np.concatenate([np.zeros(0, np.int32), *(s.best for s in scored)]),
        )
