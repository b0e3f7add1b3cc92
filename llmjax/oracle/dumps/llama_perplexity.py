"""The file that llama.cpp's ``llama-perplexity --kl-divergence-base`` (``--save-all-logits``) writes.

``_logits_``, then int32 ``n_ctx``, ``V`` and the number of chunks, the token ids of all chunks ``[chunks, n_ctx]``
int32, and for each chunk the log-probabilities at its positions ``n_ctx / 2`` to ``n_ctx - 2``: a row of uint16, of an
even number of places: a float32 step and a float32 least (4 places), then ``V`` numbers of steps above the least.  What
is less probable than the best token by more than ``e^-16`` is written as the least, and counts so in what is made of
the file, in a ``nll`` too.  All is little-endian.

The model was fed BOS in the place of each chunk's first token, where its tokenizer puts one before a text: the first
chunk's own first token shows whether.
Source: llama.cpp, ``tools/perplexity/perplexity.cpp``.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmjax.errors import RequestError
from llmjax.model import Model
from llmjax.oracle.dump import Dump, Stored, Window
from llmjax.oracle.metrics import blocks

_MAGIC = b"_logits_"
_HEAD = 20
# The largest step: from the best token's log-probability to what is cut off.
_STEP = 16 / 65535


def is_base(file: Path) -> bool:
    """Whether a file begins as these do."""
    try:
        with open(file, "rb") as stream:
            return stream.read(8) == _MAGIC
    except OSError as error:
        raise RequestError(f"{file}: cannot be read: {error.strerror}") from None


def read(file: Path, model: Model | None) -> Sequence[Dump]:
    """A dump for each chunk; rows are read when they are asked for.

    Args:
      file: begins with the magic.
      model: whose tokenizer knows BOS.  Without one only the first chunk's tokens are known to be what was fed, and
        only that chunk is there.

    Raises:
      RequestError: it is cut off, or says what cannot be.
    """
    size = file.stat().st_size
    if size < _HEAD:
        raise RequestError(f"{file}: cut off: {size} bytes, expected at least {_HEAD}")
    context, vocab, count = (int(x) for x in np.fromfile(file, "<i4", 3, offset=8))
    if context < 3 or vocab < 1 or count < 1:
        raise RequestError(
            f"{file}: n_ctx {context}, a vocabulary of {vocab} and {count} chunks: none of llama-perplexity's"
        )
    shape = (count, context - 1 - context // 2, 2 * ((vocab + 1) // 2) + 4)
    start = _HEAD + 4 * count * context
    expected = start + 2 * shape[0] * shape[1] * shape[2]
    if size != expected:
        raise RequestError(
            f"{file}: expected {expected} bytes for {count} chunks of {context} tokens, found {size}; "
            + ("llama-perplexity was stopped before its end, or the copy was" if size < expected else "it is damaged")
        )
    ids = np.fromfile(file, "<i4", count * context, offset=_HEAD).reshape(count, context).astype(np.int32)
    if (outside := ids[(ids < 0) | (ids >= vocab)]).size:
        raise RequestError(f"{file}: token id {outside[0]} is not in its own vocabulary of {vocab}")
    rows = np.memmap(file, "<u2", "r", start, shape)
    what = f"of llama-perplexity --kl-divergence-base: log-probabilities of {shape[1]} of a text's {context} tokens"
    what += f", in steps of at most {_STEP:.1e}, cut off at e^-16 of the best token's, and nothing else"
    if model is None or model.tokenizer is None:
        if count > 1:
            what += f"; without a tokenizer it is not known how the other {count - 1} texts begin"
            count = 1
    elif ids[0, 0] == model.tokenizer.bos_id:
        ids[:, 0] = ids[0, 0]
    return [_dump(str(file), ids[i], _Chunk(f"{file}: text {i}", rows[i], vocab), what) for i in range(count)]


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Rows of one chunk, and what is made of them."""

    where: str
    rows: np.ndarray
    vocab: int

    def steps(self) -> np.ndarray:
        """int ``[R, V]``"""
        return self.rows[:, 4 : 4 + self.vocab]

    def scales(self) -> tuple[np.ndarray, np.ndarray]:
        """A row's step and its least, each float32 ``[R, 1]``."""
        found = np.ascontiguousarray(self.rows[:, :4]).view("<f4").astype(np.float32)
        if not (
            (found[:, 0] >= 0) & (found[:, 0] <= 1.001 * _STEP) & (found[:, 1] <= 0) & np.isfinite(found[:, 1])
        ).all():
            raise RequestError(
                f"{self.where}: a step or a least log-probability is NaN, infinite, too large or of the wrong sign"
            )
        return found[:, :1], found[:, 1:]

    def log_probs(self) -> np.ndarray:
        """float32 ``[R, V]``, by llama.cpp's own formula."""
        step, least = self.scales()
        found = np.empty(self.steps().shape, np.float32)
        total = np.empty(len(found), np.float64)
        for some in blocks(found):
            found[some] = step[some] * self.steps()[some] + least[some]
            total[some] = np.exp(found[some]).sum(-1, dtype=np.float64)
        # What is cut off counts as the least, e^-16 of the best token's.
        if (wrong := (total < 0.999) | (total > 1.001 + self.vocab * np.exp(-16))).any():
            row = int(wrong.argmax())
            raise RequestError(f"{self.where}: the probabilities of row {row} make {total[row]:.4g} together, not 1")
        return found

    def rounding(self, _: np.ndarray) -> np.ndarray:
        """Half a step, but for what is at the least on both sides (see ``show``)."""
        return np.where(self.steps() > 0, self.scales()[0] / 2, np.float32(0))

    def show(self, logits: np.ndarray) -> np.ndarray:
        """Log-probabilities of our logits ``[T, V]`` at these positions, the least where the file has it and ours are
        no more."""
        step, least = self.scales()
        logits = logits[len(logits) // 2 : -1]
        found = np.empty(logits.shape, np.float32)
        for some in blocks(found):
            z = logits[some]
            z = z - z.max(-1, keepdims=True)
            z -= np.log(np.exp(z).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
            found[some] = np.where((self.steps()[some] == 0) & (z < least[some] + step[some] / 2), least[some], z)
        return found


def _dump(path: str, ids: np.ndarray, chunk: _Chunk, what: str) -> Dump:
    window = Window(np.arange(len(ids) // 2, len(ids) - 1), chunk.show, chunk.rounding, log_probs=True)
    return Dump(
        path,
        {"runtime": "llama.cpp", "token_ids": ids.tolist()},
        ids,
        {"logits": Stored((len(chunk.rows), chunk.vocab), "float32", chunk.log_probs)},
        {"logits": window},
        what,
    )
