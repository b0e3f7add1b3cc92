"""``llmjax bench``: how fast a model runs, beside what the machine itself can do.

Here: measurements that users can ask for.  Not here: comparisons with other runtimes (``scripts/bench_*.py``).
"""
