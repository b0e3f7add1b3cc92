"""What the runtime needs to know of any decoder, whatever its architecture."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

from flax import linen as nn

from llmjax.errors import shown
from llmjax.models.hf_config import Reader

# Far above any model's: what is planned from a configuration, before its tensors are compared, must cost little.
MOST_LAYERS = 1024
MOST_WIDTH, MOST_HEADS, MOST_HEAD_DIM, MOST_TOKENS = 1 << 20, 1 << 16, 1 << 16, 1 << 24

# The values of a config's ``layer_types``.
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Dimensions common to all architectures, by Hugging Face's names.  Frozen and hashable: configs are static in
    compiled programs.

    Attributes:
      vocab_size: V, rows of the embedding (may exceed the tokenizer's).
      hidden_size: D.
      intermediate_size: F.
      num_hidden_layers: L.
      num_attention_heads: N.
      num_key_value_heads: K.
      head_dim: H.
      max_position_embeddings: the context length, in tokens.
      tie_word_embeddings: the head is the embedding table.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    @property
    def period(self) -> int:
        """Layer ``i`` is computed like layer ``i + period``."""
        windows = getattr(self, "windows", ())
        return next((p for p in range(1, len(windows)) if windows[p:] == windows[:-p]), max(1, len(windows)))

    def shortened(self, layers: int) -> Self:
        """The model's first layers alone."""
        windows = {"windows": self.windows[:layers]} if hasattr(self, "windows") else {}
        return dataclasses.replace(self, num_hidden_layers=layers, **windows)

    @classmethod
    def from_hf(cls, config: Reader) -> Self:
        """Reads ``config.json``; leaves it to the caller to ``finish`` the reader."""
        raise NotImplementedError

    def module(self) -> nn.Module:
        """The Flax module: ``module.apply({"params": p}, ids [B, T], Context) -> logits [B, T, V]``."""
        raise NotImplementedError


def dimensions(
    r: Reader,
    *,
    tied: bool,
    context: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
) -> dict[str, Any]:
    """The fields of ``DecoderConfig``, read from the keys most architectures share.

    Args:
      r: the config.
      tied: the architecture's default for an absent ``tie_word_embeddings``.
      context: its default context length.
      kv_heads: its default for an absent ``num_key_value_heads``; None means as many as query heads, as null does.
      head_dim: its default for an absent ``head_dim``; None means the width shared among the heads.
    """
    hidden, heads = r.size("hidden_size", most=MOST_WIDTH), r.size("num_attention_heads", most=MOST_HEADS)
    kv = r.nullable(r.size, "num_key_value_heads", kv_heads or heads) or heads
    if r.get("head_dim", head_dim) is None and hidden % heads:
        r.problem(f"hidden_size: {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is absent")
    if heads % kv:
        r.problem(f"num_attention_heads: {heads} is not a multiple of num_key_value_heads {kv}")
    return {
        "vocab_size": r.size("vocab_size", most=MOST_TOKENS),
        "hidden_size": hidden,
        "intermediate_size": r.size("intermediate_size", most=4 * MOST_WIDTH),
        "num_hidden_layers": r.size("num_hidden_layers", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": r.size("head_dim", head_dim or max(1, hidden // heads), most=MOST_HEAD_DIM),
        "max_position_embeddings": r.size("max_position_embeddings", context),
        "tie_word_embeddings": r.flag("tie_word_embeddings", tied),
    }


def layer_windows(r: Reader, kinds: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """Each layer's sliding window in tokens; None sees all of the past.

    Args:
      r: the config, whose ``layer_types`` win.
      kinds: ``FULL`` or ``SLIDING`` for each layer, where ``layer_types`` is absent.
      window: of the layers that slide.
    """
    layers = len(kinds)
    found = r.get("layer_types", list(kinds))
    if not isinstance(found, list) or len(found) != layers or any(kind not in (FULL, SLIDING) for kind in found):
        r.problem(f"layer_types: expected {layers} of {SLIDING!r} or {FULL!r}, found {shown(found)}")
        return (None,) * layers
    if window is None and SLIDING in found:
        r.problem(f"sliding_window: null or switched off, but there are layers of type {SLIDING!r}")
    return tuple(window if kind == SLIDING else None for kind in found)
