"""What a run that was killed goes on from: everything its next step depends on, in one file.

The file is written whole and then put in the place of the one before, so there is always one to go on from.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.readers.safetensors import SafetensorsFile
from llmjax.checkpoint.identity import differences
from llmjax.checkpoint.safetensors_writer import SafetensorsWriter
from llmjax.errors import CheckpointError, OutputError, RequestError, ResumeError, lies_at
from llmjax.outside.paths import checked_path
from llmjax.outside.whole import whole_file
from llmjax.training.step import State

FILE = "training_state.safetensors"


@dataclasses.dataclass
class Progress:
    """Where a run is.

    Attributes:
      epoch: its number, from 0.
      group: effective batches of it that are done.
      tokens: learned so far.
      seconds: spent so far, compiling included.
      metrics: bytes of ``metrics.jsonl`` that belong to the steps done.
      first_eval: the evaluation's loss before the first step.
      best: the least loss of an evaluation.
      best_step: after which that was.
      waited: evaluations since.
      finished: why the run ended; None while it goes on.
    """

    epoch: int = 0
    group: int = 0
    tokens: int = 0
    seconds: float = 0.0
    metrics: int = 0
    first_eval: float | None = None
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    finished: str | None = None


def expect_output(path: str | Path) -> Path:
    """Where a run has its output: a new folder, or one that holds a run.  To be told before long work.

    Raises:
      RequestError: something else is there.
    """
    folder = checked_path("output", path, RequestError)
    if os.path.lexists(folder) and not folder.is_dir():
        raise RequestError(f"{folder}: expected a directory, found {lies_at(folder)}")
    held = os.listdir(folder) if folder.is_dir() else []
    # Beside a model's files an adapter would be taken for a part of it, by transformers for one.
    adapter = "an adapter that no run here made"
    taken = {"adapter_config.json": adapter, "adapter_model.safetensors": adapter, "config.json": "a model"}
    what = next((what for name, what in taken.items() if name in held), None)
    if what and FILE not in held:
        raise RequestError(f"{folder}: holds {what}; name another directory")
    return folder


def save(folder: Path, state: State, best: Any, progress: Progress, identity: Mapping[str, Any]) -> None:
    """Writes the state.

    Args:
      folder: of the run.
      state: after a step.
      best: the factors of the best evaluation, None where there was none.
      progress: beside it.
      identity: what made it, which must be the same to go on.
    """
    trees = {"state": (state.factors, state.moments)} | ({} if best is None else {"best": best})
    leaves = {f"{name}.{i}": np.asarray(leaf).reshape(-1) for name, tree in trees.items()
              for i, leaf in enumerate(jax.tree.leaves(tree))}  # fmt: skip
    facts = {"step": state.step, "progress": dataclasses.asdict(progress), "identity": identity}
    leaves["facts"] = np.frombuffer(json.dumps(facts, sort_keys=True).encode(), np.uint8)
    with whole_file(folder / FILE, OutputError) as place:
        writer = SafetensorsWriter(place, len(leaves) + 1)
        for name, leaf in (leaves | {"sha256": _sha256(leaves)}).items():
            writer.write(name, leaf)
        writer.close({})


def _sha256(leaves: Mapping[str, np.ndarray]) -> np.ndarray:
    """Over all that a state is, for a bit that flips in a file would be another run."""
    sha = hashlib.sha256()
    for name in sorted(leaves):
        sha.update(f"{name} {leaves[name].dtype} {leaves[name].size}\n".encode() + leaves[name].tobytes())
    return np.frombuffer(sha.digest(), np.uint8)


def restore(folder: Path, first: State, identity: Mapping[str, Any]) -> tuple[State, Any, Progress] | None:
    """The state, the best factors and the progress of the run in a folder; None where none has begun.

    Args:
      folder: of the run.
      first: the state before the first step, for its form.
      identity: of the run that wants to go on.

    Raises:
      ResumeError: the file is damaged, another version's, or another run's.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return _restored(path, first, identity)
    except (CheckpointError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ResumeError(f"{path}: damaged, or another version's: {error}; delete it to begin anew") from None


def _restored(path: Path, first: State, identity: Mapping[str, Any]) -> tuple[State, Any, Progress]:
    file = SafetensorsFile(path)
    leaves = {name: file.read(name) for name in file.names()}
    if not np.array_equal(leaves.pop("sha256", np.empty(0)), _sha256(leaves)):
        raise ValueError("what it holds has another checksum")
    facts = json.loads(leaves["facts"].tobytes())
    if found := list(differences(facts["identity"], json.loads(json.dumps(identity)))):
        here = f"{path.parent}: holds another run; name another directory, or delete it to begin anew:"
        raise ResumeError("\n  ".join([here, *found]))

    def tree(name: str, like: Any) -> Any:
        shapes, form = jax.tree.flatten(like)
        found = [jnp.asarray(leaves[f"{name}.{i}"].reshape(leaf.shape), leaf.dtype) for i, leaf in enumerate(shapes)]
        return jax.tree.unflatten(form, found)

    factors, moments = tree("state", (first.factors, first.moments))
    best = tree("best", first.factors) if "best.0" in leaves else None
    return State(int(facts["step"]), factors, moments), best, Progress(**facts["progress"])


def data_sha256(examples: Any) -> str:
    """Over the ids and masks of examples, in their order."""
    sha = hashlib.sha256()
    for example in (part for row in examples for part in row.parts):
        sha.update(np.array([example.row, len(example.ids)], np.int64).tobytes())
        sha.update(example.ids.tobytes() + example.learned.tobytes())
    return sha.hexdigest()


def factors_sha256(factors: Any) -> str:
    """Over the values of an adapter."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(factors):
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()
