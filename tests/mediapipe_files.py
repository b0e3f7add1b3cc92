"""Files of MediaPipe's own converter with their sources, and what they are compared by.

The converter is that of MediaPipe 0.10.14 and 0.10.21 with its model dimensions made small; names say which.
"""

import hashlib
from pathlib import Path

import numpy as np

from converters import ConversionConfig, convert_checkpoint
from converters.readers.mediapipe.container import BACKEND, MODEL_TYPE, PARAMETERS, VOCABULARY, BinFile

DATA = Path(__file__).parent / "data" / "mediapipe"
BINS = sorted(path for path in DATA.glob("*.bin") if "_lora_" not in path.name)
GEMMA = DATA / "GEMMA_2B_gpu_int8_mp0.10.21.bin"
_BITS = {"int8": (8, 8, 8), "int4": (4, 4, 4), "mixed": (8, 4, 4)}


def facts(path: Path) -> tuple[str, str, tuple[int, int, int]]:
    """Model type, backend and bits from a file's name."""
    backend = "cpu" if "_cpu_" in path.name else "gpu"
    kind, rest = path.name.split(f"_{backend}_")
    return kind, backend, _BITS[rest.split("_")[0]]


def vocabulary(folder: Path) -> Path:
    """The SentencePiece model that is in all of the files, as one of its own."""
    path = folder / "spm.model"
    path.write_bytes(BinFile(GEMMA).blob(VOCABULARY) or b"")
    return path


def config(kind: str, backend: str, folder: Path, bits=(8, 8, 8), **options) -> ConversionConfig:
    """Options to convert the checkpoint of a model type into ``folder / "out"``."""
    options.setdefault("vocab_model_file", str(vocabulary(folder)))
    options.setdefault("input_ckpt", str(DATA / kind))
    return ConversionConfig(
        ckpt_format="pytorch" if kind == "FALCON_RW_1B" else "safetensors",
        model_type=kind,
        backend=backend,
        output_dir=str(folder / "out"),
        attention_quant_bits=bits[0],
        feedforward_quant_bits=bits[1],
        embedding_quant_bits=bits[2],
        **options,
    )


def converted(path: Path, folder: Path) -> Path:
    """What our converter makes of a file's source."""
    kind, backend, bits = facts(path)
    convert_checkpoint(config(kind, backend, folder, bits))
    return folder / "out" / "model.tflite"


def digest(folder: Path) -> str:
    """Of all raw files and ``layer_info.txt``."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name != "model.tflite":
            found.update(file.name.encode() + b"\n" + file.read_bytes())
    return found.hexdigest()


def differences(ours: Path, theirs: Path) -> list[str]:
    """What two files differ in, but for where the cpu's buffers lie: the real converter shuffles them."""
    a, b = BinFile(ours), BinFile(theirs)
    found = [] if a.name == b.name else ["subgraph"]
    if list(a.entries.values()) != list(b.entries.values()):
        found.append("headers")
    found += [n for n in a.entries if n in b.entries and not np.array_equal(a.raw(n), b.raw(n))]
    found += [key for key in (PARAMETERS, VOCABULARY, BACKEND) if a.blob(key) != b.blob(key)]
    if a.numbers[MODEL_TYPE] != b.numbers[MODEL_TYPE] or list(a.numbers) != list(b.numbers):
        found.append("metadata")
    unit = 256 if a.blob(BACKEND) == b"gpu" else 64
    found += [f"alignment of {n}" for n, place in a._places.items() if place % unit]
    if unit == 256 and ours.read_bytes()[1 << 16 :] != theirs.read_bytes()[1 << 16 :]:
        found.append("bytes after the header")
    return found
