"""What the runtime needs to know of any decoder, whatever its architecture."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Self

from flax import linen as nn

from llmjax.errors import named, shown
from llmjax.models.hf_config import Reader
from llmjax.models.rope import Rope
from llmjax.models.scalings import Dynamic, LongRope, Yarn
from llmjax.outside.values import INT32

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
      max_position_embeddings: the context length, in tokens; what a file says, or more, see ``stretched``.
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
    def kinds(self) -> tuple[Hashable, ...]:
        """What each layer is computed by, where layers differ."""
        return getattr(self, "windows", ())

    @property
    def period(self) -> int:
        """Layer ``i`` is computed like layer ``i + period``."""
        kinds = self.kinds
        return next((p for p in range(1, len(kinds)) if kinds[p:] == kinds[:-p]), max(1, len(kinds)))

    @property
    def row_arrays(self) -> dict[str, tuple[tuple[int, ...], str]] | None:
        """Shape and dtype by name of what a row keeps, where that is no keys and values in pages: a page is a whole row
        then."""
        return None

    @property
    def rewinds(self) -> bool:
        """What the cache holds of a token depends on what stands before it alone: rows may share their beginnings."""
        return not any(self.carried(layer) for layer in range(self.num_hidden_layers))

    def engine_sizes(self, chunk: int, block: int) -> tuple[int, int, int]:
        """Prompt tokens a prefill call takes, cache positions attention folds at a time, and tokens of a text that a
        call scores, from what was asked for."""
        return chunk, block, chunk

    def shortened(self, layers: int) -> Self:
        """The model's first layers alone; of fields with an entry for each layer, the first entries."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        cut: dict[str, Any] = {
            n: v[:layers] for n, v in values.items() if isinstance(v, tuple) and len(v) == self.num_hidden_layers
        }
        return dataclasses.replace(self, num_hidden_layers=layers, **cut)

    def attention(self, layer: int) -> tuple[int, int] | None:
        """``(K, H)`` of a layer's attention; None for a layer that has none."""
        return self.num_key_value_heads, self.head_dim

    def cache(self, layer: int) -> Mapping[str, Mapping[str, tuple[int, int]]]:
        """What a layer keeps of each token, ``(heads, width)`` by the module that keeps it and the buffer's name, see
        ``models.pages``; nothing for a layer that has no state of its own."""
        heads = self.attention(layer)
        return {} if heads is None else {"attn": {"k": heads, "v": heads}}

    def carried(self, layer: int) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """What a layer carries from token to token, see ``models.pages``: shapes of float32 arrays by module and name.
        Such a layer keeps nothing of each token, and rows of such a model share nothing."""
        return {}

    def length_kind(self, tokens: int) -> int:
        """Equal for texts of so many tokens whose beginnings are computed alike, 0 of most models: see
        ``models.scalings``."""
        return next((scaling.kind(tokens) for scaling in self._following), 0)

    @property
    def renewal(self) -> int | None:
        """A text that grows beyond so many tokens is computed anew, from its first on; None for never."""
        return next((s.original for s in self._following if isinstance(s, LongRope)), None)

    def stretched(self) -> Self:
        """With the context that ropes of ``Yarn`` and ``Dynamic`` stretch the original one to, where that is longer: as
        vLLM takes it, since files with such a rope put in by hand (Qwen2.5's way) keep ``max_position_embeddings``."""
        reach = max((s.factor * s.original for s in self._scalings if isinstance(s, Yarn | Dynamic)), default=0)
        context = max(self.max_position_embeddings, int(min(reach, INT32)))
        return dataclasses.replace(self, max_position_embeddings=context)

    @property
    def _scalings(self) -> list[Yarn | Dynamic | LongRope]:
        ropes = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [rope.scaling for rope in ropes if isinstance(rope, Rope) and rope.scaling]

    @property
    def _following(self) -> list[Dynamic | LongRope]:
        return [scaling for scaling in self._scalings if isinstance(scaling, Dynamic | LongRope)]

    @classmethod
    def from_hf(cls, config: Reader) -> Self:
        """Reads ``config.json``; leaves it to the caller to ``finish`` the reader."""
        raise NotImplementedError

    def module(self) -> nn.Module:
        """The Flax module: ``module.apply({"params": p}, ids [B, T], Context) -> logits [B, T, V]``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class MixedConfig(DecoderConfig):
    """Of models in which some layers attend and the others mix tokens in a way of their own.

    Attributes:
      kinds_of_layers: ``FULL``, or the name of the other way.
    """

    kinds_of_layers: tuple[str, ...]

    @property
    def kinds(self) -> tuple[Hashable, ...]:
        """See ``DecoderConfig``."""
        return self.kinds_of_layers

    def attention(self, layer: int) -> tuple[int, int] | None:
        """See ``DecoderConfig.attention``."""
        return super().attention(layer) if self.kinds_of_layers[layer] == FULL else None


def dimensions(
    r: Reader,
    *,
    tied: bool,
    context: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    intermediate: int | None = None,
) -> dict[str, Any]:
    """The fields of ``DecoderConfig``, read from the keys most architectures share.

    Args:
      r: the config.
      tied: the architecture's default for an absent ``tie_word_embeddings``.
      context: its default context length.
      kv_heads: its default for an absent ``num_key_value_heads``; None means as many as query heads, as null does.
      head_dim: its default for an absent ``head_dim``; None means the width shared among the heads.
      intermediate: F, where it is not the key ``intermediate_size``.
    """
    hidden, heads = r.size("hidden_size", most=MOST_WIDTH), r.size("num_attention_heads", most=MOST_HEADS)
    kv = r.nullable(r.size, "num_key_value_heads", kv_heads or heads) or heads
    if r.get("head_dim", head_dim) is None and hidden % heads:
        r.problem(f"hidden_size: {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is absent")
    if heads % kv:
        r.problem(f"num_attention_heads: {heads} is not a multiple of num_key_value_heads {kv}")
    r.context = r.size("max_position_embeddings", context)
    return {
        "vocab_size": r.size("vocab_size", most=MOST_TOKENS),
        "hidden_size": hidden,
        "intermediate_size": intermediate or r.size("intermediate_size", most=4 * MOST_WIDTH),
        "num_hidden_layers": r.size("num_hidden_layers", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": r.size("head_dim", head_dim or max(1, hidden // heads), most=MOST_HEAD_DIM),
        "max_position_embeddings": r.context,
        "tie_word_embeddings": r.flag("tie_word_embeddings", tied),
    }


def check_rope_types(r: Reader) -> None:
    """``rope_parameters`` of models whose local and global layers rotate differently."""
    ropes = r.get("rope_parameters", {})
    for key in sorted(set(ropes) - {FULL, SLIDING}, key=str) if isinstance(ropes, dict) else ():
        r.problem(
            f"rope_parameters.{named(str(key))}: expected an object for each of {FULL!r} and {SLIDING!r}, nothing else"
        )


def layer_kinds(r: Reader, allowed: tuple[str, str], default: Sequence[str]) -> tuple[str, ...]:
    """``layer_types``, each layer's one of two; ``default`` where it is absent, ``FULL`` where it is wrong."""
    layers = len(default)
    found = r.get("layer_types", list(default))
    if not isinstance(found, list) or len(found) != layers or any(kind not in allowed for kind in found):
        expected = " or ".join(map(repr, allowed))
        r.problem(f"layer_types: expected {layers} of {expected}, found {shown(found)}")
        return (FULL,) * layers
    return tuple(found)


def layer_windows(r: Reader, kinds: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """Each layer's sliding window in tokens; None sees all of the past.

    Args:
      r: the config, whose ``layer_types`` win.
      kinds: ``FULL`` or ``SLIDING`` for each layer, where ``layer_types`` is absent.
      window: of the layers that slide.
    """
    found = layer_kinds(r, (SLIDING, FULL), kinds)
    if window is None and SLIDING in found:
        r.problem(f"sliding_window: null or switched off, but there are layers of type {SLIDING!r}")
    return tuple(window if kind == SLIDING else None for kind in found)
