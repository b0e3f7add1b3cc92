"""Weights of few bits: what they mean (``qtensor``), how they are made (``rounding``, ``schemes``), and how arrays
are kept (``bits``, ``arrays``).

Not here: how they are multiplied (``products``), and files (``converters.readers``, ``checkpoint``).
"""
