"""Readers of checkpoint formats, one file or folder each; ``opening`` chooses.

A reader gives names, headers and values, lazily and checked against the file's length; it knows no architecture.  Of
llmjax it imports ``errors``, and ``quant`` where a file holds packed values; nothing else.
"""
