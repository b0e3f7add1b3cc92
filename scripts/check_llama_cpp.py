"""The logits of GGUF files in llama.cpp itself and in llmjax: what proves that a file's conventions are read right.

    pip install --no-deps xllamacpp==2026.10.11549
    python scripts/check_llama_cpp.py model.gguf [more.gguf ...] [--tokens 24]

The wheel exports llama.cpp's C interface, called here with a float32 cache and without flash attention.  Its CPU
backend still rounds: the tanh GELU comes from a table in float16, and inputs of float16 and quantized products are
rounded to float16 and int8.  So plain F32 files of SiLU models agree to 2e-6 of the largest logit, of GELU models to
2e-3.  llama.cpp runs Phi-3 and Mistral without their windows and Falcon with the tanh GELU, takes Gemma 3n's cut from
the deviation of a sample (over F - 1, transformers over F), and chooses longrope's factors by the size of its context:
there this is no verdict.
"""

import argparse
import ctypes
import importlib.util
import sys
from pathlib import Path

import numpy as np

import llmjax

_F32 = 0
_ERROR = 4


class _Params(ctypes.Structure):
    """Larger than llama.cpp's parameter structs, which change with every version; only the fields below are written."""

    _fields_ = (("words", ctypes.c_int32 * 128),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


# Places in ``llama_context_params`` of the wheel above, in words of four bytes, and what stands there by default.
_N_CTX, _FLASH_ATTENTION, _TYPE_K, _TYPE_V = (0, 512), (13, -1), (26, 1), (27, 1)


def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        sys.exit("xllamacpp is not installed; see the top of this script")
    lib = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("*.so"))))
    for name in ("llama_model_load_from_file", "llama_init_from_model"):
        getattr(lib, name).restype = ctypes.c_void_p
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(lib, name).restype = _Params
    lib.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    lib.llama_batch_init.restype = _Batch
    lib.llama_model_load_from_file.argtypes = (ctypes.c_char_p, _Params)
    lib.llama_init_from_model.argtypes = (ctypes.c_void_p, _Params)
    lib.llama_decode.argtypes = (ctypes.c_void_p, _Batch)
    lib.llama_get_logits_ith.argtypes = (ctypes.c_void_p, ctypes.c_int32)
    lib.llama_free.argtypes = lib.llama_model_free.argtypes = (ctypes.c_void_p,)
    lib.llama_log_set(_log, None)
    return lib


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _log(level: int, text: bytes, _: int) -> None:
    if level == _ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def llama_cpp_logits(path: Path, ids: list[int], vocab_size: int) -> np.ndarray:
    """float32 ``[T, V]``.

    Raises:
      SystemExit: another version of the wheel, or llama.cpp refuses the file (its reason is on stderr).
    """
    lib = _library()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    if not model:
        sys.exit(f"{path}: llama.cpp does not load it")
    params = lib.llama_context_default_params()
    for place, default in (_N_CTX, _FLASH_ATTENTION, _TYPE_K, _TYPE_V):
        if params.words[place] != default:
            sys.exit("this version of xllamacpp has its parameters in other places; see the top of this script")
    params.words[_FLASH_ATTENTION[0]] = 0
    params.words[_TYPE_K[0]] = params.words[_TYPE_V[0]] = _F32
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    if lib.llama_decode(context, batch):
        sys.exit(f"{path}: llama.cpp does not run it")
    rows = [np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (vocab_size,)).copy() for i in range(len(ids))]
    lib.llama_free(context)
    lib.llama_model_free(model)
    return np.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=24, help="how many random tokens to run (default 24)")
    options = parser.parse_args()
    for path in options.files:
        try:
            model = llmjax.load(path)
        except llmjax.LlmjaxError as error:
            sys.exit(f"check_llama_cpp: {error}")
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, options.tokens).tolist()
        ours = model.logits([ids])[0]
        theirs = llama_cpp_logits(path, ids, model.config.vocab_size)
        top = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
        print(
            f"{path}: max |d| {np.abs(ours - theirs).max():.1e} of {np.abs(ours).max():.1f}, same best token {top:.0%}"
        )


if __name__ == "__main__":
    main()
