"""The architectures llmjax knows, by the ``model_type`` of their ``config.json``."""

import copyreg
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from llmjax import models
from llmjax.errors import ConfigError, named, shown
from llmjax.models.architecture import Architecture
from llmjax.models.config import DecoderConfig
from llmjax.models.hf_config import Reader

# What others registered, by model_type.
_registered: dict[str, Architecture] = {}


def architectures() -> dict[str, Architecture]:
    """All of them, by model_type."""
    return {**_own(), **_registered}


def register(architecture: Architecture) -> Architecture:
    """Makes an architecture known for as long as the process lives: checkpoints whose ``config.json`` has its
    ``model_type`` are loaded, run, quantized and adapted as those of llmjax's own are.

    Args:
      architecture: as every file of ``llmjax/models`` ends with one.

    Returns:
      the same.

    Raises:
      ConfigError: it is none, or another has its name.
    """
    if not isinstance(architecture, Architecture):
        raise ConfigError(f"register: expected an llmjax.Architecture, found {shown(architecture)}")
    if not (isinstance(architecture.config, type) and issubclass(architecture.config, DecoderConfig)):
        raise ConfigError(
            f"{architecture.model_type}: config: expected a subclass of DecoderConfig, "
            f"found {shown(architecture.config)}"
        )
    if architectures().get(architecture.model_type, architecture) is not architecture:
        raise ConfigError(
            f"model_type {shown(architecture.model_type)}: there is another architecture of this name; give yours "
            "a name of its own, and its config.json the same"
        )
    _registered[architecture.model_type] = architecture
    return architecture


def _by_name(model_type: str) -> Architecture:
    """What ``_reduced`` made of one.

    Raises:
      ConfigError: nobody registered it in this process.
    """
    return find({"model_type": model_type}, "a pickled model")


def _reduced(architecture: Architecture) -> Any:
    """For ``pickle`` and ``copy``: a known architecture by its name, since its functions have none."""
    if architectures().get(architecture.model_type) is architecture:
        return _by_name, (architecture.model_type,)
    return architecture.__reduce_ex__(2)


copyreg.pickle(Architecture, _reduced)


@functools.cache
def _own() -> dict[str, Architecture]:
    """What the files of this folder call ``ARCHITECTURE``."""
    modules = [importlib.import_module(f"{models.__name__}.{m.name}") for m in pkgutil.iter_modules(models.__path__)]
    found = [m.ARCHITECTURE for m in modules if hasattr(m, "ARCHITECTURE")]
    return {architecture.model_type: architecture for architecture in found}


def find(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture a ``config.json`` names.

    Raises:
      ConfigError: none, or one llmjax does not have.
    """
    known = architectures()
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        names = config.get("architectures")
        classes = f" ({named(', '.join(map(str, names)))})" if isinstance(names, list) and names else ""
        raise ConfigError(
            f"{where}: model_type {shown(model_type)}{classes} is not supported; llmjax has {', '.join(sorted(known))}"
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
    return architecture, result.stretched()
