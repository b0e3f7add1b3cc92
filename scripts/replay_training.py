"""Replays a recorded LoRA or DoRA training run, step by step, through the public pieces of ``llmjax.training``.

    python scripts/replay_training.py RUN_DIR --base CHECKPOINT --output DIR [--numerics hf]

RUN_DIR holds ``train.json`` (settings, order of rows), ``batches.npz`` (padded arrays ``[step, micro batch, row, T]``;
of preferences ``chosen_*`` and ``rejected_*``), ``adapter_init/`` (PEFT's form), ``eval.jsonl``, and
``base_int8.safetensors`` where the base is quantized: its integers and scales are then what is trained on.  DIR gets
``history.json`` (loss, grad_norm, lr and tokens of every step, the evaluation loss before and after; of preferences the
pairs for the tokens, and rewards, accuracy and log-probabilities) and the adapters after steps 1, 5, 20 and the last.
A setting that is not known is refused by name.  A run in float32 is replayed by the formulas of the papers; one of
Falcon needs ``--numerics hf`` where transformers was not mended, whose ALiBi is bfloat16 even then.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import llmjax
from converters.readers.jsonfile import read_json
from llmjax.errors import CheckpointError, ConfigError, LlmjaxError
from llmjax.lora.adapter import modules_of
from llmjax.models.tree import path_of
from llmjax.quant.qtensor import QTensor, dequantize
from llmjax.training.adapter import Adapter
from llmjax.training.batches import IGNORED, Batch, Example, Pair, cut, from_labels
from llmjax.training.config import TrainConfig
from llmjax.training.files import read_trained, save_adapter
from llmjax.training.optimizer import schedule
from llmjax.training.step import Programs, first_state, train_step

SAVED = (1, 5, 20)
# What describes a run, or repeats what adapter_config.json says.
_NOTES = frozenset(
    """
    set name base base_folder base_set seed T pad_id order optimizer schedule_note clip_note loss_note
    deviation_float32_vs_float64 largest_update deterministic ablations steps_clipped suggested versions targets
    per_module_rank_and_scaling tokens eval_every reference note notes
    """.split()
)
_SETTINGS = frozenset(
    """
    r alpha lr betas eps weight_decay schedule warmup clip steps micro accum rslora rank_pattern alpha_pattern int8
    dropout momentum dtype dora dpo beta
    """.split()
)
# A history's names of what ``preferences.measures`` gives.
_PREFERENCES = {
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "reward_margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "logp_chosen": "logps/chosen",
    "logp_rejected": "logps/rejected",
}
_OPTIMIZERS = {"torch.optim.AdamW": "adamw", "AdamW": "adamw", "adamw": "adamw"}
_SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
}


def settings_of(run: dict[str, Any]) -> TrainConfig:
    """The run's settings as ours.

    Raises:
      ConfigError: one is not known, or not supported.
    """
    if unknown := sorted(set(run) - _NOTES - _SETTINGS):
        raise ConfigError(f"train.json: unknown settings {', '.join(unknown)}")
    optimizer = str(run.get("optimizer", "AdamW")).split(" ")[0]
    if optimizer not in _OPTIMIZERS:
        raise ConfigError(f"train.json: optimizer: unknown {optimizer!r}; expected {', '.join(_OPTIMIZERS)}")
    if run["schedule"] not in _SCHEDULES:
        raise ConfigError(f"train.json: schedule: unknown {run['schedule']!r}; expected {', '.join(_SCHEDULES)}")
    if run.get("dropout"):
        raise ConfigError("train.json: dropout: what another program's draws dropped cannot be drawn again")
    return TrainConfig(
        optimizer=_OPTIMIZERS[optimizer],
        learning_rate=run["lr"],
        betas=tuple(run.get("betas", (0.9, 0.999))),
        eps=run.get("eps", 1e-8),
        weight_decay=run.get("weight_decay", 0.0),
        schedule=_SCHEDULES[run["schedule"]],
        warmup=run.get("warmup", 0),
        clip=run.get("clip"),
        batch_size=run["micro"],
        accumulation=run["accum"],
        steps=run["steps"],
        dpo=bool(run.get("dpo")),
        beta=run.get("beta"),
    )


def check_scales(adapter: Adapter, run: dict[str, Any]) -> None:
    """Raises ConfigError where the adapter's kind, ranks and scales are not those that the run recorded."""
    if bool(adapter.settings.dora) != bool(run.get("dora")):
        raise ConfigError(f"train.json: dora: {bool(run.get('dora'))}, but adapter_init says {adapter.settings.dora}")
    ours = {t.module: [t.rank, t.scale] for t in adapter.targets}
    recorded = run.get("per_module_rank_and_scaling", ours)
    wrong = [m for m in sorted({*ours, *recorded}) if not np.allclose(ours.get(m, -1), recorded.get(m, -1))]
    if wrong:
        module = wrong[0]
        raise ConfigError(
            f"train.json: per_module_rank_and_scaling: {module}: recorded {recorded.get(module)}, adapter_init has "
            f"{ours.get(module)}"
        )


def packed(model: llmjax.Model, path: Path) -> llmjax.Model:
    """The model with the quantized weights of a file in the place of their dequantized values.

    Raises:
      CheckpointError: a weight's values are not those of the base.
    """
    tensors = load_file(path)
    params = jax.tree.map(lambda leaf: leaf, model.params)
    done = set()
    for parts in modules_of(model.architecture, model.config).values():
        name = f"{parts[0].module}.weight"
        if f"{name}.q" not in tensors:
            continue
        done |= {f"{name}.q", f"{name}.scale"}
        for part in parts:
            q = QTensor(part.entry.make([tensors[f"{name}.q"]]), part.entry.make([tensors[f"{name}.scale"][:, None]]))
            branch = params
            for key in path_of(part.parameter)[:-1]:
                branch = branch[key]
            if not np.array_equal(dequantize(q), np.asarray(branch["weight"], np.float32)):
                raise CheckpointError(f"{path}: {name}: integers times scales are not the base's values")
            branch["weight"] = q.map(jnp.asarray)
    if left := sorted(set(tensors) - done):
        raise CheckpointError(f"{path}: {left[0]} is no weight of this model")
    return dataclasses.replace(model, params=params)


def examples_of(path: Path) -> list[Example] | list[Pair]:
    """Rows with ``ids`` and ``loss_mask``, or with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    def example(i: int, ids: list[int], mask: list[int]) -> Example:
        return Example(i, np.array(ids, np.int32), np.array(mask, bool) & (np.arange(len(ids)) > 0))

    def half(i: int, prompt: list[int], said: list[int]) -> Example:
        return example(i, prompt + said, [0] * len(prompt) + [1] * len(said))

    if rows and "chosen_ids" in rows[0]:
        return [Pair(*(half(i, r["prompt_ids"], r[f"{name}_ids"]) for name in ("chosen", "rejected")))
                for i, r in enumerate(rows)]  # fmt: skip
    return [example(i, r["ids"], r["loss_mask"]) for i, r in enumerate(rows)]


def groups_of(folder: Path, run: dict[str, Any]) -> list[list[Batch]]:
    """The effective batches in their order.

    Raises:
      CheckpointError: the arrays are not as many as the settings say.
    """
    arrays = dict(np.load(folder / "batches.npz"))
    if run.get("dpo"):  # [step, micro batch, pair, 2, T]
        arrays = {name: both(arrays[f"chosen_{name}"], arrays[f"rejected_{name}"], filling)
                  for name, filling in (("input_ids", 0), ("labels", IGNORED))}  # fmt: skip
    ids, labels = arrays["input_ids"], arrays["labels"]
    expected = (run["steps"], run["accum"], run["micro"])
    if ids.shape[:3] != expected or labels.shape != ids.shape:
        raise CheckpointError(f"{folder}/batches.npz: expected arrays {list(expected)}, found {list(ids.shape)}")
    order = run.get("order") or [[() for _ in step] for step in ids]
    return [[batch_of(*micro) for micro in zip(*step, strict=True)] for step in zip(ids, labels, order, strict=True)]


def both(chosen: np.ndarray, rejected: np.ndarray, filling: int) -> np.ndarray:
    """Arrays ``[..., T]`` of the halves of pairs, side by side ``[..., 2, T]``."""
    width = max(chosen.shape[-1], rejected.shape[-1])
    halves = [np.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, width - a.shape[-1])], constant_values=filling)
              for a in (chosen, rejected)]  # fmt: skip
    return np.stack(halves, -2)


def batch_of(ids: np.ndarray, labels: np.ndarray, rows: Sequence[int]) -> Batch:
    """From ``[row, T]``, or ``[pair, 2, T]``: then a row is there twice."""
    each = 2 if ids.ndim == 3 else 1
    return from_labels(*(a.reshape(-1, a.shape[-1]) for a in (ids, labels)), [row for row in rows for _ in range(each)])


def replay(folder: Path, base: Path, output: Path, numerics: str | None = None) -> dict[str, Any]:
    """Does it and returns the history; numerics None is ``reference`` of float32, ``hf`` of less."""
    run = read_json(folder / "train.json")
    if run is None:
        raise ConfigError(f"{folder}/train.json: no such file")
    config = settings_of(run)
    dtype = run.get("dtype", "float32")
    model = llmjax.load(base, dtype=dtype, numerics=numerics or ("reference" if dtype == "float32" else "hf"))
    if run.get("int8"):
        model = packed(model, folder / "base_int8.safetensors")
    adapter = read_trained(folder / "adapter_init", model)
    check_scales(adapter, run)
    programs = Programs(model, adapter.targets, config)
    step, rate = (
        train_step(programs, config),
        schedule(config.schedule, config.learning_rate, config.warmup, run["steps"]),
    )
    state = first_state(adapter.factors, config)
    held_out = examples_of(folder / "eval.jsonl") if (folder / "eval.jsonl").exists() else []
    held_out_batches = cut(held_out, config.batch_size)

    def evaluated() -> float | None:
        return programs.evaluated(state.factors, held_out_batches)["loss"] if held_out_batches else None

    history: dict[str, Any] = {"loss": [], "grad_norm": [], "lr": [], "tokens": [], "eval_loss_before": evaluated()}
    history |= {name: [] for name in (_PREFERENCES if config.dpo else ())}
    for k, group in enumerate(groups_of(folder, run)):
        state, outcome = step(state, group, rate(k))
        history["loss"].append(outcome.loss)
        history["grad_norm"].append(outcome.grad_norm)
        history["lr"].append(rate(k))
        history["tokens"].append(sum(len(b.rows) for b in group) // 2 if config.dpo else outcome.tokens)
        for name in _PREFERENCES if config.dpo else ():
            history[name].append(outcome.preferences[_PREFERENCES[name]])
        if state.step in (*SAVED, run["steps"]):
            save_adapter(adapter.replace(state.factors), output / f"adapter_step{state.step}", "base")
    history["eval_loss_after"] = evaluated()
    (output / "history.json").write_text(json.dumps(history, indent=1))
    return history


def main() -> int:
    """Replays, and says what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--base", type=Path, required=True, help="the base model's checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="a directory, made where it is missing")
    parser.add_argument("--numerics", choices=("reference", "hf"), help="of the model (default: by the run's dtype)")
    args = parser.parse_args()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        history = replay(args.run, args.base, args.output, args.numerics)
    except LlmjaxError as error:
        print(f"replay_training: {error}", file=sys.stderr)
        return 2
    print(f"{len(history['loss'])} steps: loss {history['loss'][0]:.4f} to {history['loss'][-1]:.4f}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
