"""``llmjax.convert``: which writer makes the form that a user asks for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.litert import convert as litert
from converters.mediapipe.convert import convert_source
from llmjax.checkpoint import conversion
from llmjax.checkpoint.loading import read_override
from llmjax.checkpoint.parameters import OnParameter
from llmjax.errors import CheckpointError, ConfigError, shown
from llmjax.lora.adapter import AnyLora
from llmjax.outside.paths import checked_path

FORMATS: tuple[str, ...] = (*conversion.FORMATS, "mediapipe", *litert.FORMATS)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "llmjax",
    quantize: str | Path | Mapping[str, Any] | None = None,
    dtype: str | None = None,
    check_finite: bool = False,
    config: str | Path | Mapping[str, Any] | None = None,
    lora: AnyLora | None = None,
    report: OnParameter = lambda done, total: None,
    **options: Any,
) -> Path:
    """Writes a checkpoint in another form.

    Args:
      source: anything ``llmjax.load`` reads; of an op graph the weights and the configuration that are found in it,
        which must compute what it does.
      destination: a new directory, or an empty one; a new file for all but ``llmjax`` and ``hf``.  It appears under its
        name when it is whole.
      to: ``llmjax`` keeps quantized weights packed (see ``converters.readers.llmjax_directory``); ``hf`` writes floats
        under Hugging Face's names; ``mediapipe`` writes a ``.bin`` file; ``litertlm``, ``task`` and ``tflite`` write
        what LiteRT-LM runs.
      quantize: for ``llmjax``: see ``llmjax.load``; for ``mediapipe`` int4 or int8, or either with -asym, by role, and
        int8 where nothing is said; for LiteRT's see ``converters.litert.export.export_graph``.
      dtype: of floats; None keeps each tensor's own, and writes quantized ones as float32 to ``hf``.
      check_finite: refuse NaN and infinite weights.
      config: see ``llmjax.load``.
      lora: an adapter to merge into the weights; quantized ones are rounded again, and a warning says what that leaves
        of it.
      report: called after each parameter: how many are done, and how many there are.
      **options: for ``mediapipe``: see ``converters.mediapipe.convert.convert_source``; for LiteRT's files: see
        ``converters.litert.convert.convert_source``.

    Returns:
      the destination.

    Raises:
      CheckpointError: the source is damaged, or the destination exists or cannot be written.
      OutputError: the disk is full; nothing is left behind.
      ConfigError: the scheme or dtype does not fit.
      LoraError: the adapter is damaged, of a kind that is not supported, or does not fit.
    """
    if not isinstance(to, str) or to not in FORMATS:
        raise ConfigError(f"to: unknown {shown(to)}; expected one of {', '.join(FORMATS)}")
    destination = checked_path("destination", destination, CheckpointError)
    if to == "mediapipe":
        override = read_override(config)
        if dtype is not None:
            raise ConfigError("dtype: floats are float32 in MediaPipe's files; leave it out")
        if lora is not None:
            raise ConfigError("lora: write the merged checkpoint first (llmjax lora merge), then convert that")
        convert_source(source, destination, quantize, override, check_finite, report, **options)
        return Path(destination)
    if to in litert.FORMATS:
        if dtype is not None:
            raise ConfigError("dtype: floats are float32 in LiteRT's files; leave it out")
        if check_finite:
            raise ConfigError("check_finite: LiteRT's files hold finite weights in any case; leave it out")
        litert.convert_source(
            source, destination, to=to, quantize=quantize, config=config, lora=lora, report=report, **options
        )
        return Path(destination)
    if options:
        raise ConfigError(f"{', '.join(options)}: not for to={to!r}")
    return conversion.convert(
        source,
        destination,
        to=to,
        quantize=quantize,
        dtype=dtype,
        check_finite=check_finite,
        config=config,
        lora=lora,
        report=report,
    )
