"""What the decode slots hold, on the device and in the host's books: it grows with the tokens in use, in a budget."""

from collections.abc import Collection

import jax
import numpy as np

from llmjax.device import device_of
from llmjax.model import Model
from llmjax.models.attention import PAGE_BLOCKS
from llmjax.models.sharding import everywhere, mesh_of, of_cache
from llmjax.runtime import state as states
from llmjax.runtime.cache import bucket, grown, make_cache, nbytes
from llmjax.runtime.memory import FEWEST_PAGES, Memory, default_budget
from llmjax.runtime.pages import Pages
from llmjax.runtime.prefixes import Prefixes
from llmjax.runtime.state import State

# Below this a shorter state saves too little to be worth a program of its own.
MIN_LENGTH = 256


class Store:
    """The state and its pages.

    Args:
      model: the model.
      slots: of the state.
      chunk: prompt tokens a prefill call takes.
      block: cache positions attention folds at a time.
      stacked: layers in each buffer of the cache, None where it has one a layer.
      weights: bytes of the parameters.
      budget: bytes for everything; None for the default.
      sharing: prompts share what they begin with.

    Attributes:
      tokens: positions in a page.
      aside: stands with the slots where pages are had: for a text that is scored.
      memory: how the budget is spent.
      length: most tokens of a row, as compiled.
      state: None before anything runs, and after an interruption.
      pages: whose they are.
      prefixes: the prompts that they hold.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        chunk: int,
        block: int,
        stacked: int | None,
        weights: int,
        budget: int | None,
        sharing: bool,
    ):
        self._model, self._slots, self._chunk, self._sharing = model, slots, chunk, sharing
        self._device = device_of(model.params)
        self.aside = slots
        self.tokens, self._stacked = PAGE_BLOCKS * block, stacked
        self._mesh = mesh_of(model.params)
        none, one = map(self._sizes, (0, 1))
        page = [b - a for a, b in zip(none, one, strict=True)]
        own = sum(none) + nbytes(lambda: states.empty_state(None, slots, self.bucket(1), model.config.vocab_size))
        devices = self._mesh.size if self._mesh is not None else 1
        total = default_budget(weights, self._device, devices) if budget is None else budget
        each = max(1, sum(page))  # where no layer keeps anything of each token, too
        self.memory = Memory(total, weights, own, each, max(page), self.tokens)
        self.length = self._total = 0
        self.state: State | None = None
        self.clear()

    def _cache(self, pages: int) -> dict[str, object]:
        return make_cache(
            self._model.config,
            self._model.numerics,
            pages,
            self.tokens,
            slots=self._slots + 1,
            stacked=self._stacked is not None,
        )

    def _sizes(self, pages: int) -> list[int]:
        """Bytes of the cache's buffers, of each what one device has."""
        buffers = jax.eval_shape(lambda: self._cache(pages))
        if self._mesh is not None:
            where = of_cache(self._mesh, buffers, self._model.config)
            buffers = jax.tree.map(lambda x, at: x.update(shape=at.shard_shape(x.shape)), buffers, where)
        return [x.size * x.dtype.itemsize for x in jax.tree.leaves(buffers)]

    @property
    def layers(self) -> int:
        """In each buffer of the cache."""
        return self._stacked or 1

    def bucket(self, tokens: int) -> int:
        """The state's length for a row of so many tokens."""
        # Two pages at least.  With one, XLA:CPU would move the slice of the values out of the attention's loop, and add
        # up in another order than it does in a longer table.
        unit = int(np.lcm(self._chunk, self.tokens))
        return bucket(max(tokens, MIN_LENGTH, 2 * self.tokens), unit, self._model.context_length)

    @property
    def table(self) -> np.ndarray:
        """int32 ``[slots, N]``, the slots' pages as they are now."""
        return self.pages.table[: self._slots].copy()

    def clear(self) -> None:
        """Forgets everything and frees it; what comes next is as long as before, for programs are compiled for it."""
        self.state = None
        self.pages = Pages(self._slots + 1, self.tokens)
        self.prefixes = Prefixes(self._slots, self._chunk, self._sharing)

    def length_kind(self, tokens: int) -> int:
        """See ``DecoderConfig.length_kind``."""
        return self._model.config.length_kind(tokens)

    def fits(self, tokens: int) -> bool:
        """Whether the budget has room for one row of so many tokens."""
        return self.pages.needed(tokens) < self.memory.pages

    def restart(self, tokens: int) -> bool:
        """Forgets everything to make room for one row of so many tokens; False if it does not fit the budget."""
        if not self.fits(tokens):
            return False
        self.clear()
        self._total = max(self._total, min(2 * self.pages.needed(tokens), self.memory.pages))
        self.ensure(tokens)
        return True

    def ensure(self, tokens: int, pages: int = 0) -> State:
        """A state for rows of so many tokens, with so many pages, if the budget has them."""
        length = max(self.bucket(tokens), self.length)
        if self.state is None:
            self._total = min(max(self._total, pages + 1, FEWEST_PAGES), self.memory.pages)

            def empty() -> State:
                cache, vocab = self._cache(self._total), self._model.config.vocab_size
                return states.empty_state(cache, self._slots, length, vocab)

            where = None
            if (mesh := self._mesh) is not None:
                found = jax.eval_shape(empty)
                where = jax.tree.map(lambda _: everywhere(mesh), found)
                where = where.replace(cache=of_cache(mesh, found.cache, self._model.config))
            with jax.default_device(self._device):  # one program instead of one for each kind of buffer
                self.state = jax.jit(empty, out_shardings=where)()
        elif length > self.length:
            self.state = states.lengthened(self.state, length - self.length)
        self.length = length
        self.pages.grow(self._total, length)
        if pages >= self._total:
            self._grow(pages + 1)
        return self.state

    def _grow(self, total: int) -> bool:
        """To ``total`` pages or, to compile seldom, twice what there are; False if the budget does not have as many."""
        assert self.state is not None
        most = self.memory.pages_from(self._total)
        if most < total:
            return False
        more = min(most, max(total, 2 * self._total - 1)) - self._total
        cache, self.state = self.state.cache, self.state.replace(cache=None)
        shapes = jax.eval_shape(lambda: self._cache(self._total + more))
        self.state = self.state.replace(cache=grown(cache, self.layers, shapes))
        self._total += more
        self.pages.grow(self._total, self.length)
        return True

    def room(self, count: int, busy: Collection[int]) -> bool:
        """Whether ``count`` pages can be had: free ones, those of prompts in slots that are not busy, or new ones."""
        resting = [slot for slot in range(self._slots) if slot not in busy and self.pages.held(slot)]
        for slot in sorted(resting, key=self.prefixes.used):
            if self.pages.free >= count:
                break
            self.prefixes.forget(slot)
            self.pages.keep(slot, 0)
        return self.pages.free >= count or self._grow(self._total + count - self.pages.free)

    def hold(self, slot: int, tokens: int, busy: Collection[int]) -> bool:
        """Gives a busy slot pages for so many tokens; False, and none, if they cannot be had."""
        needed = self.pages.needed(tokens)
        if needed > self.pages.held(slot):  # seldom: all rows are asked about between two steps
            self.ensure(tokens)
            if not self.room(needed - self.pages.held(slot), busy):
                return False
            self.pages.give(slot, needed)
        return True

    def release(self, slot: int) -> None:
        """Takes the pages of a row that ended, or is put off, but for those of its prompt."""
        self.pages.keep(slot, 0 if slot == self.aside else self.pages.needed(self.prefixes.tokens(slot)))

    def settle(self) -> None:
        """Releases all slots: an earlier run may have been left in the middle."""
        for slot in range(self._slots + 1):
            self.release(slot)
