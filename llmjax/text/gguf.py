"""The tokenizer in a GGUF file's metadata (``tokenizer.ggml.*``)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from llmjax.errors import TokenizerError
from llmjax.text import sentencepiece
from llmjax.text.sentencepiece import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary
from llmjax.text.tokenizer import Tokenizer, load_backend

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# How a pre-tokenizer kind splits a text, in order; the names are llama.cpp's.
_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "gpt2": (_GPT2,),
    "phi-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "stablelm2": (_QWEN2,),
}
_NFC = ("qwen2",)


def read(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """See ``llmjax.text.tokenizer.from_gguf``."""
    entries = _Entries(metadata, str(path))
    model = entries.get("model", str)
    tokens = entries.get("tokens", list)
    types = [int(t) for t in entries.get("token_type", None, [1] * len(tokens))]
    if len(types) != len(tokens):
        raise TokenizerError(f"{path}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    if len(set(tokens)) != len(tokens):
        twice = next(t for i, t in enumerate(tokens) if t in tokens[:i])
        raise TokenizerError(f"{path}: tokenizer.ggml.tokens: {twice!r} appears twice")
    ids = {n: _id(entries, f"{n}_token_id", len(tokens)) for n in ("bos", "eos", "unknown", "padding", "eot", "eom")}
    if model == "gpt2":
        backend = load_backend(lambda: _byte_level(entries, tokens, types), str(path))
        add_bos = False
    elif model == "llama":
        backend = load_backend(lambda: _sentencepiece(entries, tokens, types, ids), str(path))
        add_bos = True
    else:
        raise TokenizerError(f"{path}: tokenizer.ggml.model {model!r} is not supported; expected 'gpt2' or 'llama'")
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return Tokenizer(
        backend=backend,
        kind="bpe" if model == "gpt2" else "sentencepiece",
        bos_id=ids["bos"],
        eos_ids=tuple(sorted({i for n in ("eos", "eot", "eom") if (i := ids[n]) is not None})),
        add_bos=entries.get("add_bos_token", bool, add_bos),
        chat_template=metadata.get("tokenizer.chat_template"),
        special={names[n]: tokens[i] for n, i in ids.items() if n in names and i is not None},
        where=str(path),
    )


class _Entries:
    def __init__(self, metadata: Mapping[str, Any], where: str):
        self._metadata, self.where = metadata, where

    def get(self, key: str, kind: type | None, default: Any = None) -> Any:
        key = f"tokenizer.ggml.{key}"
        value = self._metadata.get(key, default)
        if value is None:
            raise TokenizerError(f"{self.where}: {key} is missing; the file has no usable tokenizer")
        if kind is not None and not isinstance(value, kind):
            raise TokenizerError(f"{self.where}: {key}: expected {kind.__name__}, found {type(value).__name__}")
        return value


def _id(entries: _Entries, key: str, size: int) -> int | None:
    value = entries.get(key, None, -1)
    if not isinstance(value, int) or value >= size:
        raise TokenizerError(f"{entries.where}: tokenizer.ggml.{key}: expected an id below {size}, found {value!r}")
    return value if value >= 0 else None


def _byte_level(entries: _Entries, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    kind = entries.get("pre", str, "missing")
    if kind not in _SPLITS:
        raise TokenizerError(
            f"{entries.where}: tokenizer.ggml.pre {kind!r} is not supported (how text is split before merging); "
            f"llmjax has {', '.join(_SPLITS)}"
        )
    merges = [tuple(m.split(" ")) for m in entries.get("merges", list)]
    bad = next((m for m in merges if len(m) != 2), None)
    if bad:
        raise TokenizerError(f"{entries.where}: tokenizer.ggml.merges: expected two pieces, found {' '.join(bad)!r}")
    vocab = {t: i for i, t in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[kind]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if kind in _NFC:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (CONTROL, UNKNOWN, USER_DEFINED):
            special = token_type != USER_DEFINED
            backend.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    return backend


def _sentencepiece(
    entries: _Entries, tokens: list[str], types: list[int], ids: Mapping[str, int | None]
) -> tokenizers.Tokenizer:
    scores = [float(s) for s in entries.get("scores", None)]
    if len(scores) != len(tokens):
        raise TokenizerError(
            f"{entries.where}: tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens"
        )
    prefix = entries.get("add_space_prefix", bool, True)
    unknown = (
        ids["unknown"] if ids["unknown"] is not None else next((i for i, t in enumerate(types) if t == UNKNOWN), None)
    )
    vocabulary = Vocabulary(tokens, scores, types, prefix, ids["bos"], ids["eos"], unknown)
    return sentencepiece.build(vocabulary, entries.where)
