"""The architectures llmjax knows, by the ``model_type`` of their ``config.json``."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llmjax.errors import ConfigError
from llmjax.models.config import DecoderConfig
from llmjax.models.hf_config import Reader
from llmjax.models.names import Names


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One entry of the registry; each architecture's file ends with its own.

    Attributes:
      model_type: Hugging Face's name.
      config: the config class.
      hf_names: the table of Hugging Face names for a config.
      gguf: ``general.architecture`` of its GGUF files, None where llama.cpp has none.
      dropped: regular expressions of source tensors that are known and not needed.
      reference_attention: the ``attn_implementation`` under which transformers computes this architecture right.
      needs_bos: trained so that a prompt without BOS gives garbage; such a prompt warns.
    """

    model_type: str
    config: type[DecoderConfig]
    hf_names: Callable[[Any], Names]
    gguf: str | None = None
    dropped: tuple[str, ...] = ()
    reference_attention: str = "eager"
    needs_bos: bool = False


def architectures() -> dict[str, Architecture]:
    """All of them, by model_type."""
    from llmjax.models import (
        falcon,
        gemma,
        gemma2,
        gemma3,
        gemma3_multimodal,
        llama,
        mistral,
        phi,
        phi3,
        qwen2,
        qwen3,
        stablelm,
    )

    modules = (gemma, gemma2, gemma3, gemma3_multimodal, phi, falcon, stablelm, llama, mistral, qwen2, qwen3, phi3)
    return {m.ARCHITECTURE.model_type: m.ARCHITECTURE for m in modules}


def find(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture a ``config.json`` names.

    Raises:
      ConfigError: none, or one llmjax does not have.
    """
    known = architectures()
    model_type = config.get("model_type")
    if model_type not in known:
        names = config.get("architectures")
        classes = f" ({', '.join(map(str, names))})" if isinstance(names, list) and names else ""
        raise ConfigError(
            f"{where}: model_type {model_type!r}{classes} is not supported; llmjax has {', '.join(sorted(known))}"
        )
    return known[model_type]


def read_config(config: Mapping[str, Any], where: str) -> tuple[Architecture, DecoderConfig]:
    """Finds the architecture and reads its config strictly.

    Raises:
      ConfigError: with every problem, one per line.
    """
    architecture = find(config, where)
    reader = Reader(config, where)
    try:
        result = architecture.config.from_hf(reader)
    except (TypeError, ValueError, ZeroDivisionError):
        reader.finish()  # a wrong value derailed the reading: what was noted explains it
        raise
    reader.finish()
    return architecture, result
