"""The tokenizer files of a Hugging Face directory.

``tokenizer.json`` says everything about ids, its post-processor about BOS (transformers 5 ignores
``add_bos_token`` beside it).  For a ``tokenizer.model`` it is ``add_bos_token`` in
``tokenizer_config.json``, or the tokenizer class's documented default.
"""

import collections
import contextlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from converters.readers.jsonfile import parse_json, unique_keys
from llmjax.errors import TokenizerError, shown
from llmjax.text import sentencepiece
from llmjax.text.tokenizer import Tokenizer, add_tokens, load_backend, read_file

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# A list of more special tokens, or an object of a model's own by name.
_MORE = ("additional_special_tokens", "extra_special_tokens")
# The files of a vocabulary; the first that is there is read.
VOCABULARIES = ("tokenizer.json", "tokenizer.model")
# The documented default of these classes is to add BOS; a directory without tokenizer_config.json
# says nothing, and the models that come so (Gemma, Llama) need it.
_ADD_BOS = ("GemmaTokenizer", "LlamaTokenizer", "CodeLlamaTokenizer", "")
# These make a pre-tokenizer of their own, whatever that of tokenizer.json does.
_PREFIX_SPACE = ("CodeGenTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer")
# Special by the class alone, whatever the files say.
_CLASS_SPECIAL = {"GemmaTokenizer": {"mask_token": "<mask>"}}


def read(directory: Path) -> Tokenizer:
    """See ``llmjax.text.reading.from_huggingface``."""
    config_file = directory / "tokenizer_config.json"
    config = _object(config_file)
    file = next((f for n in VOCABULARIES if os.path.lexists(f := directory / n)), None)
    if file is None:
        hint = ""
        if (directory / "vocab.json").exists():
            hint = "; vocab.json and merges.txt alone are not read: save_pretrained() of transformers"
            hint += " makes a tokenizer.json of them"
        raise TokenizerError(f"{directory}: no tokenizer; expected tokenizer.json or tokenizer.model{hint}")
    special = _special(directory, config)
    dummy_prefix = False
    if file.name == "tokenizer.json":
        backend = load_json(read_file(file), str(file))
        if (other := directory / VOCABULARIES[1]).exists():
            with contextlib.suppress(TokenizerError):  # one that cannot be read, git-lfs's pointer say, is not needed
                _check_beside(backend, file, sentencepiece.some_pieces(read_file(other)), other)
    else:
        vocabulary = sentencepiece.parse(read_file(file), str(file))
        wanted = config.get("add_prefix_space")
        backend, dummy_prefix = sentencepiece.build(
            vocabulary,
            str(file),
            dummy_prefix=wanted if isinstance(wanted, bool) else None,
            everywhere=config.get("legacy") is True,
        )
        own = {name: _special_token(content) for name, content in sentencepiece.special_tokens(vocabulary).items()}
        special = {n: token for n, token in own.items() if config.get(n, token) is not None} | special
    _add_listed(backend, directory, config, config_file)
    class_name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if file.name == "tokenizer.json":
        _prefix_space(backend, config.get("add_prefix_space"), class_name, config_file)
    by_class = _CLASS_SPECIAL.get(class_name, {})
    special = {n: _special_token(t) for n, t in by_class.items() if backend.token_to_id(t) is not None} | special
    _add_named(backend, special, config, config_file)
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    contents = {name: token.content for name, token in special.items()}
    bos, eos = (_token_id(backend, contents.get(name)) for name in ("bos_token", "eos_token"))
    prefix, suffix = _affixes(backend)
    if file.name == "tokenizer.model":
        add_bos = config.get("add_bos_token")
        if add_bos is None:
            add_bos = class_name in _ADD_BOS
        prefix = (bos,) if add_bos and bos is not None else ()
        suffix = (eos,) if config.get("add_eos_token") and eos is not None else ()
    if bos is None and len(prefix) == 1:
        bos = prefix[0]
    template, with_tools = _chat_templates(directory, config)
    return Tokenizer(
        backend=backend,
        bos_id=bos,
        eos_ids=() if eos is None else (eos,),
        prefix_ids=prefix,
        suffix_ids=suffix,
        chat_template=template,
        tools_template=with_tools,
        special=contents,
        where=str(file),
        dummy_prefix=dummy_prefix,
    )


def _check_beside(backend: tokenizers.Tokenizer, file: Path, pieces: Mapping[int, str], other: Path) -> None:
    """Warns of a ``tokenizer.json``, which is read as in transformers, that was not made of the ``tokenizer.model``
    beside it: some pieces that were given other names leave most as they are, another model's vocabulary leaves few."""
    others = [(i, piece, found) for i, piece in pieces.items() if (found := backend.id_to_token(i)) != piece]
    if 2 * len(others) > len(pieces):
        token, piece, found = others[0]
        warnings.warn(
            f"{file}: has another vocabulary than {other.name} beside it, in {len(others)} of {len(pieces)} pieces "
            f"asked (the first, {token}: {found!r} here, {piece!r} there), and is the one that is read; one of them is "
            "another model's",
            stacklevel=3,
        )


def load_json(data: bytes, where: str) -> tokenizers.Tokenizer:
    """The backend of a ``tokenizer.json``.  What says two things, of which the library would take the last, another one
    at every start, or neither, is not left to it.

    Raises:
      TokenizerError: it is damaged, names a key twice, or gives two tokens one id.
    """
    text = _text(data, where)
    try:
        state = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{where}: not valid JSON: {error}") from None
    backend = load_backend(lambda: tokenizers.Tokenizer.from_str(text), where)
    vocab = state["model"]["vocab"]
    if isinstance(vocab, dict) and len(set(vocab.values())) < len(vocab):
        twice = collections.Counter(vocab.values()).most_common(1)[0][0]
        first, second = [shown(piece) for piece, number in vocab.items() if number == twice][:2]
        raise TokenizerError(f"{where}: model.vocab: {first} and {second} both have the id {twice}")
    ids = [(e["content"], e["id"], backend.token_to_id(e["content"])) for e in state.get("added_tokens") or []]
    if moved := [(shown(content), said, found) for content, said, found in ids if said != found]:
        content, said, found = moved[0]
        warnings.warn(
            f"{where}: added token {content} has the id {said} there and gets {found}, as in transformers, and so do "
            f"{len(moved) - 1} more: ids of added tokens follow the vocabulary's without a hole, each once",
            stacklevel=3,
        )
    return backend


def _text(data: bytes, where: Path | str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{where}: expected UTF-8 text, found byte {data[error.start]:#04x} at {error.start}"
        ) from None


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not os.path.lexists(path):
        return {}
    try:
        value = parse_json(_text(read_file(path), path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _token(value: Any, path: Path, thing: str) -> tokenizers.AddedToken:
    """A token as these files write it: a string, or an object with ``content`` and flags."""
    entry: Mapping[str, Any] = {"content": value} if isinstance(value, str) else value
    if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
        raise TokenizerError(
            f"{path}: {thing}: expected a token's string or an object with 'content', found {value!r:.80}"
        )
    flags = {n: bool(entry.get(n, False)) for n in ("single_word", "lstrip", "rstrip", "normalized")}
    return tokenizers.AddedToken(entry["content"], special=bool(entry.get("special")), **flags)


def _special_token(content: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(content, special=True, normalized=False)


def _special(directory: Path, config: Mapping[str, Any]) -> dict[str, tokenizers.AddedToken]:
    """Special tokens by name: transformers asks the older special_tokens_map.json first, and not where
    tokenizer_config.json lists the added tokens."""
    path = directory / "special_tokens_map.json"
    said, older = _names(config, directory / "tokenizer_config.json"), _names(_object(path), path)
    return said if "added_tokens_decoder" in config else said | older


def _names(source: Mapping[str, Any], path: Path) -> dict[str, tokenizers.AddedToken]:
    """The tokens that a file names: those of every model, and a model's own, whose names end alike or stand in
    an object."""
    found = {n: source[n] for n in _NAMED if source.get(n) is not None}
    own = {n: v for n, v in source.items() if n.endswith("_token") and n not in _NAMED}
    found |= {n: v for n, v in own.items() if isinstance(v, str) or (isinstance(v, Mapping) and "content" in v)}
    for name in _MORE:
        if isinstance(source.get(name), Mapping):
            found |= source[name]
    return {n: _token(v, path, n) for n, v in found.items()}


def _add_listed(backend: tokenizers.Tokenizer, directory: Path, config: Mapping[str, Any], config_file: Path) -> None:
    """Tokens of ``added_tokens_decoder``, which wins where the vocabulary has them otherwise; or those that the older
    added_tokens.json alone knows."""
    path, entries = config_file, config.get("added_tokens_decoder")
    older = entries is None
    if older:
        path = directory / "added_tokens.json"
        entries = {str(n): {"content": content, "normalized": True} for content, n in _object(path).items()}
    if not isinstance(entries, Mapping) or not all(str(key).isdecimal() for key in entries):
        raise TokenizerError(f"{path}: added_tokens_decoder: expected an object of ids to tokens")
    known = _added(backend)
    for key in sorted(entries, key=int):
        token = _token(entries[key], path, f"added token {key}")
        if token.content in known and (older or _flags(token) == _flags(known[token.content])):
            continue
        add_tokens(backend, [token], special=token.special)
        found = backend.token_to_id(token.content)
        if found != int(key):
            raise TokenizerError(
                f"{path}: added token {token.content!r}: expected id {key}, found {found} when added "
                "to the vocabulary; the file belongs to another tokenizer"
            )


def _added(backend: tokenizers.Tokenizer) -> dict[str, tokenizers.AddedToken]:
    return {token.content: token for token in backend.get_added_tokens_decoder().values()}


def _flags(token: tokenizers.AddedToken) -> tuple[bool, ...]:
    return token.special, token.normalized, token.lstrip, token.rstrip, token.single_word


def _add_named(
    backend: tokenizers.Tokenizer,
    special: Mapping[str, tokenizers.AddedToken],
    config: Mapping[str, Any],
    config_file: Path,
) -> None:
    """Marks named tokens as special ones, as transformers does, which takes what else it says of them from where they
    are listed; new ones get the next ids."""
    named = list(special.values())
    listed: list[tokenizers.AddedToken] = []
    for name in _MORE:
        value = config.get(name) or []
        if isinstance(value, Mapping):  # names, see ``_names``
            continue
        if not isinstance(value, list | tuple):
            raise TokenizerError(f"{config_file}: {name}: expected a list of tokens, found {value!r:.80}")
        listed += [_token(token, config_file, "special token") for token in value]
    known = _added(backend)
    new = [known.get(token.content, token) for token in named]
    new += [token for token in listed if token.content not in known]
    for token in new:
        token.special = True
    add_tokens(backend, new, special=True)


def _prefix_space(backend: tokenizers.Tokenizer, wanted: Any, class_name: str, config_file: Path) -> None:
    """``add_prefix_space`` beside a ``tokenizer.json``: some classes of transformers make a byte-level pre-tokenizer
    anew by it, the others leave the file's as it is."""
    if not isinstance(wanted, bool):
        return
    state, steps = _steps(backend.pre_tokenizer, "pretokenizers")
    found = next((step for step in steps if step["type"] == "ByteLevel"), None)
    if found is None:
        kinds = {step["type"]: step for step in [*steps, *_steps(backend.normalizer, "normalizers")[1]]}
        metaspace = kinds.get("Metaspace", {"prepend_scheme": "never"})
        same = wanted == ("Prepend" in kinds or metaspace["prepend_scheme"] != "never")
    else:
        same = wanted == found["add_prefix_space"]
    if same:
        return
    if found is None or class_name not in _PREFIX_SPACE:
        why = "" if found is None else f" and tokenizer_class is not one of {', '.join(_PREFIX_SPACE)}"
        warnings.warn(
            f"{config_file}: add_prefix_space {str(wanted).lower()}: not heeded, for tokenizer.json says "
            f"otherwise{why}",
            stacklevel=5,
        )
        return
    found["add_prefix_space"] = wanted
    whole = json.loads(backend.to_str())
    whole["pre_tokenizer"] = state
    backend.pre_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(whole)).pre_tokenizer


def _steps(part: Any, inside: str) -> tuple[Any, list[Any]]:
    """The state of a pre-tokenizer or normalizer, and of what it is made of."""
    state: Any = {"type": None} if part is None else json.loads(part.__getstate__())
    return state, state[inside] if state["type"] == "Sequence" else [state]


def _affixes(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the file's own post-processor puts before and behind a text."""
    if backend.post_processor is None:
        return (), ()
    encoding = backend.encode("a", add_special_tokens=True)
    inner = [i for i, s in enumerate(encoding.special_tokens_mask) if not s]
    if not inner:
        return tuple(encoding.ids), ()
    return tuple(encoding.ids[: inner[0]]), tuple(encoding.ids[inner[-1] + 1 :])


def _token_id(backend: tokenizers.Tokenizer, token: str | None) -> int | None:
    return None if token is None else backend.token_to_id(token)


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The template for conversations, and one of its own for those with tools, which goes by the name ``tool_use``."""
    path, more = directory / "chat_template.jinja", directory / "additional_chat_templates" / "tool_use.jinja"
    with_tools = _text(read_file(more), more) if os.path.lexists(more) else None
    if os.path.lexists(path):
        return _text(read_file(path), path), with_tools
    path = directory / "chat_template.json"
    found, other = _object(path).get("chat_template"), config.get("chat_template")
    if found is None:
        path, found = directory / "tokenizer_config.json", other
    elif other is not None and other != found:
        warnings.warn(
            f"{path}: has another chat template than tokenizer_config.json beside it, and is the one that is taken, as "
            "by transformers' processors; its tokenizers take the other",
            stacklevel=4,
        )
    named: Mapping[Any, Any] = found if isinstance(found, Mapping) else {"default": found}
    if isinstance(found, list):
        named = {e.get("name"): e.get("template") for e in found if isinstance(e, Mapping)}
    templates = named.get("default"), named.get("tool_use") if with_tools is None else with_tools
    for template in templates:
        if template is not None and not isinstance(template, str):
            raise TokenizerError(f"{path}: chat_template: expected a string, found {type(template).__name__}")
    return templates
