"""How ``x . W`` runs: ``matmul`` decides, the other files are the programs it chooses from.

Here: what is fast on which processor, and that it is the number that was asked for.  Not here: what weights mean
(``quant``), or who multiplies (``models``).
"""
