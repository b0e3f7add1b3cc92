"""Readers of checkpoint formats (NumPy only), and the converters between them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.source import Source, TensorSpec, open_source

__all__ = ["Source", "TensorSpec", "open_source"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from converters import source

    return getattr(source, name)
