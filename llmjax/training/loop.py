"""``finetune``: a whole run, from rows to an adapter, that may be killed at any time and goes on where it was."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from llmjax.checkpoint.identity import model_facts, runtime_facts
from llmjax.errors import ConfigError, LoraError, OutputError, RequestError, ResumeError, TrainingError, shown
from llmjax.lora.apply import has_lora
from llmjax.model import Model
from llmjax.outside.interrupts import Interrupts
from llmjax.outside.whole import locked, make_folder
from llmjax.runtime.memory import size, weight_bytes
from llmjax.text.dates import Date
from llmjax.training import checkpoints, curves
from llmjax.training.adapter import (
    ALL_LINEAR,
    Adapter,
    idle_excludes,
    new_adapter,
    settled_beside,
    stacks_of,
    targets_of,
)
from llmjax.training.batches import Batch, Example, Pair, batches, cut
from llmjax.training.checkpoints import Progress
from llmjax.training.config import TrainConfig
from llmjax.training.files import read_trained, save_adapter
from llmjax.training.lines import read_rows
from llmjax.training.optimizer import schedule
from llmjax.training.rows import Data, make_examples
from llmjax.training.step import Outcome, Programs, State, first_state, train_step

METRICS = "metrics.jsonl"
Rows = Iterable[Any] | str | Path
# What an adapter to start from says itself.
_OF_THE_START = ("targets", "rank", "alpha", "rslora", "rank_pattern", "alpha_pattern", "exclude")
_PLAIN = TrainConfig()


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run tells after each step.

    Attributes:
      step: of ``steps``.
      steps: of the run.
      values: what ``metrics.jsonl`` gets.
      seconds_left: about.
    """

    step: int
    steps: int
    values: dict[str, Any]
    seconds_left: float


@dataclasses.dataclass(frozen=True)
class Training:
    """What ``finetune`` returns.

    Attributes:
      adapter: of the best evaluation; of the last step where there was none.
      model: the base with it.
      metrics: what ``metrics.jsonl`` holds, by step.
      data: what became of the rows, and of those for evaluation.
      finished: why the run ended.
      first_eval: the evaluation's loss before the first step; None without rows for it.
      best_eval: the least.
      step: of the adapter.
    """

    adapter: Adapter
    model: Model
    metrics: list[dict[str, Any]]
    data: tuple[Data, ...]
    finished: str
    first_eval: float | None
    best_eval: float | None
    step: int

    def save(self, folder: str | Path) -> Path:
        """Writes the adapter in PEFT's form."""
        return save_adapter(self.adapter, folder, str(self.model.path))


def finetune(
    model: Model,
    rows: Rows,
    config: TrainConfig | None = None,
    *,
    eval_rows: Rows | None = None,
    output: str | Path | None = None,
    start: str | Path | None = None,
    date: Date | None = None,
    report: Callable[[Report], None] = lambda report: None,
    note: Callable[[str], None] = lambda text: None,
) -> Training:
    """Trains a LoRA adapter beside a model's frozen weights, packed ones as they are.

    Args:
      model: the base, without an adapter beside its weights.
      rows: a JSONL file, or objects: see ``llmjax.training.rows``.
      config: what to do; None for the defaults.
      eval_rows: as rows; never learned from.
      output: a directory: the adapter in PEFT's form, ``metrics.jsonl``, the curves, and, while it runs, the state to
        go on from.  The same call goes on, to the same bits, after a kill; Ctrl-C writes the state behind the step
        under way before it stops.  None keeps nothing.
      start: an adapter in PEFT's form to train on; its rank, scale and modules win over the configuration's.  The
        reference of dpo is the base without it.
      date: what chat templates take for the present.
      report: called after each step.
      note: told what a person should know.

    Raises:
      ConfigError: a setting is wrong.
      LoraError: a target matches nothing, or ``start`` does not fit.
      RequestError: no row can be learned from, or ``output`` is none.
      TrainingError: a loss or a gradient is not finite; the step and the rows are named.
      ResumeError: ``output`` holds another run.
      OutputError: ``output`` cannot be written.
    """
    if not isinstance(model, Model):
        raise RequestError(f"model: expected what llmjax.load returns, found {shown(model)}")
    config = TrainConfig() if config is None else config
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"config: expected a TrainConfig, found {shown(config)}")
    folder = None if output is None else checkpoints.expect_output(output)
    if has_lora(model.params):
        raise ConfigError(f"{model.path}: it has an adapter beside its weights; load it without, and give it as start")
    if config.eval_every and eval_rows is None:
        raise ConfigError("eval_every: goes with rows for evaluation")
    if config.patience and not (eval_rows is not None and config.eval_every):
        raise ConfigError("patience: goes with rows for evaluation, and eval_every")
    adapter = _new(model, config) if start is None else read_trained(start, model)
    if config.dora and not adapter.settings.dora:
        raise ConfigError(
            f"dora: the adapter to start from has no magnitudes (use_dora is false in {start}); leave it out"
        )
    if start is not None and (idle := [n for n in _OF_THE_START if getattr(config, n) != getattr(_PLAIN, n)]):
        note(f"{', '.join(idle)}: not used, for {start} says rank, scale and modules")
    if start is not None and adapter.settings.dropout != config.dropout:
        said = shown(adapter.settings.dropout)
        note(f"dropout: {config.dropout:g}, while {start} was trained with lora_dropout {said}")
        settings = dataclasses.replace(adapter.settings, dropout=float(config.dropout))
        adapter = dataclasses.replace(adapter, settings=settings)
    run = _Run(model, adapter, config, _data(model, rows, config, "rows", date),
               None if eval_rows is None else _data(model, eval_rows, config, "eval", date), folder)  # fmt: skip
    if start is None and config.targets == ALL_LINEAR and (stacks := stacks_of(model)):
        note(f"targets: all-linear leaves {len(stacks)} stacks of experts as they are ({stacks[0]} ...)")
    for name in idle_excludes(model, config.exclude) if start is None else ():
        note(f"exclude: {name!r} matches no module of this model")
    for data in run.data:
        for line in data.notes():
            note(line)
    return run.finish(report, note)


def _new(model: Model, config: TrainConfig) -> Adapter:
    targets = targets_of(model, config.lora)
    # Some modules are narrow (four columns of AltUp's) and take any rank, as with peft; all of them are a mistake.
    if all(target.rank > min(target.shape) for target in targets):
        widest = max(targets, key=lambda target: min(target.shape))
        raise LoraError(
            f"rank: {widest.rank} is more than any module has; the largest, {widest.module}, is {list(widest.shape)}"
        )
    adapter = new_adapter(model, config.lora, seed=config.seed)
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            single = dataclasses.replace(adapter.settings, rank=None, rank_pattern={key: 1}, alpha_pattern={})
            if not any(single.rank_of(target.module) for target in adapter.targets):
                raise ConfigError(f"{name}: {key!r} matches none of the modules that are trained")
    return adapter


def _data(model: Model, rows: Rows, config: TrainConfig, name: str, date: Date | None) -> Data:
    where = str(rows) if isinstance(rows, str | Path) else name
    found = read_rows(rows) if isinstance(rows, str | Path) else rows
    return make_examples(found, model, max_length=config.max_length, where=where, date=date, dpo=config.dpo)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system has against writing to a file, by the file's name."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot write it: {error.strerror or error}") from None


class _Run:
    def __init__(
        self,
        model: Model,
        adapter: Adapter,
        config: TrainConfig,
        data: Data,
        held_out: Data | None,
        output: Path | None,
    ):
        self.model, self.adapter, self.config, self.output = model, adapter, config, output
        self.data: tuple[Data, ...] = (data,) if held_out is None else (data, held_out)
        self.examples: list[Example] | list[Pair] = data.examples
        self.per_epoch = math.ceil(len(self.examples) / (config.batch_size * config.accumulation))
        self.steps = config.steps or config.epochs * self.per_epoch
        self.rate = schedule(config.schedule, config.learning_rate, config.warmup, self.steps)
        self.programs = Programs(model, adapter.targets, config)
        self.step = train_step(self.programs, config)
        self.held_out: list[Batch] = cut(held_out.examples, config.batch_size) if held_out else []
        self.progress, self.best = Progress(), cast(dict[str, Any] | None, None)
        self.state = first_state(adapter.factors, config)
        self.metrics: list[dict[str, Any]] = []

    def finish(self, report: Callable[[Report], None], note: Callable[[str], None]) -> Training:
        """Goes on to the end.

        Raises:
          RequestError: the output's folder cannot be made.
          OutputError: it cannot be written to.
        """
        if self.output is None:
            return self._finish(report, note)
        make_folder(self.output, RequestError)
        with contextlib.ExitStack() as stack:
            with _told(self.output / METRICS):
                stack.enter_context(locked(self.output / METRICS))
            interrupts = stack.enter_context(Interrupts())
            return self._finish(report, note, lambda: interrupts.asked)

    def _finish(
        self,
        report: Callable[[Report], None],
        note: Callable[[str], None],
        asked: Callable[[], bool] = lambda: False,
    ) -> Training:
        identity = self._begin(note) if self.output else {}
        if widest := self._widest():
            note(self._memory(widest))
        began, before, first_step = time.monotonic(), self.progress.seconds, self.state.step
        try:
            if self.held_out and self.progress.first_eval is None:
                self.progress.first_eval = self._evaluated(self.state)["loss"]
            for group in self._groups():
                rate = self.rate(self.state.step)
                state, outcome = self.step(self.state, group, rate)
                found = self._evaluated(state) if self._is_judged(state.step) else {}
                self.state = state  # behind its evaluation: where that fails, the run that goes on comes to it again
                self.progress.group += 1
                self.progress.tokens += outcome.tokens
                self.progress.seconds = before + time.monotonic() - began
                self._note_step(outcome, rate, found)
                left = (self.steps - self.state.step) * (time.monotonic() - began) / (self.state.step - first_step)
                report(Report(self.state.step, self.steps, self.metrics[-1], left))
                if self.progress.finished:
                    break
                stop = asked()  # once: a signal may come behind it
                if self.output and (stop or self.state.step % self.config.checkpoint_every == 0):
                    self._checkpoint(identity)
                if stop:
                    note(f"{self.output}: stopped after step {self.state.step} of {self.steps}; the same run goes on")
                    raise KeyboardInterrupt
            self.progress.finished = self.progress.finished or (
                "its one step is done" if self.steps == 1 else f"all {self.steps} steps are done"
            )
        except TrainingError as error:
            if self.output:
                self._save(identity)
            raise TrainingError(f"{self.data[0].where}: {error}; the adapter is as it was before this step") from None
        adapter = self._result()
        if self.output:
            self._save(identity)
            note_missing = curves.write(self.output, self.metrics, str(self.model.path))
            if note_missing:
                note(note_missing)
        params = settled_beside(self.model.params, adapter.targets, adapter.factors)
        tuned = dataclasses.replace(self.model, params=params, lora=self.output)
        kept = self.progress.best_step if self.best is not None else self.state.step
        return Training(adapter, tuned, self.metrics, self.data, self.progress.finished, self.progress.first_eval,
                        self.progress.best, kept)  # fmt: skip

    def _begin(self, note: Callable[[str], None]) -> dict[str, Any]:
        """Goes on from what the output holds, if it holds anything."""
        assert self.output is not None
        facts = model_facts(self.model)
        identity = {
            "config": {name: v for name, v in self.config.to_dict().items() if name != "checkpoint_every"},
            "steps": self.steps,
            "adapter": {t.module: [t.rank, t.scale] for t in self.adapter.targets},
            "start": checkpoints.factors_sha256(self.adapter.factors),
            "rows": checkpoints.data_sha256(self.examples),
            "eval_rows": checkpoints.data_sha256(self.data[1].examples) if self.held_out else None,
            "model": {name: value for name, value in facts.items() if name != "model"},
            "runtime": runtime_facts(self.model.params),
        }
        found = checkpoints.restore(self.output, self.state, identity)
        metrics = self.output / METRICS
        if found is not None:
            self.state, self.best, self.progress = found
            if not metrics.is_file() or metrics.stat().st_size < self.progress.metrics:
                raise ResumeError(f"{metrics}: lines that were written are gone; delete {self.output} to begin anew")
            os.truncate(metrics, self.progress.metrics)
            try:
                self.metrics = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
            except ValueError as error:
                raise ResumeError(f"{metrics}: damaged: {error}; delete {self.output} to begin anew") from None
            note(f"{self.output}: goes on after step {self.state.step} of {self.steps}")
        else:
            with _told(metrics):
                metrics.write_bytes(b"")
        return identity

    def _widest(self) -> Batch | None:
        """Of what the next epoch has left; None where nothing is left of the run."""
        left = 0 if self.progress.finished else self.steps - self.state.step
        epochs, done = divmod(self.progress.group, self.per_epoch)
        epoch = batches(self.examples, self.config, self.progress.epoch + epochs)
        groups = itertools.islice(epoch, done, done + left)
        return max((batch for group in groups for batch in group), key=lambda batch: batch.ids.size, default=None)

    def _memory(self, widest: Batch) -> str:
        """What the widest batch takes, before anything runs."""
        found = self.programs.temporaries(self.state.factors, widest)
        shape = " x ".join(map(str, widest.ids.shape))
        beside = "" if found is None else f", and {size(found)} to compute with where rows are longest ({shape} tokens)"
        return f"memory: weights {size(weight_bytes(self.model.params))}{beside}"

    def _groups(self) -> Iterator[list[Batch]]:
        """The effective batches that are left."""
        while self.state.step < self.steps and not self.progress.finished:
            done = self.progress.group
            for i, group in enumerate(batches(self.examples, self.config, self.progress.epoch)):
                if i >= done and self.state.step < self.steps:
                    yield group
            if self.progress.group >= self.per_epoch:
                self.progress.epoch, self.progress.group = self.progress.epoch + 1, 0

    def _is_judged(self, step: int) -> bool:
        every = self.config.eval_every
        return bool(self.held_out) and ((every > 0 and step % every == 0) or step == self.steps)

    def _note_step(self, outcome: Outcome, rate: float, found: Mapping[str, float]) -> None:
        values: dict[str, Any] = {
            "step": self.state.step,
            "epoch": round(self.progress.epoch + self.progress.group / self.per_epoch, 4),
            "loss": outcome.loss,
            "grad_norm": outcome.grad_norm,
            "lr": rate,
            **outcome.preferences,
            "tokens": self.progress.tokens,
            "seconds": round(self.progress.seconds, 3),
        }
        values |= {f"eval_{name}": value for name, value in found.items()}
        if found:
            self._judge(found["loss"])
        self.metrics.append(values)
        if self.output:
            with _told(self.output / METRICS), open(self.output / METRICS, "ab") as file:
                file.write(f"{json.dumps(values)}\n".encode())
                self.progress.metrics = file.tell()

    def _evaluated(self, state: State) -> dict[str, float]:
        self.held_out = [self.programs.referenced(batch) for batch in self.held_out]  # once: it stays what it is
        found = self.programs.evaluated(state.factors, self.held_out)
        if not math.isfinite(found["loss"]):
            raise TrainingError(f"after step {state.step} the loss of the rows for evaluation is not finite")
        return found

    def _judge(self, loss: float) -> None:
        progress = self.progress
        if progress.best is None or loss < progress.best:
            progress.best, progress.best_step, progress.waited = loss, self.state.step, 0
            self.best = self.state.factors
        else:
            progress.waited += 1
            if self.config.patience and progress.waited >= self.config.patience:
                progress.finished = f"no better evaluation in {progress.waited} after step {progress.best_step}"

    def _result(self) -> Adapter:
        return self.adapter.replace(self.state.factors if self.best is None else self.best)

    def _checkpoint(self, identity: dict[str, Any]) -> None:
        assert self.output is not None
        with _told(self.output / METRICS), open(self.output / METRICS, "ab") as file:
            os.fsync(file.fileno())  # the state says how many of its bytes count
        checkpoints.save(self.output, self.state, self.best, self.progress, identity)

    def _save(self, identity: dict[str, Any]) -> None:
        assert self.output is not None
        self._checkpoint(identity)
        save_adapter(self._result(), self.output, str(self.model.path))
