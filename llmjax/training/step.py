"""The loss, its gradients, and one step of training: pure functions and compiled programs, without a loop."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
from llmjax.runtime.sampling import key_words
from llmjax.training.adapter import Factors, Target, adapted, changes
from llmjax.training.batches import Batch
from llmjax.training.optimizer import clipped, optimizer
from llmjax.training.preferences import dpo_loss, measures, pairs_of

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
      loss: mean over all learned tokens of the effective batch, or over its pairs, before the step.
      grad_norm: over all factors, before clipping.
      tokens: how many are learned.
      preferences: of pairs, see ``preferences.measures``.
    """

    loss: float
    grad_norm: float
    tokens: int
    preferences: Mapping[str, float] = dataclasses.field(default_factory=dict)


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
      config: numerics, recomputation, dropout, what the loss is.
    """

    def __init__(self, model: Model, targets: tuple[Target, ...], config: "TrainConfig"):
        self._model, self._targets, self._params = model, targets, model.params
        self._numerics = model.numerics if config.compute is None else resolve("hf", jnp.dtype(config.compute))
        self._beta = beta = config.beta if config.dpo else None
        plain = partial(loss, model, targets=targets, numerics=self._numerics, recompute=config.recompute)

        def gradients(params: Any, factors: Factors, batch: Batch, count: jax.Array, key: jax.Array) -> Any:
            def mean(factors: Factors) -> tuple[jax.Array, jax.Array]:
                rows = plain(
                    params,
                    factors=factors,
                    batch=batch,
                    dropout=config.dropout,
                    key=key if config.dropout else None,
                )
                if beta is None:
                    return jnp.sum(rows) / count, rows
                return jnp.sum(dpo_loss(pairs_of(-rows), pairs_of(batch.reference), beta)) / count, rows

            return jax.grad(mean, has_aux=True)(factors)

        options = self._numerics.compiler_options(platform_of(model.params))
        self._gradients = jax.jit(gradients, compiler_options=options)
        self._compiled: dict[Any, jax.stages.Compiled] = {}
        self._losses = jax.jit(
            lambda params, factors, batch: plain(params, factors=factors, batch=batch), compiler_options=options
        )
        self._base = jax.jit(
            lambda params, factors, batch: plain(params, targets=(), factors=factors, batch=batch),
            compiler_options=options,
        )
        self._added = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
        self._norm = jax.jit(optax.tree.norm)

    @usual_programs()
    def losses(self, factors: Factors, batch: Batch) -> np.ndarray:
        """Sums of each row's cross-entropies, float32 ``[B]``, nothing dropped."""
        return self._sums(self._losses, factors, batch)

    @usual_programs()
    def referenced(self, batch: Batch) -> Batch:
        """The batch, if of pairs, with what the base says of its rows without the adapter."""
        if self._beta is None or batch.reference is not None:
            return batch
        return batch.replace(reference=-self._sums(self._base, {}, batch))

    def _sums(self, function: Any, factors: Factors, batch: Batch) -> np.ndarray:
        arguments = self._params, factors, batch.replace(reference=None).arrays()
        with in_memory("the loss of a batch", LOWER):
            return np.asarray(self._program(function, arguments)(*arguments))

    @usual_programs()
    def gradients(self, factors: Factors, batch: Batch, count: int, key: jax.Array) -> tuple[Factors, jax.Array]:
        """The gradient of the batch's loss, the mean of ``count`` tokens or pairs, and the rows' sums of
        cross-entropies ``[B]``; a batch of pairs is one that ``referenced`` gave."""
        arguments = self._params, factors, batch.arrays(), jnp.float32(count), key
        with in_memory("the gradient of a batch", LOWER):
            found: tuple[Factors, jax.Array] = self._program(self._gradients, arguments)(*arguments)
        return found

    @usual_programs()
    def temporaries(self, factors: Factors, batch: Batch) -> int | None:
        """Bytes that the gradient of a batch of this shape takes beside what it is given; None where the device does
        not say."""
        if self._beta is not None:
            batch = batch.replace(reference=np.zeros(len(batch.ids), np.float32))
        arguments = self._params, factors, batch.arrays(), jnp.float32(1), dropout_key(0)
        found = self._program(self._gradients, arguments).memory_analysis()
        return None if found is None else int(found.temp_size_in_bytes)

    def _program(self, function: Any, arguments: tuple[Any, ...]) -> jax.stages.Compiled:
        batch = arguments[2]
        key = function, batch.ids.shape, batch.at.shape
        if key not in self._compiled:
            self._compiled[key] = function.lower(*arguments).compile()
            give_back_free()
        return self._compiled[key]

    def evaluated(self, factors: Factors, group: Sequence[Batch]) -> dict[str, float]:
        """``loss``, over all learned tokens of the batches or over their pairs, and of pairs what
        ``preferences.measures`` says of them; nothing dropped."""
        group = [self.referenced(batch) for batch in group]
        return self._measured(group, [self.losses(factors, batch).astype(np.float64) for batch in group])

    def _measured(self, group: Sequence[Batch], sums: Sequence[np.ndarray]) -> dict[str, float]:
        if self._beta is not None:
            return measures(group, sums, self._beta)
        return {"loss": float(sum(map(np.sum, sums)) / sum(batch.tokens for batch in group))}

    def accumulated(self, factors: Factors, group: Sequence[Batch], key: jax.Array) -> tuple[Factors, Outcome]:
        """The gradient of the mean over all learned tokens, or pairs, of an effective batch.

        Raises:
          TrainingError: a loss or the gradient is not finite; it names the rows.
        """
        tokens = sum(batch.tokens for batch in group)
        count = tokens if self._beta is None else sum(len(batch.rows) for batch in group) // 2
        if self._beta is None or changes(self._model, self._targets, factors):
            group = [self.referenced(batch) for batch in group]
        else:  # it is the reference: by its own program in every bit, where another's rounding would be a preference
            blank = [batch.replace(reference=np.zeros(len(batch.ids), np.float32)) for batch in group]
            own = [self.gradients(factors, b, count, jax.random.fold_in(key, i))[1] for i, b in enumerate(blank)]
            group = [b.replace(reference=-np.asarray(rows)) for b, rows in zip(blank, own, strict=True)]
        whole: Any = None
        sums = []
        for i, batch in enumerate(group):
            part, rows = self.gradients(factors, batch, count, jax.random.fold_in(key, i))
            whole = part if whole is None else self._added(whole, part)
            sums.append(np.asarray(rows, np.float64))
        whence = [0.0 if batch.reference is None else batch.reference for batch in group]
        bad = [row for batch, found, base in zip(group, sums, whence, strict=True)
               for row, s in zip(batch.rows, found + base, strict=False) if not np.isfinite(s)]  # fmt: skip
        if bad:
            raise TrainingError(f"the loss of {_listed(bad)} is not finite")
        norm = float(self._norm(whole))
        if not np.isfinite(norm):
            bad = [row for i, batch in enumerate(group) if self._is_bad(factors, batch, count, key, i)
                   for row in batch.rows]  # fmt: skip
            raise TrainingError(f"the gradient of {_listed(bad)} is not finite, though each loss is")
        found = self._measured(group, sums)
        return whole, Outcome(found.pop("loss"), norm, tokens, found)

    def _is_bad(self, factors: Factors, batch: Batch, count: int, key: jax.Array, i: int) -> bool:
        part, _ = self.gradients(factors, batch, count, jax.random.fold_in(key, i))
        return not np.isfinite(float(self._norm(part)))


def _listed(rows: Sequence[int]) -> str:
    rows = list(dict.fromkeys(rows))  # a pair's both halves may be at fault
    numbers = ", ".join(str(row + 1) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
    return f"row {numbers}" if len(rows) == 1 else f"rows {numbers}"


Step = Callable[[State, Sequence[Batch], float], tuple[State, Outcome]]


def dropout_key(seed: int) -> jax.Array:
    """Of all 64 bits of a seed, where ``jax.random.key`` takes 32, and whatever ``jax_default_prng_impl`` says."""
    return jax.random.wrap_key_data(jnp.asarray(key_words(seed)), impl="threefry2x32")


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
    seed = dropout_key(config.seed)

    @jax.jit
    def updated(factors: Factors, gradients: Factors, moments: Any, norm: jax.Array, rate: jax.Array) -> Any:
        direction, moments = transformation.update(clipped(gradients, norm, config.clip), moments, factors)
        factors = jax.tree.map(lambda p, d: p - rate * d, factors, direction)
        return factors, moments, jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(factors)]).all()

    @usual_programs()
    def step(state: State, group: Sequence[Batch], rate: float) -> tuple[State, Outcome]:
        key = jax.random.fold_in(seed, state.step)
        try:
            gradients, outcome = programs.accumulated(state.factors, group, key)
        except TrainingError as error:
            raise TrainingError(f"step {state.step + 1}: {error}") from None
        norm = jnp.float32(outcome.grad_norm)
        factors, moments, finite = updated(state.factors, gradients, state.moments, norm, jnp.float32(rate))
        if not finite:
            raise TrainingError(
                f"step {state.step + 1}: at the learning rate {rate:g} the factors go beyond float32's range"
            )
        return State(state.step + 1, factors, moments), outcome

    return step
