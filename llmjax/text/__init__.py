"""Tokenizers, chat templates, and text as it grows token by token.

``tokenizer`` is what one is; ``reading`` chooses which file's reader makes it.  Not here: models.
"""
