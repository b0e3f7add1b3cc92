"""Which tokens end a text, and what else a checkpoint says of generation: read here, whatever file says so."""

from collections.abc import Mapping
from typing import Any

from converters.readers.source import Source
from llmjax.checkpoint.plan import Override
from llmjax.errors import ConfigError, shown
from llmjax.outside.values import INT32, integer
from llmjax.text.tokenizer import Tokenizer

_KEY = "eos_token_id"
_ID = integer(-1, INT32)


def end_tokens(source: Source, tokenizer: Tokenizer | None, override: Override = None) -> tuple[int, ...]:
    """The tokenizer's end tokens, and those of the configuration.

    Args:
      source: the checkpoint.
      tokenizer: its tokenizer, whose files may be GGUF's metadata or a ``.bin``.
      override: keys that win over the source's own; without ``eos_token_id`` among them what ``generation`` gives
        counts.

    Returns:
      ids in ascending order; the model need not have all of them.

    Raises:
      ConfigError: a value is neither an id nor a list of them; -1 and null say that there is none.
    """
    found = _ids(override or {}, "config")
    if found is None:
        own, file = generation(source)
        found = _ids(own, str(source.directory / file)) or set()
    return tuple(sorted(found.union(tokenizer.eos_ids if tokenizer else ())))


def generation(source: Source) -> tuple[Mapping[str, Any], str]:
    """What a checkpoint says of generation, and the file that does: ``generation_config.json``; without one
    ``config.json``, which held the same keys once (as transformers does)."""
    own = source.generation_config
    return (source.config, "config.json") if own is None else (own, "generation_config.json")


def _ids(config: Mapping[str, Any], where: str) -> set[int] | None:
    """What a configuration says; None if nothing.  A multimodal model may leave it to its text model."""
    text = config.get("text_config")
    stating = next((c for c in (config, text) if isinstance(c, Mapping) and _KEY in c), None)
    if stating is None:
        return None
    value = stating[_KEY]
    ids = value if isinstance(value, list | tuple) else [-1 if value is None else value]
    for token in ids:
        if not _ID.holds(token):
            raise ConfigError(f"{where}: {_KEY}: expected a token id or a list of them, found {shown(value)}")
    return set(ids) - {-1}
