"""TFLite op graphs, of ``.tflite``, ``.task`` and ``.litertlm`` files, as pure JAX functions and as models."""
