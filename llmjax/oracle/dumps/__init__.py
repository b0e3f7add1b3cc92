"""Other programs' files as dumps: one file a format, and ``opening.py``, which chooses by what a file is."""
