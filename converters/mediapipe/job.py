"""What a conversion to a ``.bin`` file will do, known from headers alone, and doing it."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from converters.mediapipe import lora, writer
from converters.mediapipe.vocabulary import tell_differing
from converters.mediapipe.weight_files import Folder
from converters.mediapipe.writer import BACKENDS, Item, Parameters
from converters.readers.llmjax_directory import LlmjaxSource
from converters.readers.mediapipe.lora import Factors
from converters.readers.mediapipe.source import MediapipeSource
from converters.readers.source import Source, problems_error
from llmjax.checkpoint import mediapipe_config
from llmjax.checkpoint.loading import check_not_quantized, fitting_plan, read_tokenizer
from llmjax.checkpoint.mediapipe_config import MODEL_TYPES, ModelType
from llmjax.checkpoint.parameters import OnParameter, is_packed, packed_tensor, read_all
from llmjax.checkpoint.plan import Assignment, Override, Plan, describe
from llmjax.errors import ConfigError, LlmjaxError, TokenizerError
from llmjax.models.config import DecoderConfig
from llmjax.models.registry import read_config
from llmjax.outside.whole import whole_files
from llmjax.quant.schemes import Recipe, Scheme, role_of
from llmjax.text import mediapipe, sentencepiece


@dataclasses.dataclass(frozen=True)
class Job:
    """A conversion that can be done.

    Attributes:
      kind: the model type.
      backend: ``cpu`` or ``gpu``.
      config: the model's.
      items: what the file will hold, in order.
      vocabulary: a SentencePiece model.
    """

    kind: ModelType
    backend: str
    config: DecoderConfig
    items: list[Item]
    vocabulary: bytes

    def to_text(self) -> str:
        """The plan, for a terminal."""
        c = self.config
        lines = [
            f"{self.kind.name} for {self.backend}: V {c.vocab_size}  D {c.hidden_size}  F {c.intermediate_size}  "
            f"H {c.head_dim}  N {c.num_attention_heads}  K {c.num_key_value_heads}  L {c.num_hidden_layers}"
        ]
        sizes: Counter[tuple[str, str]] = Counter()
        for item in self.items:
            scheme = "float32" if item.bits == 32 else f"int{item.bits}" + ("-asym" if item.has_zero else "")
            sizes[role_of(item.parameter) or "norms and biases", scheme] += int(np.prod(item.shape)) * item.bits // 8
        lines += [f"  {role:16}  {scheme:10}  {size / 1e6:10.1f} MB" for (role, scheme), size in sizes.items()]
        lines.append(f"  {'vocabulary':16}  {'':10}  {len(self.vocabulary) / 1e6:10.1f} MB")
        if self.backend == "cpu" and any(item.has_zero for item in self.items):
            lines.append(f"  note: {_NO_ZERO}, so the file's weights are off by them; symmetric ones are right")
        return "\n".join(lines)

    def run(
        self,
        path: Path,
        parameters: Parameters,
        *,
        weights: Path | None = None,
        factors: Mapping[tuple[int, str], Factors] = MappingProxyType({}),
        report: OnParameter = lambda done, total: None,
        new: bool = False,
    ) -> None:
        """Writes the file.

        Args:
          path: of the file.
          parameters: every parameter by its canonical name.
          weights: a folder for raw weight files as well.
          factors: an adapter's, of which the folder gets files, too.
          report: called after each parameter.
          new: see ``whole_file``.

        Raises:
          CheckpointError: something cannot be written.
        """

        def write(folder: Folder | None) -> None:
            writer.write(
                path,
                self.items,
                parameters,
                self.config,
                self.kind,
                self.backend,
                self.vocabulary,
                also=folder.add if folder else lambda item, value: None,
                report=report,
                new=new,
            )

        if weights is None:
            return write(None)
        with whole_files(weights) as partial:
            folder = Folder(partial, self.kind, self.backend)
            write(folder)
            for name, values, shape in lora.raw_files(factors):
                folder.add_floats(name, values, shape)
            folder.close()


_NO_ZERO = "MediaPipe's cpu files have no zero points"


def model_type(name: str) -> ModelType:
    """The model type of a name.

    Raises:
      ConfigError: there is none.
    """
    if name not in MODEL_TYPES:
        raise ConfigError(f"model_type: unknown {name!r}; expected one of {', '.join(MODEL_TYPES)}")
    return MODEL_TYPES[name]


def known_backend(backend: str | None) -> str:
    """``backend``, which is one.

    Raises:
      ConfigError: it is none.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend: unknown {backend!r}; expected one of {', '.join(BACKENDS)}")
    return backend


def infer(source: Source, override: Override = None) -> ModelType:
    """The model type of a checkpoint that does not say.

    Raises:
      ConfigError: MediaPipe has none for its architecture.
    """
    if isinstance(source, MediapipeSource):
        return mediapipe_config.find(source.model_type, str(source.path))
    architecture, config = read_config(*describe(source, override))
    if architecture.model_type == "gemma":
        return MODEL_TYPES["GEMMA_7B" if config.num_key_value_heads == config.num_attention_heads else "GEMMA_2B"]
    for kind in MODEL_TYPES.values():
        if kind.model_type == architecture.model_type:
            return kind
    raise ConfigError(
        f"{source.path}: MediaPipe has no model type for {architecture.model_type}; it has {', '.join(MODEL_TYPES)}"
    )


def prepare(
    source: Source,
    kind: ModelType,
    backend: str,
    recipe: Recipe | None,
    vocabulary: bytes,
    where: str,
    override: Override = None,
    check_finite: bool = False,
) -> tuple[Job, Parameters]:
    """The conversion of a checkpoint, and its parameters, which are read as they are asked for.

    Args:
      source: the open checkpoint.
      kind: the model type to write.
      backend: ``cpu`` or ``gpu``.
      recipe: how to quantize; None for weights that are quantized already.
      vocabulary: a SentencePiece model.
      where: where it comes from, for messages.
      override: keys of a ``config.json`` that win over the checkpoint's own.
      check_finite: refuse NaN and infinite values.

    Raises:
      CheckpointError: tensors do not fit the configuration.
      ConfigError: the model is not what MediaPipe's runtime of this type computes, or the format has no place for how
        its weights are quantized.
      TokenizerError: the vocabulary does not fit the model.
    """
    plan = fitting_plan(source, None, override)
    if recipe is not None:
        recipe.check_layers(plan.config.num_hidden_layers)
        check_not_quantized(source)
    check_config(plan.config, kind, str(source.path))
    check_vocabulary(vocabulary, plan.config.vocab_size, kind, where)
    _tell_of_ids(source, override, vocabulary, kind, where)
    kept = _kept(source, plan, recipe, backend)
    shapes = {a.parameter: a.shape for a in plan.assignments}
    found = writer.items(shapes, plan.config, kind, backend, kept.__getitem__)
    check_widths(found)
    return Job(kind, backend, plan.config, found, vocabulary), read_all(source, plan, None, recipe, check_finite)


def check_widths(found: list[Item]) -> None:
    """Raises ConfigError for 4 bits and an odd number of inputs."""
    for item in found:
        if item.bits == 4 and item.shape[1] % 2:
            raise ConfigError(f"{item.parameter}: {item.shape[1]} inputs of 4 bits, expected an even number; use 8")


def check_config(config: DecoderConfig, kind: ModelType, where: str) -> None:
    """Refuses a model that MediaPipe's runtime would compute as another one.

    Raises:
      ConfigError: with every field that the file cannot say and the model type says otherwise.
    """
    try:
        raw = mediapipe_config.hf_config(mediapipe_config.parameters(config, kind, "cpu"), kind, where)
        read = read_config(raw, where)[1]
    except LlmjaxError as error:
        raise ConfigError(f"{where}: not a {kind.name}: {error}") from None
    if type(read) is not type(config):
        raise ConfigError(
            f"{where}: expected a model of architecture {kind.model_type} for {kind.name}, found "
            f"{type(config).__name__.removesuffix('Config')}"
        )
    # The runtime takes any context; a head that repeats the embedding is written as a table of its own.
    free = {"max_position_embeddings"} | ({"tie_word_embeddings"} if not read.tie_word_embeddings else set())
    wrong = [
        f"{f.name}: {kind.name} has {getattr(read, f.name)}, this model {getattr(config, f.name)}"
        for f in dataclasses.fields(config)
        if f.name not in free and getattr(read, f.name) != getattr(config, f.name)
    ]
    if wrong:
        raise ConfigError(
            f"{where}: " + "\n  ".join(["MediaPipe's runtime knows this from the model type alone:", *wrong])
        )


def check_vocabulary(vocabulary: bytes, rows: int, kind: ModelType, where: str) -> None:
    """Refuses what is no SentencePiece model, has more pieces than the embedding has rows, or lacks the model type's
    own tokens.

    Raises:
      TokenizerError: it does not fit.
    """
    model = sentencepiece.processor_of(vocabulary, where)
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    if len(pieces) > rows:
        raise TokenizerError(
            f"{where}: the vocabulary has {len(pieces)} pieces, the model's embedding only {rows} rows; "
            "it belongs to another model"
        )
    eos = model.eos_id()
    mediapipe.check_tokens(pieces, eos if eos >= 0 else None, kind.start_id, [kind.stop], rows, where)


def _tell_of_ids(source: Source, override: Override, vocabulary: bytes, kind: ModelType, where: str) -> None:
    """The file's texts may become other ids than the checkpoint's: its tokenizer is another, or a byte-level one."""
    with contextlib.suppress(TokenizerError):  # one that cannot be read is not what goes along
        if own := read_tokenizer(source, override):
            spelled = kind.bytes_to_unicode
            written = mediapipe.read(vocabulary, where, start_id=None, stop=(), bytes_to_unicode=spelled)
            tell_differing(written, own, "MediaPipe's runtimes compute with the file's")


def _kept(source: Source, plan: Plan, recipe: Recipe | None, backend: str) -> dict[str, tuple[int, bool]]:
    """Bits of each parameter, and whether it has zero points."""
    found, problems = {}, []
    for assignment in plan.assignments:
        scheme = recipe.scheme(assignment.parameter) if recipe else None
        if scheme is not None:
            if scheme.group or scheme.mse:
                problems.append(f"{assignment.parameter}: {scheme}: expected int4 or int8, or with -asym")
            found[assignment.parameter] = (scheme.bits, not scheme.symmetric)
        elif recipe is None and is_packed(source, assignment.sources[0]):
            bits, has_zero, problem = _stored(source, assignment, backend)
            found[assignment.parameter] = (bits, has_zero)
            problems += [f"{assignment.parameter}: {problem}"] if problem else []
        else:
            found[assignment.parameter] = (32, False)
    if problems:
        error = problems_error(source.path, "quantized in a way MediaPipe's files have no place for", problems)
        raise ConfigError(str(error))
    return found


def _stored(source: Source, assignment: Assignment, backend: str) -> tuple[int, bool, str]:
    """Bits, zero points, and what is wrong with a weight that is quantized already."""
    name = assignment.sources[0].name
    if isinstance(source, MediapipeSource):
        bits, has_zero = int(source.spec(name).dtype.removeprefix("INT")), source.has_zero(name)
        return bits, has_zero, _NO_ZERO if has_zero and backend == "cpu" else ""
    if not isinstance(source, LlmjaxSource):
        return 8, False, f"{source.spec(name).dtype}: quantize it anew"
    q = packed_tensor(source, name)
    assert q is not None
    has_zero, usual = q.offsets is not None, 8 if q.bits == 4 else 0
    if q.bits not in (4, 8) or q.scales.shape[1] != 1:
        problem = f"{q.scheme}, expected int4 or int8 with a scale for each output channel"
    elif q.zero != usual:
        problem = f"{q.scheme} with the integer {q.zero} for zero, expected {usual}"
    elif not (q.scales > 0).all():
        problem = "scales that are not positive (of a scheme with -mse), which MediaPipe's runtimes refuse"
    elif has_zero and backend == "cpu":
        problem = f"{q.scheme}: {_NO_ZERO}"
    else:
        problem = ""
    return q.bits, has_zero, problem


def recipe(attention: int, feed_forward: int, embedding: int, symmetric: bool) -> Recipe:
    """The recipe of MediaPipe's options: bits by role; the head has the embedding's."""
    bits = {"attention": attention, "feed_forward": feed_forward, "embedding": embedding, "head": embedding}
    return Recipe({role: Scheme(b, symmetric=symmetric) for role, b in bits.items()})
