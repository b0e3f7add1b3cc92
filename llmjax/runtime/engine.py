"""The engine: fills decode slots from a queue of requests, runs the compiled programs, hands finished rows back."""

import contextlib
import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from llmjax.device import in_memory, platform_of
from llmjax.errors import CheckpointError, LlmjaxError
from llmjax.model import Model, filled_up
from llmjax.models.functions import Known
from llmjax.models.stack import stacked
from llmjax.models.watched import Program, interceptors
from llmjax.outside.values import check, integer
from llmjax.runtime import state as states
from llmjax.runtime.decode import BURST, Produced, decode
from llmjax.runtime.logits import LogitsProcessor, processor_facts
from llmjax.runtime.memory import LOWER, size, weight_bytes
from llmjax.runtime.packed import Packed, unpacking
from llmjax.runtime.prefill import Scored, prefill, score_chunk
from llmjax.runtime.prefixes import Place
from llmjax.runtime.progress import Progress
from llmjax.runtime.row import Request, Requests, Row
from llmjax.runtime.schedule import Filling, Schedule
from llmjax.runtime.scoring import Found, score_texts, scores
from llmjax.runtime.store import Store
from llmjax.runtime.terms import Terms

# Tokens between two looks at the text where a row has stop strings: what it generates after one is lost.
STOP_BURST = 8


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
      memory: bytes that the weights and all else may take; None for the weights and three quarters of what is free
        beside them.

    Attributes:
      store: what the slots hold.
      processor: says of what is computed by the logits processor, see ``processor_facts``.
      scored: tokens of a text that one call scores.
      progress: running counts.
      traces: how often each program was traced, that is compiled: once per (slots, chunk, pages, length).
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
        memory: int | None = None,
    ):
        for name, value, least in (("slots", slots, 1), ("chunk", chunk, 1), ("block", block, 1)):
            check(name, value, integer(least))
        self.model, self.slots = model, slots
        self.chunk, self.block, self.scored = model.config.engine_sizes(chunk, block)
        self.progress = Progress(slots)
        self.traces: Counter[str] = Counter()
        self.compile_seconds = 0.0
        layers = stacked(model.params, model.config.period, slots, model.numerics)
        self._params = layers or model.params
        self.new_store = functools.partial(
            Store,
            model,
            slots,
            self.chunk,
            self.block,
            None if layers is None else model.config.num_hidden_layers // model.config.period,
            weight_bytes(model.params, self._params),
            memory,
            enable_prefix_caching and model.config.rewinds,
        )
        self.store = self.new_store()
        static = (model.module, model.numerics, self.block)
        self._programs: list[Program] = []
        self._prefill = self._compiled(prefill, static, donate=1, there=3)
        self._decode = self._compiled(decode, (*static, logits_processor), donate=1, there=2)
        self._score = self._compiled(score_chunk, static, donate=1, there=2)
        self._score_texts = self._compiled(score_texts, static[:2], donate=(), there=1)
        self._share = self._compiled(states.share, (self.store.layers,), donate=0, there=2)
        self._terms = Terms(model.config.vocab_size, model.eos_ids)
        self.processor = functools.partial(processor_facts, logits_processor, slots, model.config.vocab_size)
        self._known = Known()
        self._adapters = adapters
        self.stopping = False
        self._pending: jax.Array | None = None  # what the chunk under way gives

    def _compiled(
        self, function: Callable[..., Any], static: tuple[Any, ...], donate: int | tuple[()], there: int
    ) -> Callable[..., Any]:
        """``function`` jitted, its static arguments bound, its traces counted and the time they take added up; the
        first ``there`` of the others are trees of arrays on the device, the rest one array of the host's numbers."""

        def traced(*args: Any) -> Any:
            self.traces[function.__name__] += 1
            return unpacking(function)(*static, *args)

        traced.__name__ = function.__name__  # what profiles and the compilation cache know the program by
        options = self.model.numerics.compiler_options(platform_of(self.model.params), step=function is decode)
        program = Program(traced, lower=LOWER, donate_argnums=donate, compiler_options=options)
        self._programs.append(program)

        def call(*args: Any) -> Any:
            traces, began = self.traces.total(), time.monotonic()
            result = program(*args[:there], Packed.of(args[there:]))
            if self.traces.total() > traces:
                self.compile_seconds += time.monotonic() - began
            return result

        return call

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
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

    def run(self, requests: Requests, *, burst: int = BURST, reserve: Sequence[int] = ()) -> Iterator[Update]:
        """Runs requests as slots become free, in any mix of lengths.

        A prompt goes through prefill a chunk at a time; between chunks (as many as slots are free) the rows that decode
        make one step, so that none of them waits for a long prompt.

        Where memory ends, see ``Schedule``.

        Args:
          requests: taken one by one, only when a slot is free; None where there is none at the moment.
          reserve: lengths of rows to have room for from the beginning: a cache that grows on the way means compiling
            again.
          burst: tokens a row may produce before its text is looked at; the same program whatever the number.

        Yields:
          an update whenever a row has new text or has finished, rows in any order.
        """
        self.begin()
        store, together = self.store, sorted(reserve, reverse=True)[: self.slots]
        with self.cleared_by_errors():
            # One more than slots where rows follow each other: a prompt that is shared stays until it is copied.
            store.ensure(max(together, default=0), sum(map(store.pages.needed, [*together, *together[1:2]])))
            store.settle()
            yield from self._run(iter(requests), burst)

    def begin(self) -> None:
        """A run begins."""
        self.stopping = False
        self._forget_watched()

    def scores(self, requests: Requests) -> Iterator[tuple[Request, Found | LlmjaxError]]:
        """Log-probabilities of each text, or why there are none, in their order."""
        return scores(self, requests)

    def score_texts(self, *texts: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """See ``llmjax.runtime.scoring``."""
        return self._score_texts(self._params, *texts)

    @contextlib.contextmanager
    def cleared_by_errors(self) -> Iterator[None]:
        """An interrupted program may have consumed its buffers, so nothing is left of what the slots held.

        Raises:
          NoRoomError: the device has less memory than the budget says.
        """
        try:
            with in_memory(f"a budget of {size(self.store.memory.budget)}", LOWER):
                yield
        except GeneratorExit:
            raise
        except BaseException:
            self.store.clear()
            self._pending = None
            raise

    def _forget_watched(self) -> None:
        """Keeps what Flax's interceptors did in an earlier run, or do in this one, out of the other's programs and
        prompts; and what a person's functions computed before they changed."""
        now = self.model.module.computed((self.slots, 1), (1, self.chunk)) if self.model.interventions else {}
        changed = self._known.changed(now | self.processor())
        if any([program.forget(changed) for program in self._programs]) or interceptors():
            self.store.clear()

    def stop(self) -> None:
        """Ends the run at the next chunk or burst of steps: rows that have finished are handed back, the others are
        dropped.  May be called from a signal handler or another thread."""
        self.stopping = True

    def _run(self, queue: Iterator[Request | None], burst: int) -> Iterator[Update]:
        work, more = Schedule(self.store, self.slots, self.chunk), True
        while not self.stopping:
            # As many chunks as slots are free: were it one, short rows would end faster than others begin.
            for _ in range(self.slots - len(work.rows)):
                if self.stopping:
                    break
                if work.filling is None and more and not work.waiting:
                    request = next(queue, self)
                    more = request is not self
                    if isinstance(request, Request):
                        work.waiting.append(self._row(request))
                if work.filling is None and work.waiting and (admitted := work.admit()):
                    row, place, copied = admitted
                    work.filling = Filling(place.slot, row, self._fill(row, place, copied))
                if work.filling is None:
                    break
                with self.timed("prefill_seconds"):  # a prompt that has a place has begun: others may share it
                    is_filled = next(work.filling.parts, self) is self
                if is_filled:
                    filled, work.filling = work.filling, None
                    if filled.row.error is None:
                        work.rows[filled.slot] = filled.row
                    else:
                        self._leave(filled.slot)
                        yield Update(filled.row, "")
            if self.stopping:
                self._settle()
                return
            if work.rows:
                soon = work.filling is not None or (more and not work.waiting and len(work.rows) < self.slots)
                if steps := work.make_room(1 if soon else burst):
                    with self.timed("decode_seconds"):
                        under_way = self._burst(work.rows, steps, more or bool(work.waiting))
                    with self.timed("prefill_seconds"):
                        self._settle()  # after the device knows what is next
                    with self.timed("decode_seconds"):
                        produced = self._produced(work.rows, *under_way)
                    yield from self._collect(work.rows, produced)
            elif work.filling is None and work.waiting:
                self.progress.rows += 1
                yield Update(work.refuse(), "")
            elif work.filling is None and not more:
                return

    def _row(self, request: Request) -> Row:
        model = self.model
        return Row(request, model.tokenizer, model.eos_ids, self.adapter(request.lora), model.config.renewal)

    def _burst(self, rows: dict[int, Row], steps: int, refill: bool) -> tuple[Packed, *tuple[Any, ...]]:
        """Has the decode program run, up to ``steps`` tokens a row; gives what ``_produced`` waits for."""
        forced = np.full((self.slots, BURST), -1, np.int32)
        going = np.zeros(self.slots, np.bool_)
        for slot, row in rows.items():
            going[slot] = True
            if row.request.forced:
                tokens = row.forced[:BURST]
                forced[slot, : len(tokens)] = tokens
            if row.request.params.stop:
                steps = min(steps, STOP_BURST)
        store = self.store
        store.state, packed, top = self._decode(self._params, store.state, store.table, forced, going, steps, refill)
        return packed, *top

    def _produced(self, rows: dict[int, Row], packed: Packed, *top: Any) -> Produced:
        """Waits for what it gives; alternatives are most of that, and seldom wanted."""
        if not any(row.request.params.logprobs for row in rows.values()):
            top = (np.zeros((self.slots, BURST, 0)),) * 2
        packed, top = jax.device_get((packed, top))
        found = Produced(*packed.opened(), *top)
        self.progress.decode_steps += int(found.steps)
        return found

    def _fill(self, row: Row, place: Place, copied: tuple[int, int]) -> Generator[None, None, None]:
        """Brings a prompt into its slot, a chunk at every ``next``, and makes it active."""
        store, slot = self.store, place.slot
        ids, terms = np.asarray(row.ids, np.int32), self._terms.of(row)
        begun, tokens, scored = place.length, len(ids), row.is_unscored
        if begun and (place.source != slot or any(copied) or place.is_whole):
            store.state = self._share(
                store.state, *terms, place.source, *copied, slot, begun, begun == tokens and not scored
            )
        self.progress.reused_tokens += begun
        for start in range(begun, tokens, self.chunk):
            if start > begun:
                yield
            part = ids[start : start + self.chunk]
            end = start + len(part)
            chunk, active = filled_up(part, self.chunk)[None], end == tokens and not scored
            where = chunk, slot, store.pages.table[slot], start, len(part), tokens, active
            store.state, pending = self._prefill(self._params, store.state, *terms, *where)
            store.prefixes.add(slot, ids[:end])
            self.progress.prefill_tokens += len(part)
            self._settle(pending)
        if scored:
            scores: list[dict[int, float] | None] = [None]
            try:
                for found in self.scored_chunks(row.request, ids, wanted=True):
                    scores += found.by_token(row.request.ids[len(scores) :], row.request.params.prompt_logprobs or 0)
                    yield
            except CheckpointError as error:
                row.fail(error)
                return
            row.prompt_logprobs = scores
            store.state = self._share(store.state, *terms, slot, 0, 0, slot, tokens, True)

    def adapter(self, lora: str | None) -> int:
        """The place of a resident adapter, 0 for none."""
        return 0 if lora is None else self._adapters[lora]

    def _collect(self, rows: dict[int, Row], produced: Produced) -> Iterator[Update]:
        """Hands a burst's tokens to the rows; one that a stop string ended loses the tokens after it and its slot, one
        whose numbers are none any more fails."""
        tokens, logprobs = (x[:, : produced.steps].tolist() for x in (produced.tokens, produced.logprobs))
        is_broken = bool(np.isnan(produced.logprobs).any())
        for slot, row in list(rows.items()):
            piece, end, wanted = "", int(produced.lengths[slot]), row.request.params.logprobs
            for i, (token, logprob) in enumerate(zip(tokens[slot][:end], logprobs[slot], strict=False)):
                if is_broken and np.isnan(logprob):
                    row.fail(self.no_number(row.request))
                    break
                self.progress.decode_tokens += not row.again
                top = (x[slot, i, :wanted].tolist() for x in (produced.top_ids, produced.top_logprobs) if wanted)
                piece += row.push(token, logprob, dict(zip(*top, strict=True)))
                if row.finish_reason:
                    break
            if row.finish_reason:
                del rows[slot]
                self._leave(slot, forget=row.error is not None)
            if piece or row.finish_reason:
                yield Update(row, piece)

    def _leave(self, slot: int, *, forget: bool = True) -> None:
        """A row has finished, and its slot is free; ``forget`` what it holds of the prompt, too."""
        self.progress.rows += 1
        if forget:
            self.store.prefixes.forget(slot)
        self.store.release(slot)

    def no_number(self, request: Request) -> CheckpointError:
        """What there is to say of a row for which NaN, or infinity, came out of the model."""
        beside = f" with the adapter {request.lora!r}" if request.lora is not None else ""
        return CheckpointError(
            f"{self.model.path}: the model computes NaN{beside}; look for damaged weights with check_finite=True "
            "(--check-finite), store them in a wider dtype, or look at adapters, interventions and logits processor"
        )

    def scored_chunks(self, request: Request, ids: np.ndarray, *, wanted: bool) -> Iterator[Scored]:
        """What follows each token of a request's text ``ids`` but the last, chunk by chunk, in the pages it was given
        aside; ``wanted`` asks for alternatives, too.

        Raises:
          CheckpointError: see ``no_number``.
        """
        store, adapter = self.store, self.adapter(request.lora)
        for start in range(0, len(ids) - 1, self.scored):
            part, after = (array[start : start + self.scored] for array in (ids[:-1], ids[1:]))
            tokens = filled_up(part, self.scored)[None], filled_up(after, self.scored)
            where = store.pages.table[store.aside], start, len(ids), wanted, adapter
            store.state, scored = self._score(self._params, store.state, *tokens, *where)
            scored = Scored(*(x[: len(part)] for x in jax.device_get(scored)))
            if np.isnan(scored.logprobs).any():
                store.release(store.aside)
                raise self.no_number(request)
            yield scored
        store.release(store.aside)
