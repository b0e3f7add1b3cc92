"""MediaPipe's converter and bundler: what writes ``.bin`` and ``.task`` files.

What reads them: ``converters.readers.mediapipe``.
"""
