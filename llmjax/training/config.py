"""What a training run does, as one value: every field, its default and its limits."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmjax.errors import ConfigError, named, shown
from llmjax.lora.config import LoraConfig
from llmjax.models.context import RECOMPUTE
from llmjax.outside.values import (
    FLAG,
    INT32,
    MOST_FLOAT,
    POSITIVE_NUMBER,
    Rule,
    integer,
    number,
    one_of,
    settle,
)
from llmjax.training.adapter import MEDIAPIPE
from llmjax.training.optimizer import OPTIMIZERS, SCHEDULES


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
      targets: modules that get factors: ``mediapipe`` (q, k, v and o, as MediaPipe's LoRA files hold), ``all-linear``
        (all but the head and stacks of experts), a list of names or endings of names, or one regular expression of
        whole names, as PEFT has them.
      rank: r.
      alpha: the delta's scale is alpha / r.
      rslora: alpha / sqrt(r) instead.
      dora: train a magnitude of each row of a weight beside the factors (Liu et al. 2024, arXiv:2402.09353).
      rank_pattern: r of modules whose name, or its end, a regular expression matches; the first that does wins.
      alpha_pattern: the like for alpha.
      exclude: modules to leave out, as targets.
      dropout: share of a factor's inputs that are dropped, drawn from ``seed`` and the step.
      dpo: learn from preferences: rows are pairs of completions, chosen and rejected, of which ``batch_size`` counts
        the pairs, and the loss is the mean over the pairs (``llmjax.training.preferences``).
      beta: of dpo: how dear it is to go away from the base; None for 0.1.
      optimizer: ``adamw``, ``lion``, ``sgd``, ``rmsprop`` or ``adafactor``; weight decay is apart from the gradient in
        each.
      learning_rate: the highest.
      betas: of adamw and lion; the second is rmsprop's decay.
      eps: of adamw and rmsprop.
      momentum: of sgd.
      weight_decay: of all factors.
      schedule: ``constant``, ``linear`` or ``cosine``, down to 0, after the warm-up.
      warmup: steps on which the rate rises from 0.
      clip: largest norm of the gradient, over all factors together; None for no limit.
      batch_size: rows computed together; what memory grows with.
      accumulation: batches to a step; the loss of a step is the mean over all learned tokens of all of them.
      epochs: times every row is seen, where ``steps`` does not say.
      steps: optimizer steps; None follows from ``epochs``.
      shuffle: draw a new order of the rows for each epoch, from ``seed``.
      max_length: rows of more tokens are left out; None for the model's context.
      seed: of the factors, the order of the rows and dropout.
      compute: ``float32`` or ``bfloat16`` for everything but the factors and the loss; None for the model's numerics.
      recompute: what is in a layer and computed again on the way back instead of kept: ``all`` (least memory),
        ``cheap`` (all but what projections made) or ``nothing``.
      eval_every: steps between evaluations, where there are rows for them; 0 for none but before the first step and
        after the last.
      patience: evaluations in a row without a better loss after which training stops; 0 goes on to the end.
      checkpoint_every: steps between checkpoints, to go on from after a kill.
    """

    targets: str | tuple[str, ...] = MEDIAPIPE
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    exclude: str | tuple[str, ...] = ()
    dropout: float = 0.0
    dpo: bool = False
    beta: float | None = None
    optimizer: str = "adamw"
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: int = 0
    clip: float | None = 1.0
    batch_size: int = 4
    accumulation: int = 1
    epochs: int = 1
    steps: int | None = None
    shuffle: bool = True
    max_length: int | None = None
    seed: int = 0
    compute: str | None = None
    recompute: str = "cheap"
    eval_every: int = 0
    patience: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        settle(self)
        for name in ("targets", "exclude", "betas"):  # JSON has lists
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        found = {name: rule.problem(getattr(self, name)) for name, rule in _RULES.items()}
        problems = [f"{name}: {problem}" for name, problem in found.items() if problem]
        for name, which in _OF_OPTIMIZERS.items():
            if not problems and getattr(self, name) != getattr(TrainConfig, name) and self.optimizer not in which:
                problems.append(f"{name}: goes with the optimizer {' or '.join(which)}, not with {self.optimizer}")
        if not problems and self.beta is not None and not self.dpo:
            problems.append("beta: goes with dpo")
        if problems:
            raise ConfigError("\n  ".join(["training:", *problems]) if len(problems) > 1 else problems[0])
        if self.dpo and self.beta is None:
            object.__setattr__(self, "beta", 0.1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "training") -> "TrainConfig":
        """From what a file says.

        Raises:
          ConfigError: an unknown name, or a value that is none of its.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected an object, found {shown(values)}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(named(str(key)) for key in set(values) - known):
            raise ConfigError(f"{where}: unknown {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @property
    def lora(self) -> LoraConfig:
        """What the adapter is, read as strictly as PEFT's file.

        Raises:
          ConfigError: a pattern is no regular expression, or its value no number.
        """
        values = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "lora_dropout": float(self.dropout),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "target_modules": _listed(self.targets),
            "exclude_modules": _listed(self.exclude) or None,
        }
        return LoraConfig.from_peft(values, "training")


def _listed(names: str | tuple[str, ...]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)


def _names(v: Any) -> bool:
    return isinstance(v, str) or (isinstance(v, tuple) and all(isinstance(name, str) and name for name in v))


def _optional(rule: Rule, what: str) -> Rule:
    return Rule(what, lambda v: v is None or rule.holds(v))


# What not every optimizer has a use for.
_OF_OPTIMIZERS = {"momentum": ("sgd",), "betas": ("adamw", "lion", "rmsprop"), "eps": ("adamw", "rmsprop")}
_SHARE = Rule("a number from 0 to below 1", lambda v: number(0, 1).holds(v) and v < 1)
_COUNT = integer(0, INT32, "a whole number, 0 or more")
_SIZE = integer(1, INT32, "a positive integer")
_RULES: dict[str, Rule] = {
    "targets": Rule("names of modules, or one regular expression", lambda v: bool(v) and _names(v)),
    "exclude": Rule("names of modules, or one regular expression", _names),
    "rank": _SIZE,
    "alpha": POSITIVE_NUMBER,
    "rslora": FLAG,
    "dora": FLAG,
    "rank_pattern": Rule("ranks by regular expression", lambda v: isinstance(v, Mapping)),
    "alpha_pattern": Rule("numbers by regular expression", lambda v: isinstance(v, Mapping)),
    "dropout": _SHARE,
    "dpo": FLAG,
    "beta": _optional(POSITIVE_NUMBER, "a positive number"),
    "optimizer": one_of(*OPTIMIZERS),
    "learning_rate": POSITIVE_NUMBER,
    "betas": Rule(
        "two numbers from 0 to below 1", lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(_SHARE.holds, v))
    ),
    "eps": POSITIVE_NUMBER,
    "momentum": _SHARE,
    "weight_decay": number(0, MOST_FLOAT, "a number, 0 or more"),
    "schedule": one_of(*SCHEDULES),
    "warmup": _COUNT,
    "clip": _optional(POSITIVE_NUMBER, "a positive number, or None"),
    "batch_size": _SIZE,
    "accumulation": _SIZE,
    "epochs": _SIZE,
    "steps": _optional(_SIZE, "a positive integer, or None"),
    "shuffle": FLAG,
    "max_length": _optional(integer(2, INT32), "at least 2, or None"),
    "seed": integer(0, 2**63 - 1, "a whole number, 0 or more, below 2**63"),
    "compute": one_of("float32", "bfloat16", None),
    "recompute": one_of(*RECOMPUTE),
    "eval_every": _COUNT,
    "patience": _COUNT,
    "checkpoint_every": _SIZE,
}
