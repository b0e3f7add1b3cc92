"""Between files and models: a checkpoint's tensors become parameters, and parameters files.

Here: which tensor fills which parameter (``plan``), reading (``parameters``, ``loading``), writing llmjax's and Hugging
Face's forms (``conversion``), what GGUF and MediaPipe call things, ``inspect``.  Not here: bytes of file formats
(``converters.readers``), MediaPipe's writers (``converters.mediapipe``), what a model computes (``models``).
"""
