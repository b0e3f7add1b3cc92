"""MediaPipe's checkpoint converter as Python had it until MediaPipe 1.0: ``ConversionConfig``, ``convert_checkpoint``.

Names, order and defaults of the options are those of 0.10.21.  What differs, on purpose:

- every model type takes safetensors and pytorch checkpoints, and both backends work for all of them;
- dimensions come from ``config.json`` beside the weights; without one they are the published ones, and tensors of
  other shapes are refused;
- a checkpoint whose ``config.json`` asks for what the runtime does not compute is refused;
- files appear under their names when they are whole, and a mistake in the options is a ``ConfigError``.

Asymmetric weights (``is_symmetric=False``) lose their zero points in a cpu file, as in MediaPipe: its cpu layout has no
place for them.  Use them for the gpu alone.
"""

import dataclasses
import glob
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.mediapipe import job, lora, writer
from converters.mediapipe.vocabulary import read_vocabulary
from converters.mediapipe.weight_files import Weights
from converters.readers.huggingface import HuggingFaceSource
from converters.readers.jsonfile import read_json
from converters.readers.mediapipe.lora import Factors
from converters.readers.mediapipe.source import MediapipeSource
from converters.readers.opening import open_source
from converters.readers.peft import CONFIG, WEIGHTS
from converters.readers.source import Source
from converters.readers.weights_file import TORCH
from llmjax.checkpoint.loading import find_model, is_quantized
from llmjax.checkpoint.mediapipe_config import ModelType
from llmjax.checkpoint.parameters import OnParameter
from llmjax.checkpoint.plan import Override
from llmjax.errors import CheckpointError, ConfigError, LoraError, shown
from llmjax.lora.adapter import LoraSource, read_adapter
from llmjax.models.config import DecoderConfig
from llmjax.models.registry import architectures, read_config
from llmjax.models.tree import parameter_shapes
from llmjax.outside.paths import checked_path, path_problem
from llmjax.outside.values import FLAG, POSITIVE, Rule, one_of, settle
from llmjax.outside.whole import expect_new, whole_file
from llmjax.quant.schemes import parse

_LOG = logging.getLogger(__name__)
# By checkpoint format: what a directory's weights are called, the first one found, and endings.
_FORMATS = {
    "safetensors": (("model.safetensors.index.json", "model.safetensors"), (".safetensors",)),
    "pytorch": (("pytorch_model.bin.index.json", "pytorch_model.bin"), TORCH),
}
_PATH = Rule("a path that a file can have", lambda v: isinstance(v, str | Path) and not (str(v) and path_problem(v)))
_PATH_OR_NONE = Rule("a path that a file can have, or None", lambda v: v is None or _PATH.holds(v))
_BITS = ("attention_quant_bits", "feedforward_quant_bits", "embedding_quant_bits")
# What each option may be.
_RULES: dict[str, Rule] = {
    "ckpt_format": one_of(*_FORMATS),
    "model_type": one_of(*job.MODEL_TYPES),
    "backend": one_of(*writer.BACKENDS),
    **dict.fromkeys(_BITS, one_of(4, 8)),
    "is_symmetric": FLAG,
    "combine_file_only": FLAG,
    "lora_o_proj": one_of(*lora.O_PROJ),
    **dict.fromkeys(("input_ckpt", "vocab_model_file", "output_dir"), _PATH),
    **dict.fromkeys(("output_tflite_file", "lora_ckpt", "lora_output_tflite_file"), _PATH_OR_NONE),
}
_LORA_TYPES = ("GEMMA_2B", "GEMMA_7B", "GEMMA2_2B", "PHI_2")
_OTHER_MODELS = "it belongs to model types that llmjax does not convert"
# Options that must stay as they are, and why.
_REFUSED = {
    "obfuscate": "MediaPipe's public converter writes the same file with it and without it; leave it out",
    "fp16_scale": "MediaPipe's converter ignores it; leave it out",
    "image_encoder_file": _OTHER_MODELS,
    "image_adapter_file": _OTHER_MODELS,
    "submodel_type": _OTHER_MODELS,
    "use_fake_weights": "weights of zero help nobody; llmjax loads config:NAME with random weights",
    "is_quantized": "of MediaPipe 0.10.30: give the checkpoint from before it was quantized, or an llmjax directory to "
    "llmjax.convert",
    "block_size": "of MediaPipe 0.10.32: the files of 0.10.21 have one scale for each output channel",
    "lora_alpha": "of MediaPipe 0.10.30, which stores it and never uses it; scale the weights by alpha / rank instead",
    "lora_main_model_type": _OTHER_MODELS,
    "use_dynamic_ple": _OTHER_MODELS,
    "use_mse_quant": "of later versions: files of 0.10.21 are quantized by the largest weight",
    "apply_srq": _OTHER_MODELS,
}


@dataclasses.dataclass
class ConversionConfig:
    """MediaPipe's options.

    Attributes:
      input_ckpt: a directory, a file, or a pattern of files.
      ckpt_format: ``safetensors`` or ``pytorch``.
      model_type: ``GEMMA_2B``, ``GEMMA_7B``, ``GEMMA2_2B``, ``PHI_2``, ``FALCON_RW_1B`` or ``STABLELM_4E1T_3B``.
      backend: ``cpu`` or ``gpu``.
      output_dir: gets one raw file for each tensor, ``layer_info.txt`` and, unless told otherwise, the model.
      is_symmetric: zero is an integer; see above for the cpu.
      attention_quant_bits: 4 or 8, of q, k, v and o.
      feedforward_quant_bits: 4 or 8, of the MLP.
      embedding_quant_bits: 4 or 8, of embedding and head.
      combine_file_only: read the raw files that are in ``output_dir`` already.
      vocab_model_file: a SentencePiece model, or a directory with ``tokenizer.json`` and ``tokenizer_config.json``.
      output_tflite_file: the model; None for ``model.tflite`` in ``output_dir``.
      lora_ckpt: a LoRA checkpoint: PEFT's weights of q, k, v and o in every layer.  Its alpha has no place in the file.
      lora_rank: its rank.
      lora_output_tflite_file: the file of the LoRA weights.
      lora_o_proj: llmjax's own: ``mediapipe`` scrambles o's factors as MediaPipe's converter does, ``right`` does not.

    The other fields are MediaPipe's, too, and are refused with the reason where they are set; those after
    ``use_fake_weights`` are of later versions than 0.10.21.

    Raises:
      ConfigError: an option is wrong, or two contradict each other.
    """

    input_ckpt: str
    ckpt_format: str
    model_type: str
    backend: str
    output_dir: str
    is_symmetric: bool = True
    attention_quant_bits: int = 8
    feedforward_quant_bits: int = 8
    embedding_quant_bits: int = 8
    combine_file_only: bool = False
    vocab_model_file: str = ""
    obfuscate: bool = False
    output_tflite_file: str | None = None
    fp16_scale: float | None = None
    lora_ckpt: str | None = None
    lora_rank: int | None = None
    lora_output_tflite_file: str | None = None
    image_encoder_file: str | None = None
    image_adapter_file: str | None = None
    submodel_type: str | None = None
    use_fake_weights: bool = False
    is_quantized: bool = dataclasses.field(default=False, kw_only=True)
    block_size: int = dataclasses.field(default=0, kw_only=True)
    lora_alpha: float | None = dataclasses.field(default=None, kw_only=True)
    lora_o_proj: str = dataclasses.field(default="mediapipe", kw_only=True)
    lora_main_model_type: str | None = dataclasses.field(default=None, kw_only=True)
    use_dynamic_ple: bool = dataclasses.field(default=True, kw_only=True)
    use_mse_quant: bool = dataclasses.field(default=False, kw_only=True)
    apply_srq: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        settle(self)
        problems = list(self._problems())
        if problems:
            raise ConfigError("ConversionConfig: " + "\n  ".join(problems))
        if self.output_tflite_file is None:
            self.output_tflite_file = str(Path(self.output_dir) / "model.tflite")

    def _problems(self) -> Any:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, reason in _REFUSED.items():
            if getattr(self, name) not in (defaults[name], None):
                yield f"{name}: {getattr(self, name)!r} is not supported: {reason}"
        for name, rule in _RULES.items():
            if problem := rule.problem(getattr(self, name)):
                yield f"{name}: {problem}"
        if _PATH.holds(self.output_dir) and (not self.output_dir or Path(self.output_dir).is_file()):
            yield f"output_dir: expected a directory, found {'nothing' if not self.output_dir else 'a file'}"
        for option in ("output_tflite_file", "lora_output_tflite_file"):
            path = getattr(self, option)
            if path is not None and _PATH.holds(path) and Path(path).is_dir():
                yield f"{option}: {path}: expected a file, found a directory"
        yield from self._lora_problems()

    def _lora_problems(self) -> Any:
        if (self.lora_ckpt is None) != (self.lora_rank is None):
            yield "lora_ckpt and lora_rank: expected both or none"
        if self.lora_rank is None:
            if self.lora_output_tflite_file is not None:
                yield "lora_output_tflite_file: goes with lora_ckpt and lora_rank"
            return
        if problem := POSITIVE.problem(self.lora_rank):
            yield f"lora_rank: {problem}"
        if self.backend == "cpu":
            yield "lora_ckpt: MediaPipe's cpu backend has no LoRA; use gpu"
        if self.model_type not in _LORA_TYPES:
            yield f"lora_ckpt: MediaPipe has LoRA for {', '.join(_LORA_TYPES)}, not for {self.model_type}"
        if self.combine_file_only:
            yield "lora_ckpt: not with combine_file_only, which reads no checkpoint"
        if self.lora_output_tflite_file is None:
            yield "lora_output_tflite_file: missing, expected the file for the LoRA weights"
        elif self.lora_output_tflite_file == (self.output_tflite_file or str(Path(self.output_dir) / "model.tflite")):
            yield f"lora_output_tflite_file: {self.lora_output_tflite_file} is the output_tflite_file"


def convert_checkpoint(config: ConversionConfig, *, report: OnParameter = lambda done, total: None) -> None:
    """Converts a checkpoint to a ``.bin`` file.

    Args:
      config: what to do.
      report: called after each parameter: how many are done, and how many there are.

    Raises:
      ConfigError: an option does not fit the checkpoint, or the checkpoint does not fit the model type.
      CheckpointError: the checkpoint or the raw files are damaged, or something cannot be written.
      TokenizerError: the vocabulary is damaged or does not fit the model.
    """
    if not isinstance(config, ConversionConfig):
        raise ConfigError(f"config: expected a ConversionConfig, found {shown(config)}")
    config = dataclasses.replace(config)  # options may have been set after the check
    kind, output = job.model_type(config.model_type), Path(config.output_dir)
    assert config.output_tflite_file is not None
    path = Path(config.output_tflite_file)
    if config.combine_file_only:
        _combine(config, kind, output, path, report)
        return
    source = _open(config, kind)
    try:
        vocabulary, where = _vocabulary(config, source.directory)
        _check_outputs(config, [*(file.path for file in source.files), where])
        attention, feed_forward, embedding = (getattr(config, name) for name in _BITS)
        recipe = job.recipe(attention, feed_forward, embedding, config.is_symmetric)
        try:
            work, parameters = job.prepare(source, kind, config.backend, recipe, vocabulary, where)
        except CheckpointError as error:
            if (source.directory / "config.json").exists():
                raise
            raise CheckpointError(
                f"{error}\n  (there is no config.json beside the weights, so these are the published dimensions of "
                f"{kind.name})"
            ) from None
        factors = _lora_factors(config, kind, work.config)
        work.run(path, parameters, weights=output, factors=factors, report=report)
        _keep(vocabulary, where, output)
        _write_lora(config, factors, work, vocabulary)
    finally:
        source.close()


def _check_outputs(config: ConversionConfig, inputs: Sequence[str]) -> None:
    """Refuses to write over what is read."""
    for option in ("output_tflite_file", "lora_output_tflite_file"):
        path = getattr(config, option)
        for file in (*inputs, config.lora_ckpt):
            if path and file and Path(path).exists() and Path(file).exists() and Path(path).samefile(file):
                raise ConfigError(f"{option}: {path} is what is read, and would be lost; give another name")


def _lora_factors(config: ConversionConfig, kind: ModelType, model: DecoderConfig) -> dict[tuple[int, str], Factors]:
    """What the LoRA file is to hold; read before anything is written.

    Raises:
      LoraError: the adapter is damaged, or is not one of rank r on q, k, v and o of every layer.
    """
    if config.lora_ckpt is None:
        return {}
    path, rank = Path(config.lora_ckpt), config.lora_rank
    assert rank is not None
    if path.is_dir() and not (path / CONFIG).exists():
        path = next((path / name for name in WEIGHTS if (path / name).is_file()), path)
    beside = ((path if path.is_dir() else path.parent) / CONFIG).exists()
    adapter = read_adapter(
        path if beside else LoraSource(path, alpha=rank, rank=rank), architectures()[kind.model_type], model
    )
    if any(delta.magnitude is not None for delta in adapter.deltas.values()):
        raise LoraError(
            f"{adapter.path}: an adapter with magnitudes (DoRA): MediaPipe's LoRA files hold factors A and B alone, "
            "and its runtime adds B.A; merge it into the weights (llmjax lora merge) and convert those"
        )
    wanted = {f"layers.{i}.attn.{m}.weight": (i, m) for i in range(model.num_hidden_layers) for m in "qkvo"}
    other = sorted(set(adapter.deltas) ^ set(wanted))
    wrong = sorted({d.rank for d in adapter.deltas.values()} - {rank})
    if other or wrong:
        problem = (
            f"lora_rank is {rank}, found rank {wrong[0]}"
            if wrong
            else (
                "MediaPipe's files hold q, k, v and o of every layer and nothing else; "
                + ("found" if other[0] in adapter.deltas else "missing")
                + f" {other[0]}"
            )
        )
        raise LoraError(f"{adapter.path}: {problem}")
    if scales := sorted({delta.scale for delta in adapter.deltas.values()} - {1.0}):
        _LOG.warning(
            f"{adapter.path}: its scale is {scales[-1]:g}, which MediaPipe's LoRA files have no place for: the runtime "
            "adds B.A as it is; train with alpha = rank, or read the file by LoraSource(path, alpha=...)"
        )
    factors = {wanted[name]: Factors(d.a, d.b) for name, d in adapter.deltas.items()}
    if config.lora_o_proj == "right":
        return factors
    return {key: lora.scrambled(f) if key[1] == "o" else f for key, f in factors.items()}


def _write_lora(
    config: ConversionConfig, factors: dict[tuple[int, str], Factors], work: job.Job, vocabulary: bytes
) -> None:
    if factors:
        assert config.lora_output_tflite_file is not None and config.lora_rank is not None
        writer.write_lora(
            Path(config.lora_output_tflite_file), factors, config.lora_rank, work.config, work.kind, vocabulary
        )


def convert_source(
    source: str | Path,
    destination: str | Path,
    quantize: str | Path | Mapping[str, Any] | None,
    override: Override,
    check_finite: bool,
    report: OnParameter,
    *,
    backend: str | None = None,
    model_type: str | None = None,
    vocab: str | Path | None = None,
    announce: Callable[[str], None] = lambda plan: None,
) -> None:
    """``llmjax.convert(..., to="mediapipe")``: any checkpoint to a ``.bin`` file, without raw weight files.

    Args:
      source: anything ``llmjax.load`` reads; weights that are quantized already stay what they are.
      destination: a new file.
      quantize: a scheme or recipe; None for int8, or as it is.
      override: keys of a ``config.json`` that win over the checkpoint's own.
      check_finite: refuse NaN and infinite weights.
      report: called after each parameter.
      backend: ``cpu`` or ``gpu``.
      model_type: as of ``ConversionConfig``; None for the one whose architecture it is.
      vocab: as ``vocab_model_file``; None for the checkpoint's own.
      announce: told the plan before anything is written.

    Raises:
      LlmjaxError: as ``convert_checkpoint``.
    """
    backend = job.known_backend(backend)
    kind = None if model_type is None else job.model_type(model_type)
    destination = checked_path("destination", destination, CheckpointError)
    expect_new(destination)
    opened = open_source(find_model(source))
    try:
        kind = kind or job.infer(opened, override)
        if vocab is None and isinstance(opened, MediapipeSource) and opened.vocabulary:
            vocabulary, where = opened.vocabulary, str(opened.path)
        else:
            vocabulary, where = read_vocabulary(vocab or opened.directory, given=vocab is not None)
        recipe = None if quantize is None else parse(quantize)
        if recipe is None and not is_quantized(opened):
            recipe = parse("int8")
        work, parameters = job.prepare(opened, kind, backend, recipe, vocabulary, where, override, check_finite)
        announce(work.to_text())
        work.run(destination, parameters, report=report, new=True)
    finally:
        opened.close()


def _combine(config: ConversionConfig, kind: ModelType, output: Path, path: Path, report: OnParameter) -> None:
    directory = Path(config.input_ckpt)
    directory = directory if directory.is_dir() else directory.parent
    beside = directory / "config.json"
    found = read_json(beside) if config.input_ckpt else None
    _, model = read_config(found or kind.config, str(beside) if found else kind.name)
    job.check_config(model, kind, str(beside) if found else kind.name)
    vocabulary, where = _vocabulary(config, directory)
    _check_outputs(config, [where])
    job.check_vocabulary(vocabulary, model.vocab_size, kind, where)
    places = writer.items(parameter_shapes(model), model, kind, config.backend, lambda parameter: (32, False))
    weights = Weights(output, places, kind, config.backend)
    work = job.Job(kind, config.backend, model, weights.items, vocabulary)
    work.run(path, weights.read(), report=report)
    _keep(vocabulary, where, output)


def _open(config: ConversionConfig, kind: ModelType) -> Source:
    names, endings = _FORMATS[config.ckpt_format]
    path = Path(config.input_ckpt)
    if path.is_dir():
        first = next((path / name for name in names if (path / name).exists()), None)
        files = [first] if first else sorted(p for p in path.iterdir() if p.suffix in endings)
    else:
        files = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(config.input_ckpt))
    what = f"{config.ckpt_format} weights ({', '.join('*' + ending for ending in endings)})"
    if not files:
        raise CheckpointError(f"{config.input_ckpt}: no {what}; expected a directory, a file or a pattern of files")
    wrong = [p.name for p in files if p.suffix not in (*endings, ".json")]
    if wrong or len({p.parent for p in files}) > 1:
        found = f"found {wrong[0]}" if wrong else "found files in several directories"
        raise CheckpointError(f"{config.input_ckpt}: expected {what} in one directory, {found}; check ckpt_format")
    return HuggingFaceSource(files[0].parent, files=files, path=path, config=kind.config)


def _vocabulary(config: ConversionConfig, directory: Path) -> tuple[bytes, str]:
    """The SentencePiece model, and where it comes from."""
    return read_vocabulary(config.vocab_model_file or directory, given=bool(config.vocab_model_file))


def _keep(vocabulary: bytes, where: str, output: Path) -> None:
    """Writes a vocabulary that was made from Hugging Face's beside the weight files, as MediaPipe does."""
    if Path(where).name == "tokenizer.json":
        with whole_file(output / "spm.model") as partial:
            partial.write_bytes(vocabulary)
