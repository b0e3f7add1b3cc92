"""What a phase must read and compute, whatever the program: the figures that rates are made of."""

import dataclasses
import math
from typing import Any

import jax

from llmjax.model import Model
from llmjax.quant.qtensor import is_qtensor


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one step or of a whole prompt.

    Attributes:
      nbytes: weights, each once a pass; keys and values that are attended to, each once a row; what a row carries from
        token to token, read and written.
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
        leaves = jax.tree_util.tree_leaves_with_path(model.params, is_leaf=is_qtensor)
        self.weight_bytes = sum(leaf.nbytes for _, leaf in leaves)
        self.parameters = sum(_count(leaf) for _, leaf in leaves)
        self._head = model.config.vocab_size * model.config.hidden_size
        # Tables are looked up: a few rows.  But a tied one is read as the head.
        tied = ("head.weight", "embed.weight")[model.config.tie_word_embeddings]
        each = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
        tables = {name for name in each if name.endswith("embed.weight") and name != tied}
        self._experts = [leaf for name, leaf in each.items() if ".experts." in name]
        rest = [leaf for name, leaf in each.items() if name not in tables and ".experts." not in name]
        self._read = sum(leaf.nbytes for leaf in rest)
        self._layers = sum(map(_count, rest)) - self._head

    def decode_step(self, rows: int, context: int) -> Cost:
        """One token in each of ``rows`` slots, each with ``context`` tokens before it."""
        nbytes, flops = self._attended(context, 1)
        read, expert_flops = self._through_experts(rows)
        return Cost(self._read + read + rows * nbytes, rows * (2 * (self._layers + self._head) + flops) + expert_flops)

    def prefill(self, tokens: int, chunk: int) -> Cost:
        """A prompt, ``chunk`` tokens a pass; only the last token of a pass goes through the head."""
        total = Cost(0, 0)
        for start in range(0, tokens, chunk):
            count = min(chunk, tokens - start)
            read, expert_flops = self._through_experts(count)
            flops = 2 * (self._layers * count + self._head) + self._attended(start, count)[1] + expert_flops
            total += Cost(self._read + read + self._attended(start + count - 1, 1)[0], flops)
        return total

    def _through_experts(self, rows: int) -> tuple[int, int]:
        """Bytes and flops of so many tokens, as if no two had an expert in common while there are enough."""
        used = getattr(self._config, "experts_used", 0)
        read = sum(leaf.nbytes * min(leaf.shape[0], rows * used) // leaf.shape[0] for leaf in self._experts)
        return read, sum(2 * rows * used * _count(leaf) // leaf.shape[0] for leaf in self._experts)

    def _attended(self, start: int, count: int) -> tuple[int, int]:
        """Of ``count`` tokens from position ``start`` on, over all layers: bytes of the keys and values they see, their
        own included, and of what is carried; flops of attention."""
        config = self._config
        windows = getattr(config, "windows", (None,) * config.num_hidden_layers)
        seen = {w: sum(min(p + 1, w or p + 1) for p in range(start, start + count)) for w in set(windows)}
        nbytes = flops = 0
        for layer, window in enumerate(windows):
            if heads := config.attention(layer):
                nbytes += seen[window] * 2 * heads[0] * heads[1] * self._item
                flops += seen[window] * 4 * config.num_attention_heads * heads[1]
            carried = (size for sizes in config.carried(layer).values() for size in sizes.values())
            nbytes += sum(2 * 4 * math.prod(size) for size in carried)
        return nbytes, flops


def _count(leaf: Any) -> int:
    return math.prod(leaf.shape)
