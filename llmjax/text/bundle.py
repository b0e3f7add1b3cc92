"""The tokenizer in a ``.task`` or ``.litertlm`` bundle, which LiteRT-LM runs.

The bundle names the tokens that start and stop a text.  The start token stands before every prompt, of whatever
template, and the vocabulary's own policy does not count.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence

from llmjax.errors import TokenizerError
from llmjax.text import mediapipe
from llmjax.text.huggingface import load_json
from llmjax.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
_ROLES = {"user": "user", "model": "assistant", "system": "system"}


@dataclasses.dataclass(frozen=True)
class Ends:
    """What a bundle says of texts.

    Attributes:
      start: token ids, or one token's text; nothing for none.
      stop: each token ids or a text.
      template: Jinja source, or None.
    """

    start: Sequence[int] | str = ()
    stop: Sequence[Sequence[int] | str] = ()
    template: str | None = None


def from_sentencepiece(model: bytes, where: str, ends: Ends, *, bytes_to_unicode: bool = False) -> Tokenizer:
    """A SentencePiece model's, which takes special tokens in a text as text.

    Raises:
      TokenizerError: the model is damaged, of a kind llmjax does not have, or lacks these tokens.
    """
    texts = [stop for stop in ends.stop if isinstance(stop, str)]
    found = mediapipe.read(model, where, start_id=None, stop=texts, bytes_to_unicode=bytes_to_unicode)
    return _with_ends(found, ends)


def from_huggingface(data: bytes, where: str, ends: Ends) -> Tokenizer:
    """A ``tokenizer.json``'s.

    Raises:
      TokenizerError: it is damaged.
    """
    backend = load_json(data, where)
    found = Tokenizer(
        backend=backend,
        bos_id=None,
        eos_ids=(),
        prefix_ids=(),
        suffix_ids=(),
        chat_template=None,
        special={},
        where=where,
    )
    return _with_ends(found, ends)


def _with_ends(tokenizer: Tokenizer, ends: Ends) -> Tokenizer:
    # Of several LiteRT-LM puts the first.
    start = [_start(tokenizer, ends.start)] if isinstance(ends.start, str) else list(ends.start[:1])
    if wrong := [i for i in start if not 0 <= i < tokenizer.vocab_size]:
        raise TokenizerError(f"{tokenizer.where}: the start token {wrong[0]} is not in this vocabulary")
    # One that is not in the vocabulary is never drawn, and ends nothing; but a negative one is no token.
    if wrong := [i for stop in ends.stop if not isinstance(stop, str) for i in stop if i < 0]:
        raise TokenizerError(f"{tokenizer.where}: the stop token {wrong[0]} is no token: expected ids from 0 on")
    ids, texts = set(tokenizer.eos_ids), list(tokenizer.stop)
    for stop in ends.stop:
        if not stop:
            _LOG.warning(f"{tokenizer.where}: a stop token is empty, and ends nothing")
        elif isinstance(stop, str):
            found = tokenizer.backend.token_to_id(stop)
            if found is None:
                texts.append(stop)
            else:
                ids.add(found)
        elif len(stop) == 1:
            ids.add(stop[0])
        elif wrong := [i for i in stop if i >= tokenizer.vocab_size]:  # several tokens end a text together
            _LOG.warning(
                f"{tokenizer.where}: the stop token {wrong[0]} is not in this vocabulary, so {stop} ends nothing"
            )
        else:
            texts.append(tokenizer.decode(list(stop), skip_special_tokens=False))
    if not ids and not texts:
        _LOG.warning(
            f"{tokenizer.where}: nothing in the file says which token ends a text: answers go on to max_tokens, and "
            "LiteRT-LM does not run it; --stop TEXT or --stop-token-ids ends them"
        )
    special = {**tokenizer.special, "bos_token": tokenizer.piece(start[0]) if start else ""}
    if ids:
        special = {"eos_token": tokenizer.piece(min(ids)), **special}
    return dataclasses.replace(
        tokenizer,
        bos_id=start[0] if start else None,
        prefix_ids=tuple(start),
        always_prefix=bool(start),
        eos_ids=tuple(sorted(ids)),
        stop=tuple(dict.fromkeys(text for text in texts if text)),
        chat_template=ends.template,
        special=special,
    ).told()


def _start(tokenizer: Tokenizer, text: str) -> int:
    """The id of the start token; LiteRT-LM takes the unknown token for one that the vocabulary lacks."""
    found = tokenizer.backend.token_to_id(text)
    if found is not None:
        return found
    unknown = getattr(tokenizer.backend.model, "unk_token", None)
    found = tokenizer.backend.token_to_id(unknown) if unknown else None
    if found is None:
        raise TokenizerError(f"{tokenizer.where}: the start token {text!r} is not in this vocabulary")
    _LOG.warning(f"{tokenizer.where}: the start token {text!r} is not in this vocabulary, so {unknown!r} stands for it")
    return found


def _literal(text: str) -> str:
    """A text in Jinja, which makes of a surrogate pair of escapes no one character."""
    return json.dumps(text, ensure_ascii=False)


def affixes_template(affixes: Mapping[str, tuple[str, str]], begin: str = "") -> str | None:
    """Jinja source of what stands around each role (``user``, ``model``, ``system``); None for nothing.

    Args:
      affixes: prefix and suffix by role.
      begin: text before all.
    """
    if not any(map(any, affixes.values())):
        return None
    turns = "".join(
        f"{{% {'el' if i else ''}if m['role'] == {_literal(_ROLES[role])} %}}"
        f"{{{{ {_literal(prefix)} + m['content'] + {_literal(suffix)} }}}}"
        for i, (role, (prefix, suffix)) in enumerate(affixes.items())
    )
    model = affixes.get("model", ("", ""))[0]
    return (
        f"{{{{ {_literal(begin)} }}}}{{% for m in messages %}}{turns}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {_literal(model)} }}}}{{% endif %}}"
    )


def spliced_template(affixes: Mapping[str, tuple[str, str]]) -> str | None:
    """Jinja source as LiteRT-LM makes it of ``affixes``, which become part of it: braces in them are Jinja's, and so is
    a newline that they begin with, which falls to the tag before it.  None for nothing.

    Args:
      affixes: prefix and suffix by role, see ``affixes_template``.
    """
    if not any(map(any, affixes.values())):
        return None

    def of_role(which: int) -> str:
        tests = (
            f"{{% {'el' if i else ''}if m.role == '{_ROLES[role]}' %}}{texts[which]}"
            for i, (role, texts) in enumerate(affixes.items())
        )
        return "".join(tests) + "{% endif -%}"

    parts = "([{'text': m.content}] if m.content is string else m.content)"
    return (
        f"{{% for m in messages -%}}{of_role(0)}{{%- for part in {parts} %}}{{{{ part.text }}}}{{%- endfor -%}}"
        f"{of_role(1)}{{%- endfor -%}}{{% if add_generation_prompt %}}{affixes['model'][0]}{{% endif -%}}"
    )
