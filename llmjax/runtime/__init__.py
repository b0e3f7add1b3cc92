"""Generation: cache, prefill, decode, sampling, and the engine that keeps rows in their slots.

Here: what runs after a model is loaded and a text has become ids.  Not here: files, prompts' text (``text``), jobs
(``batch``).
"""
