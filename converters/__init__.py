"""Readers of checkpoint formats (NumPy only), and the converters between them."""
