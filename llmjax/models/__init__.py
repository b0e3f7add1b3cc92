"""What models compute: one file for each architecture, and the blocks they share.

Every file with an ``ARCHITECTURE`` is one; ``registry`` finds them.  Here: configs, Flax modules, names of parameters.
Not here: files, tokenizers, caches' lifetimes, devices; and a product with a weight only through ``layers.Projection``.
"""
