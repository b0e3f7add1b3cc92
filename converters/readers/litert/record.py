"""What llmjax writes into its own graphs so that the checkpoint can be had back: the configuration, and the parameters
that a graph holds folded into others or in another shape.

Among a file's metadata it is called ``NAME``: a line of JSON ``{"config": {...}, "shapes": {name: [...]}}``, then the
parameters' values, float32, in that order.  All other parameters are constants of ``decode`` under their own names;
those of a mixture's experts each for itself, ``NAME.0``, ``NAME.1``, ...
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.readers.jsonfile import parse_json

NAME = "llmjax.checkpoint"
# How the constant ends that holds the scales of blocks.
SCALES = ".scales"


def written(config: Mapping[str, Any], parameters: Mapping[str, np.ndarray]) -> bytes:
    """The record.

    Args:
      config: as ``config.json`` has it.
      parameters: float32, by name.
    """
    shapes = {name: value.shape for name, value in parameters.items()}
    line = json.dumps({"config": config, "shapes": shapes}, separators=(",", ":")).encode()
    return b"\n".join([line, b"".join(np.ascontiguousarray(x, "<f4").tobytes() for x in parameters.values())])


def read(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The inverse of ``written``.

    Raises:
      ValueError: it is damaged.
    """
    line, _, values = data.partition(b"\n")
    try:
        found = parse_json(line)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    parts = found if isinstance(found, dict) and set(found) == {"config", "shapes"} else {}
    config, shapes = parts.get("config"), parts.get("shapes")
    if not isinstance(config, dict) or not isinstance(shapes, dict) or not all(map(_is_shape, shapes.values())):
        raise ValueError("expected a configuration and shapes")
    if sum(map(math.prod, shapes.values())) * 4 != len(values):
        raise ValueError(f"{len(values)} bytes do not fit the shapes")
    parameters, at = {}, 0
    for name, shape in shapes.items():
        parameters[name] = np.frombuffer(values, "<f4", math.prod(shape), at).reshape(shape)
        at += 4 * math.prod(shape)
    return config, parameters


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 < n < 1 << 32 for n in value)
