"""``llmjax bench``: how fast a model runs, beside what the machine itself can do."""
