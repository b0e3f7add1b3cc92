"""The published checkpoints llmjax knows by name: ``config:gemma-2b`` and so on, one data file each."""

import json
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from llmjax.errors import ConfigError

PREFIX = "config:"


def folder() -> Traversable:
    """Inside the package when installed; beside it in a source checkout."""
    inside = files("llmjax") / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def names() -> list[str]:
    """All known names."""
    return sorted(f.name.removesuffix(".json") for f in folder().iterdir() if f.name.endswith(".json"))


def read(name: str) -> dict[str, Any]:
    """A checkpoint's facts.

    Args:
      name: with or without ``config:``.

    Returns:
      ``checkpoint`` (where it is published), ``parameters`` (their exact number, None where none is published),
      ``special_tokens`` (name to text and id) and ``config`` (as its ``config.json``).

    Raises:
      ConfigError: no such name.
    """
    name = name.removeprefix(PREFIX)
    if name not in names():
        raise ConfigError(f"{PREFIX}{name}: no such configuration; llmjax has {', '.join(names())}")
    return json.loads((folder() / f"{name}.json").read_text(encoding="utf-8"))
