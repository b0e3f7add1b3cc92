"""Tokenizers, chat templates, and text as it grows token by token."""
