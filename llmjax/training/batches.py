"""Examples in batches: padded to few lengths, for each of which a program is compiled once."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import struct

if TYPE_CHECKING:
    from llmjax.training.config import TrainConfig

# What labels of tokens that are not learned are in torch's and transformers' batches.
IGNORED = -100
_SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Example:
    """A row, ready to learn from.

    Attributes:
      row: its number in the data, from 0.
      ids: token ids, int32 ``[T]``.
      learned: bool ``[T]``: tokens the loss counts; never the first, which nothing predicts.
    """

    row: int
    ids: np.ndarray
    learned: np.ndarray

    @property
    def tokens(self) -> int:
        """How many the loss counts."""
        return int(self.learned.sum())

    @property
    def parts(self) -> "tuple[Example, ...]":
        """What goes into the rows of a batch."""
        return (self,)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A row of preferences: two completions of one prompt, whose tokens both have.

    Attributes:
      chosen: with the completion that is to become more likely.
      rejected: with the other.
    """

    chosen: Example
    rejected: Example

    @property
    def row(self) -> int:
        """Its number in the data, from 0."""
        return self.chosen.row

    @property
    def tokens(self) -> int:
        """How many the log-probabilities of both are summed over."""
        return self.chosen.tokens + self.rejected.tokens

    @property
    def parts(self) -> tuple[Example, ...]:
        """What goes into the rows of a batch, one behind the other."""
        return self.chosen, self.rejected


class Batch(struct.PyTreeNode):
    """Rows of one program, padded on the right; the head runs on the ``M`` tokens of a row whose next is learned.

    Attributes:
      ids: int32 ``[B, T]``.
      at: int32 ``[B, M]``, positions whose next token is learned, filled up with 0.
      targets: int32 ``[B, M]``, those next tokens.
      weights: float32 ``[B, M]``, 1, or 0 where filled up.
      lengths: int32 ``[B]``, tokens of each row.
      rows: the numbers of the rows in the data (static), each twice where they are pairs; fewer than B where the last
        are filling.
      reference: float32 ``[B]``, of pairs: log-probabilities of the rows' learned tokens, added up, without an adapter;
        None where they are not computed yet.
    """

    ids: Any
    at: Any
    targets: Any
    weights: Any
    lengths: Any
    rows: tuple[int, ...] = struct.field(pytree_node=False, default=())
    reference: Any = None

    @property
    def tokens(self) -> int:
        """How many the loss counts."""
        return int(np.count_nonzero(self.weights))

    def arrays(self) -> "Batch":
        """On the device, without what would make a program of its own for each batch."""
        leaves = (self.ids, self.at, self.targets, self.weights, self.lengths)
        ids, at, targets, weights, lengths = map(jnp.asarray, leaves)
        reference = None if self.reference is None else jnp.asarray(self.reference)
        return Batch(ids, at, targets, weights, lengths, reference=reference)


def bucket(length: int) -> int:
    """The length that ``length`` tokens are padded to: 16, 24, 32, 48, 64, 96, ..."""
    size = _SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def make_batch(examples: Sequence[Example], rows: int | None = None, width: int | None = None) -> Batch:
    """A batch of these examples.

    Args:
      examples: at least one.
      rows: B; the examples' number where None.
      width: T; the longest one's bucket where None.
    """
    count = len(examples) if rows is None else rows
    width = bucket(max(len(e.ids) for e in examples)) if width is None else width
    most = min(bucket(max(e.tokens for e in examples)), width)
    ids = np.zeros((count, width), np.int32)
    at, targets = np.zeros((count, most), np.int32), np.zeros((count, most), np.int32)
    weights = np.zeros((count, most), np.float32)
    lengths = np.ones(count, np.int32)
    for i, example in enumerate(examples):
        lengths[i] = len(example.ids)
        ids[i, : len(example.ids)] = example.ids
        where = np.flatnonzero(example.learned) - 1
        at[i, : len(where)], targets[i, : len(where)], weights[i, : len(where)] = where, example.ids[where + 1], 1
    return Batch(ids, at, targets, weights, lengths, tuple(e.row for e in examples))


def from_labels(ids: np.ndarray, labels: np.ndarray, rows: Sequence[int] = ()) -> Batch:
    """A batch from arrays ``[B, T]`` as torch's trainers have them: labels are the ids, -100 where nothing is learned;
    a token's label is predicted from the tokens before it."""
    examples = []
    for i, (row, label) in enumerate(zip(ids, labels, strict=True)):
        learned = label != IGNORED
        learned[0] = False
        examples.append(Example(rows[i] if rows else i, np.where(learned, label, row), learned))
    return make_batch(examples, width=ids.shape[1])


def batches(examples: Sequence[Example | Pair], config: "TrainConfig", epoch: int) -> Iterator[list[Batch]]:
    """The effective batches of an epoch, each as the batches that are computed one after the other.

    The order follows from ``config.seed`` and the epoch.  Within an effective batch rows of like length go together:
    the loss is that of all its tokens, however they are cut.  The last effective batch may be smaller.

    Args:
      examples: all of them.
      config: batch size, accumulation, seed, shuffle.
      epoch: its number, from 0.
    """
    order = np.arange(len(examples))
    if config.shuffle:
        order = np.random.default_rng([config.seed, epoch]).permutation(len(examples))
    size = config.batch_size * config.accumulation
    for start in range(0, len(order), size):
        yield cut([examples[i] for i in order[start : start + size]], config.batch_size)


def cut(examples: Sequence[Example | Pair], size: int) -> list[Batch]:
    """Batches of ``size`` rows, or of so many pairs of rows, filled up, from the longest to the shortest."""
    ordered = sorted(examples, key=lambda e: (-max(len(part.ids) for part in e.parts), -e.tokens, e.row))
    parts = [[part for e in ordered[i : i + size] for part in e.parts] for i in range(0, len(ordered), size)]
    return [make_batch(rows, size * len(ordered[0].parts)) for rows in parts]
