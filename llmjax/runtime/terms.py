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
        """Fields of ``State`` by name, without the ``B``: those as long as the vocabulary, most often on the device
        already, and the rest, on the host."""
        request, params = row.request, row.request.params
        controls = row_controls(params, request.bad_words, self._vocab)
        ends = (*params.stop_token_ids, *(() if params.ignore_eos else self._eos_ids))
        floats: list[Any] = [np.float32(x) for x in (params.temperature, params.top_p, params.min_p)]
        key: Any = key_words(request.seed)
        return {"controls": self._none if controls is None else controls, "stops": self._stops(ends)}, {
            "step": row.produced,
            "knobs": Knobs(floats[0], np.int32(params.top_k), *floats[1:], key),
            "min_tokens": params.min_tokens,
            "max_tokens": params.max_tokens or 0,
            "want_logprobs": bool(params.logprobs),
            "adapter": row.adapter,
        }
