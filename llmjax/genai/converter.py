"""``mediapipe.tasks.python.genai.converter``."""

from converters.mediapipe.convert import ConversionConfig, convert_checkpoint

__all__ = ["ConversionConfig", "convert_checkpoint"]
