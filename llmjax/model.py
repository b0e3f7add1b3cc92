"""A loaded model: configuration, parameters, tokenizer, and its logits without a cache."""

import dataclasses
import functools
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from converters.readers.digest import Stamp
from llmjax.device import platform_of
from llmjax.errors import RequestError, shown
from llmjax.models.architecture import Architecture
from llmjax.models.config import DecoderConfig
from llmjax.models.context import Context
from llmjax.models.functions import Known
from llmjax.models.interventions import Interventions, checked, intervened
from llmjax.models.watched import Program
from llmjax.numerics import Numerics
from llmjax.quant.qtensor import QTensor, is_qtensor
from llmjax.quant.schemes import Recipe
from llmjax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class AdapterOrigin:
    """An adapter of a model.

    Attributes:
      name: by which rows ask for it; None for one that is part of the model.
      mode: ``lora_mode`` of ``llmjax.load``.
      options: see ``llmjax.lora.adapter.Adapter``.
      files: see there.
    """

    name: str | None
    mode: str | None
    options: Mapping[str, Any]
    files: tuple[Stamp, ...]


class Origin:
    """What parameters were made from.

    Attributes:
      files: the checkpoint's weights and their index, as they were when they were opened; none for random weights.
      quantize: the recipe they were quantized by; None for none.
      adapters: merged into them or beside them.

    Args:
      params: the parameters.
    """

    def __init__(
        self,
        params: Any,
        files: tuple[Stamp, ...] = (),
        quantize: Recipe | None = None,
        adapters: tuple[AdapterOrigin, ...] = (),
    ):
        self.files, self.quantize, self.adapters = files, quantize, adapters
        self._leaves = tuple(map(weakref.ref, jax.tree.leaves(params)))

    def made(self, params: Any) -> bool:
        """Whether these are the very parameters, and not others that were put in their place since."""
        leaves = jax.tree.leaves(params)
        return len(leaves) == len(self._leaves) and all(
            isinstance(leaf, jax.Array) and leaf is ref() for leaf, ref in zip(leaves, self._leaves, strict=True)
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_leaves": ()}  # what is unpickled is another array


@dataclasses.dataclass
class Model:
    """What ``llmjax.load`` returns.

    Attributes:
      architecture: the registry's entry.
      config: dimensions and options, hashable.
      params: the Flax module's own tree; ``params["layers_3"]["attn"]["q"]["weight"]`` is ``[out, in]``.
      numerics: the profile everything is computed under.
      numerics_chosen: somebody named it; False where it is ``llmjax.load``'s default.
      tokenizer: None when the checkpoint brings none; prompts must then be token ids.
      eos_ids: every token that ends a text, of the tokenizer's files and of ``generation_config.json``.
      path: where it was read from.
      lora: the adapter it was loaded with, merged or beside the weights.
      origin: what the parameters were made from; None where nobody knows.
      generation_config: what the checkpoint says of generation, which ``LLM`` heeds.
      generation_file: the file that says so.
      interventions: by tap, what takes its value's place wherever this model runs: see ``intervened``.
      dtype: what ``llmjax.load`` was asked to store unquantized weights as.
    """

    architecture: Architecture
    config: DecoderConfig
    params: dict[str, Any]
    numerics: Numerics
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]
    path: Path
    lora: Path | None = None
    origin: Origin | None = None
    numerics_chosen: bool = True
    generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation_file: str = "generation_config.json"
    interventions: Interventions = dataclasses.field(default_factory=dict)
    dtype: str | None = None

    # What else messages advise where a text is longer than the context.
    longer_context: ClassVar[str] = ", or load the model with a longer one (context_length, --context-length)"

    def __repr__(self) -> str:
        stored = self.stored()
        kinds = ", ".join(sorted(stored, key=lambda kind: -stored[kind]))
        megabytes = sum({id(x): x.nbytes for x in jax.tree.leaves(self.params)}.values()) / 1e6
        numerics = self.numerics.label
        if self.interventions:
            numerics += f", interventions at {', '.join(self.interventions)}"
        return (
            f"Model({str(self.path)!r}: {self.architecture.model_type}, {sum(stored.values()):,} weights in {kinds}, "
            f"{megabytes:,.1f} MB; numerics {numerics}; a context of {self.context_length:,} tokens)"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Not what is compiled: a copy, or a model in another process, has programs of its own.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def stored(self) -> dict[str, int]:
        """The kinds of weights there are, dtypes and schemes of quantized ones, and how many weights are of each."""
        kinds: Counter[str] = Counter()
        for leaf in jax.tree.leaves(self.params, is_leaf=is_qtensor):
            kinds[leaf.scheme if isinstance(leaf, QTensor) else str(leaf.dtype)] += int(np.prod(leaf.shape))
        return dict(sorted(kinds.items()))

    @property
    def context_length(self) -> int:
        """Tokens of prompt and output together that the model was made for."""
        return self.config.max_position_embeddings

    @property
    def compiler_options(self) -> dict[str, bool | int | str]:
        """For ``jax.jit``, where the parameters are."""
        return self.numerics.compiler_options(platform_of(self.params))

    @functools.cached_property
    def module(self) -> Any:
        """The Flax module, for ``module.apply({"params": params}, ids [B, T], Context)``."""
        module = self.config.module()
        return intervened(module, self.config, self.interventions) if self.interventions else module

    def intervened(self, interventions: Interventions) -> "Model":
        """The same model, its weights shared, with interventions: in ``apply``, ``logits``, ``llmjax.trace`` and every
        program of an ``LLM`` made of it, and nowhere else.

        Args:
          interventions: by tap (``layers.3.resid``; ``llmjax.trace`` has the names): a pure function of the value
            ``[B, T, ...]``, or of that and ``models.interventions.At`` where it needs to know the tokens, which returns
            as much; or an array, spread over the value's shape.  See ``models.interventions`` for what a function sees
            where.

        Raises:
          RequestError: no tap of the model, one that has an intervention, or neither function nor array.
        """
        if twice := [str(name) for name in checked(interventions) if name in self.interventions]:
            raise RequestError(
                f"interventions: {', '.join(twice)}: the model has one there; put both into one function"
            )
        if not interventions:
            return self
        model = dataclasses.replace(self, interventions={**self.interventions, **interventions})
        assert model.module  # raises what is wrong with them
        return model

    def apply(
        self,
        params: dict[str, Any],
        ids: jax.Array,
        length: jax.Array | None = None,
        *,
        interventions: Interventions = MappingProxyType({}),
    ) -> jax.Array:
        """Logits float32 ``[B, T, V]`` of ``ids`` int32 ``[B, T]``, no cache: a pure function of its arguments.

        ``jit``, ``vmap``, ``jvp`` and ``grad`` work under every profile.  Beside packed weights the derivatives are
        those of scales and offsets (``allow_int=True``: integers have none), and what a profile rounds to 8 bits is
        passed straight through.  Compile with ``compiler_options=model.compiler_options`` where the bits of
        ``Model.logits`` are wanted.

        Args:
          params: the model's.
          ids: token ids.
          length: int32 ``[B]``, tokens of rows that are padded on the right.
          interventions: see ``intervened``; arrays, and what functions close over, may be traced or differentiated.

        Raises:
          RequestError: ids that are no such array, or an intervention that cannot be.
        """
        check_rows(ids)
        ctx = Context.whole(ids, self.numerics, length=length)
        module = self.intervened(interventions).module
        return module.apply({"params": params}, ids, ctx).astype(jnp.float32)

    @functools.cached_property
    def _logits(self) -> Program:
        return Program(self.apply, compiler_options=self.compiler_options)

    @functools.cached_property
    def _known(self) -> Known:
        return Known()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name != "params":  # an argument of all that is compiled
            for made in ("module", "_logits"):
                self.__dict__.pop(made, None)

    def logits(
        self, batch: Sequence[Sequence[int]], *, interventions: Interventions = MappingProxyType({})
    ) -> list[np.ndarray]:
        """Teacher-forced logits of token id lists of any lengths, without a cache.

        Rows are computed one at a time, padded on the right to a power of two: a row's logits do not depend on the
        others.

        Args:
          batch: non-empty lists of token ids.
          interventions: see ``intervened``; compiled for this call alone.

        Returns:
          for each row float32 ``[T_i, V]``.

        Raises:
          RequestError: an empty row, an id outside the vocabulary, a row longer than the context, or an intervention
            that cannot be.
        """
        if interventions or not isinstance(interventions, Mapping):
            return self.intervened(interventions).logits(batch)
        rows: list[np.ndarray] = []
        if isinstance(batch, str | bytes | Mapping) or not np.iterable(batch):
            raise RequestError(f"batch: expected a list of token id lists, found {shown(batch)}")
        self._logits.forget()
        for index, given in enumerate(batch):
            ids = check_ids(given, self, f"row {index}")
            # An intervention sees the text as it is.
            width = len(ids) if self.interventions else padded_width(len(ids))
            if self.interventions and self._known.changed(self.module.computed((1, width))):
                self._logits.forget(everything=True)
            padded = filled_up(ids, width)[None]
            length = np.array([len(ids)], np.int32)
            # Cut by NumPy: JAX would compile a slice for every length.
            rows.append(np.asarray(self._logits(self.params, padded, length))[0, : len(ids)].copy())
        return rows


def padded_width(tokens: int) -> int:
    """What a text of so many tokens is padded to, so that few programs serve all lengths."""
    return max(16, 1 << (tokens - 1).bit_length())


def filled_up(ids: Sequence[int] | np.ndarray, width: int) -> np.ndarray:
    """Some ids, at least one, padded to int32 ``[width]`` with the last of them: of another token the model may compute
    NaN, which no mask keeps from the text."""
    padded = np.full(width, ids[-1], np.int32)
    padded[: len(ids)] = ids
    return padded


def check_rows(ids: Any) -> None:
    """Of what ``Model.apply`` is given.

    Raises:
      RequestError: it is no array of integers ``[B, T]``.
    """
    if getattr(ids, "ndim", None) != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        found = f"{ids.dtype} {list(ids.shape)}" if hasattr(ids, "dtype") else shown(ids)
        raise RequestError(f"ids: expected an array of integers [B, T], found {found}")


def check_ids(ids: Sequence[int], model: Model, what: str) -> np.ndarray:
    """Token ids as int32 ``[T]``.

    Raises:
      RequestError: none, too many for the context, not integers, or outside the vocabulary.
    """
    try:
        array = np.asarray(ids)
    except ValueError:
        raise RequestError(f"{what}: expected a list of token ids, found {shown(ids)}") from None
    if array.size == 0:
        raise RequestError(f"{what}: empty, expected at least one token")
    if array.ndim != 1 or array.dtype.kind not in "iu" or any(isinstance(i, bool) for i in ids):
        raise RequestError(f"{what}: expected a list of token ids, found {shown(ids)}")
    if len(array) > model.context_length:
        raise RequestError(
            f"{what}: {len(array)} tokens, longer than the model's context of {model.context_length}; "
            f"shorten it{model.longer_context}"
        )
    wrong = array[(array < 0) | (array >= model.config.vocab_size)]
    if wrong.size:
        raise RequestError(f"{what}: token id {outside(int(wrong[0]), model)}")
    return array.astype(np.int32)


def outside(token: int, model: Model) -> str:
    """Says of a token that the model does not have it, with its text where the tokenizer does."""
    text = model.tokenizer.piece(token) if model.tokenizer else ""
    name = f" ({text!r})" if text else ""
    why = ": the tokenizer has it, the model's embedding no row for it" if text else ""
    return f"{token}{name} is outside the vocabulary (0 to {model.config.vocab_size - 1}){why}"
