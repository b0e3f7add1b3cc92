"""A row's parameters as the state has them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.runtime.logits import Controls, no_controls, row_controls
from llmjax.runtime.row import Row
from llmjax.runtime.sampling import Knobs, key_words

# Fields of ``State``: as long as the vocabulary, and the rest.
WIDE = ("controls", "stops")
NARROW = ("step", "knobs", "min_tokens", "max_tokens", "want_logprobs", "adapter")


class Terms:
    """Makes them.

    Args:
      vocab: V.
      eos_ids: tokens that end a text.
    """

    def __init__(self, vocab: int, eos_ids: Sequence[int]):
        self._vocab, self._eos_ids = vocab, tuple(eos_ids)
        self._stops = functools.lru_cache(maxsize=64)(self._made_stops)  # most rows of a job end alike

    @functools.cached_property
    def _none(self) -> Controls:
        """The controls of a row that asks for nothing, kept on the device."""
        return jax.tree.map(lambda x: x[0], no_controls(1, self._vocab))

    def _made_stops(self, ends: tuple[int, ...]) -> jax.Array:
        array = np.zeros(self._vocab, np.bool_)
        array[[i for i in ends if i < len(array)]] = True
        return jnp.asarray(array)

    def of(self, row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
        """By name, without the ``B``, what is ``WIDE``, most often on the device already, and ``NARROW``, on the
        host."""
        request, params = row.request, row.request.params
        controls = row_controls(params, request.bad_words, self._vocab)
        ends = (*params.stop_token_ids, *(() if params.ignore_eos else self._eos_ids))
        knobs: list[Any] = [
            np.float32(params.temperature),
            np.int32(params.top_k),
            np.float32(params.top_p),
            np.float32(params.min_p),
            key_words(request.seed),
        ]
        controls = self._none if controls is None else jax.device_put(controls)  # once, not with every chunk
        return {"controls": controls, "stops": self._stops(ends)}, {
            "step": row.produced,
            "knobs": Knobs(*knobs),
            "min_tokens": params.min_tokens,
            "max_tokens": params.max_tokens or 0,
            "want_logprobs": bool(params.logprobs),
            "adapter": row.adapter,
        }
