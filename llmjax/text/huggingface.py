"""The tokenizer files of a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from llmjax.errors import TokenizerError
from llmjax.text import sentencepiece
from llmjax.text.detokenize import decoder_kind
from llmjax.text.tokenizer import Tokenizer, load_backend

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Classes that add BOS where tokenizer_config.json does not say (transformers' defaults).
_ADD_BOS = ("GemmaTokenizer", "LlamaTokenizer", "CodeLlamaTokenizer")


def read(directory: Path) -> Tokenizer:
    """See ``llmjax.text.tokenizer.from_huggingface``."""
    config = _object(directory / "tokenizer_config.json")
    special = _special(directory, config)
    file = directory / "tokenizer.json"
    if file.exists():
        backend = load_backend(lambda: tokenizers.Tokenizer.from_file(str(file)), str(file))
        kind = "bpe" if decoder_kind(backend, str(file))[0] else "sentencepiece"
        _add_tokens(backend, config)
        bos_in_file = _adds_bos(backend, special.get("bos_token"))
    else:
        file = directory / "tokenizer.model"
        if not file.exists():
            raise TokenizerError(f"{directory}: no tokenizer; expected tokenizer.json or tokenizer.model")
        model = sentencepiece.parse(file.read_bytes(), str(file))
        backend = sentencepiece.build(model, str(file))
        kind = "sentencepiece"
        _add_tokens(backend, config)
        special = sentencepiece.special_tokens(model) | special
        bos_in_file = False
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
        add_bos = bos_in_file or (file.name == "tokenizer.model" and name in (*_ADD_BOS, ""))
    bos, eos = special.get("bos_token"), special.get("eos_token")
    eos_id = backend.token_to_id(eos) if eos else None
    return Tokenizer(
        backend=backend,
        kind=kind,
        bos_id=backend.token_to_id(bos) if bos else None,
        eos_ids=() if eos_id is None else (eos_id,),
        add_bos=bool(add_bos),
        chat_template=_chat_template(directory, config),
        special=special,
        where=str(file),
    )


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise TokenizerError(f"{path}: cannot read the file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _special(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name; tokenizer_config.json wins over special_tokens_map.json."""
    result = {}
    for source in (_object(directory / "special_tokens_map.json"), config):
        for name in _NAMED:
            value = source.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                result[name] = value
    return result


def _adds_bos(backend: tokenizers.Tokenizer, bos: str | None) -> bool:
    """Whether the file's own post-processor puts BOS first."""
    first = backend.encode("a", add_special_tokens=True).ids[:1]
    return bos is not None and first == [backend.token_to_id(bos)]


def _add_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Tokens that only tokenizer_config.json knows (``added_tokens_decoder``), at the ids it gives."""
    known = backend.get_added_tokens_decoder()
    entries = config.get("added_tokens_decoder") or {}
    for key in sorted(entries, key=int):
        entry = entries[key]
        if int(key) in known and known[int(key)].content == entry.get("content"):
            continue
        token = tokenizers.AddedToken(
            entry["content"],
            single_word=entry.get("single_word", False),
            lstrip=entry.get("lstrip", False),
            rstrip=entry.get("rstrip", False),
            normalized=entry.get("normalized", False),
            special=entry.get("special", False),
        )
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = _object(directory / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several named ones: the one called default
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
