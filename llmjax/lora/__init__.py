"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685): a projection's weight becomes ``W + scale * B . A``; and DoRA
(Liu et al. 2024, arXiv:2402.09353), which gives each row of that the length that is its magnitude.

``adapter`` reads one and fits it to a model, ``config`` says what PEFT's settings mean, ``merge`` adds it to the
weights, ``apply`` computes it beside them, for all rows alike or for each row its own.  Not here: the files' bytes
(``converters.readers``), and what needs a checkpoint (``checkpoint.adapters``).
"""
