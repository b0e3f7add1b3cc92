"""Weights of few bits: what they mean (``qtensor``), how they are made (``rounding``, ``schemes``) and multiplied
(``product``)."""
