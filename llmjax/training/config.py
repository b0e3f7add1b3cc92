"""What a training run does, as one value: every field, its default and its limits."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from llmjax.errors import ConfigError
from llmjax.lora.config import LoraConfig
from llmjax.training.adapter import MEDIAPIPE
from llmjax.training.optimizer import OPTIMIZERS, SCHEDULES

_LATER = {
    "dora": "weight-decomposed adapters (DoRA) are not supported yet; leave it out for LoRA",
    "use_dora": "weight-decomposed adapters (DoRA) are not supported yet; leave it out for LoRA",
    "dpo": "preference training (DPO) is not supported yet; rows need a prompt and one completion",
    "beta": "preference training (DPO) is not supported yet; rows need a prompt and one completion",
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
      targets: modules that get factors: ``mediapipe`` (q, k, v and o, as MediaPipe's LoRA files hold), ``all-linear``
        (all but the head), a list of names or endings of names, or one regular expression of whole names, as PEFT has
        them.
      rank: r.
      alpha: the delta's scale is alpha / r.
      rslora: alpha / sqrt(r) instead.
      rank_pattern: r of modules whose name, or its end, a regular expression matches; the first that does wins.
      alpha_pattern: the like for alpha.
      exclude: modules to leave out, as targets.
      dropout: share of a factor's inputs that are dropped, drawn from ``seed`` and the step.
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
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    exclude: str | tuple[str, ...] = ()
    dropout: float = 0.0
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
        for name in ("targets", "exclude", "betas"):  # JSON has lists
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        found = [(name, what, ok, getattr(self, name)) for name, what, ok in _LIMITS]
        problems = [f"{name}: expected {what}, found {value!r}" for name, what, ok, value in found if not ok(value)]
        if self.momentum and self.optimizer != "sgd":
            problems.append(f"momentum: goes with the optimizer sgd, not with {self.optimizer}")
        if problems:
            raise ConfigError("\n  ".join(["training:", *problems]) if len(problems) > 1 else problems[0])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "training") -> "TrainConfig":
        """From what a file says.

        Raises:
          ConfigError: an unknown name, or a value that is none of its.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name, why in _LATER.items():
            if values.get(name) not in (None, False):
                raise ConfigError(f"{where}: {name}: {why}")
        if unknown := sorted(set(values) - known):
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
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "target_modules": _listed(self.targets),
            "exclude_modules": _listed(self.exclude) or None,
        }
        return LoraConfig.from_peft(values, "training")


def _listed(names: str | tuple[str, ...]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and v >= least


def _number(least: float, most: float = math.inf, *, above: bool = False) -> Callable[[Any], bool]:
    def ok(v: Any) -> bool:
        return type(v) in (int, float) and (v > least if above else v >= least) and v < most

    return ok


def _names(v: Any) -> bool:
    return isinstance(v, str) or (isinstance(v, tuple) and all(isinstance(name, str) and name for name in v))


def _optional(ok: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: v is None or ok(v)


_POSITIVE, _FLAG = _number(0, above=True), (lambda v: type(v) is bool)
_LIMITS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("targets", "names of modules, or one regular expression", lambda v: bool(v) and _names(v)),
    ("exclude", "names of modules, or one regular expression", _names),
    ("rank", "a positive integer", _whole(1)),
    ("alpha", "a positive number", _POSITIVE),
    ("rslora", "True or False", _FLAG),
    ("dropout", "a number from 0 to below 1", _number(0, 1)),
    ("optimizer", f"one of {', '.join(OPTIMIZERS)}", lambda v: v in OPTIMIZERS),
    ("learning_rate", "a positive number", _POSITIVE),
    ("betas", "two numbers from 0 to below 1", lambda v: isinstance(v, tuple) and len(v) == 2
     and all(map(_number(0, 1), v))),
    ("eps", "a positive number", _POSITIVE),
    ("momentum", "a number from 0 to below 1", _number(0, 1)),
    ("weight_decay", "a number, 0 or more", _number(0)),
    ("schedule", f"one of {', '.join(SCHEDULES)}", lambda v: v in SCHEDULES),
    ("warmup", "a whole number, 0 or more", _whole(0)),
    ("clip", "a positive number, or None", _optional(_POSITIVE)),
    ("batch_size", "a positive integer", _whole(1)),
    ("accumulation", "a positive integer", _whole(1)),
    ("epochs", "a positive integer", _whole(1)),
    ("steps", "a positive integer, or None", _optional(_whole(1))),
    ("shuffle", "True or False", _FLAG),
    ("max_length", "at least 2, or None", _optional(_whole(2))),
    ("seed", "a whole number, 0 or more", _whole(0)),
    ("compute", "float32, bfloat16 or None", lambda v: v in (None, "float32", "bfloat16")),
    ("recompute", "all, cheap or nothing", lambda v: v in ("all", "cheap", "nothing")),
    ("eval_every", "a whole number, 0 or more", _whole(0)),
    ("patience", "a whole number, 0 or more", _whole(0)),
    ("checkpoint_every", "a positive integer", _whole(1)),
)  # fmt: skip
