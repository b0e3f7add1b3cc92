"""MediaPipe's model files: read, written and made from checkpoints."""
