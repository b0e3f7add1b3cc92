"""Writes LiteRT's files: a model's graph as ``.tflite``, traced from the model's own Flax modules."""
