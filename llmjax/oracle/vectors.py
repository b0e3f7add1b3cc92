"""Test vectors: texts that show what an ordinary sentence hides, and what a model computes of each.

A mistake in a runtime may show only in a first token, behind a sliding window, past 256 tokens (where bfloat16 cannot
count), at the table's ends or in a token that was generated.  ``write`` makes a dump for each such place of a model; a
runtime is fed the same ids, and its own dumps, in folders of the same names, are what ``llmjax compare`` takes.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.errors import RequestError, amount
from llmjax.llm import LLM
from llmjax.model import Model
from llmjax.models.rope import Rope
from llmjax.models.scalings import Dynamic, LongRope
from llmjax.oracle.trace import bytes_of, trace
from llmjax.outside.paths import checked_path
from llmjax.outside.values import POSITIVE, check
from llmjax.outside.whole import whole_folder
from llmjax.runtime.params import SamplingParams
from llmjax.text.disagreement import PLAIN, SCRIPTS

LONGEST = 512
_TEXT = (
    "In 1905 the young clerk wrote four papers. The first said that light comes in grains; 3.14 had nothing to do with "
    'it, nor had "common sense", which (he said later) is what one has learnt by the age of 18.'
)
# Tokens of a text at most, and of the beginning that is gone on with, by how many.
_LONG, _PROMPT, _DRAWN = 240, 32, 24
# bfloat16 holds whole numbers up to 256: positions beyond it, and what is counted by them, are rounded.
_FAR = 256
# Tokens behind a window, or behind the length that a rope was made for.
_BEHIND = 32


@dataclasses.dataclass(frozen=True)
class Vector:
    """A text for a model.

    Attributes:
      name: of its folder.
      shows: which mistakes.
      ids: token ids as they are fed.
      text: what they were made of, for runtimes that make the ids themselves; None where they stand for no text.
      drawn: how many of the last ones were generated greedily, to be generated again.
    """

    name: str
    shows: str
    ids: tuple[int, ...]
    text: str | None = None
    drawn: int = 0


def vectors(model: Model) -> Iterator[Vector]:
    """Those of a model, within its context, shortest first; all but the one that is drawn, which ``write`` adds."""
    tokenizer, rows, most = model.tokenizer, model.config.vocab_size, model.context_length
    special = {*tokenizer.special_tokens.values(), *tokenizer.eos_ids} if tokenizer else {*model.eos_ids}
    known = min(rows, tokenizer.vocab_size) if tokenizer else rows
    plain = [i for i in range(known) if i not in special] or [0]
    begin = tokenizer.prefix_ids if tokenizer else ()
    random = np.random.default_rng(0)

    def some(count: int) -> tuple[int, ...]:
        return (*begin, *random.choice(plain, max(0, count - len(begin))).tolist())

    def of_text(name: str, shows: str, parts: Sequence[str], between: str, longest: int) -> Vector:
        """Of the parts that fit, one after the other."""
        assert tokenizer is not None
        kept: list[str] = []
        for part in parts:
            ids = tokenizer.encode(between.join([*kept, part]))
            if len(ids) <= min(longest, most) and max(ids, default=rows) < rows:
                kept.append(part)
        if not kept:
            return Vector(name, shows, some(min(longest, most)))
        return Vector(name, shows, tuple(tokenizer.encode(text := between.join(kept))), text)

    named = sorted(i for i in special if i < rows)
    if len(named) > 2 * _PROMPT:  # names kept for later, by the hundred
        named = named[:_PROMPT] + named[-_PROMPT:]
    ends = [*range(4), *range(rows - 4, rows), *named]
    found = [
        Vector("first", "a token that attends to itself alone", some(max(1, len(begin)))),
        Vector("repeated", "positions alone: one token again and again", (*begin, *[plain[-1]] * 48)),
        Vector("ends", "the embedding's first and last rows, and special tokens", (*begin, *dict.fromkeys(ends))),
        Vector("far", f"positions past {_FAR}", some(_FAR + _BEHIND)),
    ]
    if tokenizer:
        found.append(of_text("text", "an ordinary text", _TEXT.split(" "), " ", _LONG))
        for name, texts, what in (
            ("hard", PLAIN, "spaces, marks, digits, code"),
            ("scripts", SCRIPTS, "other letters"),
        ):
            parts = [text for text in texts if text.strip()]
            found.append(of_text(name, f"how a text becomes ids: {what}", parts, "\n", _LONG))
    else:
        found.append(Vector("text", "an ordinary text", some(min(_PROMPT, most))))
    windows = {w for w in getattr(model.config, "windows", ()) if w is not None}
    found += [Vector(f"window_{w}", f"what lies behind a window of {w}", some(w + _BEHIND)) for w in windows]
    ropes = (getattr(model.config, field.name) for field in dataclasses.fields(model.config))
    scalings = [rope.scaling for rope in ropes if isinstance(rope, Rope)]
    lengths = {s.original for s in scalings if isinstance(s, Dynamic | LongRope)}
    found += [Vector(f"stretched_{n}", f"a rope stretched beyond {n} tokens", some(n + _BEHIND)) for n in lengths]
    yield from sorted((v for v in found if 0 < len(v.ids) <= most), key=lambda v: (len(v.ids), v.name))


def write(
    model: Model,
    directory: str | Path,
    taps: str | Sequence[str] = "logits",
    *,
    longest: int = LONGEST,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Writes a folder for each of the ``vectors`` of at most ``longest`` tokens, as ``Trace.save`` does, and an index,
    ``vectors.json``; all of it, or nothing.

    Beside what a trace's manifest holds, that of a vector has its ``name``, what it ``shows``, the ``text`` that a
    runtime should make the same ids of (or null), how many of the last tokens were ``drawn`` greedily behind the
    others, and their ``margins``: how far the logit of each lies above the next best, so that a tie is seen for one.

    Args:
      model: the model; its profile decides the numbers.
      directory: new, or empty.
      taps: see ``llmjax.trace``.
      longest: tokens of a vector at most; those left out are named in the index.
      progress: is told of the size, then of each.

    Returns:
      the index.

    Raises:
      RequestError: a tap that there is not, or the directory exists or cannot be written.
      OutputError: the disk is full; nothing is left behind.
    """
    check("longest", longest, POSITIVE, RequestError)
    every = list(vectors(model))
    found, left = ([v for v in every if (len(v.ids) > longest) == out] for out in (False, True))
    prompt, drawn = _beginning(model, next(v for v in every if v.name == "text"), longest)
    lengths = [*(len(v.ids) for v in found), *([len(prompt) + drawn] if drawn else ())]
    most = max(lengths, default=1)
    size = bytes_of(model, most, taps)
    total = size * sum(lengths) / most
    texts = amount(len(lengths), "text")
    progress(f"{texts}: up to {size / 1e6:,.1f} MB of memory for one, about {total / 1e6:,.1f} MB on disk")
    if drawn:
        found.append(_drawn(model, prompt, drawn))
    index: dict[str, Any] = {"schema": 1, "vectors": [], "left_out": [_entry(v) for v in left]}
    with whole_folder(checked_path("directory", directory, RequestError), RequestError) as folder:
        for vector in found:
            result = trace(model, vector.ids, taps)
            facts = {**_entry(vector), "text": vector.text}
            if vector.drawn:
                full = result if "logits" in result.activations else trace(model, vector.ids, "logits")
                facts["margins"] = _margins(vector, full.activations["logits"])
            dataclasses.replace(result, manifest={**result.manifest, **facts}).save(folder / vector.name)
            index["vectors"].append(_entry(vector))
            progress(f"{vector.name}: {amount(len(vector.ids), 'token')}: {vector.shows}")
        (folder / "vectors.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return index


def _entry(vector: Vector) -> dict[str, Any]:
    return {"name": vector.name, "shows": vector.shows, "tokens": len(vector.ids), "drawn": vector.drawn}


def _beginning(model: Model, text: Vector, longest: int) -> tuple[tuple[int, ...], int]:
    """That of a text, and how many tokens the model is to go on with; 0 where there is no room for them."""
    prompt = text.ids[: min(_PROMPT, max(1, model.context_length // 2))]
    return prompt, max(0, min(_DRAWN, min(longest, model.context_length) - len(prompt)))


def _drawn(model: Model, prompt: tuple[int, ...], count: int) -> Vector:
    """What the model goes on with."""
    llm = LLM(model, numerics=model.numerics.name, max_batch=1, generation_config="none")
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    (answer,) = llm.generate([list(prompt)], params)
    ids = answer.outputs[0].token_ids
    shows = "tokens that were generated, one after the other, from a cache"
    return Vector("drawn", shows, (*prompt, *ids), drawn=len(ids))


def _margins(vector: Vector, logits: np.ndarray) -> list[float]:
    """Of those of the whole text, ``[T, V]``: what stands before each drawn token."""
    best = np.sort(logits[-vector.drawn - 1 : -1], -1)
    return (best[:, -1] - best[:, -2]).tolist()
