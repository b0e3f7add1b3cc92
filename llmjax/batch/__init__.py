"""Batch jobs: JSONL in, JSONL out."""
