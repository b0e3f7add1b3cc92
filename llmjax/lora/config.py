"""What ``adapter_config.json`` of PEFT means for each module, read as strictly as a model's ``config.json``."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llmjax.errors import LoraError, named, shown
from llmjax.models.hf_config import Reader
from llmjax.outside.patterns import Matcher, is_regex
from llmjax.outside.values import INT32, POSITIVE_NUMBER, Rule, integer

# Bookkeeping, training-only settings, and options of other options that are refused where they are on.
_IRRELEVANT = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config inference_mode loftq_config
    lora_ga_config megatron_core peft_version qalora_group_size revision task_type
    """.split()
)
# Each changes what the adapter computes; PEFT writes them as null or false where they are off.
_OFF = (
    "alora_invocation_tokens",
    "arrow_config",
    "enable_lora",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "merge_weights",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# The others (pissa, olora, corda, loftq, lora_ga) change the base's weights as well.
_INIT = (True, False, "gaussian", "eva", "orthogonal", "mica")


_RANK = integer(1, INT32, "a positive integer")


class _AdapterReader(Reader):
    irrelevant = _IRRELEVANT
    must_be_false = ()
    error = LoraError


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Rank, scale and choice of modules.

    Attributes:
      rank: r of modules without their own; None takes it from the tensors.
      alpha: of modules without their own; ``scale = alpha / r``.
      rslora: ``scale = alpha / sqrt(r)`` instead (Kalajdzievski 2023, arXiv:2312.03732).
      dora: every module has magnitudes, too; None where it is not known.
      rank_pattern: regular expressions of module names, and their r; the first that matches wins.
      alpha_pattern: the like for alpha.
      target_modules: names or endings of modules, or one regular expression; None where it is not known.
      exclude_modules: as target_modules.
      layers: numbers of the layers that names in ``target_modules`` mean; None for all.
      layers_pattern: what those layers' list is called.
      dropout: share of a factor's inputs that were dropped in training; it changes nothing of what an adapter computes.
      matcher: of the regular expressions.
    """

    rank: int | None
    alpha: float
    rslora: bool = False
    dora: bool | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    dropout: float = 0.0
    matcher: Matcher = dataclasses.field(default_factory=Matcher, compare=False, repr=False)

    @classmethod
    def from_peft(cls, values: Mapping[str, Any], where: str) -> "LoraConfig":
        """Reads ``adapter_config.json``.

        Raises:
          LoraError: with every key that is wrong, not supported or not known.
        """
        r = _AdapterReader(values, where)
        r.expect("peft_type", ("LORA",))
        r.expect("bias", ("none",), "none")
        r.expect("init_lora_weights", _INIT, True)
        r.flag("fan_in_fan_out", False)  # of Conv1D layers; PEFT, too, takes no notice of it on linear ones
        for key in ("r", "lora_alpha"):  # PEFT's defaults are for what is absent
            if key in values and values[key] is None:
                r.problem(f"{key}: expected a number, found None")
        for key in _OFF:
            if r.get(key) not in (None, False, [], {}):
                r.problem(f"{key}: {shown(r.get(key))} is not supported, expected it off")
        result = cls(
            rank=r.size("r", 8),
            alpha=r.number("lora_alpha", 8),
            rslora=r.flag("use_rslora", False),
            dora=r.flag("use_dora", False),
            rank_pattern=_pattern(r, "rank_pattern", _RANK),
            alpha_pattern=_pattern(r, "alpha_pattern", POSITIVE_NUMBER),
            target_modules=_modules(r, "target_modules"),
            exclude_modules=_modules(r, "exclude_modules") or (),
            layers=_layers(r),
            layers_pattern=_patterns(r, "layers_pattern"),
            dropout=r.get("lora_dropout") or 0.0,
        )
        if isinstance(result.target_modules, str) and (result.layers or result.layers_pattern):
            r.problem("layers_to_transform: goes with names in target_modules, not with a regular expression")
        if result.layers_pattern and result.layers is None:
            r.problem("layers_pattern: goes with layers_to_transform, which is absent")
        r.finish()
        return result

    def rank_of(self, module: str) -> int | None:
        """r of a module."""
        return self._first(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """What multiplies ``B . A``."""
        alpha = self._first(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def targets(self, module: str) -> bool | None:
        """Whether the adapter is meant to change a module of this name, as PEFT decides it; None where the
        configuration does not say."""
        if self.target_modules is None:
            return None
        if self._names(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return module.rsplit(".", 1)[-1] != "lm_head"
        if not self._names(self.target_modules, module):
            return False
        if self.layers is None or module in self.target_modules:
            return True
        patterns = [rf"(?:^|.*?\.){p}\." for p in self.layers_pattern] or [r".*?\.[^.]*\."]
        matches = (self.matcher.match(rf"{p}(\d{{1,9}})\.", module) for p in patterns)
        found = next((match for match in matches if match), None)
        return found is not None and int(found[found.re.groups]) in self.layers

    def _first(self, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        return next((v for key, v in patterns.items() if self.matcher.match(rf"(.*\.)?({key})$", module)), default)

    def _names(self, names: tuple[str, ...] | str, module: str) -> bool:
        if isinstance(names, str):
            return self.matcher.match(names, module, whole=True) is not None
        return any(is_named(module, name) for name in names)


def is_named(module: str, name: str) -> bool:
    """Whether it is the module's name or the end of one, as in PEFT."""
    return module == name or module.endswith(f".{name}")


def _pattern(r: Reader, key: str, rule: Rule) -> dict[str, Any]:
    found = r.get(key, {})
    if not isinstance(found, dict):
        r.problem(f"{key}: expected an object, found {shown(found)}")
        return {}
    for name, value in found.items():
        if not is_regex(name):
            r.problem(f"{key}: {shown(name)} is no regular expression")
        if problem := rule.problem(value):
            r.problem(f"{key}: {named(str(name))}: {problem}")
    return found


def _modules(r: Reader, key: str) -> tuple[str, ...] | str | None:
    found = r.get(key)
    if isinstance(found, str):
        if not is_regex(found):
            r.problem(f"{key}: {shown(found)} is no regular expression")
            return None
        return found
    return None if found is None else _names(r, key)


def _names(r: Reader, key: str) -> tuple[str, ...]:
    found = r.get(key, [])
    if isinstance(found, str):
        found = [found] if found else []  # PEFT takes an empty one for none
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        r.problem(f"{key}: expected a list of names, found {shown(found)}")
        return ()
    return tuple(found)


def _patterns(r: Reader, key: str) -> tuple[str, ...]:
    for name in _names(r, key):
        if not is_regex(name):
            r.problem(f"{key}: {shown(name)} is no regular expression")
    return _names(r, key)


def _layers(r: Reader) -> tuple[int, ...] | None:
    found = r.get("layers_to_transform", [])
    found = [found] if type(found) is int else found
    if not isinstance(found, list) or not all(type(i) is int and i >= 0 for i in found):
        r.problem(f"layers_to_transform: expected numbers of layers, found {shown(found)}")
        return None
    return tuple(found) or None
