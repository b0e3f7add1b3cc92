"""Token ids that begin or end alike: a padded row of a batch, whose padding a mask hid from the candidate alone."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from llmjax.model import Model
from llmjax.oracle.dump import Dump, Stored
from llmjax.oracle.measure import fitted, inner, token_axis
from llmjax.oracle.names import Named
from llmjax.oracle.stages import Stages


def edges(ids: np.ndarray) -> Iterator[tuple[str, slice]]:
    """How ids begin or end alike, in words, and the tokens that are left without that."""
    for end, from_it in (("begin", ids), ("end", ids[::-1])):
        count = int(np.argmax(from_it != from_it[0]))  # 0 where all are the same
        if count > 1:
            rest = slice(count, None) if end == "begin" else slice(None, -count)
            yield f"token_ids {end} with {count} times {from_it[0]}", rest


def note(ids: np.ndarray) -> str:
    """What is told of ids that begin or end alike."""
    return next((f"; note: {words}: if that is padding, leave it out" for words, _ in edges(ids)), "")


def masked(
    faults: list[dict[str, Any]], known: Named, stages: Stages, holds: Callable[[Dump], bool]
) -> list[dict[str, Any]]:
    """The faults of a candidate, or in their place its padding, where without that it ``holds``: the last tokens of a
    text may be wrong alone, too, so they are padding only where they are a token that pads."""
    for words, rest in edges(stages.ids) if faults and not known.dump.windows else ():
        if _pads(stages.model, int(stages.ids[0 if rest.start else -1])) and holds(_without(known, stages, rest)):
            detail = f"{words}: without them nothing differs, as where a mask hides padding; leave it out"
            return [{**faults[0], "also": [], "causes": [{"cause": "padding", "detail": detail, "explains": 1.0}]}]
    return faults


def _pads(model: Model, token: int) -> bool:
    """Whether a token may be padding; any may where no tokenizer knows better."""
    tokenizer = model.tokenizer
    if tokenizer is None or token in (0, tokenizer.bos_id, *tokenizer.eos_ids):
        return True
    return not tokenizer.token_bytes(token)  # special, or none that the vocabulary has


def _without(known: Named, stages: Stages, rest: slice) -> Dump:
    """A dump of some of the tokens."""

    def read(tap: str) -> np.ndarray:
        rows = (slice(None),) * token_axis(tap) + (rest,)
        value = fitted(known, tap, stages.shapes[inner(tap)], None)[rows]
        return value[..., rest] if tap.endswith(".probs") else value

    def stored(tap: str) -> Stored:
        return Stored(read(tap).shape, known.dump.arrays[known.taps[tap].name].dtype, partial(read, tap))

    ids = stages.ids[rest]
    manifest = {**known.dump.manifest, "token_ids": ids.tolist(), "names": None}
    return Dump(known.dump.path, manifest, ids, {tap: stored(tap) for tap in known.taps})
