"""PyTorch's weights files, read without torch or ``pickle``: the zip, the pickle in it, the tensors it names."""
