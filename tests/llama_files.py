"""The tiny GGUF model that llama.cpp made ``tests/data/llama_cpp`` of.

python -m tests.llama_files model.gguf [Q8_0]
"""

import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

from tests import gguf_files, tiny

# An odd number, for which llama-perplexity writes a place more.
_PIECES = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz", ".", "▁t", "▁th", "he", "▁the"]
TEXT = (
    "the quick brown fox jumps over the lazy dog. a river runs below the hill and the mill. nobody knows why the "
    "clock on the tower stopped. they left before the rain came."
)


def _tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(_PIECES)
    writer.add_token_types([2, 3, 3, *[1] * (len(_PIECES) - 3)])
    writer.add_token_scores([-float(i) for i in range(len(_PIECES))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


def _peaked(tensors: dict[str, np.ndarray]) -> None:
    """Some tokens are far less probable than others: llama-perplexity cuts them off."""
    tensors["output.weight"] *= 6


def model(path: Path, kind: str = "F32") -> Path:
    """Writes it: a Llama of two layers, its matrices of a kind of GGUF's."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "rope_theta": 10000.0}
        changes |= {"vocab_size": len(_PIECES), "eos_token_id": 2}
        checkpoint = tiny.checkpoint(Path(folder), **changes)
        return gguf_files.write(checkpoint, path, kind, tokenizer=_tokenizer, change=_peaked)


if __name__ == "__main__":
    model(Path(sys.argv[1]), *sys.argv[2:])
