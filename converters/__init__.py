"""Readers of checkpoint formats (NumPy only), and the converters between them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.mediapipe.bundle import BundleConfig, create_bundle
    from converters.mediapipe.convert import ConversionConfig, convert_checkpoint
    from converters.readers.opening import open_source
    from converters.readers.source import Source, TensorSpec

__all__ = [
    "BundleConfig",
    "ConversionConfig",
    "Source",
    "TensorSpec",
    "convert_checkpoint",
    "create_bundle",
    "open_source",
]

_HOMES = {
    "Source": "readers.source",
    "TensorSpec": "readers.source",
    "open_source": "readers.opening",
    "BundleConfig": "mediapipe.bundle",
    "ConversionConfig": "mediapipe.convert",
    "convert_checkpoint": "mediapipe.convert",
    "create_bundle": "mediapipe.bundle",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"converters.{_HOMES[name]}"), name)
