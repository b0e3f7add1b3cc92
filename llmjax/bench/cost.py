"""What a phase must read and compute, whatever the program: the figures that rates are made of."""

import dataclasses
import math
from typing import Any

import jax

from llmjax.model import Model
from llmjax.quant.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one step or of a whole prompt.

    Attributes:
      nbytes: weights, each once a pass, and keys and values that are attended to, each once a row.
      flops: two for each weight of a product and each row, and those of attention.
    """

    nbytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.nbytes + other.nbytes, self.flops + other.flops)


class Costs:
    """Of one model.

    Attributes:
      weight_bytes: of all parameters, as stored.
      parameters: their number.
    """

    def __init__(self, model: Model):
        self._config = model.config
        self._item = model.numerics.products.itemsize
        leaves = jax.tree.leaves(model.params, is_leaf=is_quantized)
        self.weight_bytes = sum(leaf.nbytes for leaf in leaves)
        self.parameters = sum(_count(leaf) for leaf in leaves)
        embed = model.params["embed"]["weight"]
        # Untied, the embedding is a look-up of a few rows; tied, it is read as the head.
        looked_up = not model.config.tie_word_embeddings
        self._read = self.weight_bytes - (embed.nbytes if looked_up else 0)
        self._head = model.config.vocab_size * model.config.hidden_size
        self._layers = self.parameters - _count(embed) - (self._head if looked_up else 0)

    def decode_step(self, rows: int, context: int) -> Cost:
        """One token in each of ``rows`` slots, each with ``context`` tokens before it."""
        attended = self._attended(context, 1)
        flops = rows * 2 * (self._layers + self._head) + rows * attended * self._flops_each()
        return Cost(self._read + rows * attended * self._bytes_each(), flops)

    def prefill(self, tokens: int, chunk: int) -> Cost:
        """A prompt, ``chunk`` tokens a pass; only the last token of a pass goes through the head."""
        total = Cost(0, 0)
        for start in range(0, tokens, chunk):
            count = min(chunk, tokens - start)
            flops = 2 * (self._layers * count + self._head) + self._attended(start, count) * self._flops_each()
            total += Cost(self._read + self._attended(start + count - 1, 1) * self._bytes_each(), flops)
        return total

    def _attended(self, start: int, count: int) -> int:
        """Positions that ``count`` tokens from position ``start`` on see, themselves included, summed over layers."""
        windows = getattr(self._config, "windows", (None,) * self._config.num_hidden_layers)
        seen = {w: sum(min(p + 1, w or p + 1) for p in range(start, start + count)) for w in set(windows)}
        return sum(seen[w] for w in windows)

    def _bytes_each(self) -> int:
        return 2 * self._config.num_key_value_heads * self._config.head_dim * self._item

    def _flops_each(self) -> int:
        return 4 * self._config.num_attention_heads * self._config.head_dim


def is_quantized(leaf: Any) -> bool:
    """Keeps a quantized weight whole in a walk over a tree."""
    return isinstance(leaf, QTensor)


def _count(leaf: Any) -> int:
    return math.prod(leaf.shape)
