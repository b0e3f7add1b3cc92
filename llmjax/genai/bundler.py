"""``mediapipe.tasks.python.genai.bundler``."""

from converters.mediapipe.bundle import BundleConfig, create_bundle

__all__ = ["BundleConfig", "create_bundle"]
