"""From the model's logits to those the draw sees.  Defined here, so that another runtime can replay it.

For one row, in float32 (vLLM's order; a processor comes first, so that what the row bars stays barred):

1. ``logits_processor``, where the engine has one.
2. Barred tokens become -inf: those not in ``allowed_token_ids``; the last token of each sequence of ``bad_words`` whose
   other tokens are the last ones generated; before ``min_tokens``, tokens that end the text.
3. ``logit_bias`` is added.
4. ``repetition_penalty`` r, for each token that is in the prompt or was generated: ``l / r`` if ``l > 0``, else
``l * r``.
5. ``frequency_penalty`` f and ``presence_penalty`` p, for each token generated c > 0 times: ``l - f c - p``.

Then temperature and the rest of ``llmjax.runtime.sampling``.  Where step 2 would bar everything, the bad words of
several tokens and ``min_tokens`` give way.  Log-probabilities that are reported are the model's own, before step 1.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmjax.errors import RequestError, shown
from llmjax.models import functions
from llmjax.runtime.params import SamplingParams
from llmjax.text.tokenizer import Tokenizer

# Sequences of several tokens a row can bar, and tokens in one: the compiled step has room for no more.
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 16


class Tokens(NamedTuple):
    """What the rows hold so far; ``S`` is the cache's length.

    Attributes:
      ids: int32 ``[B, S]``, the prompt's tokens and then the generated ones; what lies behind them means nothing.
      prompt_length: int32 ``[B]``.
      length: int32 ``[B]``, prompt and generated tokens together.
      active: bool ``[B]``; what becomes of the other rows' logits does not matter.
    """

    ids: jax.Array
    prompt_length: jax.Array
    length: jax.Array
    active: jax.Array


LogitsProcessor = Callable[[jax.Array, Tokens], jax.Array]


def processor_facts(processor: LogitsProcessor | None, slots: int, vocab: int) -> dict[str, str]:
    """A hash of what it computes by now, by its name; nothing of none."""
    return {} if processor is None else {"logits_processor": functions.computed(processor, *_asked(slots, vocab))}


def check_processor(processor: LogitsProcessor | None, slots: int, vocab: int) -> None:
    """Before a step is compiled with it.

    Raises:
      RequestError: it is no function of logits that returns as many.
    """
    if processor is None:
        return
    if not callable(processor):
        raise RequestError(f"logits_processor: expected a function of logits and tokens, found {shown(processor)}")
    # By another name: JAX would take what it once traced of the function for what it computes later on.
    found: Any = jax.eval_shape(lambda *args: processor(*args), *_asked(slots, vocab))
    if getattr(found, "shape", None) != (slots, vocab) or not jnp.issubdtype(found.dtype, jnp.floating):
        what = f"{found.dtype} {list(found.shape)}" if hasattr(found, "dtype") else shown(found)
        raise RequestError(
            f"logits_processor: the function must return logits of the shape that it is given, [{slots}, {vocab}] "
            f"here, found {what}"
        )


def _asked(slots: int, vocab: int) -> tuple[Any, Tokens]:
    def rows(dtype: Any, *more: int) -> Any:
        return jax.ShapeDtypeStruct((slots, *more), dtype)

    tokens = Tokens(rows(jnp.int32, 256), rows(jnp.int32), rows(jnp.int32), rows(jnp.bool_))
    return rows(jnp.float32, vocab), tokens


class Controls(NamedTuple):
    """What rows ask to be changed.

    Attributes:
      used: bool ``[B]``; False leaves a row's logits as they are in every bit.
      bias: float32 ``[B, V]``: ``logit_bias``; -inf bars a token at every step.
      repetition: float32 ``[B]``; 1 for none.
      presence: float32 ``[B]``.
      frequency: float32 ``[B]``.
      bad_words: int32 ``[B, W, M]``, right-aligned, -1 before the first token of each.
    """

    used: jax.Array
    bias: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    bad_words: jax.Array


def no_controls(slots: int, vocab: int) -> Controls:
    """Controls of rows that ask for nothing."""
    return Controls(
        used=jnp.zeros(slots, jnp.bool_),
        bias=jnp.zeros((slots, vocab), jnp.float32),
        repetition=jnp.ones(slots, jnp.float32),
        presence=jnp.zeros(slots, jnp.float32),
        frequency=jnp.zeros(slots, jnp.float32),
        bad_words=jnp.full((slots, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, jnp.int32),
    )


def row_controls(params: SamplingParams, bad_words: Sequence[Sequence[int]], vocab: int) -> Controls | None:
    """One row's controls, without the ``B``; None if it asks for nothing.

    Args:
      params: of the row, its ids in the vocabulary.
      bad_words: token sequences of ``params.bad_words``.
      vocab: V.

    Raises:
      RequestError: more bad words than there is room for, or no token left.
    """
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    if not (params.allowed_token_ids or params.logit_bias or bad_words) and penalties == (1, 0, 0):
        return None
    bias = np.zeros(vocab, np.float32)
    if params.allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[list(params.allowed_token_ids)] = 0
    for token, value in (params.logit_bias or {}).items():
        bias[token] += np.float32(value)
    words = [w for w in bad_words if len(w) > 1]
    bias[[w[0] for w in bad_words if len(w) == 1]] = -np.inf
    if not np.isfinite(bias).any():
        raise RequestError("bad_words: together with allowed_token_ids they leave no token to draw")
    longest = max(map(len, words), default=0)
    if len(words) > MAX_BAD_WORDS or longest > MAX_BAD_WORD_TOKENS:
        raise RequestError(
            f"bad_words: expected at most {MAX_BAD_WORDS} sequences of at most {MAX_BAD_WORD_TOKENS} tokens (single "
            f"tokens aside), found {len(words)}, the longest of {longest}"
        )
    table = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, np.int32)
    for i, word in enumerate(words):
        table[i, -len(word) :] = word
    values: list[Any] = [np.True_, bias, *map(np.float32, penalties), table]
    return Controls(*values)


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token sequences of bad words, as vLLM makes them: each without a space before it, and with one where that gives
    as many tokens but another first one."""
    found: list[tuple[int, ...]] = []
    for word in words:
        plain, spaced = (tuple(tokenizer.encode(s + word.lstrip(), add_bos=False)) for s in ("", " "))
        found += [w for w in (plain,) if w]
        if spaced and len(spaced) == len(plain) and spaced[0] != plain[0]:
            found.append(spaced)
    return tuple(found)


def adjust(logits: jax.Array, controls: Controls, early: jax.Array, stops: jax.Array, tokens: Tokens) -> jax.Array:
    """Steps 2 to 5.

    Args:
      logits: float32 ``[B, V]``.
      controls: of the rows.
      early: bool ``[B]``, rows that may not end yet.
      stops: bool ``[B, V]``, tokens that would end them.
      tokens: of the rows.

    Returns:
      float32 ``[B, V]``.
    """

    def changed() -> jax.Array:
        least = logits + controls.bias
        ending = stops & early[:, None]
        x = jnp.where(ending | _completes_bad_word(controls.bad_words, tokens, logits.shape), -jnp.inf, least)
        x = jnp.where(jnp.all(x == -jnp.inf, -1, keepdims=True), least, x)
        x = _penalised(x, controls, tokens)
        return jnp.where((controls.used | early)[:, None], x, logits)

    return lax.cond(jnp.any(tokens.active & (controls.used | early)), changed, lambda: logits)


def _completes_bad_word(bad_words: jax.Array, tokens: Tokens, shape: tuple[int, ...]) -> jax.Array:
    """bool ``[B, V]``: tokens that would complete one."""
    rows = jnp.arange(shape[0], dtype=jnp.int32)[:, None]
    places = tokens.length[:, None] - jnp.arange(MAX_BAD_WORD_TOKENS - 1, 0, -1, dtype=jnp.int32)[None]
    recent = jnp.where(places >= tokens.prompt_length[:, None], tokens.ids[rows, places], -2)  # [B, M - 1]
    before, last = bad_words[..., :-1], bad_words[..., -1]
    found = jnp.all((before == recent[:, None]) | (before < 0), -1) & (last >= 0)
    return jnp.zeros(shape, jnp.bool_).at[rows, jnp.where(found, last, shape[1])].max(True, mode="drop")


def _penalised(x: jax.Array, controls: Controls, tokens: Tokens) -> jax.Array:
    rows, vocab = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None], x.shape[1]
    places = jnp.arange(tokens.ids.shape[1], dtype=jnp.int32)[None]
    present = places < tokens.length[:, None]
    generated = present & (places >= tokens.prompt_length[:, None])
    nowhere = jnp.zeros(x.shape, jnp.int32)
    seen = nowhere.at[rows, jnp.where(present, tokens.ids, vocab)].max(1, mode="drop") > 0
    count = nowhere.at[rows, jnp.where(generated, tokens.ids, vocab)].add(1, mode="drop")
    r, f, p = (c[:, None] for c in (controls.repetition, controls.frequency, controls.presence))
    x = jnp.where(seen, jnp.where(x > 0, x / r, x * r), x)
    return x - f * count.astype(x.dtype) - p * (count > 0).astype(x.dtype)
