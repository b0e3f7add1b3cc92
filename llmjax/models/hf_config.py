"""Strict reading of Hugging Face's ``config.json``.

Every key is used, known to be irrelevant, or refused by name: a key that is silently dropped is how a model loses its
sliding window.  Files come in two dialects, transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and 5
(``rope_parameters``, ``dtype``).
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from llmjax.errors import ConfigError, LlmjaxError, named, shown
from llmjax.models.generation_keys import GENERATION_KEYS
from llmjax.models.layers import ACTIVATIONS
from llmjax.models.rope import Rope
from llmjax.models.rope_config import STRETCHED, RopeSpec
from llmjax.outside.values import COUNT, FLAG, INT32, LEAST_FLOAT, POSITIVE, POSITIVE_NUMBER, Rule, number

T = TypeVar("T")

# Beside those of generation, bookkeeping and settings of training: none of them changes a logit.
IRRELEVANT = GENERATION_KEYS | frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _experts_implementation
    _flash_attn_2_enabled _name_or_path add_cross_attention architectures attention_dropout attn_implementation
    attn_pdrop auto_map chunk_size_feed_forward classifier_dropout cross_attention_hidden_size dtype embd_pdrop
    finetuning_task gradient_checkpointing hidden_dropout id2label initializer_range is_decoder is_encoder_decoder
    is_llama_config label2id model_type num_labels prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values resid_pdrop return_dict rope_interleaved sep_token_id task_specific_params tf_legacy_loss
    tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers.js_config transformers_version
    unsloth_fixed unsloth_version use_bfloat16
    """.split()
)
# rope_interleaved is written by SmolLM's training code with the value false; true is refused in Reader.finish.
# Where it stands that weights are packed in some way, here, in an early form of compressed-tensors, and in MLX.
_QUANTIZED = ("quantization_config", "compression_config", "quantization")
_FRACTION = number(LEAST_FLOAT, 1, "a number in (0, 1]")
_MUST_BE_FALSE = ("add_cross_attention", "is_encoder_decoder", "rope_interleaved")


class Reader:
    """Takes keys out of a config and reports, all at once, what it could not accept.

    Args:
      config: the parsed file.
      where: how error messages call it.
    """

    irrelevant: frozenset[str] = IRRELEVANT
    must_be_false: tuple[str, ...] = _MUST_BE_FALSE
    error: type[LlmjaxError] = ConfigError
    context: int | None = None  # of the model, in tokens, once it was read

    def __init__(self, config: Mapping[str, Any], where: str):
        self._config, self._where = dict(config), where
        self._seen: set[str] = set()
        self._problems: list[str] = []
        self._sections: dict[str, Reader] = {}

    def problem(self, text: str) -> None:
        """Adds a line to the error that ``finish`` raises."""
        if text not in self._problems:
            self._problems.append(text)

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands, ``default`` where the key is absent or null."""
        self._seen.add(key)
        value = self._config.get(key)
        return default if value is None else value

    def default(self, key: str, value: Any) -> None:
        """What a key that is absent or null means, all at once."""
        if self._config.get(key) is None:
            self._config[key] = value

    def section(self, key: str, defaults: Mapping[str, Any]) -> "Reader":
        """A reader of a nested object, as strict; ``finish`` reports its problems among the others.

        Args:
          key: the object's.
          defaults: what the object may leave out.
        """
        value = self.get(key)
        if not isinstance(value, dict):
            self.problem(f"{key}: expected an object, found {shown(value)}")
            value = {}
        self._sections[key] = Reader({**defaults, **value}, f"{self._where}: {key}")
        return self._sections[key]

    def text_section(self, model_type: str, defaults: Mapping[str, Any], *, tied: bool = True) -> "Reader":
        """The reader of a multimodal config's ``text_config``, whose head is tied where the outer object says so:
        transformers asks that alone, and saves the text model's default beside it.

        Args:
          model_type: the text model's.
          defaults: what published files leave to transformers.
          tied: what an outer object means that does not say it.
        """
        said = self.get("tie_word_embeddings") is not None
        tied = self.flag("tie_word_embeddings", tied)
        text = self.section("text_config", {**defaults, "tie_word_embeddings": tied})
        text.expect("model_type", (model_type,), model_type)
        if said:
            text.flag("tie_word_embeddings", tied)
            text._config["tie_word_embeddings"] = tied
        else:  # versions differ in what they take
            text.expect("tie_word_embeddings", (tied,))
        return text

    def ignore(self, *keys: str) -> None:
        """Marks keys as irrelevant for this architecture."""
        self._seen.update(keys)

    def _checked(self, key: str, default: Any, rule: Rule, instead: Any, most: float | None = None) -> Any:
        """A value that is as its rule says; else ``instead``, which lets the reading go on to the other problems."""
        value = self.get(key, default)
        if value is None:
            self.problem(f"{key}: missing, expected {rule.what}")
        elif problem := rule.problem(value):
            self.problem(f"{key}: {problem}")
        elif most is not None and value > most:
            self.problem(f"{key}: expected at most {most:,}, found {shown(value)}")
        else:
            return value
        return instead

    def size(self, key: str, default: int | None = None, most: int = INT32) -> int:
        """A positive integer."""
        return self._checked(key, default, POSITIVE, 1, most)

    def count(self, key: str, default: int | None = None) -> int:
        """A number that may be 0."""
        return self._checked(key, default, COUNT, 1, INT32)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        return float(self._checked(key, default, POSITIVE_NUMBER, 1.0))

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        return self._checked(key, default, FLAG, True)

    def optional_number(self, key: str) -> float | None:
        """A positive number, or None where the key is absent or null."""
        return None if self.get(key) is None else self.number(key)

    def nullable(self, read: Callable[[str, Any], T], key: str, default: Any) -> T | None:
        """``read(key, default)``, for keys whose null means "none" rather than "the default"."""
        self._seen.add(key)
        return None if key in self._config and self._config[key] is None else read(key, default)

    def expect(self, key: str, allowed: Collection[Any], default: Any = None) -> Any:
        """A value out of a list of supported ones; anything else is refused by name."""
        value = self.get(key, default)
        if value not in allowed:
            self.problem(f"{key}: {shown(value)} is not supported, expected {' or '.join(map(repr, allowed))}")
            return next(iter(allowed))
        return value

    def activation(self, key: str, default: str | None = None) -> str:
        """The name of an activation function in ``layers.ACTIVATIONS``."""
        return self.expect(key, tuple(ACTIVATIONS), default)

    def rope(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        theta_key: str | None = "rope_theta",
        scaling_key: str | None = "rope_scaling",
        layer_type: str | None = None,
        fraction: float | None = None,
        known: tuple[str, ...] = (),
    ) -> Rope:
        """The rotary embedding, from either dialect.

        Args:
          head_dim: H.
          theta: the class default for an absent base.
          theta_key: where transformers 4 has the base; None where these layers always had the class default.
          scaling_key: where transformers 4 has the scaling; None where these layers never had one.
          layer_type: the entry of ``rope_parameters`` for layers of this type, where types differ (Gemma 3).
          fraction: the class default for an absent ``partial_rotary_factor``; None for architectures that always
            rotate the whole head, where transformers has no such option.
          known: entries that are the caller's.
        """
        places = {"rope_parameters": self.get("rope_parameters")}
        if layer_type is not None and isinstance(places["rope_parameters"], dict):
            places = {f"rope_parameters.{layer_type}": places["rope_parameters"].get(layer_type)}
        if scaling_key is not None:
            places = {scaling_key: self.get(scaling_key), **places}
        # Beside the object transformers reads it where all layers' is the same, there alone.
        one = layer_type is None
        original = self._config.get("original_max_position_embeddings") if one else None
        # What an entry is where it is not said.
        unsaid = {
            "rope_theta": theta if theta_key is None else self._config.get(theta_key, theta),
            "partial_rotary_factor": self._config.get("partial_rotary_factor", 1.0 if fraction is None else fraction),
            "original_max_position_embeddings": original,
        }
        if layer_type is not None and scaling_key is not None:
            self._check_kind(scaling_key, *places.values())
        entries: dict[str, Any] = {}
        for key, value in places.items():
            if value is not None and not isinstance(value, dict):
                self.problem(f"{key}: expected an object, found {shown(value)}")
            elif value:
                rest = unsaid if layer_type is None else value  # for layers of a type the newer may say more
                self._check_same(entries, value, f"{scaling_key} and {key}", rest)
                entries.update(value)
        for key in known:
            entries.pop(key, None)
        spec = RopeSpec(entries, self.problem, self.context, original, not one)
        if spec.kind in STRETCHED and one:
            self._seen.add("original_max_position_embeddings")
        theta = entries.pop("rope_theta", theta if theta_key is None else self.get(theta_key, theta))
        whole = fraction is None and spec.kind != "proportional"
        fraction = 1.0 if fraction is None else fraction
        # Null is no default but where that is the whole head: transformers rotates all of it, or fails.
        beside = self.nullable(self.get, "partial_rotary_factor", fraction)
        fraction = entries.pop("partial_rotary_factor", 1.0 if beside is None and fraction == 1 else beside)
        if whole and fraction != 1:
            self.problem(f"partial_rotary_factor: {shown(fraction)} is not supported here, expected 1.0")
            fraction = 1.0
        return self._build_rope(spec, theta, fraction, head_dim)

    def _check_kind(self, key: str, old: Any, new: Any) -> None:
        """Refuses a scaling of global layers alone whose kind stands under ``type``: transformers 4 reads it there, 5
        leaves them unscaled."""
        old, new = (entries if isinstance(entries, dict) else {} for entries in (old, new))
        kind = old.get("type")
        if kind not in (None, "default") and old.get("rope_type") is None and new.get("rope_type") is None:
            self.problem(
                f"{key}.type: {shown(kind)} scales the rotation of global layers in transformers 4 and not in 5; "
                "name it rope_type, or take it out"
            )

    def _check_same(self, old: dict[str, Any], new: dict[str, Any], what: str, rest: dict[str, Any]) -> None:
        """Refuses two descriptions of one rope that differ (transformers takes the older), each with the ``rest`` where
        it says nothing."""

        def plain(entries: dict[str, Any]) -> dict[str, Any]:
            kind = entries.get("rope_type", entries.get("type"))
            return {k: v for k, v in {**entries, "rope_type": kind, "type": None}.items() if v is not None}

        rest = {"rope_type": "default", **plain(rest)}
        if old and rest | plain(old) != rest | plain(new):
            self.problem(f"{what}: two descriptions of one rope, and different ones; keep the one that is meant")

    def _build_rope(self, spec: RopeSpec, theta: Any, fraction: Any, head_dim: int) -> Rope:
        theta = self._found("rope_theta", theta, POSITIVE_NUMBER, 1.0)
        fraction = self._found("partial_rotary_factor", fraction, _FRACTION, 1.0)
        dims = head_dim if spec.kind == "proportional" else int(head_dim * fraction)
        if dims % 2 or dims == 0:
            self.problem(f"rotary width: {head_dim} * {fraction} = {dims}, expected a positive even number")
            dims = 2
        return spec.rope(float(theta), dims, int(fraction * head_dim // 2))

    def _found(self, what: str, value: Any, rule: Rule, instead: Any) -> Any:
        if problem := rule.problem(value):
            self.problem(f"{what}: {problem}")
            return instead
        return value

    def _all_problems(self) -> list[str]:
        """What was wrong, and what is left over."""
        found = list(self._problems)
        for key in self.must_be_false:
            if self._config.get(key):
                found.append(f"{key}: {shown(self._config[key])} is not supported, expected false")
        for key in sorted(set(self._config) - self._seen - self.irrelevant, key=str):
            value = self._config[key]
            if key in _QUANTIZED and value is not None:
                method = value.get("quant_method") if isinstance(value, dict) else None
                found.append(
                    f"{key}: weights quantized by {shown(method or value)} are not read, of those of Hugging Face only "
                    "'fp8'; take the checkpoint that they were made of, or a GGUF file"
                )
            elif value is not None:
                found.append(
                    f"{named(str(key))}: llmjax does not know this key (value {shown(value)}) and will not guess what "
                    "it changes"
                )
        for key, section in self._sections.items():
            found += [f"{key}.{problem}" for problem in section._all_problems()]
        return found

    def finish(self) -> None:
        """Raises for everything that was wrong or left over.

        Raises:
          ConfigError: one line per problem.
        """
        problems = self._all_problems()
        if len(problems) == 1:
            raise self.error(f"{self._where}: {problems[0]}")
        if problems:
            raise self.error(f"{self._where}: " + "\n  ".join(["unsupported configuration:", *problems]))
