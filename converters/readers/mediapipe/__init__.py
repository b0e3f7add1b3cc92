"""MediaPipe's files as they are: the ``.bin`` container, LoRA weights, bundles, the facts in a graph's tables."""
