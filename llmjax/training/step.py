"""The loss, its gradients, and one step of training: pure functions and compiled programs, without a loop."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llmjax.device import in_memory, platform_of, usual_programs
from llmjax.errors import TrainingError
from llmjax.model import Model
from llmjax.models.context import Context
from llmjax.numerics import Numerics, resolve
from llmjax.runtime.memory import give_back_free
from llmjax.training.adapter import Factors, Target, adapted
from llmjax.training.batches import Batch
from llmjax.training.optimizer import clipped, optimizer

if TYPE_CHECKING:
    from llmjax.training.config import TrainConfig


# Where the device's memory does not do.
LOWER = (
    "have fewer or shorter rows in a batch (batch_size, max_length; accumulation keeps the step the same), or compute "
    'more again (recompute="all")'
)


@dataclasses.dataclass(frozen=True)
class State:
    """What a step makes the next of.

    Attributes:
      step: optimizer steps done.
      factors: of the adapter.
      moments: of the optimizer.
    """

    step: int
    factors: Factors
    moments: Any


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a step found.

    Attributes:
      loss: mean over all learned tokens of the effective batch, before the step.
      grad_norm: over all factors, before clipping.
      tokens: how many are learned.
    """

    loss: float
    grad_norm: float
    tokens: int


def loss(
    model: Model,
    params: Any,
    targets: tuple[Target, ...],
    factors: Factors,
    batch: Batch,
    *,
    numerics: Numerics | None = None,
    recompute: str | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropies of each row's learned tokens, added up: float32 ``[B]``.  A pure function of its arguments.

    Args:
      model: the architecture and its numerics.
      params: of the model, frozen.
      targets: the adapter's modules.
      factors: by module.
      batch: the rows.
      numerics: None for the model's.
      recompute: see ``Context``.
      dropout: see ``adapted``.
      key: see ``adapted``.
    """
    how = numerics or model.numerics
    ctx = Context.whole(batch.ids, how, last=batch.at, recompute=recompute, length=batch.lengths)
    tree = adapted(params, targets, factors, dropout=dropout, key=key)
    logits = model.module.apply({"params": tree}, batch.ids, ctx).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * batch.weights, -1)


class Programs:
    """The compiled programs of one adapter's training: each is traced once for each shape of batch.

    Args:
      model: the base; its parameters are arguments of the programs, never copied.
      targets: the adapter's modules.
      config: numerics, recomputation, dropout.
    """

    def __init__(self, model: Model, targets: tuple[Target, ...], config: "TrainConfig"):
        self._params = model.params
        self._numerics = model.numerics if config.compute is None else resolve("hf", jnp.dtype(config.compute))
        plain = partial(loss, model, targets=targets, numerics=self._numerics, recompute=config.recompute)

        def gradients(params: Any, factors: Factors, batch: Batch, tokens: jax.Array, key: jax.Array) -> Any:
            def mean(factors: Factors) -> tuple[jax.Array, jax.Array]:
                rows = plain(
                    params,
                    factors=factors,
                    batch=batch,
                    dropout=config.dropout,
                    key=key if config.dropout else None,
                )
                return jnp.sum(rows) / tokens, rows

            return jax.grad(mean, has_aux=True)(factors)

        options = self._numerics.compiler_options(platform_of(model.params))
        self._gradients = jax.jit(gradients, compiler_options=options)
        self._compiled: dict[Any, jax.stages.Compiled] = {}
        self._losses = jax.jit(
            lambda params, factors, batch: plain(params, factors=factors, batch=batch), compiler_options=options
        )
        self._added = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
        self._norm = jax.jit(optax.tree.norm)

    @usual_programs()
    def losses(self, factors: Factors, batch: Batch) -> np.ndarray:
        """Sums of each row's cross-entropies, float32 ``[B]``, nothing dropped."""
        arguments = self._params, factors, batch.arrays()
        with in_memory("the loss of a batch", LOWER):
            return np.asarray(self._program(self._losses, arguments)(*arguments))

    @usual_programs()
    def gradients(self, factors: Factors, batch: Batch, tokens: int, key: jax.Array) -> tuple[Factors, jax.Array]:
        """The gradient of the batch's sum over ``tokens``, and the rows' sums ``[B]``."""
        arguments = self._params, factors, batch.arrays(), jnp.float32(tokens), key
        with in_memory("the gradient of a batch", LOWER):
            found: tuple[Factors, jax.Array] = self._program(self._gradients, arguments)(*arguments)
        return found

    @usual_programs()
    def temporaries(self, factors: Factors, batch: Batch) -> int | None:
        """Bytes that the gradient of a batch of this shape takes beside what it is given; None where the device does
        not say."""
        arguments = self._params, factors, batch.arrays(), jnp.float32(1), jax.random.key(0)
        found = self._program(self._gradients, arguments).memory_analysis()
        return None if found is None else int(found.temp_size_in_bytes)

    def _program(self, function: Any, arguments: tuple[Any, ...]) -> jax.stages.Compiled:
        batch = arguments[2]
        key = function, batch.ids.shape, batch.at.shape
        if key not in self._compiled:
            self._compiled[key] = function.lower(*arguments).compile()
            give_back_free()
        return self._compiled[key]

    def mean_loss(self, factors: Factors, group: Sequence[Batch]) -> float:
        """Over all learned tokens of the batches."""
        total = sum(float(self.losses(factors, batch).astype(np.float64).sum()) for batch in group)
        return total / sum(batch.tokens for batch in group)

    def accumulated(self, factors: Factors, group: Sequence[Batch], key: jax.Array) -> tuple[Factors, Outcome]:
        """The gradient of the mean over all learned tokens of an effective batch.

        Raises:
          TrainingError: a loss or the gradient is not finite; it names the rows.
        """
        tokens = sum(batch.tokens for batch in group)
        whole: Any = None
        sums = []
        for i, batch in enumerate(group):
            part, rows = self.gradients(factors, batch, tokens, jax.random.fold_in(key, i))
            whole = part if whole is None else self._added(whole, part)
            sums.append(np.asarray(rows, np.float64))
        bad = [row for batch, found in zip(group, sums, strict=True) for row, s in zip(batch.rows, found, strict=False)
               if not np.isfinite(s)]  # fmt: skip
        if bad:
            raise TrainingError(f"the loss of {_listed(bad)} is not finite")
        norm = float(self._norm(whole))
        if not np.isfinite(norm):
            bad = [row for i, batch in enumerate(group) if self._is_bad(factors, batch, tokens, key, i)
                   for row in batch.rows]  # fmt: skip
            raise TrainingError(f"the gradient of {_listed(bad)} is not finite, though each loss is")
        return whole, Outcome(float(sum(map(np.sum, sums)) / tokens), norm, tokens)

    def _is_bad(self, factors: Factors, batch: Batch, tokens: int, key: jax.Array, i: int) -> bool:
        part, _ = self.gradients(factors, batch, tokens, jax.random.fold_in(key, i))
        return not np.isfinite(float(self._norm(part)))


def _listed(rows: Sequence[int]) -> str:
    numbers = ", ".join(str(row + 1) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
    return f"row {numbers}" if len(rows) == 1 else f"rows {numbers}"


Step = Callable[[State, Sequence[Batch], float], tuple[State, Outcome]]


def first_state(factors: Factors, config: "TrainConfig") -> State:
    """The state before the first step."""
    return State(0, factors, optimizer(config).init(factors))


def train_step(programs: Programs, config: "TrainConfig") -> Step:
    """A function that takes a state, an effective batch and a learning rate, and gives the next state and what it
    found; a step that fails (``TrainingError``) changes nothing.

    Args:
      programs: compiled for the adapter.
      config: optimizer, clipping, seed of dropout.
    """
    transformation = optimizer(config)

    @jax.jit
    def updated(factors: Factors, gradients: Factors, moments: Any, norm: jax.Array, rate: jax.Array) -> Any:
        direction, moments = transformation.update(clipped(gradients, norm, config.clip), moments, factors)
        return jax.tree.map(lambda p, d: p - rate * d, factors, direction), moments

    @usual_programs()
    def step(state: State, group: Sequence[Batch], rate: float) -> tuple[State, Outcome]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        try:
            gradients, outcome = programs.accumulated(state.factors, group, key)
        except TrainingError as error:
            raise TrainingError(f"step {state.step + 1}: {error}") from None
        norm = jnp.float32(outcome.grad_norm)
        factors, moments = updated(state.factors, gradients, state.moments, norm, jnp.float32(rate))
        return State(state.step + 1, factors, moments), outcome

    return step
