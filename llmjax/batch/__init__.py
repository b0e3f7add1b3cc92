"""Batch jobs: JSONL in, JSONL out, resumed to the byte.

Here: rows and their forms, the journal and the manifest, progress, scoring of files.  Not here: how a model runs
(``llmjax.llm``, ``runtime``), or how a command line reads its flags (``cli``).
"""
