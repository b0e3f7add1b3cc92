"""Log-probabilities of given texts: long ones chunk by chunk through the cache, short ones several at a time."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from llmjax.errors import CheckpointError, LlmjaxError
from llmjax.model import filled_up
from llmjax.models.context import Context
from llmjax.numerics import Numerics
from llmjax.runtime.row import Request, Requests
from llmjax.runtime.schedule import no_room, padded

if TYPE_CHECKING:
    from llmjax.runtime.engine import Engine

# Short texts that are computed together, a chunk in all: a text's length alone says which program it gets, so its bits
# do not depend on its neighbours.
ROWS = 4

# Log-probabilities float32 ``[T - 1]`` of each token after the first, and int32 ``[T - 1]`` the most likely ones there.
Found = tuple[np.ndarray, np.ndarray]


def score_texts(
    module: nn.Module,
    numerics: Numerics,
    params: Any,
    ids: jax.Array,
    targets: jax.Array,
    length: jax.Array,
    adapter: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Scores what follows each token of several short texts, which need no cache.

    Args:
      module: static.
      numerics: static.
      params: the model's.
      ids: int32 ``[B, T]``, right-padded.
      targets: int32 ``[B, T]``, the token that follows each.
      length: int32 ``[B]``, tokens of each text.
      adapter: int32 ``[B]``, see ``Context``.

    Returns:
      log-probabilities float32 ``[B, T]`` of the targets, and the most likely tokens int32 ``[B, T]``.
    """
    ctx = Context.whole(ids, numerics, adapter=adapter, length=length)
    logits: jax.Array = module.apply({"params": params}, ids, ctx)  # type: ignore[assignment]
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    norm = jax.nn.logsumexp(logits, -1)
    return jnp.where(jnp.isfinite(norm), chosen - norm, jnp.nan), lax.argmax(logits, 2, jnp.int32)


def scores(engine: "Engine", requests: Requests) -> Iterator[tuple[Request, Found | LlmjaxError]]:
    """Each request with what was found, in their order; ``Engine.stop`` ends it.

    Args:
      engine: which computes.
      requests: taken one by one.
    """
    engine.begin()
    short: list[Request] = []
    for request in requests:
        if engine.stopping:
            return
        is_short = request is not None and len(request.ids) - 1 <= engine.scored // ROWS
        if is_short and request is not None:
            short.append(request)
        if short and (len(short) == ROWS or not is_short):
            yield from _together(engine, short)
            short = []
        if request is not None and not is_short:
            yield request, _alone(engine, request)
    if short and not engine.stopping:
        yield from _together(engine, short)


def _together(engine: "Engine", requests: list[Request]) -> Iterator[tuple[Request, Found | LlmjaxError]]:
    width = engine.scored // ROWS
    ids, targets = np.zeros((2, ROWS, width), np.int32)
    lengths, adapters = np.ones(ROWS, np.int32), np.zeros(ROWS, np.int32)
    for i, request in enumerate(requests):
        ids[i] = filled_up(request.ids[:-1] or request.ids, width)
        targets[i, : len(request.ids) - 1] = request.ids[1:]
        lengths[i], adapters[i] = len(request.ids), engine.adapter(request.lora)
    with engine.cleared_by_errors(), engine.timed("prefill_seconds"):
        logprobs, best = jax.device_get(engine.score_texts(ids, targets, lengths, adapters))
    for i, request in enumerate(requests):
        count = len(request.ids) - 1
        engine.progress.prefill_tokens += len(request.ids)
        is_broken = np.isnan(logprobs[i, :count]).any()
        yield request, engine.no_number(request) if is_broken else (logprobs[i, :count], best[i, :count])


def _alone(engine: "Engine", request: Request) -> Found | LlmjaxError:
    store, count = engine.store, len(request.ids)
    tokens = padded(count, engine.chunk)
    with engine.cleared_by_errors():
        store.ensure(count)
        store.settle()
        if not store.hold(store.aside, tokens, ()):
            if not store.restart(tokens):
                return no_room(store, count)
            store.hold(store.aside, tokens, ())
        with engine.timed("prefill_seconds"):
            try:
                scored = list(engine.scored_chunks(request, np.asarray(request.ids, np.int32), wanted=False))
            except CheckpointError as error:
                return error
    engine.progress.prefill_tokens += count
    return (
        np.concatenate([np.zeros(0, np.float32), *(s.logprobs for s in scored)]),
        np.concatenate([np.zeros(0, np.int32), *(s.best for s in scored)]),
    )
