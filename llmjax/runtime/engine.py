"""The engine: fills decode slots from a queue of requests, runs the compiled programs, hands finished rows back."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.errors import CheckpointError, RequestError
from llmjax.model import Model
from llmjax.runtime import decode as programs
from llmjax.runtime.cache import bucket, make_cache
from llmjax.runtime.decode import BURST, Produced, State
from llmjax.runtime.row import Request, Row
from llmjax.runtime.sampling import Knobs, key_words

# One-row products take a slow path on the CPU (llmjax.matmul), so fewer slots would be slower, not faster.
MIN_SLOTS = 4
# Below this a smaller cache saves too little to be worth a program of its own.
MIN_LENGTH = 256


@dataclasses.dataclass
class Progress:
    """Counts since the engine was made: tokens through prefill and decode, and rows finished."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    rows: int = 0


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
      slots: rows decoded together; at least 4.
      chunk: prompt tokens a prefill call takes.
      block: cache positions attention folds at a time.

    Attributes:
      progress: running counts.
      traces: how often each program was traced, that is compiled: once per (slots, chunk, cache length).
      compile_seconds: time that took.
    """

    def __init__(self, model: Model, *, slots: int = 8, chunk: int = 128, block: int = 128):
        for name, value, least in (("slots", slots, MIN_SLOTS), ("chunk", chunk, 1), ("block", block, 1)):
            if not isinstance(value, int) or value < least:
                raise RequestError(f"{name}: expected an integer of at least {least}, found {value!r}")
        self.model, self.slots, self.chunk, self.block = model, slots, chunk, block
        self.progress = Progress()
        self.traces: Counter[str] = Counter()
        self.compile_seconds = 0.0
        static = (model.module, model.numerics, block)
        self._prefill = self._compiled(programs.prefill, static, donate=1)
        self._decode = self._compiled(programs.decode, static, donate=1)
        self._score = self._compiled(programs.score_chunk, static, donate=1)
        self._admit = self._compiled(programs.admit, (), donate=0)
        self._length = 0
        self._state: State | None = None
        self._stopping = False

    def _compiled(self, function: Callable[..., Any], static: tuple[Any, ...], donate: int) -> Callable[..., Any]:
        """``function`` jitted, its static arguments bound, its traces counted and the time they take added up."""

        def traced(*args: Any) -> Any:
            self.traces[function.__name__] += 1
            return function(*static, *args)

        jitted = jax.jit(traced, donate_argnums=donate, compiler_options=self.model.numerics.compiler_options)

        def call(*args: Any) -> Any:
            traces, began = self.traces.total(), time.monotonic()
            result = jitted(*args)
            if self.traces.total() > traces:
                self.compile_seconds += time.monotonic() - began
            return result

        return call

    def _unit(self) -> int:
        return int(np.lcm(self.chunk, self.block))

    def _bucket(self, tokens: int) -> int:
        return bucket(max(tokens, MIN_LENGTH), self._unit(), self.model.context_length)

    def _ensure(self, tokens: int) -> State:
        """A state whose cache holds ``tokens`` a row; a longer cache keeps the rows that are in it."""
        length = self._bucket(tokens)
        model = self.model
        if self._state is None:
            cache = make_cache(model.config, model.numerics, self.slots, length)
            self._state = programs.empty_state(cache, self.slots, model.config.vocab_size)
            self._length = length
        elif length > self._length:
            pad = ((0, 0), (0, 0), (0, length - self._length), (0, 0))
            self._state = self._state.replace(cache=jax.tree.map(lambda x: jnp.pad(x, pad), self._state.cache))
            self._length = length
        return self._state

    def run(self, requests: Iterable[Request], *, burst: int = BURST, reserve: int = 0) -> Iterator[Update]:
        """Runs requests as slots become free, in any mix of lengths.

        Args:
          requests: taken one by one, only when a slot is free.
          reserve: cache positions to begin with, where the longest request is not known: a cache that grows on the way
            means compiling again.
          burst: tokens a row may produce before its text is looked at; the same program whatever the number.

        Yields:
          an update whenever a row has new text or has finished, rows in any order.
        """
        self._stopping = False
        self._state = self._ensure(reserve).replace(active=jnp.zeros(self.slots, jnp.bool_))
        try:
            yield from self._run(iter(requests), burst)
        except GeneratorExit:
            raise
        except BaseException:
            self._state = None  # an interrupted program may have consumed its buffers
            raise

    def stop(self) -> None:
        """Ends the run at the next step: rows that have finished are handed back, the others are dropped.  May be
        called from a signal handler."""
        self._stopping = True

    def _run(self, queue: Iterator[Request], burst: int) -> Iterator[Update]:
        rows: dict[int, Row] = {}
        more = True
        while not self._stopping:
            while more and len(rows) < self.slots:
                request = next(queue, None)
                if request is None:
                    more = False
                    break
                slot = next(s for s in range(self.slots) if s not in rows)
                rows[slot] = self._start(slot, request)
            if not rows:
                return
            self._state, produced = self._decode(self.model.params, self._state, self._forced(rows), np.int32(burst))
            yield from self._collect(rows, jax.device_get(produced))

    def _forced(self, rows: dict[int, Row]) -> np.ndarray:
        """int32 ``[slots, BURST]``: tokens to impose in the next burst, -1 where the draw is free."""
        forced = np.full((self.slots, BURST), -1, np.int32)
        for slot, row in rows.items():
            tokens = row.forced[:BURST]
            forced[slot, : len(tokens)] = tokens
        return forced

    def _start(self, slot: int, request: Request) -> Row:
        """Prefills a prompt into a slot and makes it active."""
        params = request.params
        assert params.max_tokens is not None
        state = self._ensure(len(request.ids) + params.max_tokens)
        ids = np.asarray(request.ids, np.int32)
        for start in range(0, len(ids), self.chunk):
            part = ids[start : start + self.chunk]
            padded = np.pad(part, (0, self.chunk - len(part)))[None]
            state = self._prefill(
                self.model.params, state, padded, np.int32(slot), np.int32(start), np.int32(len(part))
            )
        self.progress.prefill_tokens += len(ids)
        self._state = self._admit(state, np.int32(slot), self._row_arrays(request))
        return Row(request, self.model.tokenizer, self.model.eos_ids)

    def _row_arrays(self, request: Request) -> dict[str, Any]:
        params = request.params
        stops = np.zeros(self.model.config.vocab_size, np.bool_)
        ends = [*params.stop_token_ids, *(() if params.ignore_eos else self.model.eos_ids)]
        stops[[i for i in ends if i < len(stops)]] = True
        return {
            "knobs": Knobs(
                jnp.float32(params.temperature),
                jnp.int32(params.top_k),
                jnp.float32(params.top_p),
                jnp.float32(params.min_p),
                jnp.asarray(key_words(request.seed)),
            ),
            "stops": stops,
            "min_tokens": np.int32(params.min_tokens),
            "max_tokens": np.int32(params.max_tokens or 0),
            "want_logprobs": np.bool_(bool(params.logprobs)),
        }

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
                assert self._state is not None
                self._state = self._state.replace(active=self._state.active.at[slot].set(False))
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
                "(--check-finite), or store them in a wider dtype"
            )

    def score(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities float32 ``[T - 1]`` of each token after the first, and the most likely token int32 ``[T -
        1]`` there."""
        array = np.asarray(ids, np.int32)
        length = self._bucket(len(array))
        cache = make_cache(self.model.config, self.model.numerics, 1, length)
        logprobs, best = [], []
        for start in range(0, len(array) - 1, self.chunk):
            part, after = (array[:-1][start : start + self.chunk], array[1:][start : start + self.chunk])
            pad = (0, self.chunk - len(part))
            cache, p, b = self._score(
                self.model.params, cache, np.pad(part, pad)[None], np.pad(after, pad), np.int32(start)
            )
            logprobs.append(np.asarray(p)[: len(part)])
            self._check_finite(logprobs[-1])
            best.append(np.asarray(b)[: len(part)])
        self.progress.prefill_tokens += len(array)
        return np.concatenate(logprobs or [np.zeros(0)]), np.concatenate(best or [np.zeros(0, np.int32)])
