"""The tokenizer in a GGUF file's metadata (``tokenizer.ggml.*``).

Keys and defaults: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's
``llama-vocab.cpp``.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from llmjax.errors import TokenizerError
from llmjax.text import sentencepiece
from llmjax.text.detokenize import byte_level_bytes
from llmjax.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from llmjax.text.sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary
from llmjax.text.tokenizer import Tokenizer, add_tokens, load_backend

_LOG = logging.getLogger(__name__)
_IDS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_END_IDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
# Models end texts, turns and calls with these, code models files and repositories.  No key says so, and types are often
# wrong: llama.cpp goes by the same names, and makes them special.
_ENDS = frozenset(
    "</s> <eos> [EOS] <|endoftext|> <|end_of_text|> <end_of_turn> <turn|> <end_of_utterance> <|eot_id|> <|eom_id|> "
    "<|im_end|> <|end|> <|return|> <|call|> <|calls|> <|flush|> <|tool_response> <EOT> _<EOT> ▁<EOT> [EOT] "
    "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> "
    "<|file_sep|>".split()
)
# Phi-3's other special tokens swallow the white space behind them.  GGUF does not say so; llama.cpp goes by the name.
_PHI3_KEEPS_SPACE = {"<unk>", "<s>", "<|endoftext|>"}
# Of the other model, or of none; converters write them all the same.
_IRRELEVANT = frozenset({"merges", "pre", "scores", "token_type_count"})


def read(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """See ``llmjax.text.reading.from_gguf``."""
    entries = _Entries(metadata, str(path))
    model = entries.text("model")
    if model not in ("gpt2", "llama", "gemma4"):
        raise TokenizerError(
            f"{path}: tokenizer.ggml.model {model!r} is not supported; expected 'gpt2' (byte-level BPE), 'llama' "
            "(SentencePiece BPE) or 'gemma4' (SentencePiece's spaces and bytes, with merges)"
        )
    tokens = entries.strings("tokens")
    types = entries.numbers("token_type", len(tokens), default=NORMAL)
    defaults = _SENTENCEPIECE_IDS if model == "llama" else {}
    ids = {
        n: entries.token_id(f"{n}_token_id", len(tokens), defaults.get(n), needed=n in _SENTENCEPIECE_IDS)
        for n in dict.fromkeys((*_IDS, *_END_IDS))
    }
    ends = _ends(tokens, metadata) | {i for n in _END_IDS if (i := ids[n]) is not None}
    types = [CONTROL if i in ends else kind for i, kind in enumerate(types)]
    dummy_prefix, verbatim = False, frozenset[int]()
    if model == "llama":
        entries.expect_false("remove_extra_whitespaces")
        vocabulary = Vocabulary(
            pieces=tokens,
            scores=entries.numbers("scores", len(tokens)),
            types=types,
            add_dummy_prefix=entries.flag("add_space_prefix", True),
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            unk_id=ids["unknown"],
        )
        phi3 = metadata.get("general.architecture") == "phi3"
        strips = set(tokens) - _PHI3_KEEPS_SPACE if phi3 else ()
        backend, dummy_prefix = sentencepiece.build(vocabulary, str(path), everywhere=True, strip_after=strips)
        add_bos = True
    else:
        _refuse_twice(tokens, str(path))
        entries.expect_false("add_space_prefix")
        merges = entries.strings("merges")
        if model == "gemma4":
            unknown = None if ids["unknown"] is None else tokens[ids["unknown"]]
            backend, add_bos = _with_byte_tokens(tokens, merges, unknown, str(path)), True
        else:
            kind = _pre_tokenizer(entries)
            backend, add_bos = _byte_level(tokens, merges, kind, str(path)), kind.add_bos
            own = {i for i, token_type in enumerate(types) if token_type == USER_DEFINED}
            verbatim = frozenset(i for i in own if byte_level_bytes(tokens[i]) != tokens[i].encode())
        for wanted, hidden in ((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False):
            found = [t for t, token_type in zip(tokens, types, strict=True) if token_type in wanted]
            add_tokens(backend, [tokenizers.AddedToken(t, normalized=False) for t in found], special=hidden)
    named = {n: i for n, i in ids.items() if n in _IDS and i is not None}
    special = {_IDS[n]: tokens[i] for n, i in named.items()}
    # As transformers does: what the file names is special even where its type does not say so.
    untyped = [tokens[i] for i in named.values() if types[i] not in (CONTROL, UNKNOWN)]
    add_tokens(backend, [tokenizers.AddedToken(t, normalized=False) for t in untyped], special=True)
    bos, eos = ids["bos"], ids["eos"]
    prefix = (bos,) if entries.flag("add_bos_token", add_bos) and bos is not None else ()
    suffix = (eos,) if entries.flag("add_eos_token", False) and eos is not None else ()
    entries.finish()
    keys = ("tokenizer.chat_template", "tokenizer.chat_template.tool_use")
    templates = [metadata.get(key) for key in keys]
    for key, template in zip(keys, templates, strict=True):
        if template is not None and not isinstance(template, str):
            raise TokenizerError(f"{path}: {key}: expected a string, found {type(template).__name__}")
    return Tokenizer(
        backend=backend,
        bos_id=bos,
        eos_ids=tuple(sorted(ends)),
        prefix_ids=prefix,
        suffix_ids=suffix,
        chat_template=templates[0],
        tools_template=templates[1],
        special=special,
        where=str(path),
        dummy_prefix=dummy_prefix,
        verbatim=verbatim,
    )


def _ends(tokens: Sequence[str], metadata: Mapping[str, Any]) -> set[int]:
    """Tokens that end a text by their names."""
    found = _ENDS.intersection(tokens)
    if found & {"<|call|>", "<|calls|>"} and found & {"<|return|>", "<|flush|>"}:
        found -= {"<|end|>"}  # there, of a message within the turn
    if str(metadata.get("general.architecture")).startswith("gemma"):
        found -= {"</s>"}  # there, of struck-out text in HTML
    return {i for i, token in enumerate(tokens) if token in found}


class _Entries:
    """The metadata, with every entry's type and length checked, and none left unread."""

    def __init__(self, metadata: Mapping[str, Any], where: str):
        self._metadata, self.where = metadata, where
        self._seen: set[str] = set()

    def text(self, key: str) -> str:
        value = self._get(key)
        return value if isinstance(value, str) else self._refuse(key, "a string", value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        return bool(value) if isinstance(value, bool | np.bool_) else self._refuse(key, "bool", value)

    def expect_false(self, key: str) -> None:
        """Raises TokenizerError for a flag that llmjax has no answer to."""
        if self.flag(key, False):
            raise TokenizerError(
                f"{self.where}: tokenizer.ggml.{key}: true is not supported with tokenizer.ggml.model "
                f"{self._metadata['tokenizer.ggml.model']!r}, expected false"
            )

    def finish(self) -> None:
        """Refuses keys that nothing has read; ids of further tokens and flags that are false change no encoding."""
        for key, value in sorted(self._metadata.items()):
            name = key.removeprefix("tokenizer.ggml.")
            known = name == key or name in self._seen or name in _IRRELEVANT or name.endswith("_token_id")
            if not known and value is not False:
                self._refuse(name, "a key that llmjax knows", value)

    def token_id(self, key: str, size: int, default: int | None, needed: bool) -> int | None:
        """A token's id; of one that is not ``needed`` it may be beyond the tokens, as padding's often is: none then,
        as in llama.cpp."""
        value = self._get(key, -1 if default is None or default >= size else default)
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            self._refuse(key, "a token id", value)
        # Converters write the largest uint32 where there is no such token.
        if value < 0 or value == 0xFFFFFFFF:
            return None
        if value >= size and not needed:
            _LOG.warning(f"{self.where}: tokenizer.ggml.{key}: {value} is none of the {size} tokens and is left out")
            return None
        return int(value) if value < size else self._refuse(key, f"an id below {size}", value)

    def strings(self, key: str) -> list[str]:
        value = self._get(key)
        if not isinstance(value, list):
            self._refuse(key, "list", value)
        bad = next((i for i, v in enumerate(value) if not isinstance(v, str)), None)
        return value if bad is None else self._refuse(f"{key}[{bad}]", "a string", value[bad])

    def numbers(self, key: str, size: int, default: int | None = None) -> list[Any]:
        value = self._get(key, None if default is None else [default] * size)
        if not isinstance(value, list | tuple | np.ndarray):
            self._refuse(key, "list", value)
        try:
            array = np.asarray(value)
        except ValueError:  # lists of unequal length in it
            array = np.array(None)
        if array.ndim != 1 or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            self._refuse(key, "a list of finite numbers", value)
        if len(array) != size:
            raise TokenizerError(
                f"{self.where}: tokenizer.ggml.{key} has {len(array)} entries for {size} tokens; expected one a token"
            )
        return array.tolist()

    def _get(self, key: str, default: Any = None) -> Any:
        self._seen.add(key)
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if value is None:
            raise TokenizerError(
                f"{self.where}: tokenizer.ggml.{key} is missing; convert the model again with a current converter"
            )
        return value

    def _refuse(self, key: str, expected: str, found: Any) -> Any:
        kind = "" if expected.startswith("an id below") else f"{type(found).__name__} "
        raise TokenizerError(
            f"{self.where}: tokenizer.ggml.{key}: expected {expected}, found {kind}{' '.join(repr(found)[:60].split())}"
        )


def _pre_tokenizer(entries: _Entries) -> PreTokenizer:
    name = entries.text("pre")
    if name not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"{entries.where}: tokenizer.ggml.pre {name!r} is not supported (how text is split before merging); "
            f"expected one of {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]


def _refuse_twice(tokens: Sequence[str], where: str) -> None:
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        i, twice = next((i, t) for i, t in enumerate(tokens) if ids[t] != i)
        raise TokenizerError(f"{where}: tokenizer.ggml.tokens: {twice!r} appears twice: ids {i} and {ids[twice]}")


def _byte_level(tokens: list[str], merges: list[str], kind: PreTokenizer, where: str) -> tokenizers.Tokenizer:
    backend = _merging(tokens, merges, where, ignore_merges=kind.ignore_merges)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if kind.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _with_byte_tokens(tokens: list[str], merges: list[str], unknown: str | None, where: str) -> tokenizers.Tokenizer:
    """Gemma 4's: what no token spells is bytes, and a text is never split before merging."""
    backend = _merging(tokens, merges, where, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _merging(tokens: list[str], merges: list[str], where: str, **options: Any) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    try:
        model = models.BPE(vocab, pairs, **options)
    except Exception as error:
        _refuse_merges(merges, vocab, where)
        raise TokenizerError(f"{where}: the tokenizer cannot be built: {error}") from None
    return load_backend(lambda: tokenizers.Tokenizer(model), where)


def _refuse_merges(merges: Sequence[str], vocab: Mapping[str, int], where: str) -> None:
    """Names the first merge the vocabulary has no use for."""
    for i, merge in enumerate(merges):
        pair = merge.split(" ")
        if len(pair) != 2 or not all(pair):
            raise TokenizerError(f"{where}: tokenizer.ggml.merges[{i}]: expected two pieces, found {merge!r}")
        for piece in (*pair, "".join(pair)):
            if piece not in vocab:
                raise TokenizerError(
                    f"{where}: the tokenizer cannot be built: tokenizer.ggml.merges[{i}] {merge!r} needs {piece!r}, "
                    "which is not among the tokens; tokens and merges belong to different models"
                )
